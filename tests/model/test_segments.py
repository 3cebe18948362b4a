"""Segments: passes over them give transformers' own logits, and what does not fit is refused."""

from contextlib import ExitStack
from dataclasses import replace
from typing import cast

import pytest
import torch

from tests.answers import reference_logits
from tests.runtimes import open_runtime, reserved, run_segments
from tests.tiny import Tiny, prompts_for
from tests.tiny_configs import LENGTH_DEPENDENT, SHORT_TEXT
from tiered.cache import CachePlan, KVPool, KVShape, layer_groups
from tiered.errors import ConfigError
from tiered.model import Seats, Segment, Segments
from tiered.plan.passes import MicroBatchLimits


def pool_of(sequences: int = 2, context: int = 100) -> KVPool:
    plan = CachePlan(1, 16, False, layer_groups((0,), KVShape(1, 2, 2, "bfloat16")), sequences, context, 200, context)
    return KVPool(plan, torch.zeros(plan.pool_nbytes, dtype=torch.uint8))


def refused(segment: Segment, pool: KVPool) -> str:
    with pytest.raises(ConfigError) as caught:
        seats = cast(Seats, None)  # it does not come that far
        Segments([segment], pool, MicroBatchLimits(rows=64), 1, seats, lambda number, index, logits: None)
    return str(caught.value)


def test_a_segment_beyond_what_was_reserved_is_refused() -> None:
    pool = pool_of()
    kv = pool.reserve(10)
    assert kv is not None
    kv.length = 4
    message = "segment 0: tokens 4 to 11 of a sequence with room for 10; expected at least one, and reserve as many"
    assert message in refused(Segment(kv, [1] * 7), pool)


def test_a_segment_without_tokens_is_refused() -> None:
    pool = pool_of()
    kv = pool.reserve(10)
    assert kv is not None
    assert "expected at least one" in refused(Segment(kv, []), pool)


@pytest.mark.parametrize("micro_batch", [None, 1, 4])
@pytest.mark.parametrize("keeps", [(0, 0), (1, 5), (6, 0)])
def test_logits_come_for_the_last_positions_asked_for_and_no_others(
    tiny: Tiny, keeps: tuple[int, int], micro_batch: int | None
) -> None:
    prompts = prompts_for("llama")
    with open_runtime(tiny.store("llama"), micro_batch_rows=micro_batch) as runtime, ExitStack() as stack:
        kvs = [reserved(stack, runtime, len(prompt)) for prompt in prompts]
        found = run_segments(runtime, [Segment(*each) for each in zip(kvs, map(list, prompts), keeps, strict=True)])
        assert [kv.length for kv in kvs] == [len(prompt) for prompt in prompts]
    for rows, keep, prompt, logits in zip(found, keeps, prompts, tiny.reference("llama").logits, strict=True):
        assert len(rows) == keep
        if keep:
            expected = logits[len(prompt) - keep : len(prompt)]
            torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-4)


def test_logits_come_in_pieces_of_bounded_size(tiny: Tiny) -> None:
    (prompt, _), pieces = prompts_for("llama"), list[tuple[int, int, int]]()
    with open_runtime(tiny.store("llama")) as runtime, ExitStack() as stack:
        kv = reserved(stack, runtime, len(prompt))
        segment = Segment(kv, list(prompt), len(prompt))
        runtime.run([segment], lambda number, index, rows: pieces.append((number, index, len(rows))))
        most = runtime.plan.head_rows
    assert most < len(prompt)
    assert [index for _, index, _ in pieces] == list(range(0, len(prompt), most))
    assert max(rows for _, _, rows in pieces) == most


def test_more_tokens_than_a_pass_is_planned_for_are_refused(tiny: Tiny) -> None:
    (prompt, _) = prompts_for("llama")
    with open_runtime(tiny.store("llama")) as runtime, ExitStack() as stack:
        kv, most = reserved(stack, runtime, len(prompt)), len(prompt) - 1
        runtime.plan = replace(runtime.plan, max_batched_tokens=most)
        with pytest.raises(ConfigError, match=f"a pass of {most + 1} tokens, expected at most the {most} that are p"):
            runtime.run([Segment(kv, list(prompt), 1)], lambda *_: None)
        assert kv.length == 0


def test_a_pass_that_fails_leaves_lengths_as_they_were(tiny: Tiny) -> None:
    def fail(*_: object) -> None:
        raise ValueError("of the caller's own")

    (prompt, _) = prompts_for("llama")
    with open_runtime(tiny.store("llama")) as runtime, ExitStack() as stack:
        kv = reserved(stack, runtime, len(prompt))
        with pytest.raises(ValueError, match="of the caller's own"):
            runtime.run([Segment(kv, list(prompt), 1)], fail)
        assert kv.length == 0
        (found,) = run_segments(runtime, [Segment(kv, list(prompt), 1)])
    torch.testing.assert_close(found[0], tiny.reference("llama").logits[0][len(prompt) - 1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LENGTH_DEPENDENT)
def test_pieces_of_a_prompt_are_turned_as_the_whole_of_it_is(tiny: Tiny, name: str) -> None:
    (prompt, _) = prompts_for(name)
    assert 5 < SHORT_TEXT < len(prompt)
    found = []
    with open_runtime(tiny.store(name)) as runtime, ExitStack() as stack:
        kv = reserved(stack, runtime, len(prompt))
        for ids in (prompt[:5], prompt[5:]):
            found += run_segments(runtime, [Segment(kv, list(ids), len(ids), text_length=len(prompt))])
    expected = reference_logits(tiny.model(name), prompt)
    torch.testing.assert_close(torch.cat(found), expected, rtol=1e-4, atol=1e-4)
