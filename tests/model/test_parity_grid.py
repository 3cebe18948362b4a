"""Same answers whatever the memory, the read-ahead and the split; and exactly the planned bytes read.

Budgets are derived from the plan itself: what the process needs, plus room for so many blocks.
"""

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain
from typing import Any, Final

import pytest

from tests.answers import STEPS, Answers, assert_same
from tests.convert.models import TRAINED
from tests.quick import represented
from tests.runtimes import open_runtime, reserved, run_greedy, run_segments
from tests.tiny import Tiny, prompts_for
from tiered.convert import ConvertOptions, convert_checkpoint
from tiered.errors import BudgetError, InterruptedRun
from tiered.io import CHUNK_BUFFERS, Arena, ChunkBuffers, DiskReader, VerifyPolicy
from tiered.model import Segment
from tiered.plan import Plan, Tier, full_ring, make_plan
from tiered.plan.budget import BASELINE_VARIES_NBYTES
from tiered.prepare import measure_inputs
from tiered.runtime import Runtime
from tiered.store import CHUNK_NBYTES, Store, Unit
from tiered.units import GIB, MIB

FAMILIES: Final = ("opt", "llama", "gemma3_text", "bloom")


def two_units(sizes: Sequence[int]) -> int:
    """A full ring for units of these sizes."""
    return full_ring([[nbytes] for nbytes in sizes])


ROOM: Final[dict[str, Callable[[tuple[int, ...]], int]]] = {
    "all resident": sum,
    "some resident": lambda sizes: two_units(sizes) + max(sizes),
    "ring of two blocks": lambda sizes: two_units(sizes),
    "smallest ring": max,
}
"""Bytes left for blocks of the given sizes."""
PREFETCH: Final = (None, 0, 1)
PROMPTS: Final = ([5, 300, 41, 7, 99], [800, 12, 60])
MICRO_BATCHES: Final = (1, 3, 5, 30, None)
"""Rows of a micro-batch: less than a prompt, one prompt, both."""


pytestmark = pytest.mark.usefixtures("steady_baseline")


def budget_for(store: Store, room: str, opening: Callable[..., Runtime] = open_runtime, **options: Any) -> int:
    """The budget that leaves the room for blocks that ROOM calls `room` to what `opening` opens."""
    runtime = opening(store, **options)
    model, machine, budgets = measure_inputs(store, runtime.options)
    # What a run needs besides grows a little with the budget: from a large one down, until both agree.
    nbytes, budget = ROOM[room](model.tape.nbytes), 64 * GIB
    while True:
        plan = make_plan(model, machine, runtime.workload, replace(budgets, ram=budget))
        if (needed := plan.needs.total + nbytes) >= budget:
            return budget
        budget = needed


@pytest.fixture
def units_read(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Bytes of the units that have been read whole, by file: embedding rows are not."""
    count: Counter[str] = Counter()
    original = DiskReader.read_unit

    async def read_unit(reader: DiskReader, unit: Unit, memory: memoryview, buffers: ChunkBuffers) -> None:
        await original(reader, unit, memory, buffers)
        count[unit.file.path] += unit.nbytes

    monkeypatch.setattr(DiskReader, "read_unit", read_unit)
    return count


def check_reads(runtime: Runtime, units_read: Counter[str], passes: int) -> None:
    """What was read is what `passes` passes should read, embedding rows, and outer tensors."""
    planned = planned_bytes(runtime, passes)
    assert {path: units_read[path] for path in planned} == planned
    disk: Counter[str] = Counter()
    for span in runtime.host.trace.spans:
        if span.lane == "disk":
            disk[span.name] += span.nbytes
    assert disk.total() == runtime.bytes_read
    tables = {block.file.path for block in runtime.store.manifest.blocks if block.role in ("embed", "outer")}
    assert {path: nbytes for path, nbytes in disk.items() if path not in tables} == {
        path: nbytes for path, nbytes in planned.items() if path not in tables
    }


def planned_bytes(runtime: Runtime, passes: int) -> Counter[str]:
    """What `passes` passes should read: a resident unit and a small one once, any other every time."""
    planned: Counter[str] = Counter()
    for position, unit in enumerate(chain.from_iterable(runtime.store.dense_units)):
        planned[unit.file.path] += unit.nbytes * (1 if position in runtime.plan.placement.resident else passes)
    for block in runtime.store.tape:
        planned[block.file.path] += sum(u.nbytes for u in runtime.store.layout(block).units if u.kind == "small")
    return planned


CELLS: Final = [
    (name, prefetch, room)
    for first, name in enumerate(FAMILIES)
    for second, prefetch in enumerate(PREFETCH)
    for third, room in enumerate(ROOM)
    if name == "opt" or (first + second + third) % 3 == 0
]
"""What is read when depends on sizes alone: one family has all combinations, the others meet every room and every
read-ahead."""


@pytest.mark.parametrize(
    ("name", "prefetch", "room"), represented(CELLS, [("opt", *cell[1:]) for cell in CELLS if cell[0] == FAMILIES[1]])
)
def test_budget_and_read_ahead_change_nothing(
    tiny: Tiny, units_read: Counter[str], name: str, prefetch: int | None, room: str
) -> None:
    # Each cell takes the next size of micro-batches; the test below takes all of them in one cell.
    turn = FAMILIES.index(name) + PREFETCH.index(prefetch) + list(ROOM).index(room)
    rows = MICRO_BATCHES[turn % len(MICRO_BATCHES)]
    store, steps = tiny.store(name), 4
    options: dict[str, Any] = {"prefetch": prefetch, "micro_batch_rows": rows, "verify": VerifyPolicy.NEVER}
    ram = budget_for(store, room, **options)
    with open_runtime(store, ram=ram, keep_spans=True, **options) as runtime:
        check_placement(runtime.plan, room)
        first = run_greedy(runtime, prompts_for(name), steps, end=False)
        second = run_greedy(runtime, prompts_for(name), steps)
    assert_same(first, tiny.reference(name))
    assert_same(second, tiny.reference(name))
    check_reads(runtime, units_read, passes=2 * steps)


def check_placement(plan: Plan, room: str) -> None:
    """The budget gave the placement it is named after."""
    placement, sizes = plan.placement, plan.tape.nbytes
    if room == "all resident":
        assert len(placement.resident) == len(sizes)
        assert placement.ring_nbytes == 0
    elif room == "some resident":
        assert 0 < len(placement.resident) < len(sizes)
    else:
        assert not placement.resident
        assert placement.ring_nbytes == ROOM[room](sizes)


@pytest.mark.parametrize("rows", represented(MICRO_BATCHES, [5]))
@pytest.mark.parametrize("name", FAMILIES)
def test_the_split_into_micro_batches_changes_nothing(tiny: Tiny, name: str, rows: int | None) -> None:
    store = tiny.store(name)
    ram = budget_for(store, "some resident", micro_batch_rows=rows)
    with open_runtime(store, ram=ram, micro_batch_rows=rows) as runtime:
        assert_same(run_greedy(runtime, prompts_for(name), 6), tiny.reference(name))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_cpu_tier_alone_loads_all_and_reads_it_once(tiny: Tiny, units_read: Counter[str], name: str) -> None:
    options: dict[str, Any] = {"tiers": (Tier.CPU,), "keep_spans": True, "verify": VerifyPolicy.NEVER}
    with open_runtime(tiny.store(name), **options) as runtime:
        found = run_greedy(runtime, prompts_for(name), STEPS)
    assert_same(found, tiny.reference(name))
    check_reads(runtime, units_read, passes=1)


def test_the_cpu_tier_alone_refuses_a_budget_that_would_stream(tiny: Tiny) -> None:
    ram = budget_for(tiny.store("llama"), "some resident")
    with pytest.raises(BudgetError, match="disk,cpu"), open_runtime(tiny.store("llama"), ram=ram, tiers=(Tier.CPU,)):
        pass


@pytest.mark.parametrize("prefetch", PREFETCH)
@pytest.mark.parametrize("blocks_before", [1, 3])
def test_the_pass_after_an_interrupted_one_is_right(tiny: Tiny, prefetch: int | None, blocks_before: int) -> None:
    store, prompts = tiny.store("llama"), prompts_for("llama")
    with open_runtime(store, ram=budget_for(store, "smallest ring"), prefetch=prefetch) as runtime:

        def interrupt(done: int, _of: int) -> None:
            if done == blocks_before:
                thread = threading.Thread(target=runtime.host.cancel.set)
                thread.start()
                thread.join()

        for _ in range(2):
            with ExitStack() as stack, pytest.raises(InterruptedRun):
                kv = reserved(stack, runtime, len(prompts[0]))
                run_segments(runtime, [Segment(kv, list(prompts[0]))], on_block=interrupt)
            assert kv.length == 0 and runtime._memory.pool.is_empty
        assert_same(run_greedy(runtime, prompts, steps=3), tiny.reference("llama"))


def test_the_pass_after_a_failing_callback_is_right(tiny: Tiny) -> None:
    def fail(done: int, _of: int) -> None:
        if done == 2:
            raise ValueError("of the caller's own")

    store, prompts = tiny.store("opt"), prompts_for("opt")
    with open_runtime(store, ram=budget_for(store, "ring of two blocks")) as runtime:
        with ExitStack() as stack, pytest.raises(ValueError, match="of the caller's own"):
            kv = reserved(stack, runtime, len(prompts[0]))
            run_segments(runtime, [Segment(kv, list(prompts[0]))], on_block=fail)
        assert_same(run_greedy(runtime, prompts, steps=3), tiny.reference("opt"))


@pytest.mark.parametrize("end", [True, False])
@pytest.mark.parametrize("room", ROOM)
def test_nothing_is_left_at_exit(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, room: str, end: bool) -> None:
    left: list[dict[str, int]] = []
    close = Arena.close

    def note_and_close(arena: Arena) -> None:
        left.append(dict(arena.in_use))
        close(arena)

    monkeypatch.setattr(Arena, "close", note_and_close)
    store = tiny.store("llama")
    with open_runtime(store, ram=budget_for(store, room)) as runtime:
        run_greedy(runtime, prompts_for("llama"), steps=2, end=end)
        assert runtime._memory.arena.in_use
    assert left[-1] == {}
    assert runtime._memory.arena.in_use == {}
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("tiered")]


def test_a_refused_budget_names_the_smallest_that_works(tiny: Tiny) -> None:
    store, prompts = tiny.store("llama"), prompts_for("llama")
    with pytest.raises(BudgetError, match="--ram") as refused, open_runtime(store, ram=64 * MIB):
        pass
    smallest = refused.value.smallest_bytes
    assert smallest is not None
    with open_runtime(store, ram=smallest) as runtime:
        assert_same(run_greedy(runtime, prompts, steps=3), tiny.reference("llama"))
    with pytest.raises(BudgetError), open_runtime(store, ram=smallest - 2 * BASELINE_VARIES_NBYTES):
        pass


@pytest.fixture(scope="module")
def coded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Answers]:
    """A trained model whose exponents are coded, and what it answers from a store where they are not."""
    folder = tmp_path_factory.mktemp("coded")
    stores = []
    for compress in ("none", "planes"):
        options = ConvertOptions(quant="none", compress=compress)
        stores.append(Store.open(convert_checkpoint(TRAINED, folder / compress, options).store))
    assert any(unit.compressed for units in stores[1].dense_units for unit in units)
    with open_runtime(stores[0]) as runtime:
        return stores[1], run_greedy(runtime, PROMPTS, 3)


@pytest.mark.parametrize("room", ROOM)
@pytest.mark.parametrize("prefetch", represented([None, 0], [None]))
def test_coded_exponents_change_nothing_and_are_nowhere_in_memory(
    coded: tuple[Store, Answers], units_read: Counter[str], prefetch: int | None, room: str
) -> None:
    store, expected = coded
    options: dict[str, Any] = {"prefetch": prefetch, "verify": VerifyPolicy.NEVER}
    with open_runtime(store, ram=budget_for(store, room, **options), keep_spans=True, **options) as runtime:
        check_placement(runtime.plan, room)
        used, plan = runtime._memory.arena.in_use, runtime.plan
        units = [unit for units in store.dense_units for unit in units]
        assert used.get("resident", 0) == sum(units[unit].memory_nbytes for unit in plan.placement.resident)
        assert used["compressed chunks"] == plan.buffers_nbytes <= CHUNK_BUFFERS * CHUNK_NBYTES
        assert_same(run_greedy(runtime, PROMPTS, 3), expected)
    assert all(unit.memory_nbytes > 1.4 * unit.nbytes for unit in units if unit.compressed and not unit.copied)
    check_reads(runtime, units_read, passes=3)
