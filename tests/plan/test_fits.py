"""The table of budgets says what the planner would say."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.plan.plans import LOADED, STREAMING, mixture_of, model_of, tape_of
from tiered.errors import BudgetError, DeviceBudgetError
from tiered.plan import (
    MAX_BATCHED_TOKENS,
    Budgets,
    Computes,
    Machine,
    Needs,
    Placement,
    Tier,
    Workload,
    fit_units,
    make_plan,
)
from tiered.plan.fits import fits, ladder
from tiered.plan.plan import smallest_budget
from tiered.units import GIB, MIB, round_up

SIZES = st.lists(st.integers(1, 4000).map(lambda n: n * 4096), min_size=1, max_size=12)
ALL = (Tier.DISK, Tier.CPU, Tier.GPU)
WORK, BUDGETS, MACHINE = Workload(max_context=512), Budgets(1, 300 * MIB), Machine(16 * MIB)


def growing(budget: int) -> Needs:
    """Needs that grow with the budget, as activations do, up to a point."""
    return Needs(300 * MIB, 20 * MIB, 50 * MIB, 10 * MIB + min(budget // 16, 100 * MIB))


@pytest.mark.parametrize("tiers", [STREAMING, LOADED])
@given(sizes=SIZES)
def test_the_smallest_budget_works_and_a_smaller_one_does_not(tiers: tuple[Tier, ...], sizes: list[int]) -> None:
    def place_at(budget: int) -> Placement:
        return fit_units(tape_of(sizes), growing(budget), budget, tiers)

    smallest = smallest_budget(place_at)
    assert place_at(smallest).nbytes <= smallest
    with pytest.raises(BudgetError):
        place_at(smallest - MIB)


@given(sizes=SIZES)
def test_more_memory_never_reads_more(sizes: list[int]) -> None:
    rows = fits(model_of(sizes), MACHINE, WORK, BUDGETS)
    assert all(row.resident_nbytes + row.read_nbytes == sum(sizes) for row in rows)
    assert [row.read_nbytes for row in rows] == sorted((row.read_nbytes for row in rows), reverse=True)
    assert rows[-1].read_nbytes == 0 and rows[-1].resident_share == 1


def test_the_first_budget_is_the_smallest_and_the_last_the_smallest_that_holds_all() -> None:
    sizes = [8 * MIB] * 100
    first, *_, last = fits(model_of(sizes), MACHINE, WORK, BUDGETS)
    for row, tiers in ((first, STREAMING), (last, LOADED)):
        less = replace(BUDGETS, ram=row.plan.budget - MIB, tiers=tiers)
        with pytest.raises(BudgetError):
            make_plan(model_of(sizes), MACHINE, WORK, less)
        assert make_plan(model_of(sizes), MACHINE, WORK, replace(less, ram=row.plan.budget)) == row.plan


@given(sizes=SIZES, vram=st.integers(100, 400).map(lambda n: n * MIB))
def test_beside_a_device_what_stays_there_is_neither_read_nor_copied(sizes: list[int], vram: int) -> None:
    asked = replace(BUDGETS, tiers=ALL, vram=vram)
    rows = fits(model_of(sizes), MACHINE, WORK, asked)
    assert all(row.resident_nbytes + row.read_nbytes == sum(sizes) for row in rows)
    assert all(row.device_nbytes + row.bus_nbytes == sum(sizes) for row in rows)
    assert all(row.device_nbytes <= row.resident_nbytes for row in rows)
    assert rows[0].bus_seconds(1e9) == rows[0].bus_nbytes / 1e9
    assert rows[-1].read_nbytes == 0


def test_bytes_read_are_those_of_files() -> None:
    model = model_of(tape=tape_of([8 * MIB] * 10, [5 * MIB] * 10))
    smallest, *_, everything = fits(model, MACHINE, WORK, BUDGETS)
    assert smallest.read_nbytes == 50 * MIB
    assert everything.resident_nbytes == 50 * MIB
    assert smallest.disk_seconds(5 * MIB) == 10


def test_the_ladder_doubles_between_its_ends() -> None:
    assert ladder(1500 * MIB, 9 * GIB) == (1500 * MIB, 2 * GIB, 4 * GIB, 8 * GIB, 9 * GIB)
    assert ladder(300 * MIB, 400 * MIB) == (300 * MIB, 400 * MIB)
    assert ladder(300 * MIB, 300 * MIB) == (300 * MIB,)
    assert ladder(2 * GIB, round_up(4 * GIB, MIB)) == (2 * GIB, 4 * GIB)


def test_a_mixture_reads_what_a_token_chooses_and_nothing_once_all_of_it_is_in_memory() -> None:
    model = mixture_of([20 * MIB] * 11, count=32, chosen=2, nbytes=8 * MIB)
    assert model.experts is not None
    first, *between, last = fits(model, MACHINE, WORK, BUDGETS)
    assert first.plan.experts is not None
    # The least cache has room for what one token chooses in one of ten layers.
    assert first.read_nbytes == first.plan.read_nbytes + 10 * 2 * 8 * MIB * 318 // 320
    assert first.resident_nbytes == 2 * 8 * MIB + 220 * MIB - first.plan.read_nbytes
    assert [row.resident_share for row in between] == sorted(row.resident_share for row in between)
    assert last.plan.experts is None and last.read_nbytes == 0 and last.resident_share == 1
    assert last.resident_nbytes == last.total_nbytes == (220 + 10 * 32 * 8) * MIB


@given(
    sizes=SIZES,
    vram=st.integers(60, 400).map(lambda n: n * MIB),
    decode=st.sampled_from(("cpu", "gpu")),
    wish=st.sampled_from((None, 0, 2 * MIB)),
    context=st.sampled_from((8, 128, 512)),
)
def test_beside_a_device_the_last_budget_holds_all(
    sizes: list[int], vram: int, decode: Computes, wish: int | None, context: int
) -> None:
    wish = wish if decode == "gpu" else None
    asked = replace(BUDGETS, tiers=ALL, kv="auto", vram=vram, context_nbytes=0, decode_device=decode, resident_gpu=wish)
    work = Workload(max_context=context, max_batched_tokens=MAX_BATCHED_TOKENS)
    try:
        rows = fits(model_of(sizes), MACHINE, work, asked)
    except DeviceBudgetError:
        return
    assert rows[-1].read_nbytes == 0 and rows[-1].resident_share == 1
