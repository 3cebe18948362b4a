"""Ways to run a request or a job on one machine, compared by what they are predicted to take.

In: shapes of a model, a machine in numbers, what is asked for, budgets. Out: rows, the quickest first, why it is that
one, and what does not fit with the nearest ask that does. Pure: same numbers, same rows. `tiered plan` prints them.

On the processor rows are the plans that `make_plan`'s ways give, so what is predicted is what a run does. With a GPU
(`gpu.py`) they are closed forms, as this version computes on the processor only.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any, Final

from tiered.errors import BudgetError, ConfigError
from tiered.plan.batch_size import candidates
from tiered.plan.gpu import GpuBudget, OnGpu, place_on_gpu
from tiered.plan.hardware import Hardware, Mode
from tiered.plan.inputs import MAX_BATCHED_TOKENS, Budgets, Machine, ModelShape, Objective, Workload
from tiered.plan.kv import Bits, check_bits
from tiered.plan.make import WORTH_OF_BITS
from tiered.plan.plan import Plan, smallest_budget
from tiered.plan.predict import Prediction, predict
from tiered.plan.way import Asked
from tiered.units import MIB, format_budget, format_seconds, format_size

BASELINE_NBYTES: Final = 390 * MIB
"""What a process takes by itself where none can be measured: interpreter, torch, transformers, graph and kernels."""
_SCRATCH_NBYTES: Final = 16 * MIB
"""What linear kernels hold besides their results, or less, where few threads compute."""
_THREAD_SCRATCH_NBYTES: Final = 2 * MIB
_MOST_BATCH: Final = 512
_BITS: Final[tuple[Bits, ...]] = (16, 4)
_WORTH: Final = 1.02
"""So many times quicker a larger batch must be."""
_SAME: Final = 1.005
_MOST_NBYTES: Final = 1 << 46
"""Of a budget that is looked for: 64 TiB."""
CPU, GPU, BOTH = "cpu", "gpu", "gpu+cpu"
_GPU_TIERS: Final[dict[str, tuple[str, ...]]] = {CPU: (), GPU: ("gpu", "cpu", "disk"), BOTH: ("cpu", "disk")}
"""Where the KV cache may be, by strategy. In VRAM it pushes weights out, so the first that holds it need not be the
quickest."""


@dataclass(frozen=True)
class Ask:
    """What is to be run, and in what."""

    prompt: int
    """Tokens of each prompt."""
    generate: int
    """Tokens that each sequence generates."""
    sequences: int
    batch: int | None
    """Sequences at once; None: chosen."""
    ram: int
    vram: int | None
    """None: no GPU is used."""
    objective: Objective
    baseline: int = BASELINE_NBYTES
    mode: Mode = "invariant"

    def __post_init__(self) -> None:
        for name in ("prompt", "generate", "sequences", "batch", "ram", "vram"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} {value!r}: expected a whole number above 0")

    @property
    def batches(self) -> list[int]:
        """Batch sizes to compare."""
        if self.batch is not None:
            return [min(self.batch, self.sequences)]
        return candidates(min(self.sequences, _MOST_BATCH))

    def workload(self, batch: int) -> Workload:
        """What a run with `batch` sequences at once is planned for."""
        return Workload(
            self.sequences,
            self.prompt + self.generate,
            self.prompt,
            max_batched_tokens=MAX_BATCHED_TOKENS,
            batch_size=batch,
            objective=self.objective,
        )

    def cost(self, row: "Row") -> float:
        """What a batch size is chosen by: the seconds of the whole job, or, where latency counts, those after which a
        sequence is finished, on average."""
        seconds = row.prediction.seconds
        if self.objective == "throughput":
            return seconds
        waves = -(-self.sequences // row.batch_size)
        return seconds * (waves + 1) / (2 * waves)


@dataclass(frozen=True)
class Row:
    """One way to run, and what it is predicted to take."""

    strategy: str
    quant: str
    batch_size: int
    kv_tier: str
    """"gpu", "cpu" or "disk"."""
    kv_bits: int
    resident_share: float
    """Of the weights' bytes, those in memory for good, of the processor or of the GPU."""
    prediction: Prediction
    plan: Plan | None
    """None where a GPU takes part."""
    usd_per_million_tokens: float | None = None

    is_resident: bool = False
    """All weights are for good in the memory of what computes."""

    @property
    def is_built(self) -> bool:
        """Whether this version can run it."""
        return self.plan is not None

    @property
    def title(self) -> str:
        """The strategy, for people."""
        return f"{self.strategy} in {'RAM' if self.strategy == CPU else 'VRAM'}" if self.is_resident else self.strategy

    def to_json(self) -> dict[str, Any]:
        """Plain numbers and words."""
        own = {name: value for name, value in vars(self).items() if name not in ("prediction", "plan")}
        return own | {"is_built": self.is_built, **self.prediction.to_json()}


@dataclass(frozen=True)
class Refusal:
    """What does not fit, and the nearest ask that does."""

    strategy: str
    quant: str
    message: str


@dataclass(frozen=True)
class Comparison:
    """All strategies."""

    rows: tuple[Row, ...]
    """The quickest first."""
    refusals: tuple[Refusal, ...]

    @property
    def best(self) -> Row | None:
        """The quickest that this version can run."""
        return next((row for row in self.rows if row.is_built), None)

    @property
    def why(self) -> str:
        """What bounds the best row, and what the next best loses; empty where nothing fits."""
        best = self.best
        if best is None:
            return ""
        phase = "prefill" if best.prediction.prefill.seconds > best.prediction.decode.seconds else "decoding"
        passes = best.prediction.prefill if phase == "prefill" else best.prediction.decode
        took = f"{format_seconds(passes.compute_seconds / passes.passes)} of computing"
        if passes.disk_seconds:
            took = f"{format_seconds(passes.disk_seconds / passes.passes)} of disk and {took}"
        bound = {"disk": "the disk", "compute": "computing", "memory": "computing, as nothing is read again"}
        said = f"{phase} takes most of the time and is bound by {bound[passes.bottleneck]}: {took} per pass"
        rest = [row for row in self.rows if row.is_built and row is not best]
        if rest:
            slower = rest[0].prediction.seconds / best.prediction.seconds
            loses = "takes as long" if slower < _SAME else f"takes {slower:.3g} times as long"
            said += f"; {rest[0].title} {rest[0].quant} {loses}"
        return said


def machine_for(model: ModelShape, hardware: Hardware, mode: Mode = "invariant") -> Machine:
    """`hardware` as plans and predictions for `model` want it."""
    scratch = max(_SCRATCH_NBYTES, hardware.cpu.cores * _THREAD_SCRATCH_NBYTES)
    machine = hardware.machine(model.quantization, mode, model.kv, scratch)
    experts = model.experts
    return replace(
        machine,
        prompt_attention_flops=hardware.cpu.prefill_attention,
        disk_write_bytes_per_second=hardware.disk.write,
        expert_bytes_per_second=None if experts is None else hardware.disk.random_read(experts.file_nbytes),
    )


def compare(shapes: Callable[[str], ModelShape], quants: tuple[str, ...], hardware: Hardware, ask: Ask) -> Comparison:
    """Every strategy in each of `quants`, of which `shapes` gives the model's shape. Where it may hold all weights in
    memory and is quicker another way, that is a row, too."""
    rows: list[Row] = []
    refusals: list[Refusal] = []
    for quant in quants:
        model = shapes(quant)
        machine = machine_for(model, hardware, ask.mode)
        on_cpu = list(_cpu_rows(model, machine, quant, ask))
        found = {CPU: on_cpu}
        if hardware.gpu is not None and ask.vram is not None:
            budget = GpuBudget(ask.ram - ask.baseline - model.tables_nbytes, ask.vram)
            places = [
                place
                for batch, bits, tier in product(ask.batches, _bits(model), _GPU_TIERS[GPU])
                if (place := place_on_gpu(model, hardware, machine, ask.workload(batch), budget, bits, tier))
            ]
            found |= {GPU: [_gpu_row(place, quant, ask) for place in places], BOTH: list(_hybrid_rows(places, on_cpu))}
        for strategy, ways in found.items():
            if not ways:
                refusals.append(Refusal(strategy, quant, _nearest(strategy, model, machine, hardware, ask)))
                continue
            chosen, resident = [_chosen(ways, ask)], [row for row in ways if row.is_resident]
            if resident and not chosen[0].is_resident:
                chosen.append(_chosen(resident, ask))
            rows += [_priced(row, hardware) for row in chosen]
    return Comparison(tuple(sorted(rows, key=lambda row: row.prediction.seconds)), tuple(refusals))


def _priced(row: Row, hardware: Hardware) -> Row:
    if hardware.usd_per_hour is None or not row.prediction.generated_tokens:
        return row
    per_token = hardware.usd_per_hour / 3600 / row.prediction.tokens_per_second
    return replace(row, usd_per_million_tokens=1e6 * per_token)


def _chosen(found: Sequence[Row], ask: Ask) -> Row:
    """The best of one strategy: that of most bits, then of fewest sequences, which costs little more than the least."""
    most = min(map(ask.cost, found)) * WORTH_OF_BITS
    bits = max(row.kv_bits for row in found if ask.cost(row) <= most)
    same = [row for row in found if row.kv_bits == bits]
    least = min(map(ask.cost, same)) * _WORTH
    return min((row for row in same if ask.cost(row) <= least), key=lambda row: row.batch_size)


def _cpu_rows(model: ModelShape, machine: Machine, quant: str, ask: Ask) -> Iterator[Row]:
    for batch in ask.batches:
        for bits in _bits(model):
            for on_disk in (False, True):
                workload = ask.workload(batch)
                asked = Asked(model, machine, workload, Budgets(ask.ram, ask.baseline, kv_bits=bits))
                try:
                    plan = asked.way(batch, on_disk).plan_at(ask.ram)
                except BudgetError:
                    continue
                yield _cpu_row(plan, model, predict(plan, model, machine, workload), quant)
                if not plan.read_nbytes:
                    break  # on disk the cache would only be slower


def _bits(model: ModelShape) -> Iterator[Bits]:
    for bits in _BITS:
        try:
            check_bits(model.kv, bits)
        except ConfigError:
            continue
        yield bits


def _cpu_row(plan: Plan, model: ModelShape, prediction: Prediction, quant: str) -> Row:
    held = plan.placement.resident_nbytes + (0 if plan.experts is None else plan.experts.nbytes)
    tier = "disk" if plan.cache.on_disk else "cpu"
    share = min(1.0, held / model.tape.total)
    is_resident = not plan.placement.ring_nbytes and plan.experts is None
    return Row(CPU, quant, plan.batch_size, tier, plan.cache.bits, share, prediction, plan, is_resident=is_resident)


def _nearest(strategy: str, model: ModelShape, machine: Machine, hardware: Hardware, ask: Ask) -> str:
    """What does not fit, and what would, in words."""
    least, bits = min(ask.batches), min(_bits(model))

    @cache
    def smallest(batch: int) -> int:
        """The least budget of RAM where the processor computes, or decodes."""
        asked = Asked(model, machine, ask.workload(batch), Budgets(ask.ram, ask.baseline, kv_bits=bits))
        return min(smallest_budget(asked.way(batch, on_disk).plan_at) for on_disk in (False, True))

    def fits(batch: int, ram: int, vram: int) -> bool:
        if strategy != GPU and smallest(batch) > ram:
            return False
        budget = GpuBudget(ram - ask.baseline - model.tables_nbytes, vram)
        tiers = _GPU_TIERS[strategy]
        return not tiers or any(
            place_on_gpu(model, hardware, machine, ask.workload(batch), budget, bits, tier) for tier in tiers
        )

    said, vram, ram_most = f"does not fit in {format_size(ask.ram)}", ask.vram or 0, _MOST_NBYTES
    asks = []
    if hardware.gpu is not None and strategy != CPU:
        said, ram_most = f"{said} of RAM and {format_size(vram)} of VRAM", hardware.ram
        more = _least(lambda vram: fits(least, ask.ram, vram), hardware.gpu.vram)
        asks += [] if more is None else [f"--vram {format_budget(more)}"]
    more = _least(lambda ram: fits(least, ram, vram), ram_most)
    asks += [] if more is None else [f"--ram {format_budget(more)}"]
    fewer = [batch for batch in candidates(least) if batch < least and fits(batch, ask.ram, vram)]
    asks += [f"--batch {batch}" for batch in fewer[-1:]]
    return f"{said}: the smallest that works is {', or '.join(asks)}" if asks else f"{said}, nor with more of either"


def _least(fits: Callable[[int], bool], most: int) -> int | None:
    """The least whole number of MiB up to `most` that `fits`, which more does, too; None where nothing does."""
    counts = range(most // MIB + 1)
    found = bisect_left(counts, True, key=lambda count: fits(count * MIB))
    return found * MIB if found in counts else None


def _gpu_row(place: OnGpu, quant: str, ask: Ask) -> Row:
    """A closed form: nothing of it is built."""
    own = {"process": ask.baseline, "tables": place.model.tables_nbytes}
    prediction = replace(place.prediction, memory=own | place.prediction.memory)
    batch, bits, is_resident = place.cache.sequences, place.cache.bits, place.in_vram == place.total
    share = place.resident_share
    return Row(GPU, quant, batch, place.kv_tier, bits, share, prediction, None, is_resident=is_resident)


def _hybrid_rows(places: Sequence[OnGpu], on_cpu: Sequence[Row]) -> Iterator[Row]:
    """Prompts as one of `places`, decoding as the row of `on_cpu` with the same cache."""
    for place in places:
        for row in on_cpu:
            if (row.batch_size, row.kv_bits, row.kv_tier) == (place.cache.sequences, place.cache.bits, place.kv_tier):
                prediction = place.with_decode(row.prediction)
                yield replace(row, strategy=BOTH, prediction=prediction, plan=None, is_resident=False)
