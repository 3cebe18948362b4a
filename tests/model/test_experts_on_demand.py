"""Experts that are read when they are chosen give, bit for bit, what layers that are read whole give."""

import dataclasses
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import pytest
import torch

from tests.answers import assert_same
from tests.quick import represented
from tests.runtimes import open_runtime, run_greedy
from tests.tiny import Tiny, prompts_for
from tiered.arch.families import _MIXTURES
from tiered.errors import InterruptedRun
from tiered.plan import ExpertCachePlan, Held, Plan, Tape, make_plan, place
from tiered.plan.placement import full_ring
from tiered.runtime import Runtime
from tiered.store import Store
from tiered.stream import ExpertCache

STEPS: Final = 4


@contextmanager
def on_demand(
    monkeypatch: pytest.MonkeyPatch, store: Store, slots: int, is_resident: bool = True, **options: Any
) -> Iterator[Runtime]:
    """A runtime that reads experts when they are chosen, with room for so many; dense units resident or streamed."""

    def make(*inputs: Any) -> Plan:
        plan, shape = make_plan(*inputs), inputs[0].experts
        tape: Tape = shape.dense
        held = Held(True, True)
        placement = place(tape, tape.total if is_resident else full_ring(tape.streamed(held)), held)
        assert placement is not None
        experts = ExpertCachePlan(slots, shape.nbytes)
        return dataclasses.replace(plan, tape=tape, placement=placement, held=held, experts=experts)

    with monkeypatch.context() as patch:
        patch.setattr("tiered.opening.make_plan", make)
        with open_runtime(store, **options) as runtime:
            yield runtime


REPRESENTATIVES: Final = ("qwen3_moe", "glm4_moe")
CELLS: Final = [
    (name, slots)
    for first, name in enumerate(_MIXTURES)
    for second, slots in enumerate((1, 5, 1000))
    if name in REPRESENTATIVES or (first + second) % 3 == 0
]
"""How experts come and go depends on their number alone: two mixtures have every number of slots, the others one."""


@pytest.mark.parametrize(("name", "slots"), represented(CELLS, [cell for cell in CELLS if cell[0] in REPRESENTATIVES]))
def test_every_mixture_gives_bit_for_bit_what_whole_layers_give(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, name: str, slots: int
) -> None:
    store, prompts = tiny.store(name), prompts_for(name)
    options: dict[str, Any] = {"micro_batch_rows": {1: 3, 5: 6, 1000: None}[slots]}
    with open_runtime(store, **options) as runtime:
        whole = run_greedy(runtime, prompts, STEPS)
    with on_demand(monkeypatch, store, slots, is_resident=slots != 5, **options) as runtime:
        found = run_greedy(runtime, prompts, STEPS)
    assert found.tokens == whole.tokens
    assert all(torch.equal(a, b) for a, b in zip(found.logits, whole.logits, strict=True))


@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_quantized_experts_on_the_kernels_give_the_same_bits(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, quant: str
) -> None:
    store, prompts = tiny.store("qwen3_moe", quant), prompts_for("qwen3_moe")
    with open_runtime(store, dtype="bfloat16") as runtime:
        whole = run_greedy(runtime, prompts, STEPS)
    with on_demand(monkeypatch, store, 3, is_resident=False, dtype="bfloat16") as runtime:
        found = run_greedy(runtime, prompts, STEPS)
    assert all(torch.equal(a, b) for a, b in zip(found.logits, whole.logits, strict=True))


def test_only_what_is_chosen_is_read_and_passes_say_what_it_was(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    store = tiny.store("qwen3_moe")
    with on_demand(monkeypatch, store, 1000) as runtime:
        run_greedy(runtime, [[3]], 1)
        dense = sum(unit.nbytes for block in store.dense_units for unit in block)
        layers, experts = store.tape[:-1], sum(unit.nbytes for block in store.expert_units for unit in block)
        use = runtime.start_streaming().blocks.expert_use
        assert use.hits == 0 and 0 < use.misses < len(layers) * len(store.expert_units[0])
        assert use.nbytes == use.misses * store.expert_units[0][0].nbytes < experts
        small = sum(unit.nbytes for block in store.small_units for unit in block)
        besides = sum(store.blocks[name].file.nbytes for name in ("embed", "outer"))
        assert dense + use.nbytes <= runtime.bytes_read <= dense + use.nbytes + small + besides


@pytest.mark.parametrize("is_resident", [False, True])
def test_an_interruption_between_experts_leaves_the_runtime_usable(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, is_resident: bool
) -> None:
    store, prompts, each, left = tiny.store("mixtral"), prompts_for("mixtral"), ExpertCache.each, [0]

    def interrupt(cache: ExpertCache, *asked: Any) -> Any:
        for found in each(cache, *asked):
            left[0] -= 1
            if not left[0]:
                runtime.host.interrupt(runtime)
            yield found

    monkeypatch.setattr(ExpertCache, "each", interrupt)
    with on_demand(monkeypatch, store, 2, is_resident) as runtime:
        for at in (1, 2, 5, 9):
            left[0] = at
            with pytest.raises(InterruptedRun):
                run_greedy(runtime, prompts, 2)
            assert_same(run_greedy(runtime, prompts, 2, end=False), tiny.reference("mixtral"))
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("tiered")]


def test_an_error_while_experts_are_computed_leaves_nothing_behind(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    store, prompts, take = tiny.store("mixtral"), prompts_for("mixtral"), [3]
    with on_demand(monkeypatch, store, 2, is_resident=False) as runtime:
        linear: Callable[..., torch.Tensor] = runtime.host.kernels.linear

        def failing(*arguments: Any) -> torch.Tensor:
            take[0] -= 1
            if not take[0]:
                raise MemoryError("no room")
            return linear(*arguments)

        for at in (9, 14, 20):
            take[0] = at
            with monkeypatch.context() as patch:
                patch.setattr(runtime.host.kernels, "linear", failing)
                with pytest.raises(MemoryError):
                    run_greedy(runtime, prompts, 2)
            assert_same(run_greedy(runtime, prompts, 2, end=False), tiny.reference("mixtral"))
