"""Ways to run a request or a job on one machine, compared by what they are predicted to take.

In: shapes of a model, a machine in numbers, what is asked for, budgets. Out: rows, the quickest first, why it is that
one, and what does not fit with the nearest ask that does. Pure: same numbers, same rows. `tiered plan` prints them.

Rows are the plans that `make_plan` makes of the same ask, with a GPU as without one, so what is predicted is what a run
does.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

from tiered.errors import BudgetError, ConfigError, DeviceBudgetError
from tiered.plan.batch_size import candidates
from tiered.plan.choose import Option, batches, best, bits_of, options
from tiered.plan.gpu import SCRATCH_NBYTES
from tiered.plan.hardware import Hardware, Mode
from tiered.plan.inputs import MAX_BATCHED_TOKENS, Budgets, Machine, ModelShape, Objective, Tier, Workload
from tiered.plan.on_device import CONTEXT_NBYTES
from tiered.plan.plan import HOLDS_LESS, Plan, smallest_budget
from tiered.plan.predict import Prediction, Predictor
from tiered.plan.way import Asked, Way
from tiered.units import MIB, format_budget, format_size

BASELINE_NBYTES: Final = 390 * MIB
"""What a process takes by itself where none can be measured: interpreter, torch, transformers, graph and kernels."""
_SCRATCH_NBYTES: Final = 16 * MIB
"""What linear kernels hold besides their results, or less, where few threads compute."""
_THREAD_SCRATCH_NBYTES: Final = 2 * MIB
_SAME: Final = 1.005
CPU, GPU, BOTH = "cpu", "gpu", "gpu+cpu"
"""The processor computes; the GPU does; prompts are the GPU's, and decoding is the processor's."""
GPU_TIERS: Final = (Tier.DISK, Tier.CPU, Tier.GPU)
"""Of rows with a GPU. Weights that fit in faster ones stay there, so others would plan no better."""


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
    def workload(self) -> Workload:
        """What a run is planned for."""
        return Workload(
            self.sequences,
            self.prompt + self.generate,
            self.prompt,
            max_batched_tokens=MAX_BATCHED_TOKENS,
            batch_size=self.batch,
            choose_batch_size=True,
            objective=self.objective,
            is_whole=True,
        )


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
    plan: Plan
    usd_per_million_tokens: float | None = None

    is_resident: bool = False
    """All weights are for good in the memory of what computes."""

    @property
    def title(self) -> str:
        """The strategy, for people."""
        return f"{self.strategy} in {'RAM' if self.strategy == CPU else 'VRAM'}" if self.is_resident else self.strategy

    def to_json(self) -> dict[str, Any]:
        """Plain numbers and words."""
        own = {name: value for name, value in vars(self).items() if name not in ("prediction", "plan")}
        return own | self.prediction.to_json()


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
        """The quickest."""
        return self.rows[0] if self.rows else None

    @property
    def why(self) -> str:
        """What bounds the best row, and what the next best loses; empty where nothing fits."""
        best = self.best
        if best is None:
            return ""
        phase = "prefill" if best.prediction.prefill.seconds > best.prediction.decode.seconds else "decoding"
        passes = best.prediction.prefill if phase == "prefill" else best.prediction.decode
        bound = {
            "disk": "the disk",
            "bus": "the bus to the GPU",
            "compute": "computing",
            "memory": "computing, as nothing is read again",
        }
        said = f"{phase} takes most of the time and is bound by {bound[passes.bottleneck]}: "
        said += f"{passes.of_a_pass} per pass"
        if len(self.rows) > 1:
            second = self.rows[1]
            slower = second.prediction.seconds / best.prediction.seconds
            loses = "takes as long" if slower < _SAME else f"takes {slower:.3g} times as long"
            said += f"; {second.title} {second.quant} {loses}"
        if best.plan.holds_less:
            said += f"; {best.resident_share:.0%} of the weights stay in memory: {HOLDS_LESS}"
        return said


def machine_for(model: ModelShape, hardware: Hardware, mode: Mode = "invariant") -> Machine:
    """`hardware` as plans and predictions for `model` want it."""
    scratch = max(_SCRATCH_NBYTES, hardware.cpu.cores * _THREAD_SCRATCH_NBYTES)
    machine = hardware.machine(model.quantization, mode, model.kv, scratch, model.queries_per_key)
    experts = model.experts
    return replace(
        machine,
        prompt_attention_flops=hardware.cpu.prefill_attention,
        disk_write_bytes_per_second=hardware.disk.write,
        expert_bytes_per_second=None if experts is None else hardware.disk.random_read(experts.file_nbytes),
        device_scratch_nbytes=SCRATCH_NBYTES,
    )


def compare(shapes: Callable[[str], ModelShape], quants: tuple[str, ...], hardware: Hardware, ask: Ask) -> Comparison:
    """Every strategy in each of `quants`, of which `shapes` gives the model's shape. Where it may hold all weights in
    memory and is quicker another way, that is a row, too."""
    rows: list[Row] = []
    refusals: list[Refusal] = []
    for quant in quants:
        model = shapes(quant)
        machine = machine_for(model, hardware, ask.mode)
        predictor = Predictor(model, machine, hardware.gpu)
        for strategy in (CPU, GPU, BOTH) if hardware.gpu is not None and ask.vram is not None else (CPU,):
            asked = Asked(model, machine, ask.workload, _budgets(strategy, ask))
            found = options(asked, predictor)
            if not found:
                refusals.append(Refusal(strategy, quant, _nearest(strategy, asked, hardware, ask)))
                continue
            chosen, resident = [best(found)], [option for option in found if option.is_resident]
            if resident and not chosen[0].is_resident:
                chosen.append(best(resident))
            rows += [_priced(_row(strategy, option, model, quant), hardware) for option in chosen]
    return Comparison(tuple(sorted(rows, key=lambda row: row.prediction.seconds)), tuple(refusals))


def _priced(row: Row, hardware: Hardware) -> Row:
    if hardware.usd_per_hour is None or not row.prediction.generated_tokens:
        return row
    per_token = hardware.usd_per_hour / 3600 / row.prediction.tokens_per_second
    return replace(row, usd_per_million_tokens=1e6 * per_token)


def _budgets(strategy: str, ask: Ask) -> Budgets:
    budgets = Budgets(ask.ram, ask.baseline, kv="auto", choose_kv_bits=True)
    if strategy == CPU:
        return budgets
    return replace(
        budgets,
        tiers=GPU_TIERS,
        vram=ask.vram or 0,
        context_nbytes=CONTEXT_NBYTES,
        decode_device="cpu" if strategy == BOTH else "gpu",
    )


def _row(strategy: str, option: Option, model: ModelShape, quant: str) -> Row:
    plan = option.plan
    held = plan.placement.resident_nbytes + (0 if plan.experts is None else plan.experts.nbytes)
    on_device = 0 if plan.device is None else plan.device.placement.resident_nbytes
    tier = "disk" if plan.cache.on_disk else "gpu" if plan.cache.on_device else "cpu"
    share = min(1.0, (held + on_device) / model.tape.total)
    prediction, is_resident = option.prediction, option.is_resident
    return Row(
        strategy, quant, plan.batch_size, tier, plan.cache.bits, share, prediction, plan, is_resident=is_resident
    )


def _nearest(strategy: str, asked: Asked, hardware: Hardware, ask: Ask) -> str:
    """What does not fit, and what would, in words."""
    least = min(batches(ask.workload))

    def ways(batch: int) -> list[Way]:
        return [way for bits in bits_of(asked.model, asked.budgets) for way in asked.with_bits(bits).ways(batch)]

    said, asks = f"does not fit in {format_size(ask.ram)}", []
    if strategy != CPU and hardware.gpu is not None:
        said = f"{said} of RAM and {format_size(ask.vram or 0)} of VRAM"
        vram = min(filter(None, (_more_vram(way, ask) for way in ways(least))), default=None)
        asks += [f"--vram {format_budget(vram)}"] if vram is not None and vram <= hardware.gpu.vram else []
    ram = min(filter(None, map(_more_ram, ways(least))), default=None)
    if ram is not None and (strategy == CPU or ram <= hardware.ram):
        asks.append(f"--ram {format_budget(ram)}")
    fewer = [batch for batch in candidates(least) if batch < least and any(_fits(way, ask.ram) for way in ways(batch))]
    asks += [f"--batch {batch}" for batch in fewer[-1:]]
    return f"{said}: the smallest that works is {', or '.join(asks)}" if asks else f"{said}, nor with more of either"


def _fits(way: Way, ram: int) -> bool:
    try:
        way.plan_at(ram)
    except BudgetError:
        return False
    return True


def _more_ram(way: Way) -> int | None:
    """The least budget of RAM; None where the GPU's memory does not suffice."""
    try:
        return smallest_budget(way.plan_at)
    except DeviceBudgetError:
        return None


def _more_vram(way: Way, ask: Ask) -> int | None:
    """The least budget of the GPU's memory; None where RAM does not suffice."""
    vram = min(way.smallest_vram(experts) for experts in way.asked.expert_choices)
    return vram if _fits(way.within(replace(way.asked.budgets, vram=vram)), ask.ram) else None
