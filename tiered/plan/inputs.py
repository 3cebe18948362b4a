"""What a plan is made from: the model, the machine, the work and the budgets, all of them numbers.

`model/shape.py` makes a ModelShape of a store and a graph, `bench/rates.py` measures a Machine, commands make their
Workload, and the runtime adds to the Budgets what the process itself takes. `make.py` turns the four into a Plan.
"""

import bisect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property
from typing import Final, Literal

from tiered.errors import ConfigError
from tiered.plan.kv import Bits, KVShape, LayerGroup, itemsize
from tiered.plan.placement import Tape
from tiered.plan.state import StateShape
from tiered.units import PAGE_TOKENS

MAX_BATCHED_TOKENS: Final = 4096
"""Tokens of a pass at most, in commands: so many take any processor far longer than the weights take any disk."""
_SPARE: Final = 1.1
"""Room in the cache, as a multiple of what sequences take on average; while several long ones run, fewer run."""
_ALIKE: Final = 0.9
"""So much of the longest sequence the mean one has where all count as equally long."""

KVTier = Literal["auto", "cpu", "disk", "gpu", "host"]
Computes = Literal["cpu", "gpu"]
"""What computes a phase: the processor, or the device."""


class Tier(Enum):
    """A place where weights can be, slowest first."""

    DISK = "disk"
    CPU = "cpu"
    GPU = "gpu"


def parse_tiers(text: str) -> tuple[Tier, ...]:
    """The tiers named by `text`, such as "disk,cpu"; the order is from slowest to fastest.

    Raises ConfigError that explains unknown names and combinations that cannot work.
    """
    names = [name.strip().lower() for name in text.split(",")]
    known = {tier.value: tier for tier in Tier}
    for name in names:
        if name not in known:
            raise ConfigError(f"--tiers {text!r}: unknown tier {name!r}; known tiers are disk, cpu and gpu")
    tiers = tuple(known[name] for name in names)
    order = list(Tier)
    if [order.index(tier) for tier in tiers] != sorted({order.index(tier) for tier in tiers}):
        right = ",".join(tier.value for tier in order if tier in tiers)
        raise ConfigError(f"--tiers {text!r}: name each tier once, slowest first: {right}")
    if tiers == (Tier.DISK,):
        raise ConfigError(f"--tiers {text!r}: weights on disk need a tier that computes; use disk,cpu or disk,cpu,gpu")
    if tiers == (Tier.DISK, Tier.GPU):
        raise ConfigError(
            f"--tiers {text!r}: what comes from disk passes through memory on its way to the GPU; use disk,cpu,gpu "
            "(with --resident-cpu 0 if nothing is to stay there)"
        )
    return tiers


def tiers_text(tiers: tuple[Tier, ...]) -> str:
    """As `parse_tiers` reads them."""
    return ",".join(tier.value for tier in tiers)


def check_decodes_on_processor(tiers: tuple[Tier, ...]) -> None:
    """Raise ConfigError unless the processor can decode beside a GPU: what it computes with must be in memory."""
    if Tier.CPU not in tiers:
        raise ConfigError("--decode-device cpu: needs weights in memory; use --tiers disk,cpu,gpu or cpu,gpu")


_VIEWS_NBYTES: Final = 10 * 1024
"""Bytes of the views of an expert's matrices: three tensors for a quantized one, 1 KB each. 6.3 KB were measured with
two matrices."""
_KNOWN_NBYTES: Final = 256
"""How often an expert was chosen, and where its matrices lie. 214 bytes were measured."""


@dataclass(frozen=True)
class ExpertShape:
    """The experts of a mixture whose layers can be read without them."""

    dense: Tape
    """The tape without experts."""
    layers: int
    """Layers that have experts."""
    count: int
    """Experts of such a layer."""
    chosen: int
    """Experts that compute for a token in such a layer."""
    nbytes: int
    """Bytes of the largest expert in memory."""
    file_nbytes: int
    """Bytes that reading one takes, on average."""
    weights: int
    """Number of weights of one."""
    operations: int = 0
    """What computing one takes beside its matrix products: operations, and calls of these products."""
    elements: int = 0
    """Numbers that these operations write for each of its rows."""

    @property
    def total(self) -> int:
        """Experts of all layers."""
        return self.layers * self.count

    def objects_nbytes(self, ram: int) -> int:
        """Bytes of Python's objects for these experts, where `ram` bytes are for all that is in memory: views of the
        matrices of those that it holds, and what is known of each one, chosen or not."""
        return min(self.total, ram // self.nbytes) * _VIEWS_NBYTES + self.total * _KNOWN_NBYTES

    def distinct(self, tokens: int) -> float:
        """How many experts of a layer `tokens` tokens are expected to choose between them, if all are chosen equally
        often: each one is missed by all tokens with a probability of (1 - chosen / count) ** tokens."""
        return self.count * (1 - (1 - self.chosen / self.count) ** tokens)

    def rows_each(self, tokens: int) -> int:
        """Rows that each of the experts that `tokens` tokens choose computes: those of the tokens that choose it."""
        return max(1, round(tokens * self.chosen / self.distinct(tokens)))


@dataclass(frozen=True)
class ModelShape:
    """A model in numbers, from a store's manifest and headers and from the model's graph."""

    tape: Tape
    """The units that are streamed, or held in memory, in the order of use."""
    weights: int
    """Number of weights in all blocks of the tape, experts and the head among them."""
    side_nbytes: int
    """Bytes of the embedding's scales and zeros, where they are apart from its rows."""
    tables_nbytes: int
    """Bytes in memory beside the tape: outer and small tensors in the compute dtype and the memory they are read
    through, copies of a layer's tensors that no module borrows, the embedding's scales and zeros, staging for its
    rows, buffers for chunks of compressed units."""
    buffers_nbytes: int
    """Bytes of these buffers."""
    hidden: int
    widest: int
    """The largest `out` of any linear layer or expert in a decoder layer."""
    vocab: int
    heads: int
    """Query heads."""
    dtype: str
    """The name of the compute dtype, as torch spells it."""
    groups: tuple[LayerGroup, ...]
    """Layers that keep keys and values, grouped by how far they look back and by the shape of what they keep."""
    eager_attention: bool
    """The family holds all attention scores in memory at once."""
    dense_attention: bool
    """The family wants keys and values in one piece, padded to equal length."""
    packed_nbytes: int
    """Bytes of one row of activations, packed in the order that a linear kernel needs."""
    quantization: str | None = None
    """The scheme of the layers' linear weights."""
    experts: ExpertShape | None = None
    """None where the model is no mixture, or one whose experts are not taken apart."""
    head_weights: int = 0
    """Of the weights, those of the head, which only rows with logits go through."""
    table_numbers: int = 0
    """Numbers that each token takes from tables which are read row by row, beside its embedding."""
    table_row_nbytes: int = 0
    """Bytes of the rows with these numbers, as they are stored."""
    state: StateShape | None = None
    """What recurrent layers keep of a sequence; None: there are none."""
    operations: int = 0
    """What all layers take for a micro-batch beside linear layers and experts: operations, and calls of linear layers.
    0: not known, as it is of a graph that cannot be tried."""
    elements: int = 0
    """Numbers that these operations write for each row."""
    float32_residual: bool = False
    """Layers return hidden states in float32, whatever the compute dtype."""

    def in_dtype(self, dtype: str) -> "ModelShape":
        """The shape as computed in another dtype, by its name, but for what tables take."""
        groups = (replace(group, shape=replace(group.shape, dtype=dtype)) for group in self.groups)
        state = None if self.state is None else self.state.in_dtype(dtype, self.dtype)
        return replace(self, dtype=dtype, groups=tuple(groups), state=state)

    @property
    def itemsize(self) -> int:
        """Bytes of the compute dtype."""
        return itemsize(self.dtype)

    @property
    def hidden_nbytes(self) -> int:
        """Bytes of a token's hidden states, as layers return them."""
        return self.hidden * (4 if self.float32_residual else self.itemsize)

    @property
    def layers(self) -> int:
        """Decoder layers: the head comes after them."""
        return len(self.tape.counts) - 1

    @cached_property
    def kv(self) -> KVShape | None:
        """What one token adds to one of the layers that keep most; None where no layer keeps any."""
        most = max(self.groups, key=lambda group: group.token_nbytes, default=None)
        return None if most is None else most.shape

    @property
    def queries_per_key(self) -> int:
        """Query heads that share a key head, in the layers of `kv`."""
        return 1 if self.kv is None else max(1, self.heads // self.kv.heads)

    @property
    def latent_dim(self) -> int:
        """Channels of a token's latents; 0: no layer attends to latents."""
        return max((group.shape.head_dim for group in self.groups if not group.shape.value_dim), default=0)

    @property
    def kv_token_nbytes(self) -> int:
        """Bytes of one token's keys and values in all layers, in the compute dtype."""
        return sum(group.token_nbytes for group in self.groups)

    @property
    def outer_nbytes(self) -> int:
        """Bytes that outer and small tensors, and copies of those that no module borrows, take on a device at most."""
        return self.tables_nbytes - self.side_nbytes - self.buffers_nbytes

    @property
    def gathered_nbytes(self) -> int:
        """Bytes that one token of a context adds to the keys and values of dense attention, in all copies: as cached,
        and repeated for every query head. 0 without dense attention."""
        if not self.dense_attention:
            return 0
        shapes = [group.shape for group in self.groups]
        most = max(((kv.heads + self.heads) * (kv.head_dim + kv.value_dim) for kv in shapes), default=0)
        return most * self.itemsize


@dataclass(frozen=True)
class ComputeRate:
    """Measured seconds of linear layers per weight, for some numbers of rows; others are interpolated."""

    rows: tuple[int, ...]
    seconds_per_weight: tuple[float, ...]

    def seconds(self, rows: int, weights: int) -> float:
        """Seconds for `rows` rows through `weights` weights; beyond the most rows measured they grow with the rows,
        and fewer than the least take as long as these."""
        if rows <= self.rows[0]:
            return self.seconds_per_weight[0] * weights
        if rows >= self.rows[-1]:
            return self.seconds_per_weight[-1] * weights * rows / self.rows[-1]
        at = bisect.bisect_right(self.rows, rows)
        low, high = self.rows[at - 1], self.rows[at]
        share = (rows - low) / (high - low)
        per_weight = self.seconds_per_weight[at - 1] * (1 - share) + self.seconds_per_weight[at] * share
        return per_weight * weights


@dataclass(frozen=True)
class QuantizedRates:
    """What a KV cache of so many bits takes."""

    bits: int
    attention_seconds: float
    """As `Machine` has them for 16 bits."""
    store_seconds: float


@dataclass(frozen=True)
class Machine:
    """How fast this machine is, where that has been measured, and what its kernels take."""

    scratch_nbytes: int
    """Bytes that a linear kernel takes besides its result and its packed input, with all threads."""
    disk_bytes_per_second: float | None = None
    """Sustained rate of plain reads."""
    linear: ComputeRate | None = None
    attention_seconds: float | None = None
    """Seconds per token of context, for one query of one sequence in one layer."""
    prompt_attention_flops: float | None = None
    """Multiply-adds times two per second of a prompt's attention, which costs less per query than decoding's."""
    disk_write_bytes_per_second: float | None = None
    """Sustained rate of writing, which a KV cache on disk asks for."""
    expert_bytes_per_second: float | None = None
    """Rate of reading experts, one by one at random places; None: as fast as in file order."""
    native_steps: bool = True
    """The library of kernels computes single tokens of recurrent layers."""
    device_scratch_nbytes: int = 0
    """Bytes of a device's memory that its kernels take besides results: what weights are widened into, and partial
    sums."""
    operation_seconds: float = 0.0
    """Seconds that a micro-batch takes for each operation of `ModelShape.operations`, however few its rows are."""
    element_seconds: float = 0.0
    """Seconds that a row takes for each number that these operations write."""
    reading_seconds: float = 0.0
    """Seconds by which computing takes longer for each byte that is read meanwhile: readers want processors, too."""
    kept_bytes_per_second: float | None = None
    """Rate at which a first pass reads what then stays in memory, which it tests and takes memory for; None: as fast as
    the rest."""
    touch_bytes_per_second: float | None = None
    """Rate at which memory is touched for the first time; None: not known, and counted as nothing."""
    recent_attention_seconds: float | None = None
    """The same as `attention_seconds` for tokens of the page that a sequence is filling, which is not quantized yet;
    None: as for others."""
    store_seconds: float = 0.0
    """Seconds of quantizing a page in one layer, for each of its tokens."""
    quantized: tuple[QuantizedRates, ...] = ()
    """What `attention_seconds` and `store_seconds` are for a KV cache of 8 and of 4 bits; none: as for 16."""

    def kept_rate(self, is_touched: bool) -> float:
        """Bytes per second that a first pass reads of what then stays in memory: no more than the disk's, nor, unless
        that memory `is_touched` before, than is touched. The disk's rate must be known.

        `kept_bytes_per_second` alone may be too much: small models, with which it is measured, get memory that the last
        one has just given back, which is touched twenty times as fast as what the host of a virtual machine must find.
        """
        assert self.disk_bytes_per_second is not None
        touch = None if is_touched else self.touch_bytes_per_second
        return min(filter(None, (self.disk_bytes_per_second, self.kept_bytes_per_second, touch)))

    def keeping(self, bits: int, on_device: bool = False) -> "Machine":
        """These rates with a KV cache of so many bits; those that a plan is made from are for 16. On a device that
        computes its pages are quantized there, which is counted as nothing."""
        found = next((rates for rates in self.quantized if rates.bits == bits), None)
        if found is None:
            return self
        return replace(
            self,
            attention_seconds=found.attention_seconds,
            recent_attention_seconds=self.attention_seconds,
            store_seconds=0.0 if on_device else found.store_seconds,
            quantized=(),
        )

    def with_memory_of(self, process: "Machine") -> "Machine":
        """These rates, with what kernels take in `process`: a description of a machine knows no process."""
        return replace(
            self,
            scratch_nbytes=process.scratch_nbytes,
            native_steps=process.native_steps,
            device_scratch_nbytes=process.device_scratch_nbytes,
        )

    def touch_seconds(self, nbytes: float) -> float:
        """What touching `nbytes` of memory for the first time takes."""
        return 0.0 if self.touch_bytes_per_second is None else nbytes / self.touch_bytes_per_second


Objective = Literal["latency", "throughput"]
"""What counts: how soon each sequence gets its next token, or how many tokens all get together per second."""


@dataclass(frozen=True)
class Workload:
    """What is to be run."""

    sequences: int = 1
    """Sequences in all."""
    max_context: int = 2048
    """Tokens of the longest sequence, prompt and completion together."""
    max_prompt: int = 0
    """Tokens of the longest prompt; 0: as long as the context."""
    tokens: int = 0
    """Tokens of all sequences together, prompts and completions; 0: each may be as long as the longest."""
    prompt_tokens: int = 0
    """Tokens of all prompts together; 0: each is as long as the longest, or, in a sequence that is shorter than the
    longest, as much shorter."""
    max_batched_tokens: int = 0
    """Tokens of a pass at most; prompts beyond it take several passes. 0: all prompts at once."""
    batch_size: int | None = None
    """Sequences at once, as asked for; None: not asked for."""
    choose_batch_size: bool = False
    """Without `batch_size`: True chooses the number of sequences at once with the most throughput, False takes all."""
    one_pass: bool = False
    """Sequences begin and end in the same pass, as those that are only scored do."""
    all_logits: bool = False
    """Every position gets logits, not only the last one of each sequence."""
    objective: Objective = "latency"
    is_whole: bool = False
    """Nothing else is run by the plan. Else what stays in memory may serve later runs, so as much stays as has room."""
    least_context: int = 0
    """If not 0, `max_context` is lowered to what the budget holds, but not below this."""

    def __post_init__(self) -> None:
        for name, value in (("sequences", self.sequences), ("context", self.max_context)):
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} {value!r}: expected a whole number above 0")

    @property
    def mean_context(self) -> float:
        """Tokens of a sequence on average."""
        return self.tokens / self.sequences if self.tokens else float(self.max_context)

    @property
    def mean_prompt(self) -> float:
        """Tokens of a prompt on average."""
        if self.prompt_tokens:
            return self.prompt_tokens / self.sequences
        return (self.max_prompt or self.max_context) * self.mean_context / self.max_context

    @property
    def runs_in_waves(self) -> bool:
        """Whether sequences are about equally long, so that those which begin together end together. Of others each
        makes room for the next one when it ends."""
        return self.mean_context >= _ALIKE * self.max_context

    def tokens_in_flight(self, batch_size: int, context: int) -> int:
        """Tokens of a pass at most, with `batch_size` sequences of up to `context` tokens at once."""
        tokens = batch_size * (self.max_prompt or context)
        return min(tokens, max(self.max_batched_tokens, batch_size)) if self.max_batched_tokens else tokens

    def kv_tokens(self, batch_size: int, context: int) -> int:
        """Tokens in the KV cache at most, of `batch_size` sequences of up to `context` tokens together."""
        if not self.tokens:
            return batch_size * context
        room = int(batch_size * self.mean_context * _SPARE) + PAGE_TOKENS
        return min(batch_size * context, max(context, room))

    def contexts(self, modest: int) -> Iterator[int]:
        """Contexts to try, each half as long as the one before; the first is at most `modest` if it may be lowered."""
        least = min(self.least_context, self.max_context)
        context = min(self.max_context, max(least, modest)) if least else self.max_context
        yield context
        while 0 < least < context:
            context = max(context // 2, least)
            yield context


@dataclass(frozen=True)
class Budgets:
    """What may be used, and how."""

    ram: int
    """Bytes for the whole process; of the host's memory."""
    baseline: int
    """Bytes of these that the process takes by itself: interpreter, torch, transformers, tokenizer, graph, kernels."""
    tiers: tuple[Tier, ...] = (Tier.DISK, Tier.CPU)
    kv: KVTier = "cpu"
    """Where the KV cache is; auto: where the job is expected to be quicker, or, where no rates are known, in
    memory if it fits there; host: the same, but not on a device."""
    kv_bits: Bits = 16
    choose_kv_bits: bool = False
    """Choose the precision instead: as many bits as cost little."""
    micro_batch: int | None = None
    """Tokens computed together at most; None: as many as memory allows and are useful."""
    vram: int = 0
    """Bytes of the device's memory; 0: no device computes."""
    context_nbytes: int = 0
    """Bytes of these that are taken before anything of ours is there: the driver's context, libraries, compiled
    kernels, and what the allocator rounds up to. Measured; 0 where a device is emulated."""
    device: str = ""
    """What the device is called; nothing depends on it."""
    resident_gpu: int | None = None
    """Bytes of weights that are wished to stay on the device; None: as many as there is room for."""
    resident_cpu: int | None = None
    """The same of those that stay in memory; None: or fewer, where a short job is quicker so."""
    prefill_device: Computes = "gpu"
    """What computes prompts, where there is a device."""
    decode_device: Computes = "gpu"
    """What computes the rest."""

    @property
    def has_device(self) -> bool:
        """Whether a device computes anything."""
        return self.vram > 0

    @property
    def computes(self) -> tuple[Computes, Computes]:
        """What computes prompts, and what computes the rest."""
        return (self.prefill_device, self.decode_device) if self.has_device else ("cpu", "cpu")

    @property
    def is_hybrid(self) -> bool:
        """Whether the device computes prompts only: what stays for longer is then planned as without one."""
        return self.has_device and self.decode_device == "cpu"
