"""Which kernels compute on this machine, why no better ones do, and how fast they are just now."""

import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Final

import torch
from torch.nn import functional

from tiered.cli.doctor_findings import Examination, Fact, plain_fact
from tiered.kernels import Kernels, Level, Library, load_library
from tiered.kernels.library import LIBRARY_PATH
from tiered.plan import system as machine
from tiered.quant import GroupScheme, QuantizedTensor, QuantizedWeight

_ROWS: Final = 16
_SIZE: Final = 2048
_REPEATS: Final = 15
_DTYPES: Final = (torch.float32, torch.bfloat16)
_INT4_SHAPE: Final = (2048, 4096)
_INT4_ROWS: Final = (1, 64)
_INT4_SECONDS: Final = 0.06
"""How long each linear is timed; a slow one is still called twice."""


def kernel_facts(found: Examination) -> Iterable[Fact]:
    """The level in use, every level's refusal, and measured speeds."""
    library = load_library()
    threads = machine.cpu().allowed
    with Kernels(threads) as kernels:
        if isinstance(library, str):
            yield from _missing(found, library)
        else:
            assert kernels.level is not None
            yield from level_facts(found, library, kernels.level)
        for rows, (speed, plain) in _int4_speeds(kernels).items():
            text = f"{speed / 1e9:.2f} GB/s of packed weights"
            if not isinstance(library, str):
                text += f", {speed / plain:,.1f} times the torch reference"
            text += f" ({threads} threads, measured now)"
            yield Fact(
                f"int4 {rows} row{'s' if rows > 1 else ''}",
                text,
                {"bytes_per_second": speed, "torch_bytes_per_second": plain},
            )
    yield from _torch_speeds(found)


def level_facts(found: Examination, library: Library, used: Level) -> Iterable[Fact]:
    """What is known of each level; those above the one in use count as switched off."""
    yield Fact("linear", f"native, {level_name(used)}: the best that runs here", level_name(used))
    yield plain_fact("library", str(LIBRARY_PATH))
    for level in reversed(Level):
        refusal = library.refusal(level)
        text = f"no: {refusal}" if refusal is not None else "in use" if level is used else "can run"
        yield Fact(level_name(level), text, refusal is None)
        # Where the processor has AMX and the kernel refuses it, the section on the processor has already said so.
        if refusal is not None and level > used and all(off.feature != level_name(level) for off in found.off):
            found.switch_off(f"{level_name(level)} kernels", refusal, _remedy(refusal))


def level_name(level: Level) -> str:
    """As processors' manuals spell it."""
    return {Level.SCALAR: "portable", Level.AVX512: "AVX-512"}.get(level, level.name)


def _missing(found: Examination, why: str) -> Iterable[Fact]:
    yield Fact("linear", f"torch reference; {why}", "torch reference")
    found.switch_off(
        "native kernels",
        why,
        "install g++ or clang++ (or set CXX), then install tiered again; pip's -v shows the build",
    )


def _remedy(refusal: str) -> str:
    if "the kernel refuses" in refusal:
        return "run on Linux 5.16 or later, outside sandboxes that filter arch_prctl"
    if "the operating system" in refusal:
        return "an operating system or hypervisor that enables these registers"
    return "a processor (or a virtual machine's processor type) that has it"


def _torch_speeds(found: Examination) -> Iterable[Fact]:
    speeds = _linear_speeds()
    for name, speed in speeds.items():
        yield Fact(f"{name} gflops", f"{speed / 1e9:,.0f} (16 rows, torch, measured now)", speed / 1e9)
    fast = speeds["bfloat16"] >= speeds["float32"]
    yield Fact("bfloat16 is fast", "yes" if fast else "no: slower than float32", fast)
    if not fast:
        found.switch_off(
            "fast bfloat16",
            f"torch multiplied bfloat16 slower than float32 just now{_why_slow()}",
            "--dtype float32 (twice the memory for activations and KV cache), or a newer processor",
        )


def _why_slow() -> str:
    able = [name for name in ("avx512_bf16", "amx_bf16", "bf16") if name in machine.cpu().features]
    if able:
        return f", although the processor has {' and '.join(able)}: another process may have been using it"
    return "; the processor has no instructions for it"


def _linear_speeds() -> dict[str, float]:
    """Floating-point operations per second of `linear` [16, 2048] x [2048, 2048], by dtype.

    The best of many: other work on the machine only ever makes one slower.
    """
    return {str(dtype).removeprefix("torch."): _speed(dtype) for dtype in _DTYPES}


def _int4_speeds(kernels: Kernels) -> dict[int, tuple[float, float]]:
    """Packed bytes per second of a linear layer in int4, by rows: with `kernels`, and with the torch reference."""
    out, in_ = _INT4_SHAPE
    scheme = GroupScheme(4)
    codes = QuantizedTensor(
        torch.randint(0, 256, (out, in_ // 2), dtype=torch.uint8),
        torch.full((out, in_ // scheme.group_size), 0.01, dtype=torch.float16),
        torch.full((out, in_ // scheme.group_size), 8, dtype=torch.uint8),
    )
    weight, nbytes = QuantizedWeight(codes, scheme), sum(codes_.nbytes for codes_ in codes)
    found = {}
    with Kernels(kernels.threads, name="torch") as reference:
        for rows in _INT4_ROWS:
            x = torch.randn(rows, in_).to(torch.bfloat16)
            seconds = [_best(partial(which.linear, x, weight)) for which in (kernels, reference)]
            found[rows] = (nbytes / seconds[0], nbytes / seconds[1])
    return found


def _best(call: Callable[[], object]) -> float:
    """Seconds of the fastest call."""
    seconds: list[float] = []
    while len(seconds) < 2 or sum(seconds) < _INT4_SECONDS:
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def _speed(dtype: torch.dtype) -> float:
    x, weight = torch.ones(_ROWS, _SIZE, dtype=dtype), torch.ones(_SIZE, _SIZE, dtype=dtype)
    functional.linear(x, weight)  # the first call prepares threads and code
    seconds = []
    for _ in range(_REPEATS):
        began = time.perf_counter()
        functional.linear(x, weight)
        seconds.append(time.perf_counter() - began)
    return 2 * _ROWS * _SIZE * _SIZE / min(seconds)
