"""The workspace: rows bounded by the budget, bytes that grow with everything that grows."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.plan.plans import model_of
from tiered.plan.state import Grid, StateShape
from tiered.plan.workspace import MAX_ROWS, row_nbytes, transit_nbytes, workspace_for
from tiered.units import GIB, MIB

SHAPE, SCRATCH = model_of(), 16 * MIB
COUNTS = st.integers(1, 5000)
BUDGETS = st.integers(64 * MIB, 1 << 40)


@given(tokens=COUNTS, sequences=COUNTS, context=COUNTS, budget=BUDGETS)
def test_rows_are_at_least_one_and_no_more_than_useful(tokens: int, sequences: int, context: int, budget: int) -> None:
    found = workspace_for(SHAPE, SCRATCH, tokens, sequences, context, budget)
    assert 1 <= found.rows <= min(MAX_ROWS, tokens)
    assert found.rows == 1 or found.rows * row_nbytes(SHAPE, context) <= budget / 16
    assert found.nbytes >= found.rows * row_nbytes(SHAPE, context) + SCRATCH


@given(tokens=COUNTS, context=COUNTS, budget=BUDGETS, more=st.integers(0, 1 << 36))
def test_a_larger_budget_never_computes_fewer_rows(tokens: int, context: int, budget: int, more: int) -> None:
    less, greater = (workspace_for(SHAPE, SCRATCH, tokens, 1, context, b) for b in (budget, budget + more))
    assert less.rows <= greater.rows and less.nbytes <= greater.nbytes


@pytest.mark.parametrize("field", ["hidden", "widest", "vocab", "dtype", "packed_nbytes"])
def test_a_larger_model_takes_more(field: str) -> None:
    larger = model_of(dtype="float32") if field == "dtype" else replace(SHAPE, **{field: 2 * getattr(SHAPE, field)})
    # With rows enough for all tokens, so that only the bytes change.
    less, greater = (workspace_for(shape, SCRATCH, 8, 8, 2048, 1 << 40) for shape in (SHAPE, larger))
    assert (less.rows, greater.rows) == (8, 8)
    assert greater.nbytes > less.nbytes


def test_what_kernels_hold_is_counted_once() -> None:
    less, greater = (workspace_for(SHAPE, scratch, 8, 8, 2048, 1 << 40) for scratch in (SCRATCH, 2 * SCRATCH))
    assert greater.nbytes - less.nbytes == SCRATCH


def test_materialized_scores_count_for_every_head() -> None:
    eager = replace(SHAPE, eager_attention=True)
    assert row_nbytes(eager, 2048) - row_nbytes(SHAPE, 2048) == (3 * 32 - 1) * 2048 * 4


def test_a_long_prompt_passes_in_micro_batches_that_a_small_budget_affords() -> None:
    small, large = (workspace_for(SHAPE, SCRATCH, 2048, 1, 2048, budget) for budget in (GIB // 2, 64 * GIB))
    assert small.rows < large.rows == MAX_ROWS
    assert small.nbytes < large.nbytes


@given(tokens=COUNTS, sequences=COUNTS, context=COUNTS, budget=BUDGETS)
def test_a_device_computes_as_many_rows_in_as_much_memory_but_keeps_no_heap_and_no_logits(
    tokens: int, sequences: int, context: int, budget: int
) -> None:
    host, device = (
        workspace_for(SHAPE, SCRATCH, tokens, sequences, context, budget, is_device=is_device)
        for is_device in (False, True)
    )
    assert (host.rows, host.head_rows) == (device.rows, device.head_rows)
    assert host.nbytes - device.nbytes > sequences * SHAPE.vocab * 4
    assert device.nbytes >= device.rows * row_nbytes(SHAPE, context) + 2 * tokens * SHAPE.hidden * 2 + SCRATCH


def test_recurrent_steps_take_less_by_the_library_which_no_device_has() -> None:
    shape = replace(SHAPE, state=StateShape((), Grid(64), 0, step_nbytes=8 * MIB, native_step_nbytes=2 * MIB))
    native, own, device, same_device = (
        workspace_for(shape, SCRATCH, 32, 32, 64, 1 << 40, native_steps=native, is_device=is_device).nbytes
        for is_device in (False, True)
        for native in (True, False)
    )
    assert own - native >= 32 * 6 * MIB
    assert device == same_device >= 32 * 8 * MIB


@pytest.mark.parametrize("is_device", [False, True])
@pytest.mark.parametrize(
    ("grid", "tokens", "scanned"),
    [
        *[(Grid(64), 1, 1), (Grid(64), 2, 64), (Grid(64), 64, 64), (Grid(64), 70, 128)],
        *[(Grid(64, one_cell=True), 2, 64), (Grid(64, one_cell=True), 70, 70), (Grid(1), 2, 2), (Grid(0), 2, 2)],
    ],
)
def test_a_scan_takes_what_its_last_cell_takes_when_it_is_full(
    grid: Grid, tokens: int, scanned: int, is_device: bool
) -> None:
    without, found = (
        workspace_for(
            replace(SHAPE, state=StateShape((), grid, nbytes, 0, 0)),
            *(SCRATCH, tokens, 1, 128, 1 << 40),
            is_device=is_device,
        )
        for nbytes in (0, MIB)
    )
    more = found.nbytes - without.nbytes
    assert found.rows == tokens and (more == scanned * MIB if is_device else more >= scanned * MIB)


@given(tokens=COUNTS, sequences=COUNTS, budget=BUDGETS)
def test_what_passes_on_to_a_device_grows_with_tokens_and_logits(tokens: int, sequences: int, budget: int) -> None:
    through = transit_nbytes(SHAPE, tokens, sequences, sequences, budget)
    assert through >= 2 * tokens * SHAPE.hidden * SHAPE.itemsize + 4 * sequences * SHAPE.vocab * 4
    assert transit_nbytes(SHAPE, tokens + 1, sequences, sequences, budget) > through
