"""Holds predictions against runs: seconds per pass and of prefills, over shapes, budgets and batch sizes.

    python tools/check_predictions.py --dir DIR > table.md

Each setting is one `tiered generate` on a synthetic store, made in DIR where it is not there yet. The prediction is the
run's own, printed in its report before anything was measured of it, from a profile of this machine; the profile is made
once, by `tiered profile` (or is the one of --profile). The disk, the speed of linear layers and of touching memory are
measured anew just before each run, because a shared machine drifts, and the first two once more after it: a run during
which one of them changed by more than a tenth is repeated, whatever it took, and marked where it changed each time.
Nothing is fitted. The last column is of the first pass: predicted over measured seconds.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch

from tiered.bench.facts import machine_name
from tiered.bench.memory import measure_touch
from tiered.bench.rates import NBYTES, measure_compute, measure_disk
from tiered.bench.stores import Synthetic
from tiered.kernels import Kernels
from tiered.plan.hardware import Hardware, LinearRate
from tiered.plan.machines import find_profile, load_hardware, profile_path, save_hardware
from tiered.quant import GroupScheme
from tiered.store import Store
from tiered.units import MIB

PROMPT_TOKENS, NEW_TOKENS = 8, 6
WITHIN: Final = 0.15
LOOKS: Final = 3
STEADY: Final = 0.1
TRIES: Final = 4
SCHEME: Final = "int4-g64"
FEATURES: Final = 8192
LARGE_NBYTES: Final = 128 * MIB
"""As `bench/profile.py` has them, for few rows."""


@dataclass(frozen=True)
class Setting:
    """One run."""

    shape: str
    ram: str
    batch: int


SETTINGS: Final = [
    # Their first passes are short, and mostly what it takes to touch memory.
    *(Setting(shape, ram, 1) for shape, ram in (("opt-125m", "1GiB"), ("opt-1.3b", "2GiB"), ("opt-1.3b", "900MiB"))),
    *(Setting("opt-6.7b", ram, batch) for ram in ("1500MiB", "2500MiB", "3500MiB") for batch in (1, 32)),
    *(Setting("opt-13b", ram, batch) for ram in ("2GiB", "4GiB", "6GiB") for batch in (1, 32)),
    # Routers of random weights choose the same experts for nearly every token, so a mixture is taken where its layers
    # are read whole.
    Setting("qwen3-30b-a3b", "4GiB", 32),
]


def main(words: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()), help="where stores go")
    parser.add_argument("--profile", type=Path, help="of this machine and that disk; without, one is measured")
    shapes = list(dict.fromkeys(setting.shape for setting in SETTINGS))
    parser.add_argument("--shape", action="append", choices=shapes, help="only settings of this shape; may be repeated")
    arguments = parser.parse_args(words)
    settings = [each for each in SETTINGS if arguments.shape is None or each.shape in arguments.shape]
    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache  # a profile of somebody's stays as it is
        stores = {
            setting.shape: Synthetic(setting.shape, "int4", 4, arguments.dir).make("none") for setting in settings
        }
        if arguments.profile is None:
            tiered("profile", str(stores[settings[0].shape]))
        else:
            save_hardware(load_hardware(str(arguments.profile)), profile_path(arguments.dir))
        profile = find_profile(arguments.dir)
        assert profile is not None
        print(f"{machine_name()}; prompts of {PROMPT_TOKENS} tokens, {NEW_TOKENS} new ones\n")
        print("| shape | --ram | batch | disk GB/s | kernels | s/pass predicted | measured | ratio | bound | prefill |")
        print("|" + "---|" * 10)
        ratios = [check(stores[setting.shape], setting, profile) for setting in settings]
    close = sum(abs(ratio - 1) <= WITHIN for ratio in ratios)
    print(f"\n{close} of {len(ratios)} within {WITHIN:.0%}; median ratio {statistics.median(ratios):.2f}")
    return 0


def check(store: Path, setting: Setting, profile: Hardware) -> float:
    """Run `setting`, print its row, and return predicted over measured seconds per pass."""
    for _ in range(TRIES):
        before = now(store, setting, profile)
        save_hardware(as_now(profile, setting, *before), profile_path(store))
        report = run(store, setting)
        after = now(store, setting, profile)
        is_steady = all(abs(a / b - 1) <= STEADY for a, b in zip(after, before, strict=True))
        if is_steady:
            break
    predicted, measured = report["predicted_seconds_per_pass"], report["seconds_per_pass"]
    ratio: float = predicted / measured
    prefill = report["predicted_prefill_seconds"] / report["prefill_seconds"]
    kind = "disk" if report["compute_seconds_per_pass"] < 0.95 * measured else "compute"
    disk, kernels = before
    cells = [setting.shape, setting.ram, str(setting.batch), f"{disk / 1e9:.2f}", f"{kernels:.2f}"]
    cells += [f"{predicted:.3f}", f"{measured:.3f}", f"{ratio:.2f}", kind, f"{prefill:.2f}"]
    print("| " + " | ".join(cells) + " |" + ("" if is_steady else " unsteady"), flush=True)
    return ratio


def now(store: Path, setting: Setting, profile: Hardware) -> tuple[float, float]:
    """The disk's rate, and the speed of linear layers, as a share of the profile's."""
    nbytes = LARGE_NBYTES if setting.batch <= 16 else NBYTES
    disk, scheme, rows = measure_disk(Store.open(store)), GroupScheme.parse(SCHEME), (setting.batch,)
    with Kernels(profile.cpu.cores) as kernels:
        rates = [measure_compute(kernels, scheme, FEATURES, torch.bfloat16, rows, nbytes) for _ in range(LOOKS)]
    expected = profile.cpu.linear_rate(SCHEME, "invariant").seconds(setting.batch, 1)
    return disk, expected / min(rate.seconds(setting.batch, 1) for rate in rates)


def as_now(profile: Hardware, setting: Setting, disk: float, kernels: float) -> Hardware:
    """`profile` with the disk's rate, and linear layers so many times as fast with as many rows as decode."""

    def at_rows(one: LinearRate) -> LinearRate:
        pairs = zip(one.rate.rows, one.rate.seconds_per_weight, strict=True)
        seconds = tuple(each / kernels if rows == setting.batch else each for rows, each in pairs)
        return replace(one, rate=replace(one.rate, seconds_per_weight=seconds))

    linear = tuple(map(at_rows, profile.cpu.linear))
    touch = min(measure_touch() for _ in range(LOOKS))  # as `bench/profile.py` has it
    cpu = replace(profile.cpu, linear=linear, touch=touch)
    return replace(profile, disk=replace(profile.disk, read=disk), cpu=cpu)


def run(store: Path, setting: Setting) -> dict[str, Any]:
    """The report of a run of `setting`."""
    tokens = ["--prompt-tokens", str(PROMPT_TOKENS), "-n", str(NEW_TOKENS), "--sequences", str(setting.batch)]
    words = ["generate", str(store), "--json", "--ignore-eos", "--no-measure", "--ram", setting.ram, *tokens]
    report: dict[str, Any] = json.loads(tiered(*words))["report"]
    return report


def tiered(*words: str) -> str:
    """What the command prints on standard output."""
    done = subprocess.run([sys.executable, "-m", "tiered", *words], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"check_predictions: tiered {' '.join(words)}: exit status {done.returncode}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
