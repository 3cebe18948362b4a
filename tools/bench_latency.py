"""How long people wait: for the next token while another's prompt enters, or with --first for the first one.

    python tools/bench_latency.py                                     opt-1.3b in int4, in 1280 MiB, 2,000 tokens enter
    python tools/bench_latency.py --shape opt-6.7b --ram 2GiB --enter 2000 --decode 8
    python tools/bench_latency.py --first --shape opt-6.7b --ram 8GiB --runs 5
    python tools/bench_latency.py --first --store demo/opt-inflated.tiered --ram 1GiB --against ../before

Makes a synthetic store (kept for the next time), lets one sequence decode, adds a prompt, and goes on until its first
token; once for each objective, in alternation. Prints one row per run as Markdown: the median pass before, the median
and the longest pass while the prompt enters, and how long the newcomer waits for its first token, the first pass with
prompt tokens included.

With --first, each run is a process of its own that opens a runtime and computes two passes of 8 prompt tokens. Its row:
the seconds of the first pass, and what it is held against, of the same process: S bytes of the tape at the raw
bandwidth B (the better of two measurements, before the first pass and after the second), C, what the second pass
computes, and touch, what writing one byte to each page of as much memory as the pass takes costs by itself, in one
thread: half of it before the first pass, half after the second, and kept, so that neither finds the other's. Beside
these the processor seconds of the first pass in all threads, divided by how many processors there are: where touching,
computing, checksums and reads want more than that, they are the bound. Then a command `tiered generate`, from its
start to the first byte of its text, imports included. All reads bypass the page cache.
--against names other checkouts of tiered, which take turns.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Final

import numpy as np
import torch

from tiered.bench import measure_raw
from tiered.generate import Sampler, SamplingParams, Scheduler, Sequence, generate
from tiered.io import Arena
from tiered.plan import MAX_BATCHED_TOKENS, Workload, cpu_count
from tiered.plan.inputs import Objective
from tiered.runtime import Options, Runtime
from tiered.store import Store
from tiered.units import MIB, PAGE, parse_size

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
    parser.add_argument("--first", action="store_true", help="measure the first pass, and the time to the first token")
    parser.add_argument("--store", type=Path, help="with --first: this store, and no synthetic one")
    parser.add_argument("--against", type=Path, nargs="+", default=[], help="with --first: other checkouts of tiered")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    path = arguments.store or arguments.dir / f"bench-{arguments.shape}-{arguments.quant}.tiered"
    if arguments.one:
        print(json.dumps(first_pass(path, arguments.ram)))
        return 0
    if not (path / "manifest.json").exists():
        command = ["convert", "--synthetic", arguments.shape, "-o", str(path), "--quant", arguments.quant]
        subprocess.run([sys.executable, "-m", "tiered", *command], check=True)
    if arguments.first:
        print_first(path, arguments)
        return 0
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
    workload = Workload(count, context, context, tokens, max_batched_tokens=MAX_BATCHED_TOKENS, objective=objective)
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


FIRST: Final = (
    *("first pass s", "S GB", "S/B s", "C s", "touch GB", "touch s", "times the largest"),
    *("processor s / processors", "first text s"),
)


def print_first(path: Path, arguments: argparse.Namespace) -> None:
    """The table of first passes: a row per run, checkouts in alternation, then the medians of each."""
    print("| checkout | " + " | ".join(FIRST) + " |\n" + "|---" * (len(FIRST) + 1) + "|", flush=True)
    rows: dict[Path, list[list[float]]] = {}
    for _ in range(arguments.runs):
        for checkout in (Path(__file__).parents[1], *arguments.against):
            environment = {**os.environ, "PYTHONPATH": str(checkout.absolute())}
            command = [sys.executable, __file__, "--one", "--store", str(path), "--ram", arguments.ram]
            done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
            figures = [*json.loads(done.stdout), first_text(path, arguments.ram, checkout)]
            rows.setdefault(checkout, []).append(figures)
            print(f"| {checkout.name} | " + " | ".join(f"{value:.2f}" for value in figures) + " |", flush=True)
    for checkout, found in rows.items():
        medians = (statistics.median(column) for column in zip(*found, strict=True))
        print(f"| **{checkout.name}** | " + " | ".join(f"**{value:.2f}**" for value in medians) + " |")


def first_pass(path: Path, ram: str) -> list[float]:
    """The figures of `FIRST`, less the last one, for the checkout that this process imports."""
    store = Store.open(path)
    with Runtime(store, Workload(1, 32, 8, MAX_BATCHED_TOKENS), Options(ram=parse_size(ram))) as runtime:
        nbytes, files = runtime.plan.placement.nbytes, [store.file_path(block) for block in store.tape]
        with Arena(nbytes + 2 * PAGE) as arena:
            halves = [arena.borrow(nbytes // 2, "touch").view for _ in range(2)]
            memory, touch = halves[0], touched(halves[0])
            raw = [measure_raw(files, memory[: 256 * MIB], direct=True).bytes_per_second]
            costs = []
            for _ in range(2):
                began, used = time.perf_counter(), time.process_time()
                generation = generate(runtime, [sequence(store, 8, 1, 1)], 1)
                took, used = time.perf_counter() - began, time.process_time() - used
                costs.append((took, used, generation.prefill.compute_seconds))
            runtime.stop_streaming()
            raw.append(measure_raw(files, memory[: 256 * MIB], direct=True).bytes_per_second)
            touch += touched(halves[1])
            del memory, halves
    (first, used, _), (_, _, compute) = costs
    reading = store.tape_nbytes / max(raw)
    share = first / max(reading, compute, touch)
    return [first, store.tape_nbytes / 1e9, reading, compute, nbytes / 1e9, touch, share, used / cpu_count()]


def touched(memory: memoryview) -> float:
    """Seconds of writing a byte to each page of `memory`."""
    began = time.perf_counter()
    np.frombuffer(memory, np.uint8)[::PAGE] = 1
    return time.perf_counter() - began


def first_text(path: Path, ram: str, checkout: Path) -> float:
    """Seconds from the start of a command of `checkout` to the first byte of its text."""
    command = [
        sys.executable,
        "-m",
        "tiered",
        "generate",
        str(path.absolute()),
        "--ram",
        ram,
        "-p",
        "To install the package",
    ]
    began = time.perf_counter()
    with subprocess.Popen(
        [*command, "-n", "4", "--ignore-eos"], cwd=checkout, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as running:
        assert running.stdout is not None
        text = running.stdout.read(1)
        seconds = time.perf_counter() - began
        running.stdout.read()
    if not text or running.returncode:
        raise SystemExit(f"{' '.join(command)}: exit status {running.returncode}, no text")
    return seconds


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
