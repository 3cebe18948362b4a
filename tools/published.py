"""What published systems should reach for OPT, from their published policies and their machines' rates alone.

In: a policy (who computes, how many sequences, which share of weights and cache lies where, in how many bits) and a
machine. Out: seconds of prefill and decoding. `which_way.py` prints them beside what was published.

Nothing is fitted to a figure that is predicted. The schedule is FlexGen's: attention and MLP of a layer are steps of
their own, once per micro-batch; a step takes the longest of its lanes, and the next begins when all have ended. The
next step's weights are read during the first micro-batch only (prefetch depth 1). Without overlap lanes add up.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final, Literal

from tiered.plan.hardware import Hardware

Where = tuple[float, float, float]
"""Shares of bytes on the GPU, in the processor's memory and on disk."""
ON_GPU: Final[Where] = (1, 0, 0)
IN_RAM: Final[Where] = (0, 1, 0)
ON_DISK: Final[Where] = (0, 0, 1)
_UNPACK_NBYTES: Final = 13
"""Bytes of GPU memory that FlexGen's decompression touches per 4-bit value, counted from its operations: a shift, a
mask, two strided copies to 16 bits (5 bytes together), a division and an addition in place (4 each)."""
_WORKSPACE: Final = 5
"""Times the bytes of a 16-bit cache that FlexGen's attention on the processor moves: read them, write them in 32 bits,
read those."""


@dataclass(frozen=True)
class Shape:
    """An OPT model; embeddings and norms, under 1 % of the weights, are left out."""

    layers: int
    hidden: int


OPT_175B: Final = Shape(96, 12288)
OPT_30B: Final = Shape(48, 7168)


@dataclass(frozen=True)
class Policy:
    """How a system runs a batch."""

    micro_batch: int
    micro_batches: int = 1
    weights: Where = IN_RAM
    cache: Where = IN_RAM
    weight_bits: float = 16
    cache_bits: float = 16
    computes: Literal["gpu", "cpu"] = "gpu"
    cpu_attention: bool = False
    """Decoding's attention is the processor's where the GPU computes the rest."""
    overlap: bool = True

    @property
    def batch(self) -> int:
        """Sequences of a block."""
        return self.micro_batch * self.micro_batches


@dataclass(frozen=True)
class Lanes:
    """Seconds of one step, by what is busy; `weights` are those of the next step."""

    compute: float
    weights_disk: float
    weights_bus: float
    cache_disk: float
    cache_bus: float

    def seconds(self, micro_batches: int, overlap: bool) -> float:
        """Of the step for all micro-batches."""
        disk, bus = self.cache_disk + self.weights_disk, self.cache_bus + self.weights_bus
        each = (self.compute, self.cache_disk, self.cache_bus)
        if not overlap:
            return micro_batches * sum(each) + self.weights_disk + self.weights_bus
        return max(self.compute, disk, bus) + (micro_batches - 1) * max(each)


@dataclass(frozen=True)
class Passes:
    """Seconds of a whole block of sequences."""

    prefill: float
    decode: float


def simulate(policy: Policy, shape: Shape, hardware: Hardware, prompt: int, generate: int) -> Passes:
    """Seconds that `policy` takes for one block: its prompts, and the `generate - 1` passes after them."""

    def took(rows: int, context: float, is_prefill: bool) -> float:
        steps = step_lanes(policy, shape, hardware, rows, context, is_prefill)
        return shape.layers * sum(lanes.seconds(policy.micro_batches, policy.overlap) for lanes in steps)

    decode = (generate - 1) * took(1, prompt + generate / 2, False)
    return Passes(took(prompt, prompt, True), decode)


def step_lanes(
    policy: Policy, shape: Shape, hardware: Hardware, rows: int, context: float, is_prefill: bool
) -> Iterator[Lanes]:
    """Attention and MLP of a layer, for `rows` tokens of each sequence that see `context` tokens."""
    square = shape.hidden**2
    # Attention has 4 square matrices, the MLP has 8; each step reads the other's.
    for weights, following, has_cache in ((4 * square, 8 * square, True), (8 * square, 4 * square, False)):
        compute = _linear(policy, hardware, weights, rows * policy.micro_batch)
        nbytes = following * policy.weight_bits / 8
        on_gpu = policy.computes == "gpu"
        lanes = Lanes(
            compute,
            nbytes * policy.weights[2] / hardware.disk.read,
            nbytes * (1 - policy.weights[0]) / _bus(hardware) if on_gpu else 0.0,
            0.0,
            0.0,
        )
        yield _with_cache(lanes, policy, shape, hardware, context, is_prefill) if has_cache else lanes


def _linear(policy: Policy, hardware: Hardware, weights: int, rows: int) -> float:
    """Seconds of a micro-batch through `weights` weights."""
    if policy.computes == "cpu":
        rate = hardware.cpu
        return max(2 * rows * weights / rate.prefill_attention, weights * policy.weight_bits / 8 / rate.memory)
    gpu = hardware.gpu
    assert gpu is not None
    unpacked = _UNPACK_NBYTES * weights / gpu.memory if policy.weight_bits < 8 else 0.0
    return max(2 * rows * weights / gpu.flops, 2 * weights / gpu.memory) + unpacked


def _with_cache(
    lanes: Lanes, policy: Policy, shape: Shape, hardware: Hardware, context: float, is_prefill: bool
) -> Lanes:
    """What keys and values of one micro-batch in one layer add: prompts write them, decoding reads them."""
    values = 2 * policy.micro_batch * context * shape.hidden
    nbytes = values * policy.cache_bits / 8
    crosses = policy.computes == "gpu" and not (policy.cpu_attention and not is_prefill)
    disk = nbytes * policy.cache[2] / (hardware.disk.write if is_prefill else hardware.disk.read)
    bus = nbytes * (1 - policy.cache[0]) / _bus(hardware) if crosses else 0.0
    if is_prefill:
        # Every query sees half of the prompt on average: two products of a multiply-add per channel.
        flops = 2 * policy.micro_batch * context * context * shape.hidden
        gpu = hardware.gpu
        attention = flops / (gpu.flops if policy.computes == "gpu" and gpu else hardware.cpu.prefill_attention)
    elif policy.computes == "cpu":
        attention = nbytes / hardware.cpu.memory
    elif policy.cpu_attention:
        attention = _WORKSPACE * nbytes / hardware.cpu.memory
    else:
        assert hardware.gpu is not None
        touched = nbytes if policy.cache_bits == 16 else values * (_UNPACK_NBYTES + 2)
        attention = touched / hardware.gpu.memory
    return replace(lanes, compute=lanes.compute + attention, cache_disk=disk, cache_bus=bus)


def _bus(hardware: Hardware) -> float:
    assert hardware.gpu is not None
    return hardware.gpu.host_to_device


@dataclass(frozen=True)
class Published:
    """A published figure beside its prediction, in tokens per second unless `system` says seconds."""

    system: str
    published: float
    predicted: float
    why: str = ""
    """Why they differ; wherever the ratio is outside 0.7 to 1.4."""


_FLEXGEN: Final = Policy(32, 8, (0, 0.5, 0.5), ON_DISK, cpu_attention=True)
_FLEXGEN_4_BIT: Final = Policy(48, 3, IN_RAM, IN_RAM, 4.5, 4.5)
_PTDQ: Final = Policy(8, 1, IN_RAM, IN_RAM, 8, 32, "cpu")
"""PyTorch's dynamic quantization: int8 weights, all else in 32 bits."""
_GPU_INT8: Final = Policy(8, 1, IN_RAM, IN_RAM, 8, 16)
_UNFUSED: Final = "84 s per pass, predicted 42: decompression is six PyTorch operations, here at memory bandwidth"
_PTDQ_READS: Final = "PTDQ read {} of the {} GB/s of memory that the file assumes"


def rows(paper: Hardware, servers: dict[str, Hardware]) -> Iterator[Published]:
    """Every figure whose policy is published; `paper`: the T4 machine, `servers`: the CPUs of the discussion."""
    yield from _paper_rows(paper)
    yield from _discussion_rows(paper, servers)


def _paper_rows(t4: Hardware) -> Iterator[Published]:
    slow = replace(t4, disk=replace(t4.disk, read=0.5e9, write=0.5e9))

    def row(
        name: str,
        published: float,
        policy: Policy,
        prompt: int = 512,
        generate: int = 32,
        why: str = "",
        shape: Shape = OPT_175B,
        hardware: Hardware = t4,
    ) -> Published:
        took = simulate(policy, shape, hardware, prompt, generate)
        tokens = policy.batch * generate
        return Published(f"{name}, {prompt}/{generate}", published, tokens / (took.prefill + took.decode), why)

    def batch(policy: Policy, micro_batch: int, micro_batches: int) -> Policy:
        return replace(policy, micro_batch=micro_batch, micro_batches=micro_batches)

    yield row("ZeRO-Inference", 32 / 5024, Policy(1, 1, ON_DISK, ON_GPU))
    yield row("Accelerate", 64 / 7633, Policy(2, 1, ON_DISK, ON_GPU, overlap=False))
    yield row("FlexGen", 0.69, _FLEXGEN)
    yield row("FlexGen", 1.36, batch(_FLEXGEN, 64, 8), 256)
    yield row("FlexGen", 0.35, batch(_FLEXGEN, 12, 12), 1024)
    unknown = "policy not published, taken from 256/32; theirs is probably better"
    yield row("FlexGen", 2.409, batch(_FLEXGEN, 64, 8), 128, 128, unknown)
    yield row("FlexGen (policy of 512/32)", 0.451, _FLEXGEN, 512, 8)
    yield row("FlexGen without overlap", 0.59, replace(_FLEXGEN, overlap=False))
    yield row("FlexGen without policy search", 0.27, batch(_FLEXGEN, 32, 1))
    yield row("FlexGen without CPU attention", 0.62, replace(_FLEXGEN, cpu_attention=False))
    bare = replace(t4, disk=replace(t4.disk, read=1.6e9, write=1.3e9))
    yield row("FlexGen, page cache off, disk of 1.6 GB/s", 0.49, _FLEXGEN, hardware=bare)
    above = "0.30 takes 0.9 GB/s for weights and cache, more than this disk is said to give: not explained"
    yield row("FlexGen, disk of 0.5 GB/s", 0.30, _FLEXGEN, why=above, hardware=slow)
    yield row("FlexGen 4-bit", 1.12, _FLEXGEN_4_BIT, why=_UNFUSED)
    yield row("FlexGen 4-bit", 2.26, batch(_FLEXGEN_4_BIT, 96, 3), 256, why="the same")
    yield row("FlexGen 4-bit", 0.42, batch(_FLEXGEN_4_BIT, 12, 4), 1024, why="the same")
    yield row("FlexGen 4-bit (policy of 256/32)", 4.264, batch(_FLEXGEN_4_BIT, 96, 3), 128, 128, "the same")
    yield row("FlexGen 4-bit (policy of 512/32)", 0.559, _FLEXGEN_4_BIT, 512, 8, "the same")
    small = Policy(48, 3, (0.2, 0.8, 0), IN_RAM, cpu_attention=True)
    yield row("OPT-30B, FlexGen", 7.32, small, shape=OPT_30B)
    yield row("OPT-30B, FlexGen, 4-bit cache", 8.70, Policy(64, 8, cache_bits=4.5), why="the same", shape=OPT_30B)


def _discussion_rows(t4: Hardware, servers: dict[str, Hardware]) -> Iterator[Published]:
    """512/32, batch 8."""
    prompts, tokens = 8 * 512, 8 * 32
    prefill = simulate(_GPU_INT8, OPT_175B, t4, 512, 32).prefill
    own = {name: simulate(_PTDQ, OPT_175B, server, 512, 32) for name, server in servers.items()}
    here = simulate(_PTDQ, OPT_175B, t4, 512, 32)
    integers = "int8 products are up to four times as many per cycle as the FLOP/s that the file assumes"
    yield Published("PTDQ int8, T4's host, prompt tokens/s", 5.7, prompts / here.prefill, integers)
    yield Published("PTDQ int8, T4's host, decoding", 1.08, tokens / here.decode, _PTDQ_READS.format(23, 64))
    both = "the two above, which partly cancel"
    yield Published("PTDQ int8, T4's host, in all", 0.269, tokens / (here.prefill + here.decode), both)
    split = "bitsandbytes takes outliers apart; the file's FLOP/s are those of plain 16-bit products"
    yield Published("T4, int8, prompt tokens/s", prompts / 91.18, prompts / prefill, split)
    yield Published("hybrid, T4's host", 0.78, tokens / (prefill + here.decode), "as its two phases")
    xeon, epyc, cloud = own["xeon"], own["epyc"], own["cloud"]
    yield Published("hybrid, two Xeon 6426Y", 1.19, tokens / (prefill + xeon.decode), _PTDQ_READS.format(45, 300))
    yield Published("hybrid, EPYC 7742", 1.67, tokens / (prefill + epyc.decode), "mostly the GPU's prefill, as above")
    yield Published("PTDQ, 96 vCPUs, decoding", 1.42, tokens / cloud.decode, _PTDQ_READS.format(30, 140))


def breakdown(t4: Hardware) -> Iterator[Published]:
    """FlexGen's published seconds by lane, OPT-175B, 512/32, measured without overlap."""
    found: dict[str, float] = {}
    for phase, tokens, context, passes in (("prefill", 512, 512.0, 1), ("decode", 1, 528.0, 31)):
        for lanes in step_lanes(_FLEXGEN, OPT_175B, t4, tokens, context, phase == "prefill"):
            each = passes * OPT_175B.layers
            for name, seconds in (
                ("compute", lanes.compute * _FLEXGEN.micro_batches),
                ("weights", lanes.weights_disk + lanes.weights_bus),
                ("cache", (lanes.cache_disk + lanes.cache_bus) * _FLEXGEN.micro_batches),
            ):
                found[f"{phase}, {name}"] = found.get(f"{phase}, {name}", 0.0) + seconds * each
    for name, seconds in zip(found, (2220, 768, 261, 1498, 3047, 7046), strict=True):
        yield Published(f"FlexGen, {name}, seconds", seconds, found[name])
