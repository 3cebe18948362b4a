"""The cache of experts: what was chosen comes once and whole, what is used most stays, and nothing hangs or is lost."""

import ctypes
import errno
import os
import threading
import tracemalloc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.plan.plans import tape_of
from tests.store.make import load_unit, write_mixture
from tests.waiting import SECONDS, wait_until
from tiered.errors import InterruptedRun, ReadError, StoreError
from tiered.io import Arena, ChunkVerifier, DiskReader, Faults, VerifyPolicy
from tiered.kernels import CancelFlag
from tiered.plan import ExpertCachePlan
from tiered.plan.inputs import ExpertShape
from tiered.quant import QuantizedWeight
from tiered.store import Store
from tiered.stream import ExpertCache
from tiered.stream.experts import Slots
from tiered.trace import Tracer

NAMES = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
LAYERS, EXPERTS = 2, 6


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return write_mixture(tmp_path_factory.mktemp("experts") / "mixture.tiered", LAYERS, EXPERTS)


@contextmanager
def caching(
    store: Store,
    slots: int,
    preadv: Faults = os.preadv,
    cancel: CancelFlag | None = None,
    verify: VerifyPolicy = VerifyPolicy.FIRST,
) -> Iterator[tuple[ExpertCache, DiskReader]]:
    trace, size = Tracer(), max(unit.memory_nbytes for unit in store.expert_units[0])
    plan = ExpertCachePlan(slots, size)
    with (
        Arena(plan.nbytes) as arena,
        DiskReader(store.path, ChunkVerifier(verify, trace, store.path), trace, 4, preadv=preadv) as reader,
    ):
        cache = ExpertCache(store, plan, arena.borrow(plan.nbytes, "experts"), reader, trace, cancel or CancelFlag())
        try:
            yield cache, reader
        finally:
            cache.rewind()


def borrow(cache: ExpertCache, store: Store, layer: int, chosen: Sequence[int]) -> list[int]:
    """Go through `chosen`, compare each with the file, and return the order in which they came."""
    order = []
    for expert, matrices in cache.each(layer, dict.fromkeys(chosen, 1), NAMES):
        unit = store.expert_units[layer][expert]
        memory = load_unit(store.path, unit)
        for matrix, weight in zip(matrices, unit.weights.values(), strict=True):
            expected = weight.view(memory)
            assert isinstance(matrix, QuantizedWeight) and isinstance(expected, QuantizedWeight)
            assert all(torch.equal(a, b) for a, b in zip(matrix.codes, expected.codes, strict=True))
        order.append(expert)
    assert sorted(order) == sorted(chosen)
    return order


@pytest.mark.parametrize("slots", [1, 2, 5, LAYERS * EXPERTS])
def test_every_chosen_expert_comes_once_with_the_bytes_of_its_file(mixture: Store, slots: int) -> None:
    choices = [(0, [0, 3, 5]), (1, [1, 3]), (0, [3]), (0, list(range(EXPERTS))), (1, [0, 1, 2, 5]), (1, [])]
    with caching(mixture, slots) as (cache, reader):
        for layer, chosen in choices * 2:
            cache.begin(None)
            borrow(cache, mixture, layer, chosen)
        use = cache.use
        assert use.hits + use.misses == 2 * sum(len(chosen) for _, chosen in choices)
        assert use.nbytes == reader.bytes_read == use.misses * mixture.expert_units[0][0].nbytes
        if slots == LAYERS * EXPERTS:
            assert use.misses == EXPERTS + len({0, 1, 2, 3, 5}), "whatever has been read stays"


def test_those_in_memory_come_first_and_the_others_are_read_meanwhile(mixture: Store) -> None:
    with caching(mixture, 4) as (cache, reader):
        cache.begin(None)
        borrow(cache, mixture, 0, [2, 4])
        size, read = mixture.expert_units[0][0].nbytes, reader.bytes_read
        going = cache.each(0, dict.fromkeys([0, 2, 4, 5], 1), NAMES)
        assert {next(going)[0], next(going)[0]} == {2, 4}
        wait_until(lambda: reader.bytes_read == read + 2 * size)
        assert {expert for expert, _ in going} == {0, 5}


def test_what_is_used_often_stays_when_much_passes_by(mixture: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    # Two of these small experts keep the disk busy.
    monkeypatch.setattr("tiered.stream.experts._DEPTH_NBYTES", 2 * mixture.expert_units[0][0].nbytes)
    with caching(mixture, 4) as (cache, _):
        for _ in range(8):
            cache.begin(None)
            borrow(cache, mixture, 0, [1, 2])
        cache.begin(None)
        borrow(cache, mixture, 1, list(range(EXPERTS)))
        before = cache.use
        cache.begin(None)
        borrow(cache, mixture, 0, [1, 2])
        assert (cache.use - before).hits == 2


def test_objects_for_an_expert_in_memory_take_no_more_than_plans_count(tmp_path: Path) -> None:
    """As often as slots: a mixture of many small experts has thousands of them, 6 KB each."""
    store = write_mixture(tmp_path / "many.tiered", 2, 40)
    native_heap_nbytes()
    counted = ExpertShape(tape_of([1]), 2, 40, 1, nbytes=1, file_nbytes=1, weights=1).objects_nbytes(ram=80) / 80

    def use(layer: int) -> None:
        cache.begin(None)
        for _ in cache.each(layer, dict.fromkeys(range(40), 1), NAMES):
            pass

    def taken() -> int:
        own = tracemalloc.get_tracemalloc_memory()
        return native_heap_nbytes() - own + tracemalloc.get_traced_memory()[0]

    with caching(store, 80) as (cache, reader):
        use(0)  # and what is made once for all of them
        tracemalloc.start()
        try:
            before = taken()
            use(1)
            idle = reader.idle_seconds
            wait_until(lambda: reader.idle_seconds > idle)  # its threads let go of what they did a little later
            wait_until(lambda: (taken() - before) / 40 <= counted)
            found = taken()
            tensors = [torch.empty(0) for _ in range(100)]
            assert taken() - found > 100 * len(tensors)  # such objects are seen
        finally:
            tracemalloc.stop()


def native_heap_nbytes() -> int:
    """Bytes that malloc has given out in the main thread's arena."""

    class Info(ctypes.Structure):
        _fields_ = tuple((f"field{number}", ctypes.c_size_t) for number in range(10))

    try:
        mallinfo = ctypes.CDLL(None).mallinfo2
    except AttributeError:
        pytest.skip("the C library does not say what malloc has given out: glibc before 2.33, or another one")
    mallinfo.restype = Info
    return int(mallinfo().field7)  # uordblks


def test_a_failed_read_is_raised_and_passes(mixture: Store) -> None:
    unit, is_broken = mixture.expert_units[1][3], [True]

    def preadv(fd: int, buffers: Sequence[memoryview], offset: int, flags: int, /) -> int:
        path = str(Path(f"/proc/self/fd/{fd}").readlink())
        if is_broken[0] and path.endswith(unit.file.path) and offset == unit.offset:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return os.preadv(fd, buffers, offset, flags)

    with caching(mixture, 3, preadv) as (cache, _):
        for _ in range(3):
            cache.begin(None)
            with pytest.raises(ReadError, match=rf"{unit.file.path}: read of .* at {unit.offset:,} failed: .*EIO"):
                borrow(cache, mixture, 1, list(range(EXPERTS)))
            cache.rewind()
        is_broken[0] = False
        borrow(cache, mixture, 1, list(range(EXPERTS)))


def test_a_corrupt_expert_is_named_at_its_first_use(tmp_path: Path) -> None:
    store = write_mixture(tmp_path / "mixture.tiered", 1, 3)
    unit = store.expert_units[0][1]
    with (store.path / unit.file.path).open("r+b") as file:
        file.seek(unit.offset + 10)
        byte = file.read(1)
        file.seek(unit.offset + 10)
        file.write(bytes([byte[0] ^ 1]))
    with caching(store, 3) as (cache, _):
        borrow(cache, store, 0, [0, 2])
        with pytest.raises(StoreError, match=rf"{unit.file.path}: chunk \d+ .* is corrupt"):
            borrow(cache, store, 0, [1])


def test_an_interruption_ends_waiting_and_reads_and_all_works_after_it(mixture: Store) -> None:
    cancel, started, go_on = CancelFlag(), threading.Event(), threading.Event()

    def preadv(fd: int, buffers: Sequence[memoryview], offset: int, flags: int, /) -> int:
        started.set()
        go_on.wait(SECONDS)
        return os.preadv(fd, buffers, offset, flags)

    def interrupt() -> None:
        started.wait()
        cancel.set()

    with caching(mixture, 4, preadv, cancel) as (cache, _):
        threading.Thread(target=interrupt).start()
        with pytest.raises(InterruptedRun):
            borrow(cache, mixture, 0, [0, 1, 2])
        threading.Timer(0.1, go_on.set).start()
        cache.rewind()  # waits for the reads in flight: their memory is lent to others now
        cancel.clear()
        for chosen in ([0, 1, 2], [3, 4], [0, 5]):
            borrow(cache, mixture, 0, chosen)


@given(
    count=st.integers(1, 6),
    steps=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True), max_size=30),
    half_life=st.sampled_from([1e-3, 8.0, 1e9]),
)
def test_slots_hold_the_experts_that_are_worth_most(count: int, steps: list[list[int]], half_life: float) -> None:
    slots = Slots(count, half_life)
    inside: dict[int, int] = {}
    used: dict[int, list[int]] = {}
    for number, step in enumerate(steps):
        for expert in step:
            slots.note(expert, 1, number)
            used.setdefault(expert, []).append(number)
            if expert in slots:
                assert slots[expert] == inside[expert]
                continue
            slot = slots.take(expert)
            assert slot is not None and 0 <= slot < count
            for gone in [other for other, its in inside.items() if its == slot]:
                del inside[gone]
                # The least recently used one, or the least used one: whatever else is inside is worth no less.
                others = [used[other] for other in inside]
                if half_life < 1:
                    assert all(uses[-1] >= used[gone][-1] for uses in others)
                elif half_life > 1e6:
                    assert all(len(uses) >= len(used[gone]) for uses in others)
            inside[expert] = slot
            slots.unpin(expert)
        assert len(inside) <= count and all(expert in slots for expert in inside)


def test_what_is_pinned_is_not_thrown_out() -> None:
    slots = Slots(2)
    for expert in (1, 2):
        slots.note(expert, 1, 0)
        slots.take(expert)
    slots.note(3, 5, 1)
    assert slots.take(3) is None
    slots.unpin(2)
    assert slots.take(3) is not None
    assert 1 in slots and 2 not in slots
