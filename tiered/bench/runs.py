"""Runs of `tiered generate`, each a process of its own, inside a limit where one is asked for; settings take turns.

In: stores, and settings of `workload.py`. Out: a `Run` for each: its own report, and what the kernel says of the
process. Called by `tiered bench` and tools/bench_workload.py. Imports no torch: the peak that the kernel counts for a
child includes what its parent had when it was started.
"""

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from tiered.bench import limit
from tiered.bench.cgroup import throttled
from tiered.bench.workload import Setting
from tiered.errors import TieredError
from tiered.units import format_size

TIERED: Final = (sys.executable, "-m", "tiered")
_KILLED: Final = 137
_NO_BUDGET: Final = 3


class StoppedError(TieredError):
    """A run was interrupted: no other follows."""

    exit_code = 130


@dataclass(frozen=True)
class Run:
    """One run: what was asked for, and what came of it."""

    setting: Setting
    seed: int
    """Of its prompts; runs of a setting differ in it."""
    command: str
    """As a person would type it."""
    report: Mapping[str, Any] | None
    """What `tiered generate --json` says; None where it failed."""
    usage: limit.Report

    @property
    def peak_bytes(self) -> int:
        """The most memory that the process held, by the kernel's count."""
        return max(self.usage.max_rss_bytes, self.usage.vm_hwm_bytes)

    @property
    def failure(self) -> str | None:
        """Why there is no report."""
        if self.report is not None:
            return None
        code, nbytes = self.usage.exit_code, self.usage.limit_bytes
        if self.usage.oom_kills or (code == _KILLED and nbytes is not None):
            return f"killed by the kernel for more than {format_size(nbytes or 0)}"
        return "does not fit the budget" if code == _NO_BUDGET else f"exit status {code}"

    def to_json(self, machine: str) -> dict[str, Any]:
        """A line of results; tools/bench_workload.py reads them again."""
        setting = self.setting
        return {
            **{"part": setting.part, "memory": setting.memory, "batch": setting.batch, "machine": machine},
            **{"command": self.command, "seed": self.seed, "setting": setting.values},
            **{"report": self.report, "usage": asdict(self.usage), "failure": self.failure},
        }


@dataclass(frozen=True)
class Way:
    """How runs are made, whatever their setting."""

    cold: bool = True
    """Whether the store's pages are dropped from the page cache first."""
    or_unlimited: bool = False
    read_rate: str | None = None
    say: Callable[[str], None] = lambda text: None


def alternate(settings: Sequence[Setting], repeat: int, run: Callable[[Setting, int], Run]) -> Iterator[Run]:
    """`repeat` runs of each of `settings`, which take turns, so that what drifts hits all of them alike.

    A run's number is the seed of its prompts. A setting that has failed is not tried again.
    """
    failed: set[Setting] = set()
    for number in range(1, repeat + 1):
        for setting in settings:
            if setting not in failed:
                done = run(setting, number)
                if done.report is None:
                    failed.add(setting)
                yield done


def run_once(store: Path, setting: Setting, seed: int, way: Way, trace: Path | None = None) -> Run:
    """One run on `store`; with `trace` it writes its spans there. Raises CannotLimitError where `setting` has a limit
    that cannot be enforced here, and StoppedError if it was interrupted."""
    words = generate_words(setting, seed)
    shown = " ".join(["tiered", "generate", store.name, *words])
    traced = [] if trace is None else ["--trace", str(trace)]
    if way.cold:
        drop_pages(store)
    with tempfile.TemporaryDirectory(prefix="tiered-bench-") as folder, limit.held_signals():
        out = Path(folder) / "out"
        with throttled(way.read_rate, store) as prefix:
            command = [*prefix, *TIERED, "generate", str(store), *words, *traced, "--json"]
            usage = limit.run(command, setting.limit_bytes, or_unlimited=way.or_unlimited, say=way.say, stdout=out)
        if usage.interrupted:
            raise StoppedError("interrupted")
        report = None if usage.exit_code else json.loads(out.read_text(encoding="utf-8"))["report"]
    return Run(setting, seed, shown, report, usage)


def generate_words(setting: Setting, seed: int) -> list[str]:
    """The options of `tiered generate` for a run; those that have their defaults are left out."""
    words = ["--prompt-tokens", str(setting.prompt_tokens), "-n", str(setting.new_tokens)]
    words += ["--sequences", str(setting.batch), "--ignore-eos", "--seed", str(seed)]
    usual = Setting()
    for axis in ("kernels", "kernel_mode", "kv", "kv_bits", "threads"):
        if getattr(setting, axis) != getattr(usual, axis):
            words += [f"--{axis.replace('_', '-')}", str(getattr(setting, axis))]
    return words if setting.budget is None else [*words, "--ram", setting.budget]


def drop_pages(store: Path) -> None:
    """Let the kernel forget what it holds of the store's files, as far as it does: pages in use stay."""
    for path in store.rglob("*"):
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(file)


def with_batch(store: Path, setting: Setting) -> Setting:
    """`setting` with a number in place of "disk-bound", which a process of its own finds out."""
    if not isinstance(setting.batch, str):
        return setting
    asked = json.dumps({axis: value for axis, value in setting.values.items() if value is not None})
    with tempfile.TemporaryDirectory(prefix="tiered-bench-") as folder, limit.held_signals():
        out = Path(folder) / "out"
        usage = limit.run([sys.executable, "-m", "tiered.bench.disk_bound", str(store), asked], None, stdout=out)
        if usage.interrupted:
            raise StoppedError("interrupted")
        if usage.exit_code:
            raise TieredError(f"{store}: no batch size for {setting.budget or 'this machine'}; see above, or --batch N")
        return replace(setting, batch=int(out.read_text(encoding="utf-8")))
