"""How fast this machine is: its disk, and its kernels timed on weights and keys of the model's kind, in a second or so.

In: an open store's files, the kernels, and what the model's linear layers and its attention look like. Out: rates, one
by one, from which `quick.py` and `profile.py` make a machine. What is read is larger than the processor's own caches,
as a model's layers are.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import torch

from tiered.bench.raw import SECONDS_EACH, huge_pages, measure_raw
from tiered.cache.layout import PageLayout
from tiered.io import ReadMode, probe_mode
from tiered.kernels import AttentionCall, BlockTable, Kernels, Pages, contiguous_pages
from tiered.plan import ComputeRate, KVShape
from tiered.quant import QuantizedTensor, QuantizedWeight, Scheme
from tiered.store import Store
from tiered.units import MIB, PAGE_TOKENS

_ROWS: Final = (1, 4, 16, 64, 256)
NBYTES: Final = 16 << 20
_SECONDS: Final = 0.2
"""Least time that one measurement takes, after one run that does not count."""
_LOOKS: Final = 4
_PAGES_BYTE: Final = 0x11
"""Of pages of the KV cache: small numbers, whatever they are read as."""
_DISK_MEMORY_NBYTES: Final = 32 * MIB


def measure_disk(store: Store, seconds: float = SECONDS_EACH) -> float:
    """Raw bandwidth of reading the tape's files, in bytes per second, `seconds` per look."""
    files = [store.file_path(block) for block in store.tape]
    with huge_pages(_DISK_MEMORY_NBYTES) as memory:
        view = memoryview(memory)
        try:
            return measure_raw(files, view, probe_mode(files[0]).mode is ReadMode.DIRECT, seconds).bytes_per_second
        finally:
            view.release()


def measure_compute(
    kernels: Kernels,
    scheme: Scheme | None,
    in_features: int,
    dtype: torch.dtype,
    counts: Sequence[int] = _ROWS,
    nbytes: int = NBYTES,
) -> ComputeRate:
    """Time `kernels.linear` for each number of rows in `counts`, with a weight whose codes take `nbytes`."""
    bits = dtype.itemsize * 8 if scheme is None else scheme.bits
    out = max(64, nbytes * 8 // bits // in_features)
    weight = _random_weight(scheme, out, in_features, dtype)
    seconds = []
    for rows in counts:
        x = torch.ones(rows, in_features, dtype=dtype)
        seconds.append(_time(lambda: kernels.linear(x, weight, None)) / (out * in_features))  # noqa: B023
    return ComputeRate(tuple(counts), tuple(seconds))


def measure_attention(
    kernels: Kernels, heads: int, shape: KVShape, bits: int = 16, sequences: int = 1, nbytes: int = NBYTES
) -> float:
    """Seconds per token of context that one query of one sequence takes in one layer, over a KV cache of `bits` bits in
    which `sequences` sequences have equally many pages, of about `nbytes` bytes in all."""
    layout = PageLayout(shape, bits)
    pages = max(1, nbytes // layout.block_nbytes // sequences)
    memory = _filled((sequences * pages * layout.block_nbytes,), torch.uint8, _PAGES_BYTE)
    offsets = torch.arange(sequences * pages).view(sequences, pages) * layout.block_nbytes
    tokens = pages * PAGE_TOKENS
    query = torch.ones(sequences, 1, heads, shape.head_dim, dtype=layout.dtype)
    call = _attention_call(query, shape.heads, layout.pages(BlockTable(memory, offsets)), tokens)
    return _time(lambda: kernels.attention(call)) / (sequences * tokens)


def measure_quantizing(shape: KVShape) -> float:
    """Seconds of quantizing a page in one layer, for each of its tokens: in 4 bits, which take some more than 8.
    Several at once, as a prompt fills them, take less each where a page has few heads."""
    layout = PageLayout(shape, 4)
    memory, offsets = torch.zeros(layout.block_nbytes, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)
    widths = shape.head_dim, shape.value_dim
    keys, values = (torch.rand(1, shape.heads, PAGE_TOKENS, width).to(layout.dtype) for width in widths)
    return _time(lambda: layout.store(memory, offsets, keys, values)) / PAGE_TOKENS


def measure_prefill_attention(
    kernels: Kernels, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, tokens: int = 512
) -> float:
    """Floating-point operations per second (a multiply-add counts as two) of a prompt of `tokens` tokens, each of which
    sees itself and what comes before it."""
    states = torch.ones(1, kv_heads, tokens, head_dim, dtype=dtype)
    query, pages = torch.ones(1, tokens, heads, head_dim, dtype=dtype), map(contiguous_pages, (states, states.clone()))
    call = _attention_call(query, kv_heads, pages, tokens)
    pairs = tokens * (tokens + 1) // 2
    return 4 * heads * head_dim * pairs / _time(lambda: kernels.attention(call))


def _attention_call(query: torch.Tensor, kv_heads: int, pages: Iterable[Pages], tokens: int) -> AttentionCall:
    """Queries at the end of sequences of `tokens` tokens, and the pages of all their keys and values."""
    keys, values = pages
    first, count = (torch.full(query.shape[:1], position) for position in (0, tokens))
    return AttentionCall(query, kv_heads, keys, values, first, count, scaling=query.shape[-1] ** -0.5)


def _time(work: Callable[[], object]) -> float:
    """Seconds per call of `work`, after one that does not count: of `_LOOKS` looks, each as many calls as its share of
    `_SECONDS` allows, the quickest, because other programs, and threads that wait on each other's processor until they
    are moved, only make them slower."""
    work()
    return min(_look(work) for _ in range(_LOOKS))


def _look(work: Callable[[], object]) -> float:
    runs, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < _SECONDS / _LOOKS or not runs:
        work()
        runs += 1
    return elapsed / runs


def _random_weight(
    scheme: Scheme | None, out: int, in_features: int, dtype: torch.dtype
) -> torch.Tensor | QuantizedWeight:
    """A constant weight [out, in_features]; kernels take as long for it as for any other."""
    if scheme is None:
        return _filled((out, in_features), dtype, 0.01)
    shape = out, in_features
    scale = 0.01 if scheme.scale_dtype.is_floating_point else 120  # an exponent
    codes = QuantizedTensor(
        _filled(scheme.q_shape(*shape), torch.uint8, 0x77),
        _filled(scheme.scale_shape(*shape), scheme.scale_dtype, scale),
        _filled(scheme.zero_shape(*shape), torch.uint8, 7),
    )
    return QuantizedWeight(codes, scheme)


def _filled(shape: tuple[int, ...], dtype: torch.dtype, value: float) -> torch.Tensor:
    """A tensor in huge pages, as what a run computes with is, if the kernel has them. Every element is written, because
    memory that never was is one page for the kernel, in the processor's caches."""
    nbytes = math.prod(shape) * dtype.itemsize
    if not nbytes:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(huge_pages(nbytes), dtype=dtype).view(shape).fill_(value)
