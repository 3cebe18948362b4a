"""How long a decoding sequence waits while another's prompt enters: the seconds of its passes, and how many there are.

    python tools/bench_latency.py                                     opt-1.3b in int4, in 1280 MiB, 2,000 tokens enter
    python tools/bench_latency.py --shape opt-6.7b --ram 2GiB --enter 2000 --decode 8

Makes a synthetic store (kept for the next time), lets one sequence decode, adds a prompt, and goes on until its first
token; once for each objective, in alternation. Prints one row per run as Markdown: the median pass before, the median
and the longest pass while the prompt enters, and how long the newcomer waits for its first token, the first pass with
prompt tokens included.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from tiered.generate import Sampler, SamplingParams, Scheduler, Sequence
from tiered.plan import MAX_BATCHED_TOKENS, Workload
from tiered.plan.inputs import Objective
from tiered.runtime import Options, Runtime
from tiered.store import Store
from tiered.units import parse_size

_DECODED = 112
"""Tokens that each decoding sequence may generate."""


class Silent:
    """A tokenizer without text."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool = False) -> str:
        return ""


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="opt-1.3b", help="a name in configs/models (default: %(default)s)")
    parser.add_argument("--quant", default="int4", choices=["none", "int8", "int4"])
    parser.add_argument("--ram", default="1280MiB", help="budget (default: %(default)s)")
    parser.add_argument("--enter", type=int, default=2000, help="prompt tokens that enter (default: %(default)s)")
    parser.add_argument("--decode", type=int, default=1, help="sequences that decode meanwhile (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=3, help="of each objective (default: %(default)s)")
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()), help="where the store goes")
    arguments = parser.parse_args()
    path = arguments.dir / f"bench-{arguments.shape}-{arguments.quant}.tiered"
    if not (path / "manifest.json").exists():
        command = ["convert", "--synthetic", arguments.shape, "-o", str(path), "--quant", arguments.quant]
        subprocess.run([sys.executable, "-m", "tiered", *command], check=True)
    print("| objective | s/pass before | s/pass while entering | longest | passes | first token of the newcomer |")
    print("|---|---|---|---|---|---|", flush=True)
    # Each in a process of its own: the peak memory of one run would count in the next one's plan.
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as processes:
        for objective in ("throughput", "latency") * arguments.runs:
            print(processes.submit(row, path, objective, arguments).result(), flush=True)
    return 0


def row(path: Path, objective: Objective, arguments: argparse.Namespace) -> str:
    """One run; returns its row of the table."""
    store, context = Store.open(path), arguments.enter + 64
    tokens, count = context + arguments.decode * (16 + _DECODED), arguments.decode + 1
    workload = Workload(count, context, context, tokens, MAX_BATCHED_TOKENS, objective=objective)
    with (
        Runtime(store, workload, Options(ram=parse_size(arguments.ram))) as runtime,
        Scheduler[Sequence](runtime, count) as scheduler,
    ):
        for number in range(arguments.decode):
            scheduler.add(sequence(store, 16, number, _DECODED))
        before = [timed(scheduler) for _ in range(8)][3:]
        newcomer = scheduler.add(sequence(store, arguments.enter, 99, 2))
        during = []
        while not newcomer.item.token_ids:
            during.append(timed(scheduler))
    figures = f"{statistics.median(before):.3f} | {statistics.median(during):.3f} | {max(during):.3f}"
    return f"| {objective} | {figures} | {len(during)} | {sum(during):.2f} s |"


def timed(scheduler: Scheduler[Sequence]) -> float:
    start = time.perf_counter()
    scheduler.step()
    return time.perf_counter() - start


def sequence(store: Store, tokens: int, seed: int, new_tokens: int) -> Sequence:
    """A random prompt of `tokens` tokens, continued for `new_tokens`."""
    ids = torch.randint(store.vocab_size, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Sequence(ids, Sampler(SamplingParams(), seed), Silent(), new_tokens, frozenset())


if __name__ == "__main__":
    sys.exit(main())
