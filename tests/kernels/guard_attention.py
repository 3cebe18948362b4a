"""A process that attends to buffers beside pages that must not be touched; dies of the first that is.

`main` is called by test_attention.py, in a process of its own. Every buffer ends where such a page begins, and
in a second round begins where one ends. Results must be those on ordinary memory.
"""

import ctypes
import itertools
import math
from dataclasses import replace
from typing import Any

import torch

from tests.kernels.attention_cases import Shape, random_call
from tests.kernels.guard_pages import Guarded
from tiered.kernels import AttentionCall, CacheFormat, Kernels, Level, Pages, Plane
from tiered.kernels.attention import PAGE_TOKENS
from tiered.kernels.attention_native import NativeCall
from tiered.kernels.library import Status

SHAPES = (Shape(1, 1, 2, 2, 70, 72), Shape(2, 3, 4, 2, 129, 80), Shape(1, 9, 8, 1, 100, 64), Shape(1, 17, 2, 2, 33, 8))


class Round:
    """Copies of tensors, each in guarded memory of its own."""

    def __init__(self, at_end: bool) -> None:
        self._at_end = at_end
        self._kept: list[Guarded] = []

    def place(self, value: torch.Tensor) -> torch.Tensor:
        self._kept.append(Guarded(value.numel() * value.element_size()))
        tensor = self._kept[-1].tensor(tuple(value.shape), value.dtype, self._at_end)
        return tensor.copy_(value)

    def plane(self, plane: Plane | None, call: AttentionCall, width: int, per_page: bool = False) -> Plane | None:
        """Every page in memory of its own, which ends with the last token in use."""
        if plane is None:
            return None
        addresses = torch.zeros_like(plane.offsets)
        for s, j in itertools.product(range(plane.offsets.shape[0]), range(plane.offsets.shape[1])):
            tokens = 1 if per_page else min(PAGE_TOKENS, int(call.count[s]) - j * PAGE_TOKENS)
            page = plane.page(s, j, (call.kv_heads, tokens, width))
            assert page is not None
            # Heads lie tokens apart, as in a cache that is just so long.
            spread = torch.zeros((call.kv_heads - 1) * PAGE_TOKENS * width + tokens * width, dtype=page.dtype)
            spread.as_strided(page.shape, (PAGE_TOKENS * width, width, 1)).copy_(page)
            addresses[s, j] = self.place(spread).data_ptr()
        # Offsets from a memory at address 0.
        memory = torch.frombuffer(
            (ctypes.c_char * 8).from_address(self.place(torch.zeros(8)).data_ptr()), dtype=torch.uint8
        )
        offsets = (addresses - memory.data_ptr()) // plane.memory.element_size()
        assert torch.equal(offsets * plane.memory.element_size() + memory.data_ptr(), addresses)
        return Plane(memory.view(plane.memory.dtype), offsets, PAGE_TOKENS * width, width)

    def pages(self, pages: Pages, call: AttentionCall) -> Pages:
        head_dim = call.query.shape[-1]
        packed = pages.format is not CacheFormat.BF16
        groups = head_dim if pages.format.per_channel else head_dim // math.gcd(head_dim, PAGE_TOKENS)
        codes = self.plane(pages.codes, call, head_dim * pages.format.bits // 8 if packed else head_dim)
        assert codes is not None
        sides = [self.plane(plane, call, groups, pages.format.per_channel) for plane in (pages.scale, pages.zero)]
        return Pages(pages.format, codes, *sides)


def check(kernels: Kernels, call: AttentionCall, at_end: bool) -> None:
    expected = kernels.attention(call)
    placed = Round(at_end)
    guarded = replace(
        call,
        query=placed.place(call.query),
        keys=placed.pages(call.keys, call),
        values=placed.pages(call.values, call),
        first=placed.place(call.first),
        count=placed.place(call.count),
        mask=None if call.mask is None else placed.place(call.mask),
        bias=None if call.bias is None else placed.place(call.bias),
        sinks=None if call.sinks is None else placed.place(call.sinks),
    )
    out = placed.place(torch.zeros_like(expected))
    native = NativeCall(guarded, out)
    assert kernels._library is not None
    status = kernels._library.tk_attention(kernels._context, ctypes.byref(native.arguments), None)
    assert status == Status.OK
    assert torch.equal(out, expected), (call.keys.format, call.query.shape)


def main(level: Level) -> int:
    calls = 0
    with Kernels(2, name=level.name.lower()) as kernels:
        for kind, shape in itertools.product(CacheFormat, SHAPES):
            values = CacheFormat(kind - 2) if kind.per_channel else kind
            for masked in (False, True):
                more: dict[str, Any] = (
                    {"mask": torch.rand(shape.sequences, shape.q_len, shape.slots) < 0.7} if masked else {}
                )
                more |= (
                    {"bias": torch.randn(1, 1, 1, shape.slots), "sinks": torch.randn(shape.q_heads)} if masked else {}
                )
                call = random_call(shape, kind, values, causal=not masked, **more)
                for at_end in (True, False):
                    check(kernels, call, at_end)
                    calls += 1
    print(f"{level.name}: {calls} calls")
    return 0
