"""Measurements that share no code with what they measure."""

from tiered.bench.raw import RawBandwidth, measure_raw

__all__ = ["RawBandwidth", "measure_raw"]
