"""Plans: every byte accounted for, and a refusal that names exactly the budget that works."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.plan.plans import LOADED, STREAMING, plan_of
from tiered.errors import BudgetError, ConfigError
from tiered.plan import Needs, Tier, parse_tiers
from tiered.plan.placement import full_ring
from tiered.units import MIB, parse_size

SIZES = st.lists(st.integers(1, 50 * MIB), min_size=1, max_size=12)
NEEDS = st.builds(Needs, *[st.integers(0, 100 * MIB)] * 4)


@given(SIZES, NEEDS, st.integers(1, 2000 * MIB), st.sampled_from([STREAMING, LOADED]))
def test_a_plan_stays_within_its_budget_or_names_one_that_works(
    sizes: list[int], needs: Needs, budget: int, tiers: tuple[Tier, ...]
) -> None:
    try:
        plan = plan_of(sizes, needs, budget, tiers)
    except BudgetError as error:
        smallest = error.smallest_bytes
        assert smallest is not None and smallest > budget
        assert plan_of(sizes, needs, smallest, tiers).budget == smallest
        with pytest.raises(BudgetError):
            plan_of(sizes, needs, smallest - 1, tiers)
        named = re.search(r"--ram (\w+)", str(error))
        assert named is not None
        plan_of(sizes, needs, parse_size(named.group(1)), tiers)
    else:
        assert needs.total + plan.placement.nbytes <= budget
        assert tiers == STREAMING or plan.streamed_nbytes == 0
        assert plan.streamed_nbytes == sum(n for i, n in enumerate(sizes) if i not in plan.placement.resident)


@given(SIZES, NEEDS, st.integers(1, 2000 * MIB))
def test_the_bound_s_share_in_memory_is_what_the_budget_leaves_used_or_not(
    sizes: list[int], needs: Needs, budget: int
) -> None:
    try:
        plan = plan_of(sizes, needs, budget, STREAMING)
    except BudgetError:
        return
    free = budget - needs.total
    left = sum(sizes) if free >= sum(sizes) else free - full_ring([[nbytes] for nbytes in sizes])
    assert plan.bound_resident_nbytes == max(left, plan.placement.resident_nbytes) <= sum(sizes)


def test_the_bound_never_assumes_less_in_memory_than_there_is() -> None:
    plan = plan_of([10, 10, 10, 100], Needs(0, 0, 0, 0), 120, STREAMING)
    assert plan.placement.resident_nbytes == plan.bound_resident_nbytes == 100


def test_a_refusal_says_what_takes_the_bytes() -> None:
    needs = Needs(baseline=300 * MIB, outer=5 * MIB, kv=40 * MIB, workspace=30 * MIB)
    with pytest.raises(BudgetError) as caught:
        plan_of([20 * MIB, 60 * MIB], needs, 400 * MIB, STREAMING)
    assert str(caught.value) == (
        "a budget of 400 MiB is too small. Needed: 300 MiB for the process itself, 5 MiB for tables that stay in "
        "memory, 40 MiB for the KV cache, 30 MiB for activations, 60 MiB for the head. "
        "The smallest budget that works is --ram 435MiB"
    )
    assert caught.value.exit_code == 3


def test_loading_all_is_refused_with_the_way_out() -> None:
    with pytest.raises(BudgetError) as caught:
        plan_of([20 * MIB, 60 * MIB], Needs(10 * MIB, 0, 0, 0), 80 * MIB, LOADED)
    assert "80 MiB for all weights, which --tiers cpu loads" in str(caught.value)
    assert str(caught.value).endswith("--ram 90MiB; or use --tiers disk,cpu")


def test_needs_add_up() -> None:
    assert Needs(1, 20, 300, 4000).total == 4321


@pytest.mark.parametrize("text", ["disk,cpu", " Disk , CPU ", "DISK,CPU"])
def test_tiers_are_read_as_typed(text: str) -> None:
    assert parse_tiers(text) == STREAMING
    assert parse_tiers("cpu") == LOADED


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "unknown tier ''; known tiers are disk, cpu and gpu"),
        ("disk,ram", "unknown tier 'ram'; known tiers"),
        ("disk;cpu", "unknown tier 'disk;cpu'"),
        ("disk,cpu,", "unknown tier ''"),
        ("cpu,disk", "name each tier once, slowest first: disk,cpu"),
        ("disk,cpu,cpu", "name each tier once, slowest first: disk,cpu"),
        ("gpu,cpu", "slowest first: cpu,gpu"),
        ("disk,gpu", "passes through memory on its way to the GPU; use disk,cpu,gpu"),
        ("disk", "weights on disk need a tier that computes; use disk,cpu"),
    ],
)
def test_tiers_that_cannot_be_are_explained(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"--tiers {text!r}: .*{message}") as caught:
        parse_tiers(text)
    assert caught.value.exit_code == 2
