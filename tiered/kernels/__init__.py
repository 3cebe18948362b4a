"""Linear layers straight from stored weights."""

from tiered.kernels.cancel import CancelFlag
from tiered.kernels.linear import linear, scratch_nbytes

__all__ = ["CancelFlag", "linear", "scratch_nbytes"]
