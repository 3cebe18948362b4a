"""What passes over a model take beyond raw reading and linear layers, measured with the runtime itself.

In: a folder, in which small models of random weights lie for as long as this takes. Out: `PassRates`, for predictions.
Called by `bench/profile.py`.

    narrow, one row and more          what a layer takes beside its linear layers, which take less in it
    wide, resident, the first pass    how fast what stays in memory is read, tested and put there
    wide, streamed, one row           the share of raw bandwidth that reading ahead reaches
    wide, many rows, both ways        by how much computing is slower while others read

Each is measured several times in alternation, beside the raw disk and plain linear layers, because disks drift and
other programs run.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from tiered.bench.rates import measure_compute, measure_disk
from tiered.convert import ConvertOptions, convert_checkpoint
from tiered.errors import BudgetError
from tiered.host import Host
from tiered.model import Segment
from tiered.options import Options
from tiered.plan import ComputeRate, Workload
from tiered.plan.inputs import MAX_BATCHED_TOKENS
from tiered.quant import GroupScheme
from tiered.runtime import Runtime
from tiered.store import Store

_SHAPE: Final = """
[config]
model_type = "olmo"
vocab_size = 512
hidden_size = {hidden}
intermediate_size = {inner}
num_hidden_layers = {layers}
num_attention_heads = {heads}
num_key_value_heads = {kv_heads}
bos_token_id = 0
eos_token_id = 0
pad_token_id = 0
"""
"""With fused norms, rotary positions and a gate this family does more beside linear layers than OPT, and less than
Llama."""


@dataclass(frozen=True)
class Size:
    """Of a model of that family."""

    hidden: int
    layers: int

    @property
    def shape(self) -> str:
        """As a toml file has it."""
        heads = max(4, self.hidden // 128)
        inner, kv_heads = 3 * self.hidden, max(1, heads // 4)
        return _SHAPE.format(hidden=self.hidden, inner=inner, layers=self.layers, heads=heads, kv_heads=kv_heads)


NARROW: Final = Size(2048, 6)
WIDE: Final = Size(4096, 4)
"""Layers as wide as those of a model that does not fit in memory, but few: 0.4 GB in 4 bits, half of it on disk."""
_ROUNDS: Final = 4
_BATCH: Final = 32
_CONTEXT: Final = 64
_STREAMED: Final = 0.75
"""The share of the model for which streamed passes have no memory."""
_RAW_SECONDS: Final = 0.03
_HEAVY: Final = (64, 128, 256, 512, 1024)
"""Rows with which computing takes longer than reading: the first of them with which it takes twice as long."""
_LONGER: Final = 1.3
"""So many times as long as reading it must take, lest reading be all that is seen."""


@dataclass(frozen=True)
class PassRates:
    """As `plan.hardware` has them; None: could not be told."""

    operation_seconds: float | None = None
    element_seconds: float | None = None
    reading_seconds: float | None = None
    streamed: float | None = None
    kept: float | None = None


def measure_passes(folder: Path, threads: int, narrow: Size = NARROW, wide: Size = WIDE) -> PassRates | None:
    """Passes of `threads` threads over models of these sizes, which lie in `folder` meanwhile. None where there is no
    memory for them. What cannot be written raises as in a conversion."""
    with TemporaryDirectory(dir=folder, prefix=".tiered-profile-") as place, Host(threads) as host:
        beside, passes = _Beside(_made(Path(place), narrow), host), _Wide(_made(Path(place), wide), host)
        try:
            for _ in range(_ROUNDS):
                beside.measure()
                passes.measure_resident()
                passes.measure_streamed()
        except BudgetError:
            return None
        operation, element = beside.seconds()
        return PassRates(operation, element, passes.reading_seconds, passes.streamed, passes.kept)


def _made(place: Path, size: Size) -> Store:
    toml, output = place / f"{size.hidden}.toml", place / f"{size.hidden}.tiered"
    toml.write_text(size.shape, encoding="utf-8")
    convert_checkpoint(toml, output, ConvertOptions(synthetic=True, distinct_blocks=2, compress="none"))
    return Store.open(output)


def _open(store: Store, host: Host, ram: int | None = None) -> Runtime:
    work = Workload(_BATCH, _CONTEXT, max_batched_tokens=MAX_BATCHED_TOKENS, batch_size=_BATCH)
    return Runtime(store, work, Options(ram=ram, threads=host.threads), host=host)


def _linear(runtime: Runtime, rows: tuple[int, ...]) -> ComputeRate:
    """How fast linear layers as wide as the model's are now."""
    scheme = GroupScheme.parse(runtime.shape.quantization or "")
    return measure_compute(runtime.host.kernels, scheme, runtime.shape.hidden, runtime.dtype, rows)


class _Beside:
    """Seconds of a layer beside its linear layers."""

    def __init__(self, store: Store, host: Host) -> None:
        self._store, self._host = store, host
        self._few, self._many = list[float](), list[float]()
        """Of a layer, for one row and for `_BATCH`."""

    def measure(self) -> None:
        with _open(self._store, self._host) as runtime:
            self._shape, linear = runtime.shape, _linear(runtime, (1, _BATCH))
            weights = (runtime.shape.weights - runtime.shape.head_weights) // runtime.shape.layers
            _passes(runtime, 1, 1, 1)
            for found, rows in ((self._few, 1), (self._many, _BATCH)):
                layers: list[float] = []
                _passes(runtime, rows, 1, 6, layers.append)
                # Linear layers alone are the quickest of several looks; what else runs must not count as beside them.
                found.append(statistics.quantiles(layers)[0] - linear.seconds(rows, weights))

    def seconds(self) -> tuple[float | None, float | None]:
        """Of an operation, however few its rows, and of each number that one writes."""
        few, many = statistics.median(self._few), statistics.median(self._many)
        operations, elements = (of / self._shape.layers for of in (self._shape.operations, self._shape.elements))
        element = max(0.0, (many - few) / (_BATCH - 1) / elements)
        return _positive((few - element * elements) / operations), _positive(element)


class _Wide:
    """Passes over a model that is resident, and over one that streams."""

    def __init__(self, store: Store, host: Host) -> None:
        self._store, self._host = store, host
        self._resident, self._streaming = list[float](), list[float]()
        """Of passes over many rows."""
        self._first, self._shares, self._reading = list[float](), list[float](), list[float]()
        self._tokens = _HEAVY[0] // _BATCH

    def measure_resident(self) -> None:
        """Passes over a model that stays in memory."""
        with _open(self._store, self._host) as runtime:
            self._tape, self._needed = runtime.plan.tape, runtime.plan.nbytes - runtime.plan.needs.baseline
            self._first += _passes(runtime, 1, 1, 1)
            if not self._reading:
                linear, reading = _linear(runtime, _HEAVY), self._tape.total / measure_disk(self._store, _RAW_SECONDS)
                slow = (rows for rows in _HEAVY if linear.seconds(rows, runtime.shape.weights) > 2 * reading)
                self._tokens = min(next(slow, _HEAVY[-1]), runtime.plan.max_batched_tokens) // _BATCH
            self._resident += _passes(runtime, _BATCH, self._tokens, 4)[1:]

    def measure_streamed(self) -> None:
        """Passes over a model most of which is read each time, and the raw disk before and after."""
        # What the process takes by itself has grown since the resident runtime, and grows with the tokens of a pass.
        with _open(self._store, self._host) as runtime:
            baseline = runtime.plan.needs.baseline
        with _open(self._store, self._host, baseline + self._needed - int(_STREAMED * self._tape.total)) as runtime:
            self._tokens = min(self._tokens, runtime.plan.max_batched_tokens // _BATCH)
            rates = [measure_disk(self._store, _RAW_SECONDS)]
            # The first pass reads what stays, and what the last one has left in the ring is none of the next.
            seconds = statistics.mean(_passes(runtime, 1, 1, 6)[2:])
            self._streaming += _passes(runtime, _BATCH, self._tokens, 4)[1:]
            rates.append(measure_disk(self._store, _RAW_SECONDS))
            self._nbytes = runtime.plan.read_nbytes
            self._reading.append(seconds)
            self._shares.append(self._nbytes / statistics.mean(rates) / seconds)

    @property
    def reading_seconds(self) -> float | None:
        """By which computing takes longer for each byte that is read meanwhile."""
        # The quickest of each: other programs only make passes slower, and a difference shows twice what they do.
        resident, streaming = min(self._resident), min(self._streaming)
        if not self._nbytes or resident < _LONGER * statistics.median(self._reading):
            return None
        return _positive((streaming - resident) / self._nbytes)

    @property
    def streamed(self) -> float | None:
        """The share of raw bandwidth that passes reach; not above 1, however the disk has drifted."""
        return _positive(min(1.0, statistics.median(self._shares)))

    @property
    def kept(self) -> float:
        """Bytes per second of a first pass."""
        return self._tape.file_total / statistics.median(self._first)


def _passes(
    runtime: Runtime, sequences: int, tokens: int, times: int, on_layer: Callable[[float], object] = lambda _: None
) -> list[float]:
    """Seconds of each of so many passes over new sequences, each with `tokens` tokens; `on_layer` gets the seconds of
    each layer but the first."""
    found = []
    for _ in range(times):
        caches = [kv for _ in range(sequences) if (kv := runtime.reserve(tokens)) is not None]
        ends: list[float] = []
        began = time.perf_counter()
        segments = [Segment(kv, [1] * tokens, 1) for kv in caches]
        runtime.run(segments, lambda *_: None, lambda *_: ends.append(time.perf_counter()))  # noqa: B023
        found.append(time.perf_counter() - began)
        for kv in caches:
            runtime.release(kv)
        for before, after in pairwise(ends[:-1]):
            on_layer(after - before)
    return found


def _positive(value: float) -> float | None:
    return value if value > 0 else None
