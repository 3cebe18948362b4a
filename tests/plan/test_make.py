"""Plans from the four inputs: bytes within the budget, refusals that keep their word, one plan as text and object."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.plan.plans import LOADED, STREAMING, mixture_of, model_of, plan_of, tape_of
from tiered.errors import BudgetError, ConfigError
from tiered.plan import (
    Bits,
    Budgets,
    ComputeRate,
    KVShape,
    Machine,
    ModelShape,
    Plan,
    Tape,
    Workload,
    layer_groups,
    make_plan,
    pace_for,
    wants_rates,
)
from tiered.plan.pace import LEAST, calibration_of
from tiered.plan.workspace import MAX_ROWS
from tiered.units import GIB, MIB, format_seconds, round_up

UNMEASURED = Machine(16 * MIB)
MEASURED = Machine(16 * MIB, 2e9, ComputeRate((1, 16, 256), (1e-11, 2e-11, 4e-10)), 1e-7)


@st.composite
def tapes(draw: st.DrawFn) -> Tape:
    """Blocks of one to four units."""
    counts = draw(st.lists(st.integers(1, 4), min_size=1, max_size=6))
    units = draw(st.lists(st.integers(1, 400), min_size=sum(counts), max_size=sum(counts)))
    return tape_of([n * 100_000 for n in units], counts=counts)


WIDTHS = st.sampled_from([64, 80])
KEPT = st.none() | st.builds(KVShape, st.integers(1, 8), WIDTHS, WIDTHS, st.just("bfloat16"))
MODELS = st.builds(
    lambda base, mixture, **fields: replace(base or mixture, **fields),
    st.none() | st.builds(model_of, tape=tapes()),
    st.builds(
        mixture_of,
        st.lists(st.integers(1, 400).map(lambda n: n * 100_000), min_size=2, max_size=5),
        st.integers(1, 40),
        st.just(1),
        st.integers(1, 100).map(lambda n: n * 100_000),
        st.none() | st.just(1),
    ),
    dense_attention=st.booleans(),
    eager_attention=st.booleans(),
    groups=st.builds(
        layer_groups,
        st.sampled_from([(0, 0), (0, 100)]),
        st.tuples(KEPT, KEPT),
    ),
)
WORKLOADS = st.builds(
    Workload,
    st.integers(1, 40),
    st.integers(64, 3000),
    st.integers(0, 64),
    max_batched_tokens=st.sampled_from([0, 1, 500, 4096]),
    batch_size=st.none() | st.integers(1, 50),
    choose_batch_size=st.booleans(),
    one_pass=st.booleans(),
    all_logits=st.booleans(),
    least_context=st.sampled_from([0, 64]),
)
BUDGETS = st.builds(
    Budgets,
    st.integers(200, 20_000).map(lambda n: n * MIB),
    st.integers(0, 400).map(lambda n: n * MIB),
    st.sampled_from([STREAMING, LOADED]),
    kv=st.sampled_from(["auto", "cpu", "disk"]),
    kv_bits=st.sampled_from([16, 8, 4]),
    micro_batch=st.none() | st.integers(1, 600),
)


@given(MODELS, st.sampled_from([UNMEASURED, MEASURED]), WORKLOADS, BUDGETS)
def test_a_plan_is_within_its_budget_or_the_refusal_names_one_that_works(
    model: ModelShape, machine: Machine, workload: Workload, budgets: Budgets
) -> None:
    try:
        plan = make_plan(model, machine, workload, budgets)
    except BudgetError as error:
        assert error.smallest_bytes is not None and error.smallest_bytes > budgets.ram
        # Also where the process takes a little more next time.
        again = replace(budgets, ram=error.smallest_bytes, baseline=budgets.baseline + 4 * MIB)
        plan = make_plan(model, machine, workload, again)
        budgets = again
    check(plan, model, workload, budgets)


def test_a_budget_that_is_named_is_enough_where_less_would_compute_in_several_micro_batches() -> None:
    # 64 rows at once fit from 241 MiB on; below, layers are held for two micro-batches, which fit nowhere near.
    mixture = mixture_of([19_000_000, 100_000], 1, 1, 9_200_000, None, eager_attention=True)
    model = replace(mixture, dense_attention=False, groups=())
    budgets = Budgets(200 * MIB, 128 * MIB, kv="auto")
    with pytest.raises(BudgetError) as refused:
        make_plan(model, UNMEASURED, Workload(1, 64), budgets)
    assert refused.value.smallest_bytes is not None
    for more in (0, 4 * MIB, 8 * MIB):
        again = replace(budgets, ram=refused.value.smallest_bytes, baseline=budgets.baseline + more)
        check(make_plan(model, UNMEASURED, Workload(1, 64), again), model, Workload(1, 64), again)


def check(plan: Plan, model: ModelShape, workload: Workload, budgets: Budgets) -> None:
    """Every byte is accounted for, and no more is promised than was asked for."""
    cache, placement = plan.cache, plan.placement
    experts_nbytes = 0
    if plan.experts is None:
        assert plan.tape == model.tape
    else:
        assert model.experts is not None and plan.tape == model.experts.dense and budgets.tiers == STREAMING
        assert model.experts.chosen <= plan.experts.slots <= model.experts.total
        assert plan.experts.slot_nbytes == model.experts.nbytes
        experts_nbytes = plan.experts.slots * plan.experts.slot_nbytes
        # A slot more has no room, unless every expert has one.
        room = plan.budget - plan.nbytes
        assert room < plan.experts.slot_nbytes or plan.experts.slots == model.experts.total
    assert plan.nbytes == plan.needs.total + placement.resident_nbytes + placement.ring_nbytes + experts_nbytes
    assert plan.nbytes <= plan.budget
    assert plan.budget == budgets.ram and plan.needs.baseline == budgets.baseline
    assert placement.resident_nbytes == sum(plan.tape.nbytes[i] for i in placement.resident)
    assert placement.ring_nbytes or len(placement.resident) == len(plan.tape.nbytes)
    assert plan.needs.kv >= cache.pool_nbytes + cache.ring_nbytes
    held = 0 if cache.on_disk else cache.blocks_nbytes
    assert cache.memory_nbytes == cache.tails_nbytes + cache.ring_nbytes + held
    assert 1 <= plan.batch_size == cache.sequences <= workload.sequences
    assert workload.least_context in (0, *range(plan.max_context + 1))
    assert plan.max_context == cache.context <= workload.max_context
    assert workload.least_context or plan.max_context == workload.max_context
    assert plan.max_batched_tokens >= plan.batch_size
    assert 1 <= plan.micro_batch_rows <= min(budgets.micro_batch or MAX_ROWS, plan.max_batched_tokens)
    assert plan.gathered_rows <= plan.micro_batch_rows and plan.head_rows <= plan.micro_batch_rows
    assert cache.on_disk == (budgets.kv == "disk") or budgets.kv == "auto"
    # Passes are of one micro-batch, or the ring holds a layer.
    assert plan.held.layers or plan.max_batched_tokens <= plan.micro_batch_rows
    pieces = plan.tape.streamed(plan.held, placement.resident)
    assert placement.ring_nbytes >= max(map(sum, pieces), default=0)
    asked = workload.tokens_in_flight(plan.batch_size, plan.max_context)
    assert plan.max_batched_tokens == asked or plan.max_batched_tokens == plan.micro_batch_rows < asked
    if plan.max_batched_tokens < asked:
        assert workload.max_batched_tokens or workload.one_pass


@given(MODELS, WORKLOADS, BUDGETS)
def test_written_down_and_read_back_it_is_the_same_plan(
    model: ModelShape, workload: Workload, budgets: Budgets
) -> None:
    try:
        plan = make_plan(model, MEASURED, workload, budgets)
    except BudgetError:
        return
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    assert hash(plan) == hash(Plan.from_json(plan.to_json()))


def plan_for(workload: Workload, ram: int, machine: Machine = UNMEASURED, **fields: Any) -> Plan:
    return make_plan(model_of([100 * MIB] * 20), machine, workload, Budgets(ram, 300 * MIB, **fields))


def test_what_is_asked_for_runs_at_once() -> None:
    assert plan_for(Workload(7), 8 * GIB).batch_size == 7
    assert plan_for(Workload(7, batch_size=3), 8 * GIB).batch_size == 3
    assert plan_for(Workload(7, batch_size=300), 8 * GIB).batch_size == 7


def test_without_rates_as_many_run_at_once_as_fit() -> None:
    workload = Workload(600, 1024, choose_batch_size=True)
    few, many = plan_for(workload, 1200 * MIB), plan_for(workload, 64 * GIB)
    assert 1 < few.batch_size < many.batch_size == 600
    # 512 at once would take as many waves.
    assert plan_for(replace(workload, objective="throughput"), 64 * GIB).batch_size == 300
    assert few.why.startswith(f"{few.batch_size} of 600 sequences at once, as fit; KV cache ")
    assert few.why.endswith(" in memory")


def test_with_rates_the_batch_is_as_large_as_gains() -> None:
    workload = Workload(600, 1024, 8, choose_batch_size=True, max_batched_tokens=4096, objective="throughput")
    plan = plan_for(workload, 64 * GIB, MEASURED)
    # All weights are in memory, and 256 rows take twenty times as long as 16.
    assert plan.batch_size == 16
    assert f"{plan.batch_size} of 600 sequences at once; predicted per pass: " in plan.why
    assert "disk" not in plan.why and "of computing; KV cache" in plan.why
    assert " of disk and " in plan_for(workload, 1200 * MIB, MEASURED).why


def test_the_more_rows_compute_the_further_reading_goes_ahead() -> None:
    def ring(sequences: int, nbytes: int = 100 * MIB) -> int:
        model = model_of([nbytes] * 20)
        workload = Workload(sequences, 256, 16, max_batched_tokens=4096)
        return make_plan(model, UNMEASURED, workload, Budgets(1300 * MIB, 300 * MIB)).placement.ring_nbytes

    # One row: two units. More: up to 64 MiB beyond that, but no more than half as much again.
    assert [ring(count) // MIB for count in (1, 2, 5, 17, 30)] == [200, 204, 216, 264, 264]
    assert [ring(count, 60 * MIB) // MIB for count in (1, 30)] == [120, 180]


def test_the_cache_goes_to_disk_only_where_memory_does_not_suffice() -> None:
    workload = Workload(40, 4096, 16)
    assert not plan_for(workload, 8 * GIB, kv="auto").cache.on_disk
    assert plan_for(workload, 1200 * MIB, kv="auto").cache.on_disk
    with pytest.raises(BudgetError, match="for the KV cache"):
        plan_for(workload, 1200 * MIB, kv="cpu")


def test_a_refusal_with_the_cache_in_memory_is_the_one_to_read_where_both_fail() -> None:
    workload = Workload(4, 4096)
    refusals = []
    for kv in ("auto", "cpu"):
        with pytest.raises(BudgetError) as refused:
            plan_for(workload, 400 * MIB, kv=kv)
        refusals.append(str(refused.value))
    assert refusals[0] == refusals[1]


def test_a_context_that_is_not_asked_for_is_what_an_eighth_of_the_budget_holds_or_less() -> None:
    workload = Workload(1, 2048, least_context=128)
    model = model_of([10 * MIB] * 20, layers=400)
    contexts = []
    for ram in (700 * MIB, 2 * GIB, 64 * GIB):
        plan = make_plan(model, UNMEASURED, workload, Budgets(ram, 300 * MIB))
        contexts.append(plan.max_context)
        assert model.kv_token_nbytes * plan.max_context <= ram / 8 or plan.max_context == 128
    assert 128 <= contexts[0] < contexts[1] < contexts[2] == 2048
    with pytest.raises(BudgetError, match=r", for a context of 128 tokens$"):
        make_plan(model, UNMEASURED, workload, Budgets(2 * GIB, 2 * GIB - 10 * MIB))


def test_rates_are_wanted_only_where_they_decide_and_fit() -> None:
    model = model_of([100 * MIB] * 20)
    workload = Workload(600, 1024, choose_batch_size=True, objective="throughput")

    def wants(ram: int, **changes: Any) -> bool:
        return wants_rates(model, UNMEASURED, replace(workload, **changes), Budgets(ram, 300 * MIB))

    assert wants(1200 * MIB) and wants(64 * GIB)
    for changes in ({"batch_size": 3}, {"choose_batch_size": False}, {"one_pass": True}, {"sequences": 1}):
        assert not wants(1200 * MIB, **changes)
    with pytest.raises(BudgetError) as refused:
        make_plan(model, UNMEASURED, replace(workload, batch_size=1), Budgets(1, 300 * MIB))
    assert refused.value.smallest_bytes is not None
    assert not wants(1) and not wants(refused.value.smallest_bytes)
    assert wants(refused.value.smallest_bytes + 110 * MIB)


def test_who_waits_for_a_text_does_not_wait_for_rates_unless_all_have_no_room() -> None:
    workload = Workload(600, 1024, choose_batch_size=True, objective="latency")
    model = model_of([100 * MIB] * 20)
    assert wants_rates(model, UNMEASURED, workload, Budgets(1200 * MIB, 300 * MIB))
    assert not wants_rates(model, UNMEASURED, workload, Budgets(64 * GIB, 300 * MIB))


def test_windows_that_are_scored_share_passes_where_that_spares_the_disk() -> None:
    workload = Workload(30, 512, 512, choose_batch_size=True, one_pass=True, all_logits=True)
    plan = plan_for(workload, 1200 * MIB)
    assert 1 < plan.batch_size <= 30
    assert plan.why == f"{plan.batch_size} of 30 sequences at once, for the fewest bytes to read"


def test_the_cache_has_as_many_bits_as_cost_little() -> None:
    def chosen(ram: int, tokens: int, layers: int = 40) -> Plan:
        budgets = Budgets(ram, 300 * MIB, kv="auto", choose_kv_bits=True)
        return make_plan(model_of([100 * MIB] * 20, layers), UNMEASURED, Workload(1, tokens, 16), budgets)

    assert chosen(64 * GIB, 16384).cache.bits == 16  # nothing is read
    assert chosen(1200 * MIB, 256).cache.bits == 16  # the cache is small beside the weights that are read
    assert chosen(1200 * MIB, 2048).cache.bits == 8  # eight bits cost little more than four
    assert chosen(1200 * MIB, 16384).cache.bits == 4
    with pytest.raises(BudgetError) as refused:
        chosen(1, 2048)
    assert refused.value.smallest_bytes is not None
    smallest = round_up(refused.value.smallest_bytes, MIB) + 64 * MIB
    assert chosen(smallest, 2048).budget == smallest


def test_heads_that_four_bits_cannot_hold_are_no_obstacle() -> None:
    model = model_of([100 * MIB] * 20, groups=layer_groups((0, 0), KVShape(8, 127, 128, "bfloat16")))
    budgets = Budgets(1200 * MIB, 300 * MIB, kv="auto", choose_kv_bits=True)
    assert make_plan(model, UNMEASURED, Workload(1, 16384, 16), budgets).cache.bits == 16


@pytest.mark.parametrize("bits", [4, 5])
def test_kv_blocks_that_cannot_be_are_explained(bits: Bits) -> None:
    model = model_of(groups=layer_groups((0, 0), KVShape(2, 64, 63, "bfloat16")))
    with pytest.raises(ConfigError, match="KV cache: "):
        make_plan(model, UNMEASURED, Workload(), Budgets(GIB, 0, kv_bits=bits))


@pytest.mark.parametrize("fields", [{"sequences": 0}, {"max_context": 0}, {"sequences": "two"}, {"max_context": 1.5}])
def test_workloads_that_cannot_be_are_explained(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="expected a whole number above 0"):
        Workload(**fields)


def test_plans_need_neither_torch_nor_transformers() -> None:
    check = (
        "import sys, pkgutil, importlib, tiered.plan;"
        "[importlib.import_module(m.name) for m in pkgutil.iter_modules(tiered.plan.__path__, 'tiered.plan.')];"
        "print(sorted({'torch', 'transformers', 'numpy', 'tiered.runtime'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_prompts_are_paced_by_rates_where_they_have_been_measured() -> None:
    plan, model = plan_of(), model_of()
    assert pace_for(plan, model, None, calibration_of(model, Machine(0), 512)).prompt_tokens(4) == LEAST
    # Rows cost next to nothing up to 512: a quarter of a pass is more than all of them.
    fast = Machine(0, None, ComputeRate((1, 512), (1e-9, 1.1e-9)))
    assert pace_for(plan, model, None, calibration_of(model, fast, 512)).prompt_tokens(4) > 512
    slow = Machine(0, None, ComputeRate((1, 512), (1e-9, 1e-6)))
    assert pace_for(plan, model, None, calibration_of(model, slow, 512)).prompt_tokens(4) == LEAST


def planned(ram: int, prompt: int = 4096, **fields: Any) -> Plan:
    """A plan for layers of four units of 20 and two of 80 MiB, beside some 400 MiB that are needed."""
    model = model_of(tape=tape_of([20 * MIB] * 4 * 20 + [80 * MIB], counts=[4] * 20 + [1]), **fields)
    return make_plan(model, UNMEASURED, Workload(1, 4096, prompt, max_batched_tokens=4096), Budgets(ram, 300 * MIB))


def test_a_pass_of_one_micro_batch_needs_two_units() -> None:
    plan = planned(800 * MIB, prompt=8)
    assert not plan.held.layers and not plan.held.head and plan.max_batched_tokens == 8
    # The head is resident, so that two units of layers are the largest neighbours.
    assert 80 in plan.placement.resident and plan.placement.ring_nbytes == 40 * MIB


def test_a_long_prompt_takes_one_pass_where_a_layer_and_a_unit_fit_and_more_where_they_do_not() -> None:
    ample, scarce = planned(2 * GIB), planned(BudgetNamed(planned).smallest)
    assert ample.held.layers and ample.max_batched_tokens == 4096 > ample.micro_batch_rows
    assert not scarce.held.layers and scarce.max_batched_tokens == scarce.micro_batch_rows < 4096
    assert scarce.placement.ring_nbytes < 100 * MIB and not ample.missing_overlap_nbytes


def test_what_needs_a_whole_layer_gets_it() -> None:
    fields: dict[str, Any] = {"dense_attention": True, "groups": layer_groups((0, 0), KVShape(8, 128, 128, "bfloat16"))}
    plan = planned(2 * GIB, **fields)
    assert plan.held.layers and not plan.missing_overlap_nbytes
    with pytest.raises(BudgetError, match="80 MiB for the"):
        planned(MIB, **fields)


LARGE = mixture_of([50 * MIB] * 20 + [100 * MIB], count=64, chosen=4, nbytes=5 * MIB)
"""20 layers of 50 MiB, and of 64 experts which take 6400 MiB: a token chooses 400 MiB of them."""


def mixture_plan(workload: Workload, ram: int, machine: Machine = UNMEASURED, model: ModelShape = LARGE) -> Plan:
    return make_plan(model, machine, workload, Budgets(ram, 300 * MIB))


def test_experts_are_read_on_demand_where_that_reads_clearly_less() -> None:
    plan = mixture_plan(Workload(1, 256), 2 * GIB)
    assert plan.experts is not None and plan.tape.total == 1100 * MIB
    # Dense units come first: what they leave are the experts'.
    assert not plan.placement.ring_nbytes and plan.experts.slots > 50
    # 32 sequences choose 56 of 64 experts between them.
    assert mixture_plan(Workload(32, 256), 2 * GIB).experts is None


def test_what_fits_in_memory_is_held_whole() -> None:
    plan = mixture_plan(Workload(1, 256), 16 * GIB)
    assert plan.experts is None and not plan.placement.ring_nbytes
    loaded = make_plan(LARGE, UNMEASURED, Workload(1, 256), Budgets(16 * GIB, 300 * MIB, LOADED))
    assert loaded.placement == plan.placement


def test_scoring_and_long_prompts_with_short_completions_read_layers_whole() -> None:
    scored = Workload(8, 512, 512, choose_batch_size=True, one_pass=True, all_logits=True)
    assert mixture_plan(scored, 2 * GIB).experts is None
    for completion, on_demand in ((1, False), (200, True)):
        asked = Workload(1, 2048 + completion, 2048, max_batched_tokens=4096)
        assert (mixture_plan(asked, 2 * GIB).experts is not None) == on_demand


def test_a_budget_too_small_for_whole_layers_is_enough_for_dense_units_and_the_experts_of_a_token() -> None:
    # A unit of whole layers is larger than any dense one and four experts.
    large = mixture_of([10 * MIB] * 9, count=64, chosen=4, nbytes=40 * MIB)
    assert large.experts is not None
    joined = replace(large, tape=tape_of([10 * MIB, 2560 * MIB] * 8 + [10 * MIB], counts=[2] * 8 + [1]))

    def at(ram: int, model: ModelShape = joined) -> Plan:
        return mixture_plan(Workload(1, 64), ram, model=model)

    least = BudgetNamed(at).smallest
    plan = at(least)
    assert plan.experts is not None and plan.experts.slots == 4
    assert BudgetNamed(lambda ram: at(ram, replace(joined, experts=None))).smallest > least + 2 * GIB
    with pytest.raises(BudgetError, match="160 MiB for the experts that one token chooses, 10 MiB for"):
        at(MIB)


def test_results_of_experts_that_wait_for_their_sum_are_counted() -> None:
    needs = []
    for chosen in (4, 8):
        model = mixture_of([50 * MIB] * 20 + [100 * MIB], count=64, chosen=chosen, nbytes=5 * MIB)
        plan = mixture_plan(Workload(1, 256, 100, max_batched_tokens=100), 2 * GIB, model=model)
        assert plan.experts is not None and plan.micro_batch_rows == 100
        needs.append(plan.needs.workspace)
    assert needs[1] - needs[0] >= 4 * 100 * LARGE.hidden * LARGE.itemsize


def test_a_batch_is_chosen_by_what_its_sequences_read_of_experts_and_compute_of_them() -> None:
    workload = Workload(64, 256, 16, choose_batch_size=True, max_batched_tokens=4096, objective="throughput")
    many, few = (mixture_plan(replace(workload, sequences=n), 2 * GIB, MEASURED) for n in (64, 2))
    assert (many.batch_size, many.experts) == (64, None)
    assert few.experts is not None and few.batch_size == 2
    # What two tokens choose of 64 experts a layer, less those that are in memory.
    read = 20 * 64 * (1 - (15 / 16) ** 2) * 5 * MIB * (1 - few.experts.slots / (20 * 64))
    assert f"predicted per pass: {format_seconds(read / 2e9)} of disk and " in few.why


class BudgetNamed:
    """The budget that is named where there is far too little."""

    def __init__(self, plan_at: Callable[[int], Plan]) -> None:
        with pytest.raises(BudgetError) as refused:
            plan_at(MIB)
        assert refused.value.smallest_bytes is not None
        self.smallest = refused.value.smallest_bytes


def test_a_refusal_names_the_objects_of_experts_where_there_are_any() -> None:
    mixture = mixture_of([MIB] * 9, count=64, chosen=2, nbytes=4 * MIB, layers=8)
    for model, told in ((mixture, "for experts' objects, "), (model_of(), "for tables that stay in memory, ")):
        with pytest.raises(BudgetError, match=told):
            make_plan(model, Machine(0), Workload(1, 64), Budgets(2 * MIB, 0))
