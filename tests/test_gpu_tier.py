"""A device computes: the same tokens as the processor's, whatever is where, within both budgets.

The device is the emulated one in its chaotic mode: copies come early, late and out of step, memory that is not in use
is poison, and vector clocks find every wait that is missing (tests/device, tests/stream/test_device_feed.py).
"""

import json
import time
from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from transformers.cache_utils import DynamicCache

import tiered
from tests.answers import Answers, assert_same
from tests.commands import make_store, run_here
from tests.quick import represented
from tests.runtimes import open_runtime, reserved, run_greedy, run_segments
from tests.tiny import Tiny, prompts_for
from tests.waiting import SECONDS, wait_until
from tiered.device import Device, open_device
from tiered.device.emulated import EmulatedDevice
from tiered.errors import BudgetError, ConfigError, DeviceBudgetError
from tiered.generate.sampling import Sampler, SamplingParams
from tiered.generate.scheduler import Scheduler
from tiered.generate.sequence import Sequence
from tiered.host import Host
from tiered.model import ForwardBatch, Segment
from tiered.plan import ComputeRate, Machine, Plan, Tier, Workload, full_ring, make_plan
from tiered.plan.hardware import GpuRates
from tiered.plan.load import PassLoad
from tiered.plan.pace import LEAST, Pace
from tiered.plan.play import Player
from tiered.plan.play_seat import Device as SimulatedDevice
from tiered.prepare import measure_inputs
from tiered.runtime import Options, Runtime
from tiered.store import Store
from tiered.units import GIB, MIB

FAMILIES: Final = ("opt", "llama", "gemma3_text", "bloom", "mixtral")
ALL: Final = (Tier.DISK, Tier.CPU, Tier.GPU)
STEPS: Final = 4
PLENTY: Final = 4 * GIB


def two_units(sizes: Items[int]) -> int:
    return full_ring([[nbytes] for nbytes in sizes])


ROOM: Final[dict[str, Callable[[tuple[int, ...]], int]]] = {
    "all": sum,
    "some": lambda sizes: two_units(sizes) + max(sizes),
    "a ring": two_units,
}
"""Bytes for weights, on the device or in memory, of units of the given sizes."""
KV: Final = (("gpu", 16), ("gpu", 8), ("cpu", 16), ("cpu", 4), ("disk", 16), ("disk", 8))

pytestmark = pytest.mark.usefixtures("steady_baseline")


class Devices(list[Device]):
    """The devices that are opened: emulated ones, each with another schedule, or the real one."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def open(self, name: str, vram: int | None) -> Device:
        assert name == self.name and vram is not None
        self.append(EmulatedDevice(vram, seed=len(self)) if name == "emulated" else open_device(name, vram))
        return self[-1]


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def devices(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Devices:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    made = Devices(request.param)
    monkeypatch.setattr("tiered.host.open_device", made.open)
    return made


def options_for(
    store: Store, devices: Devices, on_device: str, in_ram: str, folder: Path, **options: Any
) -> dict[str, Any]:
    """Options with budgets that leave the rooms which ROOM calls `on_device` and `in_ram`."""
    options = {"tiers": ALL, "device": devices.name, "vram": PLENTY, "kv_folder": folder, **options}
    runtime = open_runtime(store, **options)
    model, machine, budgets = measure_inputs(store, runtime.options)
    ram = vram = PLENTY
    while True:
        plan = make_plan(model, machine, runtime.workload, replace(budgets, ram=ram, vram=vram))
        assert plan.device is not None
        enough = plan.needs.total + ROOM[in_ram](model.tape.nbytes)
        enough_there = plan.device.needs.total + ROOM[on_device](model.tape.nbytes)
        if enough >= ram and enough_there >= vram:
            return {**options, "ram": ram, "vram": vram}
        ram, vram = min(ram, enough), min(vram, enough_there)


@contextmanager
def opened(store: Store, devices: Devices, **options: Any) -> Iterator[Runtime]:
    """A runtime whose device stays within its budget and gives all its memory back."""
    with open_runtime(store, **options) as runtime:
        yield runtime
        assert devices[-1].peak_nbytes <= options["vram"]
        assert runtime.plan.device is not None and runtime.plan.device.nbytes <= options["vram"]
    if isinstance(devices[-1], EmulatedDevice):
        assert not devices[-1].in_use


def check_placement(plan: Plan, on_device: str) -> None:
    """Every unit has one place, and the budget gave what it is named after."""
    assert plan.device is not None
    there, here = plan.device.placement.resident, plan.placement.resident
    assert not there & here
    count = len(plan.tape.nbytes)
    assert {"all": len(there) == count, "some": 0 < len(there) < count, "a ring": not there}[on_device]


CELLS: Final = [
    (name, on_device, in_ram, *KV[(first + 2 * second + 3 * third) % len(KV)], rows)
    for first, name in enumerate(FAMILIES)
    for second, on_device in enumerate(ROOM)
    for third, (in_ram, rows) in enumerate((("all", None), ("some", 3), ("a ring", 5)))
    if name in ("llama", "gemma3_text") or (first + second + third) % 3 == 0
]
"""All rooms for a family without windows and one with; the others meet every room here and every room there."""


@pytest.mark.parametrize(
    ("name", "on_device", "in_ram", "kv", "bits", "rows"),
    represented(CELLS, [cell for cell in CELLS if cell[0] == "llama" and cell[1] == cell[2]]),
)
def test_the_tokens_are_the_processor_s(
    tiny: Tiny,
    devices: Devices,
    tmp_path: Path,
    name: str,
    on_device: str,
    in_ram: str,
    kv: str,
    bits: int,
    rows: int | None,
) -> None:
    store = tiny.store(name)
    asked = {"kv": kv, "kv_bits": bits, "micro_batch_rows": rows}
    options = options_for(store, devices, on_device, in_ram, tmp_path, **asked)
    with open_runtime(store, kv="cpu", kv_bits=bits) as runtime:
        expected = run_greedy(runtime, prompts_for(name), STEPS)
    with opened(store, devices, **options) as runtime:
        check_placement(runtime.plan, on_device)
        assert (runtime.plan.cache.on_device, runtime.plan.cache.on_disk) == (kv == "gpu", kv == "disk")
        first = run_greedy(runtime, prompts_for(name), STEPS, end=False)
        assert_same(first, expected)
        assert_same(run_greedy(runtime, prompts_for(name), STEPS), expected)


HYBRID: Final = [
    (name, in_ram, *KV[2 + (first + second) % 4])
    for first, name in enumerate(FAMILIES)
    for second, in_ram in enumerate(("all", "some", "a ring"))
    if name in ("opt", "gemma3_text") or (first + second) % 3 == 0
]


@pytest.mark.parametrize(
    ("name", "in_ram", "kv", "bits"), represented(HYBRID, [cell for cell in HYBRID if cell[:2] == ("opt", "some")])
)
def test_prompts_on_the_device_and_the_rest_on_the_processor_with_sequences_that_enter_and_leave(
    tiny: Tiny, devices: Devices, tmp_path: Path, name: str, in_ram: str, kv: str, bits: int
) -> None:
    store = tiny.store(name)
    asked = {"kv": kv, "kv_bits": bits, "micro_batch_rows": 9, "prefill_device": "gpu", "decode_device": "cpu"}
    options = options_for(store, devices, "a ring", in_ram, tmp_path, **asked)
    with open_runtime(store, kv="cpu", kv_bits=bits) as runtime:
        expected = stream_of_sequences(runtime, name)
    with opened(store, devices, **options) as runtime:
        assert (runtime.plan.prefill_device, runtime.plan.decode_device) == ("gpu", "cpu")
        found, read = stream_of_sequences(runtime, name), runtime.bytes_read
        assert_same(found, expected)
        tape = sum(runtime.plan.tape.nbytes)
        # Each unit was read at most once in a pass for both, and a little ahead.
        assert read <= (runtime.passes + 2) * tape + 4 * MIB


def stream_of_sequences(runtime: Runtime, name: str) -> Answers:
    """Greedy texts of four prompts, two at a time: each enters in a pass in which another one decodes."""
    prompts = [*prompts_for(name), *(prompt[::-1] for prompt in prompts_for(name))]
    tokens: list[list[int]] = [[] for _ in prompts]
    logits: list[list[torch.Tensor]] = [[] for _ in prompts]
    running: dict[int, tuple[Any, list[int]]] = {}
    waiting = deque(enumerate(prompts))
    while running or waiting:
        if waiting and len(running) < 2:
            number, prompt = waiting.popleft()
            kv = runtime.reserve(len(prompt) + STEPS)
            assert kv is not None
            running[number] = kv, prompt
        segments = [Segment(kv, ids, keep=len(ids)) for kv, ids in running.values()]
        for number, part in zip(list(running), run_segments(runtime, segments), strict=True):
            logits[number].append(part)
            tokens[number].append(int(part[-1].argmax()))
            kv, _ = running[number]
            running[number] = kv, [tokens[number][-1]]
            if len(tokens[number]) == STEPS:
                runtime.release(running.pop(number)[0])
    return Answers(tuple(tokens), tuple(torch.cat(parts) for parts in logits))


@pytest.mark.parametrize(
    ("name", "kv"), represented([("llama", "cpu"), ("mixtral", "disk"), ("falcon_h1", "cpu")], [("mixtral", "disk")])
)
def test_the_device_keeps_no_memory_for_prompts_while_only_the_processor_decodes(
    tiny: Tiny, devices: Devices, tmp_path: Path, name: str, kv: str
) -> None:
    store = tiny.store(name)
    asked = {"kv": kv, "micro_batch_rows": 9, "prefill_device": "gpu", "decode_device": "cpu"}
    options = options_for(store, devices, "a ring", "some", tmp_path, **asked)
    with open_runtime(store, kv=kv, kv_folder=tmp_path) as runtime:
        expected = [each.token_ids for each, _ in generated(runtime, devices, name)]
    with opened(store, devices, **options) as runtime:
        assert runtime.plan.device is not None
        kept: list[int] = []
        ring = runtime.plan.device.placement.ring_nbytes
        for each, held in generated(runtime, devices, name):
            assert each.token_ids == expected[len(kept)]
            with_prompts, without = (max(nbytes for found, nbytes in held if found is way) for way in (True, False))
            assert with_prompts >= ring > 0
            kept.append(without)
        assert kept == [runtime.rested_nbytes] * 3
        assert devices.name == "cuda" or kept == [0] * 3


def generated(runtime: Runtime, devices: Devices, name: str) -> Iterator[tuple[Sequence, list[tuple[bool, int]]]]:
    """Prompts one after the other, each with its text, and what the device's memory holds behind passes with prompts
    and without."""
    prompts = prompts_for(name)
    with Scheduler[Sequence](runtime, 2, lambda: False) as scheduler:
        for prompt in (*prompts, prompts[0][::-1]):
            sequence, held = Sequence(prompt, Sampler(SamplingParams(), 0), None, STEPS, frozenset()), []
            scheduler.add(sequence)
            while not scheduler.is_idle:
                scheduler.step()
                is_prompt = scheduler.costs.recent[-1].prompt_tokens > 0
                held.append((is_prompt, devices[-1].held_nbytes if devices else 0))
            yield sequence, held


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden states wait in the host's memory wherever they may, as they do where the device's is short."""
    monkeypatch.setattr("tiered.plan.way.Way._has_full_device_ring", lambda way, passes: False)


WAITING: Final = (
    ("llama", "gpu", 16, "gpu"),
    ("gemma3_text", "cpu", 8, "gpu"),
    ("bloom", "cpu", 16, "gpu"),
    ("mixtral", "disk", 16, "cpu"),
    ("opt", "disk", 8, "gpu"),
    ("opt", "cpu", 16, "cpu"),
)


@pytest.mark.parametrize(("name", "kv", "bits", "decode"), represented(WAITING, [WAITING[3]]))
@pytest.mark.usefixtures("waits")
def test_hidden_states_wait_in_memory_and_come_back_for_each_layer(
    tiny: Tiny, devices: Devices, tmp_path: Path, name: str, kv: str, bits: int, decode: str
) -> None:
    store = tiny.store(name)
    asked = {"kv": kv, "kv_bits": bits, "micro_batch_rows": 2, "decode_device": decode}
    with open_runtime(store, kv="cpu", kv_bits=bits) as runtime:
        expected = run_greedy(runtime, prompts_for(name), STEPS)
    options = {"tiers": ALL, "device": devices.name, "vram": PLENTY, "kv_folder": tmp_path, **asked}
    with opened(store, devices, **options) as runtime:
        plan = runtime.plan
        assert plan.device is not None and plan.device.waiting is not None
        tokens = sum(map(len, prompts_for(name)))
        assert plan.needs.waiting >= tokens * plan.device.waiting.token_nbytes
        assert_same(run_greedy(runtime, prompts_for(name), STEPS, end=False), expected)
        assert_same(run_greedy(runtime, prompts_for(name), STEPS), expected)
        # Those of the prompts, not those of decoding, which are in a slot each. Weights are counted behind computing.
        runtime.stop_streaming()
        crossed = runtime.host.trace.total("bus").nbytes - runtime.bus_nbytes
        assert crossed == 2 * plan.waiting_nbytes(tokens)


@pytest.mark.usefixtures("waits")
def test_hidden_states_of_a_caller_s_own_passes_wait_as_well(tiny: Tiny, devices: Devices, tmp_path: Path) -> None:
    store, ids = tiny.store("llama"), torch.tensor([prompt[:12] for prompt in prompts_for("llama")])

    def logits(**options: Any) -> torch.Tensor:
        with open_runtime(store, micro_batch_rows=4, **options) as runtime:
            (found,) = runtime.forward([ForwardBatch(ids, DynamicCache(), logits_to_keep=0)]).logits
            assert runtime.plan.device is None or runtime.plan.device.waiting is not None
            return found

    expected = logits()
    torch.testing.assert_close(logits(tiers=ALL, device=devices.name, vram=PLENTY, kv_folder=tmp_path), expected)


KINDS: Final = {
    "deepseek_v3": "latents, and experts in groups",
    "llama4_text": "chunks, and experts that get scaled inputs",
    "gemma4_text": "a table of rows by id, and layers that read another's pages",
    "gpt_oss": "sinks",
    "falcon-new": "linear layers of its own",
    "dbrx": "experts of its own",
    "gpt_bigcode": "one head of keys, and positions in a table",
    "bitnet": "norms inside projections",
}
"""What families above have not. Those with recurrent layers are in `test_gpu_states.py`; `model/test_elsewhere.py` goes
through all, without numbers."""


@pytest.mark.parametrize(
    ("name", "decode"),
    represented([(name, ("gpu", "cpu")[number % 2]) for number, name in enumerate(KINDS)], [("deepseek_v3", "gpu")]),
)
def test_every_kind_of_family_computes_there(
    tiny: Tiny, devices: Devices, tmp_path: Path, name: str, decode: str
) -> None:
    options: dict[str, Any] = {"tiers": ALL, "device": devices.name, "vram": GIB, "decode_device": decode}
    with opened(tiny.store(name), devices, **options, ram=PLENTY, resident_cpu=0, kv_folder=tmp_path) as runtime:
        assert_same(run_greedy(runtime, prompts_for(name), STEPS), tiny.reference(name))


@pytest.mark.parametrize("tiers", [(Tier.CPU, Tier.GPU), (Tier.GPU,)], ids=["cpu,gpu", "gpu"])
def test_without_the_disk_nothing_is_read_after_the_first_pass(
    tiny: Tiny, devices: Devices, tmp_path: Path, tiers: tuple[Tier, ...]
) -> None:
    on_device = "some" if Tier.CPU in tiers else "all"
    store = tiny.store("llama")
    options = options_for(store, devices, on_device, "all", tmp_path, tiers=tiers)
    with opened(store, devices, **options) as runtime:
        assert not runtime.plan.read_nbytes
        first = run_greedy(runtime, prompts_for("llama"), 1, end=False)
        wait_until(lambda: runtime.bus_nbytes >= sum(runtime.plan.tape.nbytes))  # it is counted behind computing
        tape = sum(unit.nbytes for units in store.dense_units for unit in units)
        read, copied = runtime.bytes_read, runtime.bus_nbytes
        assert_same(first, tiny.reference("llama"))
        assert_same(run_greedy(runtime, prompts_for("llama"), STEPS), tiny.reference("llama"))
        # Rows of the embedding are read in every pass.
        assert runtime.bytes_read - read < tape
        assert bool(runtime.bus_nbytes - copied) == (Tier.CPU in tiers)


def test_what_a_refusal_names_is_enough(tiny: Tiny, devices: Devices, tmp_path: Path) -> None:
    store = tiny.store("opt")
    options: dict[str, Any] = {"tiers": ALL, "device": devices.name, "kv_folder": tmp_path}
    with pytest.raises(DeviceBudgetError) as refused, open_runtime(store, **options, vram=MIB, ram=PLENTY):
        pass
    assert refused.value.smallest_bytes is not None
    vram = -(-refused.value.smallest_bytes // MIB) * MIB
    with pytest.raises(DeviceBudgetError), open_runtime(store, **options, vram=vram - MIB, ram=PLENTY):
        pass
    with pytest.raises(BudgetError) as short, open_runtime(store, **options, vram=vram, ram=64 * MIB):
        pass
    assert short.value.smallest_bytes is not None
    ram = -(-short.value.smallest_bytes // MIB) * MIB
    with opened(store, devices, **options, vram=vram, ram=ram) as runtime:
        assert_same(run_greedy(runtime, prompts_for("opt"), STEPS), tiny.reference("opt"))


def test_a_device_that_cannot_be_used_is_an_error_or_the_processor_computes(
    tiny: Tiny, caplog: pytest.LogCaptureFixture
) -> None:
    store = tiny.store("opt")
    with pytest.raises(ConfigError, match=r"^cuda:99: "), open_runtime(store, tiers=ALL, device="cuda:99"):
        pass
    with open_runtime(store, tiers=ALL, device="cuda:99", fallback="cpu") as runtime:
        assert runtime.plan.device is None and runtime.host.device_refusal is not None
        assert_same(run_greedy(runtime, prompts_for("opt"), STEPS), tiny.reference("opt"))
    assert sum("the processor computes instead" in record.message for record in caplog.records) == 1


@pytest.mark.timeout(300)
@pytest.mark.parametrize("decodes", ["gpu", "cpu"])
def test_a_simulation_foretells_the_passes_of_a_paced_device(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, decodes: Any
) -> None:
    # Where the processor decodes, each pass has another prompt for the device beside a sequence that decodes.
    is_hybrid = decodes == "cpu"
    paced, steps = Devices("emulated"), 5
    monkeypatch.setattr("tiered.host.open_device", paced.open)
    store = tiny.store("llama")
    options = options_for(store, paced, "a ring" if is_hybrid else "some", "all", tmp_path, decode_device=decodes)

    def run(rate: float, is_enough: Callable[[Runtime, list[float]], bool]) -> list[float]:
        """Seconds of passes over a bus of `rate` bytes per second, until there are enough."""
        monkeypatch.setattr(
            "tiered.host.open_device", lambda _, vram: EmulatedDevice(vram, mode="paced", copy_rate=rate)
        )
        with open_runtime(store, **options) as runtime, ExitStack() as stack:
            kv, ids, seconds = reserved(stack, runtime, 40), [5, 6, 7], list[float]()
            while not is_enough(runtime, seconds):
                with ExitStack() as newcomers:
                    segments = [Segment(kv, ids, keep=1)]
                    if is_hybrid and seconds:
                        segments.append(Segment(reserved(newcomers, runtime, 8), [5, 6, 7], keep=1))
                    start = time.perf_counter()
                    logits, *_ = run_segments(runtime, segments)
                    seconds.append(time.perf_counter() - start)
                ids = [int(logits[-1].argmax())]
            return seconds

    @cache
    def expected(runtime: Runtime, rate: float) -> float:
        plan = runtime.plan
        assert plan.device is not None and plan.bus_nbytes > 0
        assert (plan.bus_nbytes == plan.tape.total) is is_hybrid
        machine = Machine(0, linear=ComputeRate((1,), (1e-15,)), disk_bytes_per_second=1e12, attention_seconds=0.0)
        device = SimulatedDevice.of(plan, GpuRates("paced", PLENTY, rate, rate, 1e12, 1e15))
        player = Player(plan, runtime.shape, machine, device)
        prompt = (range(3),)
        beside = prompt if is_hybrid else ()
        later = [PassLoad((range(at, at + 1), *beside), 1, 1 + len(beside), False) for at in range(3, 2 + steps)]
        player.run(iter([PassLoad(prompt, 0, 1, False), *later]), Pace())
        return sum(each.seconds for each in player.passes[2:])

    def is_foretold() -> bool:
        # What this machine computes in a pass, and how other programs delay it now, is to be a trifle beside the bus.
        fast = run(1e12, lambda _, seconds: len(seconds) == 6)
        rate = min(2e6, store.tape_nbytes / (20 * max(fast[2:])))

        def is_enough(runtime: Runtime, seconds: list[float]) -> bool:
            wanted = expected(runtime, rate)
            found.append((sum(seconds[2 - steps :]), wanted))
            is_right = len(seconds) >= steps and found[-1][0] == pytest.approx(wanted, rel=0.1)
            return is_right or len(seconds) == 20

        run(rate, is_enough)
        return found[-1][0] == pytest.approx(found[-1][1], rel=0.1)

    # Three passes in a row are looked for that nothing delays, until other programs have left this one alone so long.
    found: list[tuple[float, float]] = []
    deadline = time.monotonic() + 2 * SECONDS
    while not is_foretold():
        assert time.monotonic() < deadline, found


@pytest.mark.timeout(300)
@pytest.mark.parametrize("decodes", ["gpu", "cpu"])
def test_prompts_that_come_later_compute_while_weights_cross_the_bus_for_them(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, decodes: Any
) -> None:
    paced, store, count, length = Devices("emulated"), tiny.store("llama"), 4, 90
    options = options_for(store, paced, "a ring", "all", tmp_path, decode_device=decodes)
    # A pass takes a second to copy, and next to nothing to compute.
    monkeypatch.setattr(
        "tiered.host.open_device",
        lambda _, vram: EmulatedDevice(vram, mode="paced", copy_rate=float(store.tape_nbytes)),
    )
    given = Options(**{"dtype": "float32", "threads": 1, **options, "ram": PLENTY, "vram": PLENTY, "resident_gpu": 0})
    work = Workload(count, 112, length, max_batched_tokens=1024)
    with Runtime(store, work, given) as runtime, Scheduler[Sequence](runtime, count, lambda: False) as scheduler:
        assert runtime.plan.bus_nbytes == runtime.plan.tape.total

        def add(ids: list[int], tokens: int) -> Sequence:
            made = Sequence(ids, Sampler(SamplingParams(), 0), None, tokens, frozenset())
            scheduler.add(made)
            return made

        first = add([5, 6, 7], 20)
        for _ in range(3):
            scheduler.step()
        later = [add([5 + number] * length, 2) for number in range(count - 1)]
        while not all(sequence.token_ids for sequence in later):
            scheduler.step()
        shared = [cost.prompt_tokens for cost in scheduler.costs.recent if cost.prompt_tokens][1:]
        assert shared[0] == LEAST and sum(shared) == (count - 1) * length
        assert len(shared) == 3 and len(first.token_ids) < 20


def test_transformers_own_generate_computes_on_the_device_with_beams_and_caches_of_its_own(
    devices: Devices, tmp_path: Path
) -> None:
    store, ids = make_store(tmp_path), torch.tensor([[5, 300, 41, 7, 99]])

    def generated(**options: Any) -> torch.Tensor:
        with tiered.load(store, context=60, sequences=3, ram=PLENTY, dtype="float32", **options) as loaded:
            if options:
                assert loaded.runtime.plan.cache.on_device
            found: torch.Tensor = loaded.model.generate(ids, max_new_tokens=STEPS, num_beams=3, do_sample=False)
            if options and isinstance(devices[-1], EmulatedDevice):
                # The cache is transformers' own: what the plan counts for it is left free.
                assert "kv" not in devices[-1].in_use
            return found

    expected = generated()
    assert torch.equal(generated(tiers="disk,cpu,gpu", device=devices.name, vram=PLENTY), expected)


def test_transformers_own_generate_has_prompts_computed_on_the_device_and_the_rest_on_the_processor(
    devices: Devices, tmp_path: Path
) -> None:
    store, ids = make_store(tmp_path), torch.tensor([[5, 300, 41, 7, 99]])
    hybrid = ["--tiers", "disk,cpu,gpu", "--device", devices.name, "--vram", "1GiB", "--decode-device", "cpu"]
    with tiered.load(store, context=60, ram=PLENTY, dtype="float32") as loaded:
        whole = loaded.model(ids).logits
        text = str(loaded.tokenizer.decode(ids[0]))
        prompt = loaded.tokenizer(text, return_tensors="pt")["input_ids"]
        expected = loaded.model.generate(prompt, max_new_tokens=STEPS, do_sample=False)
    options: dict[str, Any] = {"tiers": "disk,cpu,gpu", "device": devices.name, "vram": GIB, "decode_device": "cpu"}
    with tiered.load(store, context=60, ram=PLENTY, dtype="float32", **options) as loaded:
        runtime = loaded.runtime
        assert not runtime.plan.cache.on_device
        # A prompt passes in several micro-batches, and goes on in a forward that finds a cache.
        runtime.plan = replace(runtime.plan, micro_batch_rows=2)
        first = loaded.model(ids[:, :3], use_cache=True)
        # What the device is given is copied to it, and counted by and by: all weights, for the prompt.
        wait_until(lambda: runtime.bus_nbytes >= runtime.plan.tape.total)
        rest = loaded.model(ids[:, 3:], past_key_values=first.past_key_values)
        found = torch.cat([first.logits, rest.logits], dim=1)
        torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-4)
        assert torch.equal(loaded.model.generate(prompt, max_new_tokens=STEPS, do_sample=False), expected)
        assert all(device.peak_nbytes <= GIB for device in devices)
    words = ["--dtype", "float32", "-p", text, "-n", str(STEPS), "--ignore-eos", "--no-measure", "--json", *hybrid]
    done = run_here("generate", store, *words)
    (completion,) = json.loads(done.out)["completions"]
    assert completion["token_ids"] == expected[0, prompt.shape[1] :].tolist()


def test_two_runtimes_share_the_memory_of_a_device(tiny: Tiny, devices: Devices, tmp_path: Path) -> None:
    store, host = tiny.store("llama"), Host(1, device=devices.name, vram=PLENTY)
    options = {"tiers": ALL, "device": devices.name, "vram": PLENTY, "kv_folder": tmp_path}
    with open_runtime(store, host=host, **options) as first, open_runtime(store, host=host, **options) as second:
        assert first.plan.device is not None and second.plan.device is not None
        assert second.plan.device.vram == PLENTY - first.plan.device.nbytes + first.plan.device.needs.context
        for runtime in (first, second):
            assert_same(run_greedy(runtime, prompts_for("llama"), STEPS, end=False), tiny.reference("llama"))


def test_memory_that_runs_out_in_the_middle_is_an_error_of_the_budget_and_the_next_pass_is_right(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, devices: Devices, tmp_path: Path
) -> None:
    store = tiny.store("llama")
    options = options_for(store, devices, "some", "all", tmp_path)
    with opened(store, devices, **options) as runtime, ExitStack() as stack, monkeypatch.context() as patch:
        assert runtime.host.computer is not None
        patch.setattr(runtime.host.computer.kernels, "attention", out_of_memory)
        with pytest.raises(BudgetError, match="--vram"):
            run_segments(runtime, [Segment(reserved(stack, runtime, 40), [5, 6, 7], keep=1)])
        patch.undo()
        stack.close()
        assert_same(run_greedy(runtime, prompts_for("llama"), STEPS), tiny.reference("llama"))


def out_of_memory(call: object) -> torch.Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
