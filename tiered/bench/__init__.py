"""Measurements of a machine: the raw disk, by code of its own, the rates of disk and kernels that plans ask for, and a
profile of all of it."""

from tiered.bench.raw import RawBandwidth, measure_random, measure_raw

__all__ = ["RawBandwidth", "measure_random", "measure_raw"]
