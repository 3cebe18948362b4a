"""A sequence whose logits are NaN ends with an error, and changes no other: they get the answers that they get alone.

Neither where it shares their passes, nor where the next sequence gets its pages, which are full of NaN.
"""

from pathlib import Path
from typing import Any, Final

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.commands import make_store
from tests.damage import poisoned
from tests.quick import represented
from tests.tiny import Tiny, randomize
from tests.tiny_configs import tiny_config
from tiered.convert import ConvertOptions, convert_checkpoint
from tiered.errors import ModelError
from tiered.generate import Sampler, SamplingParams, Sequence, generate
from tiered.io import VerifyPolicy
from tiered.plan import Workload
from tiered.runtime import Options, Runtime
from tiered.store import Store
from tiered.units import GIB

WRONG: Final = 9
"""A token that only the bad text has, long before its end."""
LATE: Final = 70
"""A position that only the bad text has."""
TOKENS: Final = 8
"""Tokens of each completion."""


class Numbers:
    """A tokenizer without text of its own."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(f"{token}," for token in token_ids)


def text_of(length: int) -> list[int]:
    """Random tokens, good ones."""
    generator = torch.Generator().manual_seed(length)
    return torch.randint(WRONG + 1, 150, (length,), generator=generator).tolist()


GOOD: Final = [text_of(length) for length in (8, 58, 60, 33)]
"""Two of them complete a page with their completions."""
BAD: Final = [*text_of(40), WRONG, *text_of(39)]


def sequence_of(prompt: list[int]) -> Sequence:
    sampler = Sampler(SamplingParams(temperature=1.0, seed=len(prompt)), 0)
    return Sequence(prompt, sampler, Numbers(), TOKENS, frozenset(), logprobs=3)


def logprobs(sequence: Sequence) -> list[float]:
    """The log-probabilities of a completion's tokens, which show the bits of its logits."""
    found = sequence.logprobs
    assert found is not None and sequence.error is None and len(found) == TOKENS
    return [x for i in range(TOKENS) for x in (found.chosen(i), *(value for _, value in found.top(i)))]


def assert_contained(store: Store, tolerance: float = 0, **options: Any) -> None:
    """Bad texts fail before, between and after good ones, whose answers are those that they get alone.

    Where torch computes, which rounds by the shape of a batch, their logits may differ by `tolerance`.
    """
    options = {"ram": 8 * GIB, "threads": 1, "verify": VerifyPolicy.NEVER, **options}
    context = len(BAD) + TOKENS
    with Runtime(store, Workload(3, context, context), Options(**options)) as runtime:
        alone = [sequence_of(prompt) for prompt in GOOD]
        for sequence in alone:
            generate(runtime, [sequence], 1)
        # Every place in the cache has held a bad one before a good one comes.
        prompts = [BAD, BAD, BAD, GOOD[0], BAD, *GOOD[1:], BAD]
        together, finished = [sequence_of(prompt) for prompt in prompts], list[Sequence]()
        generate(runtime, together, 3, on_finished=finished.append)
        assert runtime._memory.pool.is_empty
    assert sorted(map(id, finished)) == sorted(map(id, together))
    failed = [sequence for sequence in together if sequence.prompt_ids == BAD]
    assert all(isinstance(sequence.error, ModelError) and not sequence.token_ids for sequence in failed)
    served = [sequence for sequence in together if sequence not in failed]
    for found, expected in zip(served, alone, strict=True):
        assert (found.prompt_ids, found.token_ids) == (expected.prompt_ids, expected.token_ids)
        assert logprobs(found) == pytest.approx(logprobs(expected), rel=0, abs=tolerance)


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The trained model with NaN for a position; its table begins with two rows of no use."""
    folder = tmp_path_factory.mktemp("opt")
    return poisoned(make_store(folder), folder, "model.decoder.embed_positions.weight", LATE + 2)


@pytest.mark.parametrize("kv_bits", represented([16, 8, 4], [4]))
def test_a_sequence_full_of_nan_leaves_no_trace_in_others(opt: Store, kv_bits: Any) -> None:
    assert_contained(opt, kv_bits=kv_bits)


@pytest.mark.slow
def test_nor_where_pages_go_to_disk(opt: Store) -> None:
    assert_contained(opt, kv_bits=8, kv="disk")


@pytest.mark.slow
@pytest.mark.parametrize("kv_bits", [16, 4])
def test_nor_where_torch_computes(opt: Store, kv_bits: Any) -> None:
    assert_contained(opt, 1e-3, kv_bits=kv_bits, dtype="float32")


@pytest.mark.parametrize("kv_bits", represented([16, 4], [4]))
def test_nor_where_keys_are_gathered_and_padded(tmp_path: Path, kv_bits: Any) -> None:
    config = tiny_config("bloom")
    config.tie_word_embeddings = False
    model = AutoModelForCausalLM.from_config(config)
    randomize(model)
    model.save_pretrained(tmp_path / "bloom")
    convert_checkpoint(tmp_path / "bloom", tmp_path / "store", ConvertOptions(quant="none"))
    store = poisoned(tmp_path / "store", tmp_path, "transformer.word_embeddings.weight", WRONG)
    assert_contained(store, 1e-3, kv_bits=kv_bits, dtype="float32")


def test_nor_where_tokens_choose_experts_and_windows_slide(tiny: Tiny, tmp_path: Path) -> None:
    store = poisoned(tiny.store("mixtral").path, tmp_path, "model.embed_tokens.weight", WRONG)
    assert_contained(store, kv_bits=8, dtype="bfloat16")
