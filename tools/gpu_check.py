"""What can only be checked on a real device, in less than ten minutes, without a network: tools/gpu-check.

    tools/gpu-check                     all parts
    tools/gpu-check --parts bus,tiers   some of them

It needs torch with CUDA, triton and the packages of pyproject.toml; what is missing is named first. Each part is a
process of its own, prints as it goes, and is ended where it takes too long; one that fails hides none of the others.
At the end a table says what passed, in Markdown, for docs/benchmarks/gpu.md.

    facts    the device, driver, versions
    kernels  int4 and int8 against float64, few rows and many, the same bits alone and in a batch; GB/s; prompts'
             attention by fused kernels and by our own
    bus      copies from registered memory beside copies from memory that torch has pinned, in both directions
    tests    the tests that run on an emulated device elsewhere, here on this one: pytest -m gpu
    tiers    greedy tokens of a small model over tiers and places of the KV cache, beside those of the processor; with
             hidden states that wait in memory, and memory that goes back while the processor decodes
    streams  a model larger than the device's budget: seconds per pass beside bytes over the measured bandwidth of the
             bus, and of the disk where the host's memory is short, too
"""

import argparse
import bisect
import dataclasses
import functools
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from tiered.kernels import DeviceKernels

NEEDED: Final = (
    *("torch", "triton", "transformers", "safetensors", "tokenizers", "huggingface_hub", "accelerate", "click"),
    *("numpy", "psutil", "sentencepiece", "tomli_w", "xxhash", "zstandard", "pytest"),
)
SECONDS: Final = {"facts": 30, "kernels": 110, "bus": 40, "tests": 140, "tiers": 100, "streams": 150}
"""How long each part may take: all together less than ten minutes, whatever hangs."""
SHAPE: Final = "opt-13b"
SMALL: Final = "opt-125m"
WAITING: Final = (3, 1000, 4)
"""Sequences, tokens of their prompts, tokens generated, of what waits."""
WAITING_ROWS: Final = 64


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(SECONDS), help="comma-separated (default: all)")
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()), help="where stores go")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run is not None:
        return PARTS[arguments.run](arguments.dir)
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        say(f"not installed: {', '.join(missing)}; parts that need them will fail")
    wanted = arguments.parts.split(",")
    if unknown := set(wanted) - set(SECONDS):
        parser.error(f"unknown parts {', '.join(sorted(unknown))}; known: {', '.join(SECONDS)}")
    results = [run_part(name, arguments.dir) for name in wanted]
    print("\n| part | result | seconds |\n|---|---|---|")
    for result in results:
        print(f"| {result.name} | {result.verdict} | {result.seconds:.0f} |")
    return 0 if all(result.verdict == "passed" for result in results) else 1


@dataclass(frozen=True)
class Result:
    """How a part ended."""

    name: str
    verdict: str
    seconds: float


def run_part(name: str, folder: Path) -> Result:
    """Run a part as a process of its own."""
    print(f"\n## {name}\n", flush=True)
    start = time.monotonic()
    command = [sys.executable, "-u", "-m", "tools.gpu_check", "--run", name, "--dir", str(folder)]
    try:
        code = subprocess.run(command, timeout=SECONDS[name], check=False).returncode
        verdict = "passed" if code == 0 else f"failed ({code})"
    except subprocess.TimeoutExpired:
        verdict = f"ended after {SECONDS[name]} s"
    return Result(name, verdict, time.monotonic() - start)


def say(text: str) -> None:
    print(text, flush=True)


class Checks:
    """Lines of what holds and what does not."""

    def __init__(self) -> None:
        self.failures = 0

    def check(self, holds: bool, what: str) -> None:
        self.failures += not holds
        say(f"{'PASS' if holds else 'FAIL'}  {what}")


# ---- parts


def facts(folder: Path) -> int:
    """What there is."""
    import torch

    say(f"torch {torch.__version__}, CUDA {torch.version.cuda}")
    from tiered.device import open_device

    device = open_device("cuda", None)
    say(f"{device.name}: {device.description}; {device.context_nbytes / 2**20:.0f} MiB of context")
    device.close()
    return subprocess.run([sys.executable, "-m", "tiered", "doctor"], check=False).returncode


def kernels(folder: Path) -> int:
    """Results beside float64, and speed."""
    import torch

    from tiered.kernels import DeviceKernels, Mode
    from tiered.quant import GroupScheme, QuantizedTensor, QuantizedWeight, quantize

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


def attention(checks: Checks, ours: "DeviceKernels", queries: int, slots: int) -> None:
    """The last `queries` queries of a prompt of `slots` tokens, beside float64."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    from tiered.kernels import AttentionCall, contiguous_pages

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
    import torch

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
    import torch

    from tiered.device import open_device
    from tiered.io import Arena
    from tiered.units import GIB, MIB

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


def tests(folder: Path) -> int:
    """The suite's own tests of devices, on this one."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "gpu",
        "-q",
        "-p",
        "no:cacheprovider",
        "--basetemp",
        str(folder / "t"),
    ]
    return subprocess.run(command, check=False).returncode


def tiers(folder: Path) -> int:
    """Greedy tokens over tiers and places of the KV cache."""
    from tiered.bench.stores import Synthetic

    checks = Checks()
    store = Synthetic(SMALL, "int8", None, folder).make("none")
    common = ("--prompt-tokens", "70", "-n", "12", "--sequences", "3", "--ignore-eos", "--dtype", "float32")
    expected = generate(store, *common, "--no-measure")["completions"]
    for words in (
        ("--tiers", "gpu"),
        ("--tiers", "cpu,gpu", "--resident-gpu", "20MiB"),
        ("--tiers", "disk,cpu,gpu", "--resident-gpu", "0", "--resident-cpu", "0"),
        ("--tiers", "disk,cpu,gpu", "--kv", "cpu", "--kv-bits", "8"),
        ("--tiers", "disk,cpu,gpu", "--kv", "disk"),
        ("--tiers", "disk,cpu,gpu", "--prefill-device", "gpu", "--decode-device", "cpu"),
    ):
        with failing(checks, " ".join(words)):
            found = generate(store, *common, "--no-measure", "--device", "cuda", "--vram", "4GiB", *words)
            device = found["report"]["device"]
            same = [c["token_ids"] for c in found["completions"]] == [c["token_ids"] for c in expected]
            within = device["vram_peak_bytes"] <= device["vram_budget_bytes"]
            peak = f"peak {device['vram_peak_bytes'] / 2**20:.0f} MiB"
            if "--decode-device" in words:
                kept = device["vram_decode_bytes"]
                within = within and kept is not None and kept < device["vram_peak_bytes"]
                peak += f", {(kept or 0) / 2**20:.0f} MiB while the processor decodes"
            checks.check(same and within, f"{' '.join(words)}: {'equal' if same else 'OTHER'} tokens, {peak}")
    return checks.failures + waiting(store)


def waiting(store: Path) -> int:
    """Greedy tokens of prompts whose hidden states wait in memory, as the device's is short."""
    checks, vram = Checks(), short_vram(store, "cuda")
    checks.check(vram is not None, f"hidden states of a pass wait in memory with {vram} bytes of the device's")
    if vram is None:
        return checks.failures
    sequences, prompt, tokens = WAITING
    asked = ("--prompt-tokens", str(prompt), "-n", str(tokens), "--sequences", str(sequences), "--ignore-eos")
    common = (*asked, "--dtype", "float32", "--no-measure", "--micro-batch", str(WAITING_ROWS), "--kv", "cpu")
    with failing(checks, f"waiting, {vram} bytes"):
        expected = generate(store, *common)["completions"]
        found = generate(store, *common, "--device", "cuda", "--tiers", "disk,cpu,gpu", "--vram", str(vram))
        device = found["report"]["device"]
        same = [c["token_ids"] for c in found["completions"]] == [c["token_ids"] for c in expected]
        within = device["vram_peak_bytes"] <= device["vram_budget_bytes"]
        told = f"{device['waiting_tokens']} tokens may wait, peak {device['vram_peak_bytes'] / 2**20:.0f} MiB"
        checks.check(same and within and device["waiting_tokens"] > 0, f"{'equal' if same else 'OTHER'} tokens, {told}")
    return checks.failures


def short_vram(store: Path, device: str) -> int | None:
    """Bytes of the device's memory with which hidden states of `WAITING` wait in the host's: what is missing for all of
    them is half of what they take. None: they never wait."""
    from tiered.errors import BudgetError
    from tiered.options import Options
    from tiered.plan import Tier, Workload, make_plan
    from tiered.prepare import measure_inputs
    from tiered.store import Store
    from tiered.units import GIB, MIB

    sequences, prompt, tokens = WAITING
    work = Workload(sequences, prompt + tokens, prompt, max_batched_tokens=4096)
    asked = Options(
        tiers=(Tier.DISK, Tier.CPU, Tier.GPU),
        device=device,
        vram=2 * GIB,
        ram=4 * GIB,
        dtype="float32",
        kv="cpu",
        micro_batch_rows=WAITING_ROWS,
    )
    model, machine, budgets = measure_inputs(Store.open(store), asked)

    def waits(vram: int) -> bool | None:
        try:
            plan = make_plan(model, machine, work, dataclasses.replace(budgets, vram=vram))
        except BudgetError:
            return None
        assert plan.device is not None
        is_cut = plan.max_batched_tokens <= WAITING_ROWS
        return None if is_cut else plan.device.waiting is not None

    sizes = range(budgets.vram // MIB)
    enough = bisect.bisect_left(sizes, True, key=lambda count: waits(count * MIB) is False) * MIB
    short = enough - work.tokens_in_flight(sequences, work.max_context) * model.hidden * model.itemsize
    return short if waits(short) else None


def streams(folder: Path) -> int:
    """Seconds per pass where the bus is the bound, and where the disk is."""
    from tiered.bench.stores import Synthetic

    checks = Checks()
    store = Synthetic(SHAPE, "int4", 8, folder).make("none")
    common = ("--prompt-tokens", "32", "-n", "8", "--ignore-eos", "--device", "cuda", "--vram", "4GiB")
    for name, words in (
        ("bus", ("--tiers", "cpu,gpu")),
        ("bus", ("--tiers", "cpu,gpu", "--sequences", "16", "--kernel-mode", "fast")),
        ("disk", ("--tiers", "disk,cpu,gpu", "--resident-gpu", "0", "--resident-cpu", "0")),
        ("disk", ("--tiers", "disk,cpu,gpu", "--prefill-device", "gpu", "--decode-device", "cpu", "--ram", "6GiB")),
    ):
        with failing(checks, " ".join(words)):
            report = generate(store, *common, *words)["report"]
            device, share = report["device"], report["bound_share"] or 0.0
            told = f"{report['seconds_per_pass']:.3f} s per pass, {share:.0%} of the bound ({report['bottleneck']}), "
            told += f"bus {(device['bus_bandwidth'] or 0) / 1e9:.1f} of {(device['raw_bus_bandwidth'] or 0) / 1e9:.1f} "
            told += f"GB/s, disk {(report['disk_bandwidth'] or 0) / 1e9:.2f} of "
            told += f"{(report['raw_disk_bandwidth'] or 0) / 1e9:.2f} GB/s"
            checks.check(is_bound(name, report), f"{' '.join(words)}: {told}; expected {name}")
    return checks.failures


def is_bound(name: str, report: dict[str, Any]) -> bool:
    """Whether a run came near the bound that its plan names, that is the one called `name`, within its budget."""
    device = report["device"]
    within = device["vram_peak_bytes"] <= device["vram_budget_bytes"]
    return bool(within and report["bottleneck"] == name and (report["bound_share"] or 0.0) >= 0.9)


PARTS: Final[dict[str, Callable[[Path], int]]] = {
    part.__name__: part for part in (facts, kernels, bus, tests, tiers, streams)
}


@contextmanager
def failing(checks: Checks, what: str) -> Iterator[None]:
    """A command that fails is a failure of one line, and no end of the part."""
    try:
        yield
    except subprocess.CalledProcessError as error:
        checks.check(False, f"{what}: {(error.stderr or '').strip().splitlines()[-1:]}")


def generate(store: Path, *words: str) -> dict[str, Any]:
    """What `tiered generate --json` prints."""
    found: dict[str, Any] = json.loads(run_tiered("generate", str(store), *words, "--json"))
    return found


def run_tiered(*words: Sequence[str] | str) -> str:
    """Standard output of a command; its errors are shown as they come."""
    done = subprocess.run(
        [sys.executable, "-m", "tiered", *map(str, words)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        say(done.stderr)
    done.check_returncode()
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
