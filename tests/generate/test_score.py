"""Scoring gives every token of a text one log-probability: the right one, whatever shares its pass."""

import math
from collections.abc import Iterator
from collections.abc import Sequence as Items
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tests.answers import reference_logits
from tests.plan.plans import plan_of
from tests.tiny import Tiny
from tiered.cache import SequenceKV
from tiered.errors import BudgetError, ConfigError, ModelError, TieredError
from tiered.generate.score import (
    Tally,
    Window,
    count_windows,
    cut_windows,
    log_probabilities,
    score,
    window_targets,
)
from tiered.model import OnBlock, OnLogits, Pass, Segment
from tiered.plan import Workload
from tiered.plan.pace import Pace
from tiered.runtime import Options, Runtime
from tiered.units import GIB, MIB

VOCAB = 50
BEGIN = 3


class FakeRunner:
    """A model whose logits depend on the tokens before them, the last three most; hands them out in small pieces."""

    def __init__(self, room: int = 100, pieces: int = 3) -> None:
        self.room, self.pieces = room, pieces
        self.plan, self.pace, self.vocab_size = plan_of(max_batched_tokens=1000 * (room or 1)), Pace(), VOCAB
        self.bytes_read = self.kv_bytes_read = self.kv_bytes_written = 0
        self.disk_idle_seconds = self.stalled_seconds = self.bus_seconds = 0.0
        self.bus_nbytes = 0
        self.held: list[SequenceKV] = []
        self.runs: list[tuple[int, bool]] = []
        """Segments of each pass, and whether it was announced as the last."""
        generator = torch.Generator().manual_seed(4)
        self.table = torch.randn(3, VOCAB, VOCAB, generator=generator)

    def logits(self, ids: Items[int]) -> torch.Tensor:
        """[tokens, vocab]."""
        rows = []
        for end in range(1, len(ids) + 1):
            last = [*ids[:end]][-3:]
            rows.append(sum(self.table[age, token] for age, token in enumerate(reversed(last))) + 0.01 * end)
        return torch.stack([torch.as_tensor(row) for row in rows])

    def reserve(self, tokens: int) -> SequenceKV | None:
        if len(self.held) >= self.room:
            return None
        self.held.append(SequenceKV(tokens, first=(0,), pages=(1,), tail=0))
        return self.held[-1]

    may_rest = False

    def rest_device(self) -> None:
        raise AssertionError("there is no device")

    def release(self, kv: SequenceKV) -> None:
        self.held.remove(kv)

    def run(
        self, segments: Items[Segment], on_logits: OnLogits, on_block: OnBlock | None = None, is_last: bool = False
    ) -> Pass:
        self.runs.append((len(segments), is_last))
        self.bytes_read += 1000
        for number, segment in enumerate(segments):
            assert any(segment.kv is kv for kv in self.held)
            assert len(segment.input_ids) <= segment.kv.capacity
            kept = self.logits(segment.input_ids)[-segment.keep :]
            for index in range(0, segment.keep, self.pieces):
                on_logits(number, index, kept[index : index + self.pieces])
        for segment in segments:
            segment.kv.length += len(segment.input_ids)
        if on_block is not None:
            on_block(1, 1)
        return one_pass()


def one_pass(seconds: float = 1.0, compute: float = 0.25) -> Pass:
    return Pass((), seconds, compute, seconds - compute, ())


def random_ids(count: int) -> torch.Tensor:
    return torch.randint(4, VOCAB, (count,), generator=torch.Generator().manual_seed(count))


def scored(
    runner: FakeRunner, windows: Iterator[Window] | list[Window], per_pass: int = 4
) -> dict[tuple[int, int], float]:
    """Log-probabilities by text and position; a token scored twice fails."""
    found: dict[tuple[int, int], float] = {}

    def keep(window: Window, logprobs: torch.Tensor) -> None:
        for place, value in enumerate(logprobs.tolist(), window.position):
            assert (window.text, place) not in found
            found[window.text, place] = value

    score(runner, windows, per_pass, keep)
    return found


# Windows.


@given(
    tokens=st.integers(0, 90),
    context=st.integers(1, 20),
    stride=st.integers(1, 25),
    begins=st.integers(0, 2),
)
def test_every_token_is_scored_once_from_a_window_of_the_tokens_before_it(
    tokens: int, context: int, stride: int, begins: int
) -> None:
    assume(window_targets(context, begins) > 0)
    ids, begin_ids = torch.arange(100, 100 + tokens), list(range(begins))
    windows = list(cut_windows(ids, context, stride, begin_ids))
    assert len(windows) == count_windows(tokens, context, stride, begins)
    positions = [window.position + n for window in windows for n in range(len(window.targets))]
    assert positions == list(range(0 if begins else 1, tokens))
    for window in windows:
        assert len(window.input_ids) <= context
        assert window.input_ids[:begins] == begin_ids
        own = window.input_ids[begins:]
        assert own == list(range(own[0], own[0] + len(own))) if own else begins
        assert window.targets == ids[window.position : window.position + len(window.targets)].tolist()
        # What is fed ends just before the last target, so the last positions are the ones before the targets.
        assert (window.input_ids + window.targets[-1:])[-len(window.targets) :] == window.targets


@given(tokens=st.integers(2, 60), more=st.integers(1, 40), stride=st.integers(1, 10), begins=st.integers(0, 1))
def test_a_window_does_not_depend_on_how_the_text_goes_on(tokens: int, more: int, stride: int, begins: int) -> None:
    begin_ids = [BEGIN] * begins

    def context_of(ids: torch.Tensor) -> list[list[int]]:
        """What comes before each scored token."""
        return [
            window.input_ids[: len(window.input_ids) - len(window.targets) + 1 + n]
            for window in cut_windows(ids, 10, stride, begin_ids)
            for n in range(len(window.targets))
        ]

    short, long = torch.arange(tokens), torch.arange(tokens + more)
    assert context_of(long)[: tokens - 1 + begins] == context_of(short)


def test_windows_are_disjoint_where_the_stride_is_the_context() -> None:
    windows = list(cut_windows(torch.arange(10, 31), 8, 8, [BEGIN]))
    assert [window.input_ids for window in windows] == [
        [BEGIN, *range(10, 17)],
        [BEGIN, *range(18, 25)],
        [BEGIN, *range(26, 30)],
    ]
    without = list(cut_windows(torch.arange(10, 31), 8, 8))
    assert [window.input_ids for window in without] == [[*range(10, 18)], [*range(18, 26)], [*range(26, 30)]]


def test_a_smaller_stride_gives_later_tokens_more_to_go_by() -> None:
    for window in list(cut_windows(torch.arange(64), 16, 4, [BEGIN]))[1:]:
        assert len(window.targets) <= 4
        assert len(window.input_ids) - len(window.targets) >= 12


def test_a_context_without_room_for_any_text_is_refused() -> None:
    with pytest.raises(ConfigError, match="room for at least one"):
        list(cut_windows(torch.arange(9), 1, 1, [1, 2]))
    with pytest.raises(ConfigError, match="3 targets for 2 input tokens"):
        Window([1, 2], [2, 3, 4])


# Scoring.


@pytest.mark.parametrize("begin_ids", [[], [BEGIN]])
@pytest.mark.parametrize(("context", "stride"), [(16, 16), (16, 5), (7, 1), (64, 64)])
@pytest.mark.parametrize("per_pass", [1, 3, 50])
def test_log_probabilities_are_those_of_a_direct_computation(
    begin_ids: list[int], context: int, stride: int, per_pass: int
) -> None:
    ids, runner = random_ids(61), FakeRunner()
    found = scored(runner, cut_windows(ids, context, stride, begin_ids), per_pass)
    assert sorted(found) == [(0, place) for place in range(0 if begin_ids else 1, 61)]
    for window in cut_windows(ids, context, stride, begin_ids):
        direct = runner.logits(window.input_ids).double().log_softmax(-1)[-len(window.targets) :]
        for place, (row, target) in enumerate(zip(direct, window.targets, strict=True), window.position):
            assert found[0, place] == pytest.approx(float(row[target]), abs=1e-5)


def test_what_shares_a_pass_changes_no_bit() -> None:
    ids = random_ids(200)
    alone = scored(FakeRunner(pieces=1), cut_windows(ids, 16, 8), 1)
    for runner, per_pass in ((FakeRunner(pieces=5), 7), (FakeRunner(pieces=100), 50), (FakeRunner(room=2), 9)):
        assert scored(runner, cut_windows(ids, 16, 8), per_pass) == alone


def test_windows_are_taken_as_they_are_needed_and_reported_in_order() -> None:
    taken = 0

    def counting() -> Iterator[Window]:
        nonlocal taken
        for window in cut_windows(random_ids(81), 9, 8):
            taken += 1
            yield window

    runner, seen = FakeRunner(), list[int]()

    def on_scored(window: Window, _: torch.Tensor) -> None:
        seen.append(window.position)
        # One more than is running is looked at, to know which pass is the last.
        assert taken <= 3 * len(runner.runs) + 1
        assert not runner.held

    result = score(runner, counting(), 3, on_scored)
    assert seen == sorted(seen)
    assert runner.runs == [(3, False), (3, False), (3, False), (1, True)]
    assert (result.costs.sequences, result.costs.passes, result.total.tokens) == (10, 4, 80)
    assert (result.costs.prompt_tokens, result.costs.prefill.bytes_read) == (sum(8 for _ in seen) + 9, 4000)


def test_a_full_cache_makes_passes_smaller_and_one_without_room_is_refused() -> None:
    runner = FakeRunner(room=2)
    assert len(scored(runner, cut_windows(random_ids(49), 8, 8), 5)) == 48
    assert runner.runs == [(2, False), (2, False), (2, True)]
    with pytest.raises(BudgetError, match="no room for a sequence of 8 tokens"):
        scored(FakeRunner(room=0), cut_windows(random_ids(49), 8, 8), 5)


def test_a_failed_pass_gives_the_room_back() -> None:
    class Failing(FakeRunner):
        def run(self, *_: Any, **__: Any) -> Pass:
            raise TieredError("broken")

    runner = Failing()
    with pytest.raises(TieredError, match="broken"):
        scored(runner, cut_windows(random_ids(49), 8, 8))
    assert not runner.held


def test_nothing_to_score_takes_no_pass() -> None:
    result = score(runner := FakeRunner(), [], 4, lambda *_: None)
    assert (runner.runs, result.total.tokens, result.costs.passes) == ([], 0, 0)


# The numbers.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_softmax_in_pieces_is_log_softmax(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    logits = (20 * torch.randn(70, 50_000, generator=generator)).to(dtype)
    targets = torch.randint(0, 50_000, (70,), generator=generator)
    before = logits.clone()
    found = log_probabilities(logits, targets)
    expected = logits.double().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    assert torch.equal(logits, before)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    alone = torch.cat([log_probabilities(logits[n : n + 1], targets[n : n + 1]) for n in range(70)])
    assert torch.equal(found, alone)


def test_log_softmax_takes_a_few_mebibytes_however_many_logits_there_are() -> None:
    class Sizes(TorchDispatchMode):
        largest = 0

        def __init__(self) -> None:
            super().__init__()  # type: ignore[no-untyped-call]

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            output = func(*args, **(kwargs or {}))
            if isinstance(output, torch.Tensor) and output.dtype == torch.float32:
                self.largest = max(self.largest, output.untyped_storage().nbytes())
            return output

    logits, targets = torch.zeros(600, 50_000, dtype=torch.bfloat16), torch.zeros(600, dtype=torch.long)
    with Sizes() as sizes:
        log_probabilities(logits, targets)
    assert 0 < sizes.largest <= 4 * MIB
    # A vocabulary of which one row is more than that still passes, row by row.
    assert log_probabilities(torch.zeros(2, 2_000_000), targets[:2]).shape == (2,)


def test_log_softmax_survives_large_logits_and_impossible_tokens() -> None:
    logits = torch.tensor([[3e38, 0.0, 1.0], [-math.inf, 0.0, 0.0], [-3e38, -3e38, -3e38]])
    found = log_probabilities(logits, torch.tensor([0, 0, 2]))
    assert found.tolist() == [0.0, -math.inf, pytest.approx(-math.log(3))]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_named(bad: float) -> None:
    logits = torch.zeros(3, 9)
    logits[1, 4] = bad
    with pytest.raises(TieredError, match="NaN or infinite"):
        log_probabilities(logits, torch.tensor([0, 1, 2]))


def test_a_tally_gives_perplexity_and_bits_per_byte() -> None:
    tally = Tally()
    tally.add(torch.full((3,), math.log(0.25)))
    tally.add(torch.tensor([math.log(0.5)]))
    assert tally.tokens == 4
    assert tally.perplexity == pytest.approx(2 ** (7 / 4))
    assert tally.bits_per_byte(14) == pytest.approx(0.5)
    tally.add(torch.tensor([-1e6]))
    assert tally.perplexity == math.inf


# On real models.


@pytest.mark.parametrize("name", ["opt", "llama", "mistral", "gemma2", "bloom", "mixtral", "falcon-alibi"])
def test_scores_of_a_model_are_those_of_transformers(tiny: Tiny, name: str) -> None:
    model, store = tiny.model(name), tiny.store(name)
    ids = torch.randint(3, store.vocab_size, (150,), generator=torch.Generator().manual_seed(7))
    windows = list(cut_windows(ids, 48, 30, [1]))
    workload = Workload(3, 48, one_pass=True, all_logits=True)
    scores: dict[int, torch.Tensor] = {}
    with Runtime(store, workload, Options(dtype="float32", ram=16 * GIB, threads=1, micro_batch_rows=20)) as runtime:
        result = score(runtime, windows, 3, lambda window, logprobs: scores.update({window.position: logprobs}))
        assert runtime._memory.pool.is_empty
    assert (result.total.tokens, result.costs.sequences, result.costs.passes) == (
        150,
        len(windows),
        -(-len(windows) // 3),
    )
    for window in windows:
        logits = reference_logits(model, window.input_ids)[-len(window.targets) :]
        expected = -torch.nn.functional.cross_entropy(logits, torch.tensor(window.targets), reduction="none")
        torch.testing.assert_close(scores[window.position], expected, rtol=1e-3, atol=1e-3)


def test_a_window_whose_logits_are_no_numbers_fails_alone() -> None:
    runner = FakeRunner()
    ids = random_ids(40)
    windows = list(cut_windows(ids, 8, 8, [BEGIN]))
    logits = runner.logits
    wrong = windows[2].input_ids

    def nan(ids: Items[int]) -> torch.Tensor:
        found = logits(ids)
        return found.index_fill(0, torch.tensor([4]), math.nan) if list(ids) == wrong else found

    runner.logits = nan  # type: ignore[method-assign]
    done, failed = list[Window](), list[Window]()
    found = score(
        runner, windows, 2, lambda window, _: done.append(window), on_failed=lambda window, _: failed.append(window)
    )
    assert failed == [windows[2]] and done == [*windows[:2], *windows[3:]]
    assert found.costs.sequences == len(windows) and found.total.tokens == 40 - len(windows[2].targets)
    assert not runner.held
    with pytest.raises(ModelError, match="NaN or infinite"):
        score(runner, windows, 2, lambda window, _: None)
    assert not runner.held
