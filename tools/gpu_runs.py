"""The parts of tools/gpu-check that run `tiered` on the device: the tokens of the processor, near the bound."""

import bisect
import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from tiered.bench.stores import Synthetic
from tools.checks import Checks, say

SHAPE: Final = "opt-13b"
SMALL: Final = "opt-125m"
WAITING: Final = (3, 1000, 4)
"""Sequences, tokens of their prompts, tokens generated, of what waits."""
WAITING_ROWS: Final = 64


def tiers(folder: Path) -> int:
    """Greedy tokens over tiers and places of the KV cache."""
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
