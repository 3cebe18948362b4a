"""Measurements of a machine: the raw disk, by code of its own, and the rates of disk and kernels that plans ask for."""

from tiered.bench.raw import RawBandwidth, measure_raw

__all__ = ["RawBandwidth", "measure_raw"]
