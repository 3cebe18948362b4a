"""Every family of the table gives what transformers gives: logits at every position, and greedy tokens.

The reference knows neither cache nor padding nor micro-batches: it is one forward over each whole text. All prompts are
longer than the sliding windows.
"""

from contextlib import ExitStack
from dataclasses import fields
from functools import partial
from typing import Final

import pytest
import torch

from tests.answers import Answers, assert_same, cached_answers
from tests.quick import represented
from tests.runtimes import open_runtime, reserved, run_greedy, run_segments
from tests.tiny import Tiny, few_rows, prompts_for
from tests.tiny_configs import DRIVEN, LENGTH_DEPENDENT, SHORT_TEXT, TINY, tiny_config
from tiered.arch import FAMILIES
from tiered.arch.families import Family
from tiered.model import Segment

REPRESENTATIVES: Final = (
    *("opt", "opt-350m", "gpt_neox", "bloom", "mpt", "gpt_bigcode", "gpt_neox_japanese", "biogpt", "diffllama"),
    *("llama-tied-biased", "gemma2", "mistral", "qwen3_moe", "glm4_moe", "gpt2", "gpt_oss", "gemma4_text"),
    *("qwen3_next", "lfm2", "falcon_h1", "mamba2", "nemotron_h", "jamba"),
)
"""For --quick: learned positions and rotary ones, ALiBi, windows, soft caps, tied weights, mixtures with and without
shared experts; and whatever the table says of a family."""


def test_every_family_of_the_table_is_tested() -> None:
    assert {tiny_config(name).model_type for name in TINY} == DRIVEN


def test_the_representatives_have_every_value_of_every_column_of_the_table() -> None:
    chosen = [FAMILIES[tiny_config(name).model_type] for name in REPRESENTATIVES if name in TINY]
    driven = [FAMILIES[name] for name in DRIVEN]
    for column in fields(Family):
        if column.name != "model_type":
            values = [{getattr(family, column.name) for family in found} for found in (chosen, driven)]
            assert values[0] == values[1], column.name


@pytest.mark.parametrize("name", represented(TINY, REPRESENTATIVES))
def test_a_family_gives_what_transformers_gives(tiny: Tiny, name: str) -> None:
    prompts, expected = prompts_for(name), tiny.reference(name)
    with open_runtime(tiny.store(name)) as runtime:
        assert_same(run_greedy(runtime, prompts), expected)
    with open_runtime(tiny.store(name), micro_batch_rows=few_rows(name)) as runtime:
        # What differs is in the prompts' passes; the rest computes on what these have stored.
        assert_same(run_greedy(runtime, prompts, steps=4), expected)


@pytest.mark.parametrize("quant", represented(["int4", "int8"], ["int4"]))
@pytest.mark.parametrize(
    "name",
    represented(
        # Not all are there on the oldest versions.
        [
            *("opt", "llama", "gpt_neox", "gpt2", "qwen3_moe", "gpt_oss", "deepseek_v3"),
            *(name for name in ("gemma4_text",) if name in TINY),
        ],
        ["opt", "gpt_oss"],
    ),
)
def test_a_quantized_store_gives_what_its_dequantized_weights_give(tiny: Tiny, name: str, quant: str) -> None:
    assert tiny.store(name, quant).manifest.quantization["layers"] is not None
    expected = tiny.reference(name, quant)
    with open_runtime(tiny.store(name, quant), micro_batch_rows=6) as runtime:
        assert_same(run_greedy(runtime, prompts_for(name)), expected)


@pytest.mark.parametrize(("name", "quant"), [("llama", "nf4-g64"), ("qwen3_moe", "mxfp4-g32")])
def test_codes_that_are_looked_up_give_what_they_stand_for(tiny: Tiny, name: str, quant: str) -> None:
    test_a_quantized_store_gives_what_its_dequantized_weights_give(tiny, name, quant)


@pytest.mark.parametrize("rows", [None, 6])
@pytest.mark.parametrize("name", LENGTH_DEPENDENT)
def test_rotary_frequencies_follow_the_length_of_each_text(tiny: Tiny, name: str, rows: int | None) -> None:
    long, short = prompts_for(name)
    assert len(short) < SHORT_TEXT < len(long)
    expected = cached_answers(partial(tiny.model, name), long, steps=8)
    # A text that grows past the limit is another matter: `generate` of some families then starts over.
    expected_short = cached_answers(partial(tiny.model, name), short, steps=SHORT_TEXT - len(short))
    with open_runtime(tiny.store(name), micro_batch_rows=rows) as runtime:
        assert_same(run_greedy(runtime, [long], steps=8), expected)
        assert_same(run_greedy(runtime, [short], steps=2), expected_short)
        together = run_greedy(runtime, [short, long], steps=3)
    assert_same(Answers(together.tokens[:1], together.logits[:1]), expected_short)
    assert_same(Answers(together.tokens[1:], together.logits[1:]), expected)


def test_only_the_positions_asked_for_get_logits(tiny: Tiny) -> None:
    prompt = prompts_for("llama")[0]
    whole = tiny.reference("llama").logits[0][: len(prompt)]
    wanted = {1: whole[-1:], 3: whole[-3:], len(prompt): whole}
    with open_runtime(tiny.store("llama"), micro_batch_rows=4) as runtime:
        for keep, expected in wanted.items():
            with ExitStack() as stack:
                kv = reserved(stack, runtime, len(prompt))
                (found,) = run_segments(runtime, [Segment(kv, list(prompt), keep)])
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
