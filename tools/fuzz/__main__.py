"""Gives `tiered` damaged stores, checkpoints, requests and arguments, and reports what ends in a wrong way.

    python -m tools.fuzz [--cases 1000] [--seed 0] [--kinds manifest,requests,...] [--jobs 2] [--keep FOLDER]
    python -m tools.fuzz --case SEED [--keep FOLDER]

Whatever a case is given, it must end within its limits of time and memory, with an exit code of the table, without a
traceback, and with one line that names what was wrong. Each case is a function of its seed and of the kinds that were
asked for; the line of a finding repeats both. Exit code 0: no findings; 1: some.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

# As `tiered.cli.main` sets them, before what reads them is imported; and no case may wait for a network.
os.environ.update(TOKENIZERS_PARALLELISM="false", TRANSFORMERS_VERBOSITY="error", HF_HUB_OFFLINE="1")

from tools.fuzz import originals
from tools.fuzz.cases import KINDS, Case, make_case
from tools.fuzz.child import Child, Ended, Limits, faults, start
from tools.fuzz.originals import Originals

_POLL_SECONDS = 0.005
_SHOWN_LINES = 30


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    kinds = tuple(KINDS) if options.kinds is None else tuple(options.kinds.split(","))
    if unknown := set(kinds) - set(KINDS):
        _parser().error(f"--kinds: unknown {', '.join(sorted(unknown))}; known are {', '.join(KINDS)}")
    seeds = range(options.seed, options.seed + options.cases) if options.case is None else [options.case]
    limits = Limits(options.seconds)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="tiered-fuzz-") as name:
        fuzz = Fuzz(Path(name), kinds, limits, options.keep, loud=options.case is not None)
        fuzz.run(seeds, options.jobs)
    print(f"{len(seeds)} cases from seed {seeds[0]}, {fuzz.found} findings, {time.monotonic() - began:.0f} s")
    print("by kind and exit code: " + ", ".join(f"{k} {c}: {n}" for (k, c), n in sorted(fuzz.codes.items())))
    return 1 if fuzz.found else 0


class Fuzz:
    """Runs cases, several at a time, and counts what they find."""

    def __init__(self, folder: Path, kinds: tuple[str, ...], limits: Limits, keep: Path | None, loud: bool) -> None:
        self._folder, self._kinds, self._limits, self._keep, self._loud = folder, kinds, limits, keep, loud
        self._originals = make_originals(folder / "originals")
        self._running: list[tuple[Case, Child]] = []
        self.found = 0
        self.codes: Counter[tuple[str, int]] = Counter()

    def run(self, seeds: Sequence[int], jobs: int) -> None:
        for seed in seeds:
            self._begin(seed)
            while len(self._running) >= jobs:
                self._collect()
        while self._running:
            self._collect()

    def _begin(self, seed: int) -> None:
        folder = self._folder / str(seed)
        folder.mkdir()
        case = make_case(seed, folder, self._originals, self._kinds)
        self._running.append((case, start(lambda: run_tiered(case.words), folder, case.stdin, case.signals)))

    def _collect(self) -> None:
        time.sleep(_POLL_SECONDS)
        for case, child in list(self._running):
            ended = child.poll(self._limits)
            if ended is not None:
                self._running.remove((case, child))
                self._judge(case, child.folder, ended)
                shutil.rmtree(child.folder)

    def _judge(self, case: Case, folder: Path, ended: Ended) -> None:
        self.codes[case.kind, ended.code] += 1
        wrong = list(faults(ended, self._limits, case.names))
        if wrong:
            self.found += 1
            print(f"FOUND {case.kind} {case.damaged}: {'; '.join(wrong)}")
            print(f"  again: python -m tools.fuzz --case {case.seed} --kinds {','.join(self._kinds)}")
        if wrong or self._loud:
            print(f"  tiered {' '.join(map(repr, case.words))}\n  exit code {ended.code}, {ended.seconds:.1f} s")
            print(f"  peak {ended.rss_nbytes >> 20} MiB")
            lines = ended.err.splitlines()
            shown = lines if self._loud else lines[-_SHOWN_LINES:]
            print("".join(f"  | {line[:400]}\n" for line in shown), flush=True)
            if self._keep is not None:
                shutil.copytree(folder, self._keep / str(case.seed), symlinks=True, ignore=_no_special)


def make_originals(folder: Path) -> Originals:
    """The whole stores and checkpoints, made by a child of their own."""
    folder.mkdir()
    child = start(lambda: originals.make(folder), folder, b"")
    while (ended := child.poll(Limits(600))) is None:
        time.sleep(_POLL_SECONDS)
    if ended.code:
        raise RuntimeError(f"the originals could not be made: exit code {ended.code}: {ended.err}")
    originals.prepare()
    return originals.find(folder)


def run_tiered(words: Sequence[str]) -> None:
    """What the console script does."""
    from tiered.__main__ import run

    sys.argv = ["tiered", *words]
    run()


def _no_special(folder: str, names: list[str]) -> list[str]:
    """Of `names`, what cannot be copied."""
    paths = [(Path(folder) / name, name) for name in names]
    return [name for path, name in paths if not (path.is_symlink() or path.is_dir() or path.is_file())]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.fuzz", description="Damaged input for every command.")
    parser.add_argument("--cases", type=int, default=1000, help="how many, one for each seed")
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    parser.add_argument("--case", type=int, help="the one case of this seed, with all that it wrote")
    parser.add_argument("--kinds", help=f"only some of {','.join(KINDS)}")
    parser.add_argument("--jobs", type=int, default=2, help="cases at a time")
    parser.add_argument("--seconds", type=float, default=Limits.seconds, help="that a case may take")
    parser.add_argument("--keep", type=Path, help="folder that findings are copied into")
    return parser


if __name__ == "__main__":
    sys.exit(main())
