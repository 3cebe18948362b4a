"""The arena: every byte accounted for, given back and lent again, in memory that is this process's own."""

import os
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tiered.errors import BudgetError
from tiered.io import Arena, Slab
from tiered.io.arena import populate_refusal
from tiered.proc import process_rss_bytes
from tiered.store import PAGE
from tiered.units import MIB


def address_of(slab: Slab) -> int:
    return slab.tensor().data_ptr()


def mapping_of(address: int) -> tuple[str, dict[str, str]]:
    """Permissions, and the fields of /proc/self/smaps, of the mapping that holds `address`."""
    found: tuple[str, dict[str, str]] | None = None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key, *rest = line.split()
        if "-" in key and not key.endswith(":"):
            if found is not None:
                break
            start, stop = (int(part, 16) for part in key.split("-"))
            if start <= address < stop:
                found = rest[0], {}
        elif found is not None:
            found[1][key.rstrip(":")] = " ".join(rest)
    assert found is not None
    return found


def test_slabs_are_whole_pages_on_pages() -> None:
    with Arena(10 * PAGE) as arena:
        for nbytes in (1, PAGE, PAGE + 1):
            slab = arena.borrow(nbytes, "x")
            assert slab.nbytes == slab.view.nbytes == -(-nbytes // PAGE) * PAGE
            assert address_of(slab) % PAGE == 0
            arena.release(slab)


def test_memory_is_private_and_kept_out_of_children() -> None:
    with Arena(4 * MIB) as arena:
        permissions, fields = mapping_of(address_of(arena.borrow(4 * MIB, "x")))
        assert permissions == "rw-p"
        assert "dc" in fields["VmFlags"].split()


def test_huge_pages_are_asked_for() -> None:
    if not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists():
        pytest.skip("this kernel has no transparent huge pages")
    with Arena(4 * MIB) as arena:
        assert "hg" in mapping_of(address_of(arena.borrow(4 * MIB, "x")))[1]["VmFlags"].split()


def test_pages_are_taken_when_they_are_touched() -> None:
    with Arena(64 * MIB) as arena:
        slab = arena.borrow(64 * MIB, "x")
        assert mapping_of(address_of(slab))[1]["Rss"] == "0 kB"
        slab.tensor()[: 8 * MIB] = 1
        assert 8 * 1024 <= int(mapping_of(address_of(slab))[1]["Rss"].split()[0]) <= 10 * 1024


def test_memory_is_populated_before_it_is_touched_and_keeps_what_it_holds() -> None:
    with Arena(64 * MIB) as arena:
        arena.borrow(PAGE, "before")
        slab = arena.borrow(32 * MIB, "x")
        slab.view[5 * MIB] = 7
        done = slab.populate(4 * MIB, 8 * MIB)
        assert done == (populate_refusal() is None)
        assert slab.view[5 * MIB] == 7 and slab.view[6 * MIB] == 0
        if done:
            # Huge pages begin and end outside it.
            assert 8 * 1024 <= int(mapping_of(address_of(slab))[1]["Rss"].split()[0]) <= 13 * 1024


def test_a_kernel_that_populates_nothing_is_asked_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiered.io.arena._POPULATE_WRITE", 9999)
    assert "Invalid argument" in (populate_refusal.__wrapped__() or "")
    with Arena(4 * MIB) as arena:
        assert not arena.borrow(4 * MIB, "x").populate(0, 4 * MIB)


def test_bytes_in_use_are_told_by_label() -> None:
    with Arena(10 * PAGE) as arena:
        assert arena.in_use == {}
        first, ring, second = (arena.borrow(n * PAGE, label) for n, label in ((1, "kv"), (3, "ring"), (2, "kv")))
        assert arena.in_use == {"kv": 3 * PAGE, "ring": 3 * PAGE}
        arena.release(first)
        assert arena.in_use == {"kv": 2 * PAGE, "ring": 3 * PAGE}
        arena.release(ring)
        arena.release(second)
        assert arena.in_use == {}


def test_what_is_given_back_is_lent_again() -> None:
    with Arena(4 * PAGE) as arena:
        slabs = [arena.borrow(PAGE, "x") for _ in range(4)]
        arena.release(slabs[1])
        arena.release(slabs[2])
        assert arena.borrow(2 * PAGE, "y").offset == PAGE


def test_a_request_that_fits_no_gap_says_what_is_taken() -> None:
    with Arena(4 * MIB) as arena:
        arena.borrow(3 * MIB, "ring")
        with pytest.raises(BudgetError, match="kv: 2 MiB do not fit the arena of 4 MiB, of which 3 MiB are in use"):
            arena.borrow(2 * MIB, "kv")


def test_gaps_are_not_joined_across_what_is_in_use() -> None:
    with Arena(4 * PAGE) as arena:
        slabs = [arena.borrow(PAGE, "x") for _ in range(4)]
        arena.release(slabs[0])
        arena.release(slabs[2])
        with pytest.raises(BudgetError):
            arena.borrow(2 * PAGE, "y")


def test_releasing_twice_is_a_bug_that_shows() -> None:
    with Arena(PAGE) as arena:
        slab = arena.borrow(PAGE, "x")
        arena.release(slab)
        with pytest.raises(AssertionError, match="x: released twice"):
            arena.release(slab)


def test_releasing_a_stale_slab_leaves_the_new_borrower_alone() -> None:
    with Arena(PAGE) as arena:
        stale = arena.borrow(PAGE, "old")
        arena.release(stale)
        arena.borrow(PAGE, "new")
        with pytest.raises(AssertionError):
            arena.release(stale)
        assert arena.in_use == {"new": PAGE}


def test_views_that_outlive_the_arena_stay_readable() -> None:
    with Arena(PAGE) as arena:
        tensor = arena.borrow(PAGE, "x").tensor()
        tensor.fill_(7)
    assert not tensor.any()


def test_memory_goes_back_though_views_outlive_the_arena() -> None:
    before = process_rss_bytes()
    with Arena(64 * MIB) as arena:
        tensor = arena.borrow(64 * MIB, "x").tensor()
        tensor.fill_(7)
        assert process_rss_bytes() > before + 60 * MIB
    assert process_rss_bytes() < before + 4 * MIB and tensor.numel() == 64 * MIB


def test_addresses_go_back_when_the_last_view_goes() -> None:
    with Arena(16 * MIB) as arena:
        slab = arena.borrow(16 * MIB, "x")
        address = address_of(slab)
        slab.tensor().fill_(1)
        del slab
    start = f"{address:x}-"
    del arena
    lines = Path("/proc/self/maps").read_text().splitlines()
    assert not any(line.startswith(start) for line in lines)


def test_a_tensor_and_the_slab_are_the_same_bytes() -> None:
    with Arena(PAGE) as arena:
        slab = arena.borrow(PAGE, "x")
        slab.view[3] = 200
        assert slab.tensor().dtype == torch.uint8 and slab.tensor()[3] == 200


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5 * PAGE)), max_size=40))
def test_slabs_never_overlap_and_all_come_back(steps: list[tuple[bool, int]]) -> None:
    with Arena(16 * PAGE) as arena:
        lent: list[Slab] = []
        for borrow, number in steps:
            if borrow:
                try:
                    lent.append(arena.borrow(number, "x"))
                except BudgetError:
                    assert sum(slab.nbytes for slab in lent) > 0
            elif lent:
                arena.release(lent.pop(number % len(lent)))
            spans = sorted((slab.offset, slab.offset + slab.nbytes) for slab in lent)
            assert all(a[1] <= b[0] for a, b in pairwise(spans))
            assert sum(arena.in_use.values()) == sum(slab.nbytes for slab in lent)
            assert all(stop <= arena.nbytes for _, stop in spans)
        for slab in lent:
            arena.release(slab)
        assert arena.borrow(16 * PAGE, "all").nbytes == 16 * PAGE


def test_a_child_does_not_get_the_memory() -> None:
    with Arena(4 * PAGE) as arena:
        slab = arena.borrow(4 * PAGE, "x")
        slab.tensor().fill_(1)
        start = f"{address_of(slab):x}"
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:  # only system calls from here: the parent has threads
            try:
                maps = os.open("/proc/self/maps", os.O_RDONLY)
                text = b""
                while part := os.read(maps, 1 << 16):
                    text += part
                os.write(write, b"1" if f"\n{start}-".encode() in text else b"0")
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        assert os.read(read, 1) == b"0"
        os.close(read)
        os.close(write)
