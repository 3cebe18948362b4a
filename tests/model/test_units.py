"""Blocks of several units give the same tokens as blocks of one, in rings of two units, whatever is resident; and an
order of use that is not the store's is right or a named error."""

import errno
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Final
from unittest import mock

import pytest
import torch

from tests.answers import TOLERANCE, assert_same
from tests.quick import represented
from tests.runtimes import open_runtime, reserved, run_greedy, run_segments
from tests.store.units import Group, Rows, in_units
from tests.tiny import Tiny, prompts_for
from tests.tiny_configs import CONTEXT
from tiered.convert import ConvertOptions, convert_checkpoint
from tiered.errors import BudgetError, InterruptedRun, ReadError, UnsupportedFamilyError
from tiered.generate.score import Window, cut_windows, score
from tiered.model import Segment
from tiered.model.bind import OffloadedLinear
from tiered.plan import Held, Tape, Workload, full_ring, make_plan
from tiered.plan.placement import UNHELD, smallest_ring
from tiered.prepare import measure_inputs
from tiered.runtime import Options, Runtime
from tiered.store import BlockInfo, Store, Unit
from tiered.stream import Loan
from tiered.units import GIB

pytestmark = pytest.mark.usefixtures("steady_baseline")

FAMILIES: Final = ("opt", "llama", "gemma3_text", "bloom")


def order_of_use(store: Store) -> dict[str, list[str]]:
    """Names of each block's weights that linear layers borrow, in the order in which they do."""
    used: dict[str, dict[str, None]] = {}
    borrow = Loan.borrow

    def note(loan: Loan, key: str) -> Any:
        used.setdefault(loan.block, {})[key] = None
        return borrow(loan, key)

    with mock.patch.object(Loan, "borrow", note), open_runtime(store) as runtime:
        run_greedy(runtime, prompts_for_store(store), steps=1)
    return {block: [name for name in names if is_matrix(store, block, name)] for block, names in used.items()}


def prompts_for_store(store: Store) -> list[list[int]]:
    return [[3, 4, 5], [6, 7]]


def is_matrix(store: Store, block: str, name: str) -> bool:
    info = store.blocks.get(block) or next(b for b in store.tape if b.name == block)
    return len(store.layout(info).weights[info.prefix + name].shape) == 2


@pytest.fixture(scope="module")
def cut(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Store]:
    """Cuts a tiny model's store into units: one of small tensors, and dense ones as `arrange` says; read only."""
    folder = tmp_path_factory.mktemp("cut")

    @cache
    def make(
        name: str, arrange: Callable[[BlockInfo, list[str]], Sequence[Sequence[str | Rows]]] = each, quant: str = "none"
    ) -> Store:
        store = copied(tiny.store(name, quant), folder / f"{name}-{arrange.__name__}-{quant}.tiered")
        order = order_of_use(store)

        def groups(block: BlockInfo, names: Sequence[str]) -> list[Group]:
            used = order[block.name]
            small = [each for each in names if each not in used]
            dense = [Group("dense", members) for members in arrange(block, used)]
            return [*([Group("small", small)] if small else []), *dense]

        return in_units(store, store.path / "units", groups)

    return make


def copied(store: Store, folder: Path) -> Store:
    shutil.copytree(store.path, folder)
    return Store.open(folder)


def each(block: BlockInfo, names: list[str]) -> Sequence[Sequence[str | Rows]]:
    """Every weight is a unit."""
    return [[name] for name in names]


def ram_for(store: Store, workload: Workload, room: Callable[[Tape], int], **options: Any) -> int:
    """The budget that leaves `room` for units and ring."""
    model, machine, budgets = measure_inputs(store, Options(**{**SMALL, **options}))
    # What a run needs besides grows a little with the budget: from a large one down, until both agree.
    nbytes, budget = room(model.tape), 64 * GIB
    while True:
        plan = make_plan(model, machine, workload, replace(budgets, ram=budget))
        if (needed := plan.needs.total + nbytes) >= budget:
            return budget
        budget = needed


SMALL: Final[dict[str, Any]] = {"dtype": "float32", "ram": 16 * GIB, "threads": 1}
ONE_PASS: Final = Workload(2, 64, 21)
LIMITED: Final = Workload(2, 64, 21, max_batched_tokens=64)


@contextmanager
def opened(store: Store, workload: Workload, room: Callable[[Tape], int], **options: Any) -> Iterator[Runtime]:
    ram = ram_for(store, workload, room, **options)
    with Runtime(store, workload, Options(**{**SMALL, **options, "ram": ram})) as runtime:
        yield runtime


def two_units(tape: Tape) -> int:
    return full_ring(tape.streamed(UNHELD))


def one_unit(tape: Tape) -> int:
    return smallest_ring(tape.streamed(UNHELD))


def half(tape: Tape) -> int:
    return tape.total // 2 + two_units(tape)


def everything(tape: Tape) -> int:
    return tape.total


def layer_and_unit(tape: Tape) -> int:
    return full_ring(tape.streamed(Held(True, True)))


ROOMS: Final[dict[str, Callable[[Tape], int]]] = {
    "one unit": one_unit,
    "two units": two_units,
    "half": half,
    "all": everything,
}


def in_rooms(values: Sequence[str]) -> list[tuple[str, str, int | None]]:
    """Each of `values` with rooms and read-aheads. What is read when depends on sizes alone: the first one has all
    combinations, the others meet every room and every read-ahead."""
    return [
        (value, room, prefetch)
        for first, value in enumerate(values)
        for second, room in enumerate(ROOMS)
        for third, prefetch in enumerate((None, 0, 1))
        if not first or (first + second + third) % 3 == 0
    ]


RINGS: Final = in_rooms(("opt", "llama", "gemma3_text"))
SKIPPED: Final = in_rooms(("mlp.up_proj", "mlp.down_proj", "q_proj"))
"""A unit in the middle of a layer, its last and its first."""


@pytest.mark.parametrize(
    ("name", "room", "prefetch"),
    represented(RINGS, [cell for cell in RINGS if cell[0] == "opt" and "unit" in cell[1] and cell[2] != 1]),
)
def test_rings_of_two_units_change_nothing(
    tiny: Tiny, cut: Callable[..., Store], name: str, room: str, prefetch: int | None
) -> None:
    store = cut(name)
    with opened(store, LIMITED, ROOMS[room], prefetch=prefetch) as runtime:
        plan = runtime.plan
        assert not plan.held.layers and plan.placement.nbytes <= ROOMS[room](plan.tape)
        for _ in range(2):
            assert_same(run_greedy(runtime, prompts_for(name), 4), tiny.reference(name))
        read = plan.tape.file_nbytes
        streamed = sum(nbytes for unit, nbytes in enumerate(read) if unit not in plan.placement.resident)
        least = sum(read) - streamed + 8 * streamed
        # Rows of the embedding, small tensors and outer ones come on top.
        assert least <= runtime.bytes_read <= least + sum(f.nbytes for f in store.manifest.files) + (1 << 20)


@pytest.mark.parametrize("rows", represented([1, 3, 5], [3]))
@pytest.mark.parametrize("name", FAMILIES)
def test_several_micro_batches_hold_a_layer(tiny: Tiny, cut: Callable[..., Store], name: str, rows: int) -> None:
    store = cut(name)
    with opened(store, ONE_PASS, layer_and_unit, micro_batch_rows=rows) as runtime:
        plan = runtime.plan
        assert plan.held.layers and plan.placement.ring_nbytes >= max(
            map(sum, plan.tape.streamed(Held(True))), default=0
        )
        assert_same(run_greedy(runtime, prompts_for(name), 4), tiny.reference(name))


@pytest.mark.parametrize("prefetch", [None, 0])
def test_where_a_layer_does_not_fit_a_long_prompt_takes_more_passes(
    tiny: Tiny, cut: Callable[..., Store], prefetch: int | None
) -> None:
    store, (prompt, _), workload = cut("llama"), prompts_for("llama"), replace(LIMITED, sequences=1)
    with opened(store, workload, two_units, prefetch=prefetch, micro_batch_rows=5) as runtime:
        plan = runtime.plan
        assert not plan.held.layers and plan.max_batched_tokens == plan.micro_batch_rows == 5
        with ExitStack() as stack:
            kv = reserved(stack, runtime, len(prompt))
            parts = [prompt[start : start + 5] for start in range(0, len(prompt), 5)]
            found = [run_segments(runtime, [Segment(kv, part, len(part))])[0] for part in parts]
    expected = tiny.reference("llama").logits[0][: len(prompt)]
    assert float((torch.cat(found) - expected).abs().max() / expected.abs().max()) < 1e-4


def by_ranges(block: BlockInfo, names: list[str]) -> Sequence[Sequence[str | Rows]]:
    """The head in three ranges of rows, the first weight of a layer in two; the others by twos."""
    first, *others = names
    rows = [0, 64, 128, 160] if block.role == "head" else [0, 32, 64]
    ranges = [[Rows(first, start, stop)] for start, stop in pairwise(rows)]
    return [*ranges, *(others[i : i + 2] for i in range(0, len(others), 2))]


@pytest.mark.parametrize("quant", represented(["none", "int8", "int4"], ["int4"]))
@pytest.mark.parametrize("room", ["two units", "half", "all"])
def test_weights_in_ranges_of_rows_and_units_of_several_weights(
    tiny: Tiny, cut: Callable[..., Store], room: str, quant: str
) -> None:
    store = cut("opt", by_ranges, quant)
    with opened(store, replace(LIMITED, all_logits=True), ROOMS[room]) as runtime:
        assert not runtime.plan.held.head  # all logits that the tokens of a pass may want are computed at once
        assert_same(run_greedy(runtime, prompts_for("opt"), 4), tiny.reference("opt", quant))


SPLIT: Final = ("opt", "opt-350m", "llama", "llama-tied-biased", "gemma2", "phi", "falcon", "glm4_moe")
"""Tied heads and heads of their own, biases (Phi's head has one), soft caps, projections around the layers, dense
attention, linear layers of a class of their own (Falcon's), experts, and matrices that nothing borrows (routers)."""
UNTIED: Final = ("llama", "phi", "glm4_moe")
"""Of these, those with a head of its own."""


@pytest.mark.parametrize(
    ("name", "quant"),
    represented(
        [*((name, "int8") for name in SPLIT), ("gemma2", "none"), ("opt", "int4")],
        [("gemma2", "none"), ("falcon", "int8")],
    ),
)
def test_a_store_whose_large_weights_are_in_ranges_gives_the_same_tokens(
    tiny: Tiny, tmp_path: Path, name: str, quant: str
) -> None:
    store = in_ranges(tiny, name, quant, tmp_path)
    assert store.vocab_size == tiny.store(name, quant).vocab_size
    embed, head = (store.layout(store.blocks[block]).units for block in ("embed", "head"))
    # A quantized embedding that is not the head too is read by rows, with scales and zeros inside: it has no ranges.
    ranges = [""] if name in UNTIED and quant != "none" else ["0", "1", "2"]
    assert [unit.name.partition("#")[2] for unit in embed] == ranges and len(head) >= 3
    prompts, expected = prompts_for(name), tiny.reference(name, quant)
    for rows in (None, 5):
        with opened(store, replace(LIMITED, all_logits=True), half, micro_batch_rows=rows) as runtime:
            assert runtime.plan.held.head is (rows is not None)
            assert_same(run_greedy(runtime, prompts, 4), expected)
    with opened(store, replace(LIMITED, sequences=1), two_units) as runtime, ExitStack() as stack:
        assert runtime.plan.held == UNHELD
        kv, length = reserved(stack, runtime, CONTEXT), len(prompts[0])
        for ids in (prompts[0], expected.tokens[0][:1]):
            (found,) = run_segments(runtime, [Segment(kv, list(ids), 1)])
            wanted = expected.logits[0][kv.length - 1]
            assert float((found[0] - wanted).abs().max() / wanted.abs().max()) < TOLERANCE
        assert kv.length == length + 1


def test_a_window_that_does_not_fit_whole_is_scored_in_several_passes(tiny: Tiny, tmp_path: Path) -> None:
    store = in_ranges(tiny, "llama", "int8", tmp_path)
    windows = list(cut_windows(torch.arange(3, 120), 48, 48, [1]))
    whole = Workload(len(windows), 48, 48, choose_batch_size=True, one_pass=True, all_logits=True)
    in_parts = replace(whole, batch_size=1, one_pass=False, max_batched_tokens=64)
    found: list[dict[int, torch.Tensor]] = []

    def keep(window: Window, logprobs: torch.Tensor) -> None:
        found[-1][window.position] = logprobs

    for ram in (16 * GIB, ram_for(store, in_parts, two_units, micro_batch_rows=20)):
        found.append({})
        with Runtime(store, whole, Options(**{**SMALL, "ram": ram, "micro_batch_rows": 20})) as runtime:
            result = score(runtime, windows, runtime.plan.batch_size, keep)
            is_whole = ram == 16 * GIB
            assert runtime.plan.held.layers is runtime.plan.held.head is is_whole
            assert result.costs.passes == (1 if is_whole else sum(-(-len(w.input_ids) // 20) for w in windows))
    together, apart = found
    for position, logprobs in together.items():
        torch.testing.assert_close(apart[position], logprobs, rtol=1e-4, atol=1e-4)


def in_ranges(tiny: Tiny, name: str, quant: str, folder: Path) -> Store:
    """The store of a tiny model with every matrix in ranges of 64 rows, the last of fewer, each a unit of its own."""
    cut = mock.patch.multiple("tiered.convert.blocks", RANGE_NBYTES=1, CHUNK_NBYTES=1)
    with cut, mock.patch("tiered.convert.recipe.MIB", 512):  # only norms and biases are small
        made = convert_checkpoint(tiny.checkpoint(name), folder / "ranges", ConvertOptions(quant, compress="none"))
    return Store.open(made.store)


def swapped(block: BlockInfo, names: list[str]) -> Sequence[Sequence[str | Rows]]:
    """Every weight is a unit, and the last two have changed places."""
    return [[name] for name in ([*names[:-2], names[-1], names[-2]] if len(names) > 1 else names)]


@pytest.mark.parametrize("room", ["one unit", "two units", "half", "all"])
def test_two_units_in_the_wrong_order_are_right_or_a_named_error(
    tiny: Tiny, cut: Callable[..., Store], room: str
) -> None:
    store = cut("llama", swapped)
    with opened(store, LIMITED, ROOMS[room]) as runtime:
        if room == "one unit":
            with pytest.raises(
                UnsupportedFamilyError, match=r"'llama': layer-000/unit-\d is asked for while .* expected"
            ):
                run_greedy(runtime, prompts_for("llama"), 2)
        else:
            assert_same(run_greedy(runtime, prompts_for("llama"), 3), tiny.reference("llama"))


@pytest.mark.parametrize("room", ["two units", "all"])
def test_a_unit_that_is_used_twice_is_right_or_a_named_error(tiny: Tiny, cut: Callable[..., Store], room: str) -> None:
    forward = OffloadedLinear.forward

    def twice(module: OffloadedLinear, x: Any) -> Any:
        forward(module, x)
        return forward(module, x)

    store = cut("llama")
    with opened(store, LIMITED, ROOMS[room]) as runtime:
        with mock.patch.object(OffloadedLinear, "forward", twice):
            if room == "all":
                assert_same(run_greedy(runtime, prompts_for("llama"), 2), tiny.reference("llama"))
            else:
                with pytest.raises(
                    UnsupportedFamilyError, match=r"'llama': layer-000 uses .* after .*, expected unit unit-2"
                ):
                    run_greedy(runtime, prompts_for("llama"), 2)
        assert_same(run_greedy(runtime, prompts_for("llama"), 2), tiny.reference("llama"))


@pytest.mark.parametrize(
    ("skipped", "room", "prefetch"),
    represented(SKIPPED, [cell for cell in SKIPPED if cell[0] == "mlp.up_proj" and cell[2] is None]),
)
def test_a_unit_that_is_not_used_holds_nothing_up_or_is_named(
    tiny: Tiny, cut: Callable[..., Store], skipped: str, room: str, prefetch: int | None
) -> None:
    forward = OffloadedLinear.forward

    def unless_skipped(module: OffloadedLinear, x: Any) -> Any:
        if skipped in module._weight_name:
            return x.new_zeros((*x.shape[:-1], module.out_features))
        return forward(module, x)

    store = cut("llama")
    with opened(store, LIMITED, ROOMS[room], prefetch=prefetch) as runtime:
        with mock.patch.object(OffloadedLinear, "forward", unless_skipped):
            try:
                run_greedy(runtime, prompts_for("llama"), 3)
            except UnsupportedFamilyError as error:
                assert room != "all" and "expected layer-000/unit-" in str(error)
            else:
                assert skipped != "q_proj" or room != "one unit"
        assert_same(run_greedy(runtime, prompts_for("llama"), 2), tiny.reference("llama"))


@pytest.mark.parametrize("prefetch", represented([None, 0], [None]))
@pytest.mark.parametrize("room", ["two units", "half"])
def test_an_interruption_at_any_unit_leaves_the_runtime_usable(
    tiny: Tiny, cut: Callable[..., Store], room: str, prefetch: int | None
) -> None:
    store, borrow, left = cut("llama"), Loan.borrow, [0]
    with opened(store, LIMITED, ROOMS[room], prefetch=prefetch) as runtime:

        def interrupt(loan: Loan, key: str) -> Any:
            left[0] -= loan.block != "head"  # after the head's nobody looks any more
            if not left[0]:
                runtime.host.interrupt(runtime)
            return borrow(loan, key)

        for at in (1, 2, 8, 21, 22, 30, 42):
            left[0] = at
            with mock.patch.object(Loan, "borrow", interrupt), pytest.raises(InterruptedRun):
                run_greedy(runtime, prompts_for("llama"), 2)
            assert runtime._memory.pool.is_empty
            if at % 2:
                assert_same(run_greedy(runtime, prompts_for("llama"), 1, end=False), tiny.reference("llama"))
        assert_same(run_greedy(runtime, prompts_for("llama"), 3), tiny.reference("llama"))
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("tiered")]


def test_a_failed_read_of_a_unit_is_named_and_passes(tiny: Tiny, cut: Callable[..., Store]) -> None:
    store = cut("llama")
    unit = store.layout(store.blocks["layer-001"]).units[4]
    is_broken = [True]

    def preadv(fd: int, buffers: Sequence[memoryview], offset: int, flags: int, /) -> int:
        path = str(Path(f"/proc/self/fd/{fd}").readlink())
        if is_broken[0] and path.endswith(unit.file.path) and offset == unit.offset:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return os.preadv(fd, buffers, offset, flags)

    with opened(store, LIMITED, two_units) as runtime:
        runtime.reader._preadv = preadv
        for _ in range(2):
            with pytest.raises(ReadError, match=rf"layer-001\.safetensors: read of .* at {unit.offset:,} .*EIO"):
                run_greedy(runtime, prompts_for("llama"), 2)
        is_broken[0] = False
        assert_same(run_greedy(runtime, prompts_for("llama"), 2), tiny.reference("llama"))


def test_a_refusal_names_a_budget_that_works(tiny: Tiny, cut: Callable[..., Store]) -> None:
    store = cut("llama")
    with pytest.raises(BudgetError, match="for the head") as refused:
        Runtime(store, LIMITED, Options(**{**SMALL, "ram": 1 << 20})).__enter__()
    with Runtime(store, LIMITED, Options(**{**SMALL, "ram": refused.value.smallest_bytes})) as runtime:
        assert_same(run_greedy(runtime, prompts_for("llama"), 3), tiny.reference("llama"))


def test_small_tensors_are_read_once_and_counted(tiny: Tiny, cut: Callable[..., Store]) -> None:
    store = cut("gemma3_text")
    small: list[Unit] = [unit for block in store.tape for unit in store.layout(block).units if unit.kind == "small"]
    assert small
    reads: list[tuple[str, int]] = []

    def preadv(fd: int, buffers: Sequence[memoryview], offset: int, flags: int, /) -> int:
        reads.append((str(Path(f"/proc/self/fd/{fd}").readlink()), offset))
        return os.preadv(fd, buffers, offset, flags)

    with opened(store, LIMITED, two_units, keep_spans=True) as runtime:
        runtime.reader._preadv = preadv
        run_greedy(runtime, prompts_for("gemma3_text"), 4)
        assert [reads.count((str(store.path / unit.file.path), unit.offset)) for unit in small] == [1] * len(small)
        waits = {span.name for span in runtime.host.trace.spans if span.lane == "wait"}
        assert "layer-001/unit-1" in waits
        outer = sum(weight.nbytes for weight in store.layout(store.blocks["outer"]).weights.values())
        kept = sum(weight.nbytes for unit in small for weight in unit.weights.values())
        assert runtime.plan.needs.outer >= outer + kept
