"""The loop: who runs when, on a runner whose model is a function of the text, so that what must come out is known."""

import itertools
import weakref
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from typing import Any, Final

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.plan.plans import plan_of
from tests.quick import examples
from tiered.cache import CachePlan, KVPool, KVShape, SequenceKV, layer_groups
from tiered.errors import InterruptedRun, ModelError, TieredError
from tiered.generate import Sampler, SamplingParams, Sequence, generate
from tiered.model import OnBlock, OnLogits, Pass, Segment
from tiered.plan.pace import Pace

VOCAB: Final = 50
END: Final = frozenset({VOCAB})
"""A token that the model never chooses by itself."""
PROMPTS: Final = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=40)


def model(text: Items[int]) -> torch.Tensor:
    """Logits [vocab] after `text`; every token of it counts."""
    seed = 7
    for token in text:
        seed = (seed * 1_000_003 + token + 1) % (1 << 31)
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed))


class Numbers:
    """A tokenizer without text of its own."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(f"{token}," for token in token_ids)


class Runner:
    """A runtime without a model: it keeps every sequence's text, and checks what it is asked."""

    def __init__(self, sequences: int, context: int = 100, max_batched_tokens: int = 0, kv_tokens: int = 0) -> None:
        most = sequences * context
        tokens = min(most, max(max_batched_tokens, sequences)) if max_batched_tokens else most
        self.plan, self.pace, self.vocab_size = plan_of(max_batched_tokens=tokens), Pace(), VOCAB
        cache = CachePlan(
            1,
            16,
            False,
            layer_groups((0,), KVShape(1, 2, 2, "bfloat16")),
            sequences,
            context,
            kv_tokens or sequences * context,
            context,
        )
        self.pool = KVPool(cache, torch.empty(cache.pool_nbytes, dtype=torch.uint8))
        self.texts: dict[SequenceKV, list[int]] = {}
        self.passes: list[list[int]] = []
        """Of every pass, the tokens of its segments."""
        self.announced: list[bool] = []
        self.before_pass: Callable[[int], None] = lambda number: None
        self.bytes_read = self.kv_bytes_read = self.kv_bytes_written = 0
        self.disk_idle_seconds = self.stalled_seconds = self.bus_seconds = 0.0
        self.bus_nbytes = 0

    def reserve(self, tokens: int) -> SequenceKV | None:
        kv = self.pool.reserve(tokens)
        if kv is not None:
            self.texts[kv] = []
        return kv

    may_rest = False

    def rest_device(self) -> None:
        raise AssertionError("there is no device")

    def release(self, kv: SequenceKV) -> None:
        self.pool.release(kv)
        del self.texts[kv]

    def run(
        self, segments: Items[Segment], on_logits: OnLogits, on_block: OnBlock | None = None, is_last: bool = False
    ) -> Pass:
        assert True not in self.announced, "a pass after the one that was said to be the last"
        self.before_pass(len(self.passes))
        self.passes.append([len(segment.input_ids) for segment in segments])
        self.announced.append(is_last)
        self.bytes_read += 10
        for number, segment in enumerate(segments):
            text = self.texts[segment.kv]
            assert len(text) == segment.kv.length and segment.input_ids and segment.stop <= segment.kv.capacity
            text += segment.input_ids
            for index in range(segment.keep):
                stop = len(text) - segment.keep + index + 1
                on_logits(number, index, model(text[:stop])[None])
        for segment in segments:
            segment.kv.length += len(segment.input_ids)
        return Pass((), 0.0, 0.0, 0.0, ())


GREEDY: Final = SamplingParams()
RANDOM: Final = SamplingParams(temperature=1.0, seed=3)


def sequence_of(
    prompt: list[int], tokens: int = 5, request: int = 0, params: SamplingParams = GREEDY, **more: Any
) -> Sequence:
    return Sequence(prompt, Sampler(params, request), Numbers(), tokens, more.pop("eos_ids", END), **more)


def prompt_of(tokens: int, seed: int = 0) -> list[int]:
    return torch.randint(VOCAB, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()


def completion(sequence: Sequence, params: SamplingParams = GREEDY, request: int = 0) -> list[int]:
    """What the model makes of a prompt, without any loop."""
    sampler, found = Sampler(params, request), list[int]()
    while len(found) < sequence.max_new_tokens:
        text = sequence.prompt_ids + found
        found.append(sampler(text, model(text), len(found)))
    return found


def run(runner: Runner, sequences: Items[Sequence], batch_size: int, **more: Any) -> list[Sequence]:
    """Runs them and returns them in the order they finished in; the cache is empty then."""
    finished: list[Sequence] = []
    generate(runner, sequences, batch_size, on_finished=finished.append, **more)
    assert runner.pool.is_empty
    assert len(finished) == len(sequences) and set(map(id, finished)) == set(map(id, sequences))
    return finished


@examples(60)
@given(
    texts=st.lists(st.tuples(PROMPTS, st.integers(1, 12)), min_size=1, max_size=8),
    batch_size=st.integers(1, 6),
    max_batched_tokens=st.sampled_from([0, 1, 7, 64]),
    kv_tokens=st.sampled_from([0, 100, 150]),
    params=st.sampled_from([GREEDY, RANDOM]),
)
def test_tokens_depend_on_nothing_but_the_request(
    texts: list[tuple[list[int], int]], batch_size: int, max_batched_tokens: int, kv_tokens: int, params: SamplingParams
) -> None:
    sequences = [sequence_of(prompt, tokens, i, params) for i, (prompt, tokens) in enumerate(texts)]
    runner = Runner(batch_size, max_batched_tokens=max_batched_tokens, kv_tokens=kv_tokens)
    run(runner, sequences, batch_size)
    for number, sequence in enumerate(sequences):
        assert sequence.token_ids == completion(sequence, params, number)
        assert sequence.finish_reason == "length"
    assert all(len(tokens) <= batch_size and sum(tokens) <= runner.plan.max_batched_tokens for tokens in runner.passes)


def test_sampled_tokens_do_not_depend_on_batch_size_or_order() -> None:
    def tokens(batch_size: int, order: Items[int]) -> dict[int, list[int]]:
        made = {i: sequence_of(prompt_of(5 + i, i), 8, i, RANDOM) for i in order}
        run(Runner(batch_size), list(made.values()), batch_size)
        return {i: made[i].token_ids for i in range(6)}

    alone = tokens(1, range(6))
    assert alone == tokens(3, range(6)) == tokens(6, [4, 2, 0, 5, 3, 1])
    assert len(set(map(tuple, alone.values()))) == 6


def test_a_newcomer_enters_in_the_pass_after_somebody_left() -> None:
    runner = Runner(2)
    run(runner, [sequence_of(prompt_of(n), tokens) for n, tokens in ((3, 1), (4, 4), (5, 2), (6, 1))], batch_size=2)
    assert runner.passes == [[3, 4], [1, 5], [1, 1], [1, 6]]


def test_sequences_are_taken_from_an_endless_source_as_there_is_room() -> None:
    taken: list[Sequence] = []
    finished: list[Sequence] = []

    def endless() -> Iterator[Sequence]:
        for number in itertools.count():
            taken.append(sequence_of(prompt_of(4, number), 3, number))
            yield taken[-1]

    def stop(sequence: Sequence) -> None:
        finished.append(sequence)
        # One more than runs may have been looked at.
        assert len(taken) - len(finished) <= 3
        if len(finished) == 20:
            raise InterruptedRun("enough")

    runner = Runner(2)
    with pytest.raises(InterruptedRun):
        generate(runner, endless(), 2, on_finished=stop)
    assert finished == taken[:20]


def test_a_long_prompt_goes_over_several_passes_while_others_decode() -> None:
    runner = Runner(2, max_batched_tokens=10)
    short, long = sequence_of(prompt_of(4), 8), sequence_of(prompt_of(30, 1), 2, 1)
    run(runner, [short, long], batch_size=2)
    assert runner.passes == [[4, 6], [1, 9], [1, 9], [1, 6], [1, 1], [1], [1], [1]]
    assert long.token_ids == completion(long)


def test_a_prompt_with_no_room_left_waits_without_an_empty_segment() -> None:
    runner = Runner(3, max_batched_tokens=3)
    sequences = [sequence_of(prompt_of(n, n), 6, n) for n in (1, 1, 2)]
    run(runner, sequences, batch_size=3)
    assert runner.passes[:2] == [[1, 1, 1], [1, 1, 1]]


def test_a_sequence_waits_until_the_cache_has_room() -> None:
    runner = Runner(3, context=64 * 4, kv_tokens=64 * 4)
    sequences = [sequence_of(prompt_of(200, n), 3, n) for n in range(3)]
    assert run(runner, sequences, batch_size=3) == sequences
    assert max(len(tokens) for tokens in runner.passes) == 1


def test_a_prompt_as_long_as_the_context_gets_its_one_token() -> None:
    sequence = sequence_of(prompt_of(100), 1)
    run(Runner(1), [sequence], batch_size=1)
    assert sequence.token_ids == completion(sequence)


def test_sequences_end_at_their_own_stops() -> None:
    first, second = sequence_of(prompt_of(4), 20), sequence_of(prompt_of(5), 20)
    ends = frozenset({completion(first)[2]})
    stop = f"{completion(second)[3]},"
    by_token = sequence_of(prompt_of(4), 20, eos_ids=ends)
    by_text = sequence_of(prompt_of(5), 20, stops=(stop,))
    by_length = sequence_of(prompt_of(6), 2)
    finished = run(Runner(3), [by_token, by_text, by_length], batch_size=3)
    assert [item.finish_reason for item in finished] == ["length", "stop", "stop"]
    assert len(by_token.token_ids) <= 3 and stop not in by_text.text


def test_log_probabilities_are_those_of_the_tokens_taken() -> None:
    sequence = sequence_of(prompt_of(4), 3, logprobs=0)
    run(Runner(1), [sequence], batch_size=1)
    expected = []
    for count, token in enumerate(sequence.token_ids):
        logits = model(sequence.prompt_ids + sequence.token_ids[:count])
        expected.append(float(logits.log_softmax(-1)[token]))
    assert sequence.logprobs is not None
    assert [sequence.logprobs.chosen(index) for index in range(3)] == pytest.approx(expected, rel=1e-5)


def test_after_every_pass_each_sequence_with_logits_has_one_token_more() -> None:
    counts: list[int] = []
    sequence = sequence_of(prompt_of(10), 3)
    generate(Runner(1, max_batched_tokens=4), [sequence], 1, on_pass=lambda: counts.append(len(sequence.token_ids)))
    assert counts == [0, 0, 1, 2, 3]


class Failure(Exception):
    pass


def fail(*_: Any) -> None:
    raise Failure


def released(runner: Runner, sequences: Any, **more: Any) -> bool:
    """Whether a run that fails gives everything back."""
    with pytest.raises(Failure):
        generate(runner, sequences, 2, **more)
    return runner.pool.is_empty and not runner.texts


@pytest.mark.parametrize("number", [0, 1, 3])
def test_all_is_given_back_when_a_pass_fails(number: int) -> None:
    runner = Runner(2)
    runner.before_pass = lambda now: fail() if now == number else None
    assert released(runner, [sequence_of(prompt_of(4), 3, n) for n in range(3)])


def test_all_is_given_back_when_a_result_is_refused() -> None:
    # Both end in the same pass: the second one's place must not be forgotten.
    assert released(Runner(2), [sequence_of(prompt_of(4), 3, n) for n in range(2)], on_finished=fail)


def test_all_is_given_back_when_a_pass_is_refused() -> None:
    assert released(Runner(2), [sequence_of(prompt_of(4), 3, n) for n in range(2)], on_pass=fail)


@pytest.mark.parametrize("before", [0, 1, 3])
def test_all_is_given_back_when_the_source_fails(before: int) -> None:
    def source() -> Iterator[Sequence]:
        yield from (sequence_of(prompt_of(4), 3, n) for n in range(before))
        fail()

    assert released(Runner(2), source())


def test_a_sequence_that_no_empty_cache_holds_is_refused() -> None:
    runner = Runner(1, context=256, kv_tokens=64)
    refused, other = sequence_of(prompt_of(200), 3), sequence_of(prompt_of(4), 3, 1)
    generate(runner, [refused, other], 1)
    assert "no room for a sequence of 202 tokens although nothing else runs" in str(refused.error)
    assert other.error is None and other.token_ids == completion(other)
    assert runner.pool.is_empty


@pytest.mark.parametrize(("count", "batch_size"), [(1, 1), (1, 2), (2, 2), (3, 2), (3, 5)])
def test_the_last_pass_is_announced_where_it_is_sure(count: int, batch_size: int) -> None:
    runner = Runner(5)
    run(runner, [sequence_of(prompt_of(4 + n, n), 3, n) for n in range(count)], batch_size=batch_size)
    assert runner.announced == [False] * (len(runner.passes) - 1) + [True]


def test_no_last_pass_is_announced_before_a_prompt_has_passed() -> None:
    runner = Runner(2, max_batched_tokens=8)
    run(runner, [sequence_of(prompt_of(4), 1), sequence_of(prompt_of(20), 1, 1)], batch_size=2)
    assert runner.announced == [False, False, True]


def test_no_last_pass_is_announced_while_the_source_may_have_more() -> None:
    runner = Runner(1)
    source = iter([sequence_of(prompt_of(4), 1), sequence_of(prompt_of(5), 1)])
    generate(runner, source, 1)
    assert runner.announced[0] is False


def test_passes_are_counted_with_what_was_in_them() -> None:
    runner = Runner(2, max_batched_tokens=10)
    found = generate(runner, [sequence_of(prompt_of(4), 4), sequence_of(prompt_of(12, 1), 2, 1)], 2)
    assert [(cost.prompt_tokens, cost.new_tokens) for cost in found.recent] == [(10, 1), (6, 2), (0, 2), (0, 1)]
    assert [cost.is_decode for cost in found.recent] == [False, False, True, True]
    assert (found.sequences, found.prompt_tokens, found.generated_tokens) == (2, 16, 6)
    assert [cost.bytes_read for cost in found.recent] == [10] * 4


def test_a_long_generation_keeps_sums_not_passes() -> None:
    runner = Runner(1, context=1000)
    found = generate(runner, [sequence_of(prompt_of(4), 600)], 1)
    assert (found.passes, found.prefill.passes, found.decode.passes) == (600, 1, 599)
    assert (found.generated_tokens, found.decode.bytes_read) == (600, 5990)
    assert len(found.recent) < 300


def test_nothing_to_do_costs_no_pass() -> None:
    runner = Runner(1)
    found = generate(runner, [], 1)
    assert (found.passes, runner.passes, found.sequences) == (0, [], 0)


# What goes wrong because of one sequence concerns that sequence.


class Panic(BaseException):
    """As tokenizers' are."""


class Fails(Numbers):
    """A tokenizer that raises once there are `after` tokens."""

    def __init__(self, error: BaseException, after: int) -> None:
        self._error, self._after = error, after

    def decode(self, token_ids: list[int], skip_special_tokens: bool = False) -> str:
        if len(token_ids) >= self._after:
            raise self._error
        return super().decode(token_ids)


def failing(error: BaseException, after: int = 2, tokens: int = 6) -> Sequence:
    return Sequence(prompt_of(7, 99), Sampler(GREEDY, 0), Fails(error, after), tokens, END)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize(
    "bad",
    [
        lambda: failing(ValueError("such a token")),
        lambda: failing(Panic("at src/lib.rs")),
        lambda: failing(RecursionError("too deep")),
        lambda: sequence_of([1, 2, VOCAB]),
        lambda: sequence_of([-1]),
        lambda: sequence_of([]),
        lambda: sequence_of(prompt_of(99), 5),
    ],
    ids=["decoder", "panic", "recursion", "vocabulary", "negative", "empty", "longer than planned"],
)
def test_a_sequence_that_fails_leaves_and_the_others_go_on(bad: Callable[[], Sequence], batch_size: int) -> None:
    good = [sequence_of(prompt_of(4 + n, n), 5, n) for n in range(4)]
    wrong = [bad(), bad()]
    run(Runner(batch_size), [wrong[0], *good[:2], wrong[1], *good[2:]], batch_size)
    for number, sequence in enumerate(good):
        assert (sequence.finish_reason, sequence.error) == ("length", None)
        assert sequence.token_ids == completion(sequence, request=number)
    for sequence in wrong:
        assert sequence.finish_reason == "error" and isinstance(sequence.error, TieredError)


def test_logits_that_are_no_numbers_fail_their_sequence_at_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    bad, good = sequence_of(prompt_of(6, 50), 9), sequence_of(prompt_of(5), 9)
    wrong = [*bad.prompt_ids, *completion(bad)[:3]]

    def nan(text: Items[int], plain: Callable[[Items[int]], torch.Tensor] = model) -> torch.Tensor:
        return torch.full((VOCAB,), torch.nan) if list(text) == wrong else plain(text)

    monkeypatch.setattr("tests.generate.test_loop.model", nan)
    runner = Runner(2)
    assert run(runner, [bad, good], batch_size=2) == [bad, good]
    assert isinstance(bad.error, ModelError) and "token 3 of the completion" in str(bad.error)
    assert bad.token_ids == wrong[6:] and len(good.token_ids) == 9 and good.error is None
    assert runner.passes == [[6, 5], [1, 1], [1, 1], [1, 1]] + [[1]] * 5


def test_a_failed_sequence_holds_no_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[torch.Tensor]] = []

    def nan(text: Items[int]) -> torch.Tensor:
        logits = torch.full((VOCAB,), torch.nan)
        made.append(weakref.ref(logits))
        return logits

    monkeypatch.setattr("tests.generate.test_loop.model", nan)
    held = [sequence_of(prompt_of(4)), failing(ValueError("never asked"))]
    generate(Runner(2), held, 2)
    assert len(made) == 2 and not any(reference() is not None for reference in made)
    assert all(sequence.error is not None for sequence in held)


def test_only_what_was_sampled_is_counted() -> None:
    bad = failing(ValueError("such a token"), after=1)
    found = generate(Runner(2), [bad, sequence_of(prompt_of(4), 3)], 2)
    assert (found.sequences, found.generated_tokens) == (2, 3)


def test_a_source_of_nothing_but_bad_ones_takes_no_pass() -> None:
    runner = Runner(1)
    run(runner, [sequence_of([VOCAB]) for _ in range(5)], batch_size=1)
    assert runner.passes == []


@pytest.mark.parametrize(
    "error",
    [
        KeyboardInterrupt(),
        MemoryError(),
        InterruptedRun("enough"),
        OSError(5, "input/output error"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_concerns_all_of_them_ends_the_run(error: BaseException) -> None:
    runner = Runner(2)
    with pytest.raises(type(error)):
        generate(runner, [failing(error), sequence_of(prompt_of(4))], 2)
    assert runner.pool.is_empty
