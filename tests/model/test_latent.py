"""Latent attention gives what expanding every latent gives, in whatever parts the projection's weight is stored."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from tiered.kernels import Kernels
from tiered.model.latent import Latents
from tiered.quant import GroupScheme, QuantizedWeight, quantize
from tiered.stream import AnyWeight

HEADS, KEY, ROPE, VALUE, RANK, TOKENS, CONTEXT = 20, 16, 8, 24, 64, 3, 11


class Projection:
    """Lends these parts of a weight."""

    in_features = RANK

    def __init__(self, parts: Sequence[AnyWeight]) -> None:
        self._parts = parts

    @contextmanager
    def borrowing(self) -> Iterator[Sequence[AnyWeight]]:
        yield self._parts


def expanded(query: torch.Tensor, latents: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Attention over all keys and values, as families have it, in float64: [1, tokens, heads, value channels]."""
    both = (latents[..., :RANK] @ weight.double().T).unflatten(-1, (HEADS, KEY + VALUE)).transpose(0, 1)
    shared = latents[:, RANK:].expand(HEADS, -1, -1)
    scores = query[0].double() @ torch.cat([both[..., :KEY], shared], dim=-1).mT
    result: torch.Tensor = scores.softmax(-1) @ both[..., KEY:]
    return result.transpose(0, 1)[None]


@pytest.mark.parametrize("quantized", [False, True])
def test_queries_of_latents_give_what_expanded_latents_give(quantized: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(HEADS * (KEY + VALUE), RANK, generator=generator) / 8
    query = torch.randn(1, HEADS, TOKENS, KEY + ROPE, generator=generator)
    latents = torch.randn(CONTEXT, RANK + ROPE, generator=generator, dtype=torch.float64)
    # The second part begins within a head.
    parts: list[AnyWeight] = [weight[:333], weight[333:]]
    if quantized:
        scheme = GroupScheme(8)
        parts = [QuantizedWeight(quantize(part, scheme), scheme) for part in (weight[:333], weight[333:])]
        weight = torch.cat([part.rows(0, len(part.codes.q), torch.float32) for part in parts])  # type: ignore[union-attr]

    def attend(absorbed: torch.Tensor) -> torch.Tensor:
        weights = (absorbed.double() @ latents.T).softmax(-1)
        return (weights @ latents).float().transpose(1, 2)

    module: Any = nn.Module()
    module.qk_nope_head_dim, module.v_head_dim = KEY, VALUE
    with Kernels(1) as kernels:
        found = Latents(module, Projection(parts), None).attend(query, kernels, attend)  # type: ignore[arg-type]
    torch.testing.assert_close(found.double(), expanded(query, latents, weight), rtol=1e-4, atol=1e-5)
