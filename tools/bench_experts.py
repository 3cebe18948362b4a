"""What a token of a mixture costs whose experts are read when they are chosen, against the disk's own random reads.

    python tools/bench_experts.py STORE --ram 4GiB
    python tools/bench_experts.py STORE --ram 4GiB --routers        with the choices of the store's own routers

One sequence decodes; by default its routers' choices are replaced by random ones, all different, which is the worst
case: what is in memory is hit no more often than by chance. (The routers of synthetic weights choose the same experts
for every token, which is no case at all.) Between stretches of passes, plain threads read random places of the same
files, pieces as large as an expert, as many at a time as a layer asks for: that is the rate passes are held against.
Prints a row per stretch, and medians, as Markdown: bytes read per token, seconds per token, and these against reading
the same bytes at that rate (100 %: nothing but reading took any time).
"""

import argparse
import mmap
import random
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from tiered.bench import measure_random
from tiered.model.experts import OffloadedExperts
from tiered.plan import Workload
from tiered.runtime import Options, Runtime
from tiered.store import Store
from tiered.units import PAGE, format_size, parse_size, round_up


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("--ram", default="4GiB", help="budget (default: %(default)s)")
    parser.add_argument("--passes", type=int, default=8, help="of a stretch (default: %(default)s)")
    parser.add_argument("--stretches", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=8, help="passes that fill the cache first")
    parser.add_argument("--routers", action="store_true", help="keep what the store's routers choose")
    arguments = parser.parse_args()
    store, ram = Store.open(arguments.store), parse_size(arguments.ram)
    tokens = arguments.warm_up + arguments.passes * arguments.stretches + 1
    workload = Workload(1, tokens + 1, 1, max_batched_tokens=64)
    with at_random(not arguments.routers), Runtime(store, workload, Options(ram=ram)) as runtime:
        plan = runtime.plan
        if plan.experts is None:
            raise SystemExit(f"{store.path}: in {arguments.ram} its layers are read whole")
        unit = next(units for units in store.expert_units if units)[0]
        layers = sum(bool(units) for units in store.expert_units)
        print(
            f"{store.name}: {plan.experts.slots} of {sum(map(len, store.expert_units))} experts of "
            f"{format_size(unit.nbytes)} in memory, {layers} layers; {format_size(plan.read_nbytes)} of other weights "
            f"read per pass; {'its own routers' if arguments.routers else 'random choices'}\n"
        )
        print("| hits | MB/token | s/token | compute s | random reads GB/s | of them |\n|---|---|---|---|---|---|")
        rows = list(
            measure(runtime, [store.path / u[0].file.path for u in store.expert_units if u], unit.nbytes, arguments)
        )
    print("| " + " | ".join(f"{statistics.median(column):.3g}" for column in zip(*rows, strict=True)) + " | medians")
    return 0


def measure(
    runtime: Runtime, files: list[Path], nbytes: int, arguments: argparse.Namespace
) -> Iterator[tuple[float, ...]]:
    """One row per stretch."""
    from tiered.model import Segment

    kv = runtime.reserve(runtime.workload.max_context)
    assert kv is not None
    ids = random.Random(1)

    def run(count: int) -> list[Any]:
        token = [ids.randrange(runtime.vocab_size) for _ in range(count)]
        return [runtime.run([Segment(kv, [i], keep=1)], lambda *_: None) for i in token]

    run(arguments.warm_up)
    for _ in range(arguments.stretches):
        before = random_reads(files, nbytes)
        read, began = runtime.bytes_read, time.perf_counter()
        passes = run(arguments.passes)
        seconds, read = time.perf_counter() - began, runtime.bytes_read - read
        rate = statistics.mean((before, random_reads(files, nbytes)))
        hits = sum(p.experts.hits for p in passes) / sum(p.experts.hits + p.experts.misses for p in passes)
        per, compute = seconds / len(passes), sum(p.compute_seconds for p in passes) / len(passes)
        row = hits, read / len(passes) / 1e6, per, compute, rate / 1e9, read / len(passes) / rate / per
        print("| " + " | ".join(f"{value:.3g}" for value in row) + " |", flush=True)
        yield row


def random_reads(files: list[Path], nbytes: int, threads: int = 8) -> float:
    """Bytes per second of reading pieces of `nbytes` at random places, past the page cache, in plain threads."""
    memory = mmap.mmap(-1, 4 * round_up(nbytes, PAGE) * threads, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.write(bytes(len(memory)))  # touching it for the first time is not what is measured
    with memory, memoryview(memory) as view:
        return measure_random(files, view, nbytes, threads=threads)


@contextmanager
def at_random(is_on: bool) -> Iterator[None]:
    """Every token's experts are drawn, if `is_on`."""
    numbers, forward = torch.Generator().manual_seed(0), OffloadedExperts.forward

    def drawn(
        module: OffloadedExperts, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        index = torch.stack([torch.randperm(module.num_experts, generator=numbers)[: index.shape[1]] for _ in index])
        return forward(module, hidden, index, weights)

    with mock.patch.object(OffloadedExperts, "forward", drawn if is_on else forward):
        yield


if __name__ == "__main__":
    sys.exit(main())
