"""A process that attends to buffers beside pages that must not be touched; dies of the first that is.

`main` is called by test_attention.py, in a process of its own. Every buffer ends where such a page begins, and in a
second round begins where one ends; of a block of codes, scales and zeros each lies there once. Results must be those
on ordinary memory.
"""

import ctypes
import itertools
from dataclasses import replace
from typing import Any

import torch

from tests.kernels.attention_cases import Shape, random_call
from tests.kernels.guard_pages import Guarded
from tiered.kernels import AttentionCall, BlockTable, CacheFormat, Kernels, Level, Pages, Plane
from tiered.kernels.attention import PAGE_TOKENS
from tiered.kernels.attention_native import NativeCall
from tiered.kernels.library import Status
from tiered.units import round_up

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

    def pages(self, pages: Pages, call: AttentionCall, outermost: int) -> Pages:
        """Every block in memory of its own, of which part number `outermost` is the last, or else the first: it ends
        with the last token in use."""
        planes = [plane for plane in (pages.codes, pages.scale, pages.zero) if plane is not None]
        outer = planes[outermost]
        others = [plane for plane in planes if plane is not outer]
        moved: dict[Plane, Plane] = {}
        position = 0
        for plane in (*others, outer) if self._at_end else (outer, *others):
            # Heads lie tokens apart, as in a cache that is just so long.
            moved[plane] = replace(plane, head_stride=PAGE_TOKENS * plane.width, start=position)
            position += round_up(call.kv_heads * PAGE_TOKENS * plane.width * plane.dtype.itemsize, 8)
        addresses = torch.zeros_like(pages.table.offsets)
        for s, j in itertools.product(range(addresses.shape[0]), range(addresses.shape[1])):
            tokens = min(PAGE_TOKENS, int(call.count[s]) - j * PAGE_TOKENS)
            counts = {plane: 1 if pages.format.per_channel and plane is not planes[0] else tokens for plane in planes}
            last = outer if self._at_end else others[-1] if others else outer
            used = ((call.kv_heads - 1) * PAGE_TOKENS + counts[last]) * last.width * last.dtype.itemsize
            block = torch.zeros(round_up(moved[last].start + used, 8), dtype=torch.uint8)
            for plane in planes:
                source = plane.of(pages.table.memory, int(pages.table.offsets[s, j]), call.kv_heads, counts[plane])
                moved[plane].of(block, 0, call.kv_heads, counts[plane]).copy_(source)
            addresses[s, j] = self.place(block[: moved[last].start + used]).data_ptr()
        # Offsets from the lowest of them: they must not be negative.
        base = int(addresses.min())
        memory = torch.frombuffer((ctypes.c_char * 8).from_address(base), dtype=torch.uint8)
        return Pages(pages.format, BlockTable(memory, addresses - base), *(moved[plane] for plane in planes))


def parts_of(pages: Pages) -> int:
    return 1 if pages.format is CacheFormat.BF16 else 3


def check(kernels: Kernels, call: AttentionCall, at_end: bool, outermost: int) -> None:
    expected = kernels.attention(call)
    placed = Round(at_end)
    guarded = replace(
        call,
        query=placed.place(call.query),
        keys=placed.pages(call.keys, call, outermost % parts_of(call.keys)),
        values=placed.pages(call.values, call, outermost % parts_of(call.values)),
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
                for at_end, outermost in itertools.product((True, False), range(parts_of(call.keys))):
                    check(kernels, call, at_end, outermost)
                    calls += 1
    print(f"{level.name}: {calls} calls")
    return 0
