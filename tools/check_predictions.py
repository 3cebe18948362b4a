"""Holds predictions against runs: seconds per pass and of prefills, over shapes, budgets and batch sizes.

    python tools/check_predictions.py --dir DIR > table.md

Each setting is one `tiered generate` on a synthetic store, made in DIR where it is not there yet. The prediction is the
run's own, printed in its report before anything was measured of it, from a profile of this machine; the profile is made
once, by `tiered profile`, and its disk is measured anew just before each run, because disks drift. Nothing is fitted.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from tiered.bench.facts import machine_name
from tiered.bench.rates import measure_disk
from tiered.bench.stores import Synthetic
from tiered.plan.machines import find_profile, profile_path, save_hardware
from tiered.store import Store

PROMPT_TOKENS, NEW_TOKENS = 8, 6
WITHIN: Final = 0.15


@dataclass(frozen=True)
class Setting:
    """One run."""

    shape: str
    ram: str
    batch: int


SETTINGS: Final = [
    *(Setting("opt-6.7b", ram, batch) for ram in ("1500MiB", "2500MiB", "3500MiB") for batch in (1, 32)),
    *(Setting("opt-13b", ram, batch) for ram in ("2GiB", "4GiB", "6GiB") for batch in (1, 32)),
    # Routers of random weights choose the same experts for nearly every token, so a mixture is taken where its layers
    # are read whole.
    Setting("qwen3-30b-a3b", "4GiB", 32),
]


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()), help="where stores go")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache  # a profile of somebody's stays as it is
        stores = {
            setting.shape: Synthetic(setting.shape, "int4", 4, arguments.dir).make("none") for setting in SETTINGS
        }
        tiered("profile", str(stores["opt-13b"]))
        print(f"{machine_name()}; prompts of {PROMPT_TOKENS} tokens, {NEW_TOKENS} new ones\n")
        print("| shape | --ram | batch | disk GB/s | s/pass predicted | measured | ratio | bound by | prefill ratio |")
        print("|" + "---|" * 9)
        ratios = [check(stores[setting.shape], setting) for setting in SETTINGS]
    close = sum(abs(ratio - 1) <= WITHIN for ratio in ratios)
    print(f"\n{close} of {len(ratios)} within {WITHIN:.0%}; median ratio {statistics.median(ratios):.2f}")
    return 0


def check(store: Path, setting: Setting) -> float:
    """Run `setting`, print its row, and return predicted over measured seconds per pass."""
    profile = find_profile(store)
    assert profile is not None
    rate = measure_disk(Store.open(store))
    save_hardware(replace(profile, disk=replace(profile.disk, read=rate)), profile_path(store))
    tokens = ["--prompt-tokens", str(PROMPT_TOKENS), "-n", str(NEW_TOKENS), "--sequences", str(setting.batch)]
    words = ["generate", str(store), "--json", "--ignore-eos", "--no-measure", "--ram", setting.ram, *tokens]
    report: dict[str, Any] = json.loads(tiered(*words))["report"]
    predicted, measured = report["predicted_seconds_per_pass"], report["seconds_per_pass"]
    ratio: float = predicted / measured
    prefill = report["predicted_prefill_seconds"] / report["prefill_seconds"]
    kind = "disk" if report["compute_seconds_per_pass"] < 0.95 * measured else "compute"
    cells = [setting.shape, setting.ram, str(setting.batch), f"{rate / 1e9:.2f}", f"{predicted:.3f}", f"{measured:.3f}"]
    print("| " + " | ".join([*cells, f"{ratio:.2f}", kind, f"{prefill:.2f}"]) + " |", flush=True)
    return ratio


def tiered(*words: str) -> str:
    """What the command prints on standard output."""
    done = subprocess.run([sys.executable, "-m", "tiered", *words], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"check_predictions: tiered {' '.join(words)}: exit status {done.returncode}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
