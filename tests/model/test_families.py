"""Every family of the table gives what transformers gives: logits at every position, and greedy tokens.

The reference knows neither cache nor padding nor chunks: it is one forward over each whole text. All prompts are
longer than the sliding windows.
"""

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from tests.helpers import TINY, Tiny, assert_same, open_runtime, prompts_for, run_greedy, tiny_config
from tiered.arch import FAMILIES
from tiered.model import MicroBatch

ALONE: Mapping[str, Any] = {"rows": 1, "chunk": None}
PADDED: Mapping[str, Any] = {"rows": 2, "chunk": None}
CHUNKED: Mapping[str, Any] = {"rows": 2, "chunk": 6}


def test_every_family_of_the_table_is_tested() -> None:
    assert {tiny_config(name).model_type for name in TINY} == set(FAMILIES)


@pytest.mark.parametrize("name", TINY)
def test_a_family_gives_what_transformers_gives(tiny: Tiny, name: str) -> None:
    expected = tiny.reference(name)
    for way in (ALONE, PADDED, CHUNKED):
        with open_runtime(tiny.store(name), rows_per_chunk=way["chunk"]) as runtime:
            assert_same(run_greedy(runtime, prompts_for(name), rows=way["rows"]), expected)


@pytest.mark.parametrize("quant", ["int4", "int8"])
@pytest.mark.parametrize("name", ["opt", "llama", "gpt_neox"])
def test_a_quantized_store_gives_what_its_dequantized_weights_give(tiny: Tiny, name: str, quant: str) -> None:
    assert tiny.store(name, quant).manifest.quantization["layers"] is not None
    expected = tiny.reference(name, quant)
    assert expected.logits[0].equal(expected.logits[0])  # no NaN
    with open_runtime(tiny.store(name, quant), rows_per_chunk=6) as runtime:
        assert_same(run_greedy(runtime, prompts_for(name), rows=2), expected)


def test_only_the_positions_asked_for_get_logits(tiny: Tiny) -> None:
    prompt = prompts_for("llama")[0]
    whole = tiny.reference("llama").logits[0][: len(prompt)]
    wanted = {0: whole, 1: whole[-1:], 3: whole[-3:]}
    with open_runtime(tiny.store("llama"), rows_per_chunk=4) as runtime:
        for keep, expected in wanted.items():
            with runtime.new_cache(1, len(prompt)) as cache:
                batch = MicroBatch(torch.tensor([prompt]), cache, logits_to_keep=keep)
                (found,) = runtime.forward([batch]).logits
            torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-4)
