"""What the modules of a model compute with, wherever they are: `Kernels` on the processor, others on a device."""

from typing import Protocol

import torch

from tiered.kernels.attention import AttentionCall
from tiered.kernels.recurrent import Recurrent
from tiered.quant import QuantizedWeight


class LayerKernels(Protocol):
    """Operations on tensors that are all in one place, where the results are too."""

    def linear(
        self, x: torch.Tensor, weight: torch.Tensor | QuantizedWeight, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As `Kernels.linear`."""

    def attention(self, call: AttentionCall) -> torch.Tensor:
        """As `Kernels.attention`. The call's tables, `first` and `count` are in the host's memory wherever the query
        and the pages are."""

    def dequantize(self, weight: QuantizedWeight, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        """As `Kernels.dequantize`."""

    def by_head(self, x: torch.Tensor, w: torch.Tensor, transposed: bool) -> torch.Tensor:
        """As `Kernels.by_head`."""

    @property
    def recurrent(self) -> Recurrent | None:
        """As `Kernels.recurrent`."""

    def serves_attention(self, query: torch.Tensor) -> bool:
        """As `Kernels.serves_attention`."""
