"""How wide a job runs on this machine: measured disk and processor, and the planner asked about every width."""

import mmap
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, Literal

from tiered.arch import load_config
from tiered.bench import measure_raw
from tiered.bench.rates import measure_attention, measure_compute
from tiered.cache import CachePlan
from tiered.cli.generation import PASS_TOKENS
from tiered.cli.measuring import measure_footprint
from tiered.errors import BudgetError
from tiered.io import ReadMode, probe_mode
from tiered.kernels import Kernels
from tiered.kernels.attention import PAGE_TOKENS
from tiered.model import Footprint, Load
from tiered.options import Options
from tiered.plan import available_budget, cpu_count
from tiered.plan.width import Width, WidthOption, candidates, choose_width
from tiered.quant import GroupScheme
from tiered.store import Store
from tiered.units import MIB, format_rate, format_seconds, format_size

_MOST: Final = 512
"""Sequences at once, unless more are asked for."""
_GROWTH_NBYTES: Final = 16 * MIB
"""What the process may have grown by between planning with it and running."""
_MEASURE_NBYTES: Final = 32 * MIB
_MEASURING_GROWTH_NBYTES: Final = 96 * MIB
"""What the process may have grown by when disk and processor have been measured: its peak counts."""
_SPARE: Final = 1.1
"""Room in the cache beyond what sequences take on average: where long ones meet, fewer run."""


@dataclass(frozen=True)
class Demand:
    """What a job asks for."""

    sequences: int
    longest: int
    """Tokens of the longest one, prompt and completion."""
    tokens: int
    """Of all sequences together."""

    @property
    def mean(self) -> float:
        return self.tokens / max(self.sequences, 1)

    def load(self, width: int) -> Load:
        """What `width` of them take at once."""
        room = int(width * self.mean * _SPARE) + PAGE_TOKENS
        return Load(
            width,
            self.longest,
            self.longest,
            pass_tokens=PASS_TOKENS,
            kv_tokens=min(width * self.longest, max(self.longest, room)),
        )


@dataclass(frozen=True)
class Choice:
    """How to run, and a line that says why."""

    load: Load
    kv: Literal["cpu", "disk"]
    reason: str


def choose_batch(store: Store, options: Options, demand: Demand, say: Callable[[str], None]) -> Choice | None:
    """The width and the cache's place with most tokens per second.

    None where no width fits: opening a runtime for one sequence says why.
    """
    # Measured before the process grows by what measures.
    footprint = measure_footprint(store, demand.load(1), options)
    footprint = replace(footprint, baseline=footprint.baseline + _GROWTH_NBYTES)
    found = _options(footprint, options, demand, candidates(min(demand.sequences, _MOST)))
    if not found:
        return None
    counts = sorted({option.sequences for option in found})
    after = replace(footprint, baseline=footprint.baseline + _MEASURING_GROWTH_NBYTES)
    if not _options(after, options, demand, counts):
        # Measuring would take the memory that it is about.
        most = max(found, key=lambda option: (option.sequences, not option.kv_on_disk))
        return _choice(footprint, demand, most, f"{most.sequences} of {demand.sequences} sequences at once, as fit")
    say("measuring the disk")
    bandwidth = _bandwidth(store) if any(option.disk_nbytes for option in found) else None
    say("measuring the processor")
    compute_seconds = _compute_seconds(store, footprint, options, demand)
    after = measure_footprint(store, demand.load(1), options)
    after = replace(after, baseline=after.baseline + _GROWTH_NBYTES)
    width = choose_width(_options(after, options, demand, counts), bandwidth, compute_seconds)
    return None if width is None else _choice(after, demand, width.option, _expected(demand, width, bandwidth))


def _choice(footprint: Footprint, demand: Demand, chosen: WidthOption, why: str) -> Choice:
    load = demand.load(chosen.sequences)
    where: Literal["cpu", "disk"] = "disk" if chosen.kv_on_disk else "cpu"
    cache = format_size(replace(footprint, load=load).cache_plan(1 << 40).records_nbytes)
    return Choice(load, where, f"{why}; KV cache {cache} {'on disk' if chosen.kv_on_disk else 'in memory'}")


def _options(footprint: Footprint, options: Options, demand: Demand, counts: list[int]) -> list[WidthOption]:
    """What each width streams, with the cache in memory and on disk, where the planner agrees."""
    budget = options.ram or available_budget()
    tape = [block.file.nbytes for block in footprint.store.tape]
    tiers = {"cpu": [False], "disk": [True], "auto": [False, True]}[options.kv]
    found = []
    for count in counts:
        for on_disk in tiers:
            asked = replace(footprint, load=demand.load(count), cache=replace(footprint.cache, on_disk=on_disk))
            try:
                plan = asked.plan(budget, options.tiers)
            except BudgetError:
                continue
            streamed = sum(nbytes for i, nbytes in enumerate(tape) if i not in plan.placement.resident)
            kv = _kv_nbytes(asked.cache_plan(budget), count * demand.mean) if on_disk else 0
            found.append(WidthOption(count, on_disk, streamed + kv))
    return found


def _kv_nbytes(cache: CachePlan, tokens: float) -> int:
    """Bytes read in a pass over a cache that holds `tokens` tokens, of sequences that are halfway on average."""
    layers = sum(len(group.layers) for group in cache.groups)
    return int(tokens / PAGE_TOKENS * cache.record_nbytes * layers * 0.75)


def _bandwidth(store: Store) -> float:
    """Raw, of the blocks' files, in bytes per second."""
    files = [store.file_path(block) for block in store.tape]
    with mmap.mmap(-1, _MEASURE_NBYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        view = memoryview(memory)
        try:
            return measure_raw(files, view, probe_mode(files[0]).mode is ReadMode.DIRECT).bytes_per_second
        finally:
            view.release()


def _compute_seconds(store: Store, footprint: Footprint, options: Options, demand: Demand) -> Callable[[int], float]:
    """Seconds that a pass over so many decoding sequences computes."""
    config, kv = load_config(store.path), footprint.cache.shape
    scheme = store.manifest.quantization.get("layers")
    weights = sum(store.layout(block).weight_count for block in store.tape)
    heads = int(config.num_attention_heads)
    with Kernels(options.threads or cpu_count(), mode=options.kernel_mode, name=options.kernels) as kernels:
        linear = measure_compute(
            kernels, None if scheme is None else GroupScheme.parse(scheme), config.hidden_size, footprint.dtype
        )
        attention = measure_attention(kernels, heads, kv.heads, kv.head_dim, footprint.dtype)
    per_sequence = attention * kv.layers * demand.mean * 0.75
    return lambda count: linear.seconds(count, weights) + per_sequence * count


def _expected(demand: Demand, width: Width, bandwidth: float | None) -> str:
    """The choice and what it is expected to take."""
    chosen, disk = width.option, ""
    if chosen.disk_nbytes and bandwidth:
        disk = f"disk {format_seconds(width.disk_seconds)} at {format_rate(bandwidth)}, "
    return (
        f"{chosen.sequences} of {demand.sequences} sequences at once; expected per pass: {disk}"
        f"compute {format_seconds(width.compute_seconds)}"
    )
