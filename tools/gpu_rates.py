"""The parts of tools/gpu-check that use the device directly: kernels beside float64, copies, and how fast they are."""

import functools
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention

from tiered.device import open_device
from tiered.io import Arena
from tiered.kernels import AttentionCall, DeviceKernels, Mode, contiguous_pages
from tiered.quant import GroupScheme, QuantizedTensor, QuantizedWeight, quantize
from tiered.units import GIB, MIB
from tools.checks import Checks, say


def kernels(folder: Path) -> int:
    """Results beside float64, and speed."""
    checks, where, side = Checks(), torch.device("cuda", 0), 8192
    for bits in (4, 8):
        scheme = GroupScheme(bits)
        codes = quantize(torch.randn(side, side), scheme)
        weight = QuantizedWeight(QuantizedTensor(*(part.to(where) for part in codes)), scheme)
        exact = weight.rows(0, side, torch.float32).double()
        nbytes = sum(part.nbytes for part in codes)
        for mode in Mode:
            with DeviceKernels(where, mode) as ours:
                say(f"int{bits}: {ours.description}" + (f" ({ours.refusal})" if ours.refusal else ""))
                for rows in (1, 4, 16, 64, 512):
                    x = torch.randn(rows, side, device=where, dtype=torch.bfloat16)
                    y, expected = ours.linear(x, weight), x.double() @ exact.T
                    error = float((y.double() - expected).norm() / expected.norm())
                    seconds = timed(functools.partial(ours.linear, x, weight))
                    rate = (
                        f"{nbytes / seconds / 1e9:.0f} GB/s packed, {2 * rows * side**2 / seconds / 1e12:.1f} TFLOP/s"
                    )
                    most = 2e-2 if mode is Mode.FAST and bits == 8 else 5e-3
                    checks.check(error < most, f"{rows} rows: error {error:.1e}, {seconds * 1e6:.0f} us, {rate}")
                if mode is Mode.INVARIANT:
                    x = torch.randn(70, side, device=where, dtype=torch.bfloat16)
                    alone = torch.cat([ours.linear(row[None], weight) for row in x])
                    checks.check(torch.equal(alone, ours.linear(x, weight)), "a row's bits are the same in a batch")
    for mode in Mode:
        with DeviceKernels(where, mode) as ours:
            attention(checks, ours, 2048, 2048)
            attention(checks, ours, 512, 4096)
    return checks.failures


def attention(checks: Checks, ours: DeviceKernels, queries: int, slots: int) -> None:
    """The last `queries` queries of a prompt of `slots` tokens, beside float64."""
    import torch

    heads, group, width = 8, 4, 128
    query = torch.randn(1, queries, heads * group, width, device=ours.where, dtype=torch.bfloat16)
    keys, values = (torch.randn(1, heads, slots, width, device=ours.where).bfloat16() for _ in range(2))
    call = AttentionCall(
        query=query,
        kv_heads=heads,
        keys=contiguous_pages(keys),
        values=contiguous_pages(values),
        first=torch.zeros(1, dtype=torch.int64),
        count=torch.tensor([slots]),
        scaling=width**-0.5,
    )
    seen = torch.ones(queries, slots, dtype=torch.bool, device=ours.where).tril(slots - queries)
    k, v = (states.double().repeat_interleave(group, 1) for states in (keys, values))
    expected = scaled_dot_product_attention(query.double().transpose(1, 2), k, v, attn_mask=seen).transpose(1, 2)
    error = float((ours.attention(call).double() - expected).norm() / expected.norm())
    seconds = timed(functools.partial(ours.attention, call), runs=5)
    rate = f"{4 * int(seen.sum()) * heads * group * width / seconds / 1e12:.1f} TFLOP/s"
    what = f"attention, {ours.mode.value}, {queries} queries of {slots}"
    checks.check(error < 1e-2, f"{what}: error {error:.1e}, {seconds * 1e6:.0f} us, {rate}")


def timed(work: Callable[[], object], runs: int = 20) -> float:
    """Seconds per call."""
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(runs):
        work()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / runs


def bus(folder: Path) -> int:
    """The bandwidth of copies, from an arena that is registered and from memory that torch has pinned."""
    checks, device, nbytes, piece = Checks(), open_device("cuda", None), GIB, 64 * MIB
    with Arena(nbytes) as arena:
        slab = arena.borrow(nbytes, "test")
        slab.populate(0, nbytes)
        start = time.perf_counter()
        refusal = device.register(slab.address, nbytes)
        checks.check(refusal is None, f"1 GiB registered in {time.perf_counter() - start:.2f} s ({refusal})")
        host, there = slab.tensor(), device.borrow(nbytes, "test")
        pinned = torch.empty(nbytes, dtype=torch.uint8).pin_memory()
        rates: dict[str, float] = {}
        for name, source in (("registered", host), ("pinned by torch", pinned), ("registered again", host)):
            for way, copy in (("in", device.copy_in), ("out", device.copy_out)):
                for _ in range(2):
                    start = time.perf_counter()
                    for at in range(0, nbytes, piece):
                        pair = source[at : at + piece], there[at : at + piece]
                        last = copy(*(pair if way == "in" else pair[::-1]))
                    last.wait()
                    rates[f"{name}, {way}"] = nbytes / (time.perf_counter() - start)
                say(f"{name}, {way}: {rates[f'{name}, {way}'] / 1e9:.1f} GB/s")
        for way in ("in", "out"):
            share = rates[f"registered again, {way}"] / rates[f"pinned by torch, {way}"]
            checks.check(share > 0.9, f"registered memory is copied {way} at {share:.0%} of what torch's pinned is")
        if refusal is None:
            device.unregister(slab.address)
        device.close()
    return checks.failures
