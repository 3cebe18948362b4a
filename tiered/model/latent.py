"""Latent attention over pages of latents: the projection that expands them goes into queries and results instead.

In: queries, and the projection, of which a family's code has asked for the latents' keys and values. Out: the result of
attention as if all latents of the context had been expanded. With U and V the rows of the projection that make a head's
keys and values:

    q . (U c) = (U^T q) . c        sum of weight * (V c) = V (sum of weight * c)

so a query becomes one of latents and attends to what the cache holds. That costs a token as much as expanding itself
would, and its context nothing. Heads are taken a few at a time, whose rows are widened once for both products. Called
by `attention.py`.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from tiered.cache import PagedKeys
from tiered.kernels import LayerKernels
from tiered.model.bind import OffloadedLinear
from tiered.plan.workspace import LATENT_HEADS, LATENT_WEIGHTS
from tiered.quant import QuantizedWeight
from tiered.stream import AnyWeight

Attend = Callable[[torch.Tensor], torch.Tensor]
"""Makes of queries [1, heads, tokens, width], as wide as what the cache keeps, results [1, tokens, heads, width]."""


class Latents:
    """Latents of the cache that attention is to come with: those that the attention `module` has asked to expand."""

    def __init__(self, module: nn.Module, projection: OffloadedLinear, keys: PagedKeys) -> None:
        self.keys, self._projection = keys, projection
        self._key_rows, self._value_rows = int(module.qk_nope_head_dim), int(module.v_head_dim)  # type: ignore[arg-type]

    @classmethod
    def taken(cls, module: nn.Module) -> "Latents | None":
        """What `module` has asked for since it was last taken; None: it does not attend to latents in pages."""
        projection = getattr(module, "kv_b_proj", None)
        if not isinstance(projection, OffloadedLinear) or projection.latents is None:
            return None
        keys, projection.latents = projection.latents, None
        return cls(module, projection, keys)

    def attend(self, query: torch.Tensor, kernels: LayerKernels, attend: Attend) -> torch.Tensor:
        """query [1, heads, tokens, channels] attends to them by `attend`; returns [1, tokens, heads, channels]."""
        rank, heads, head_rows = self._projection.in_features, query.shape[1], self._key_rows + self._value_rows
        step = max(1, min(LATENT_HEADS, LATENT_WEIGHTS // (head_rows * rank)))
        outputs = []
        with self._projection.borrowing() as parts:
            for first in range(0, heads, step):
                some = query[0, first : first + step].transpose(0, 1)  # [tokens, heads, channels]
                rows = range(first * head_rows, (first + some.shape[1]) * head_rows)
                w = _widened(parts, rows, query.dtype, kernels).view(-1, head_rows, rank)
                latent = kernels.by_head(some[..., : self._key_rows], w[:, : self._key_rows], transposed=True)
                absorbed = torch.cat([latent, some[..., self._key_rows :]], dim=-1)
                found = attend(absorbed.transpose(0, 1)[None])[0, ..., :rank]
                outputs.append(kernels.by_head(found, w[:, self._key_rows :], transposed=False))
        return torch.cat(outputs, dim=1)[None] if len(outputs) > 1 else outputs[0][None]


def _widened(parts: Sequence[AnyWeight], rows: range, dtype: torch.dtype, kernels: LayerKernels) -> torch.Tensor:
    """`rows` of the weight whose rows are those of `parts`: in float32, or in `dtype` if that is wider."""
    dtype, found, begin = torch.promote_types(dtype, torch.float32), [], 0
    for part in parts:
        start, stop = max(rows.start - begin, 0), min(rows.stop - begin, part.shape[0])
        begin += part.shape[0]
        if start >= stop:
            continue
        if isinstance(part, QuantizedWeight):
            found.append(kernels.dequantize(part, start, stop, dtype))
        else:
            found.append(part[start:stop].to(dtype))
    return torch.cat(found) if len(found) > 1 else found[0]
