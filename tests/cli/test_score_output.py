"""What a person sees of a scoring: tokens with their spaces, numbers that JSON can say."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tests.commands import CHECKPOINT
from tests.generate.tokenizers import byte_fallback, byte_level, cleaning, ids_of, metaspace
from tiered.cli.score_output import PerTokenFile, Text, TokenTextReader, perplexity_so_far, score_json, table
from tiered.errors import ModelError
from tiered.generate.score import Tally, Window


def text_of(tokens: int, nats: float, nbytes: int = 100, name: str = "a.txt") -> Text:
    return Text(name, torch.zeros(tokens, dtype=torch.int32), nbytes, Tally(tokens, nats))


def test_a_text_that_fails_more_than_once_keeps_its_first_error() -> None:
    text, first = text_of(3, 1.0), ModelError("tokens 0 to 9")
    text.fail(first)
    text.fail(ModelError("tokens 10 to 19"))
    assert text.error is first and text.tally == Tally()


def test_the_perplexity_so_far_is_that_of_all_texts_once_something_is_scored() -> None:
    texts = [text_of(0, 0.0), text_of(0, 0.0)]
    assert perplexity_so_far(texts) is None
    texts[1].tally.add(torch.full((7,), -math.log(3)))
    assert perplexity_so_far(texts) == pytest.approx(3)


LONG_TEXT = "To install  the package,\n    run this: naïve 世界 </s> — 😀 do n't ." * 4


@pytest.mark.parametrize("make", [None, byte_fallback, byte_level, metaspace, cleaning])
@pytest.mark.parametrize("step", [1, 7, 1000])
def test_the_texts_of_all_tokens_are_the_text(make: Callable[[], PreTrainedTokenizerBase] | None, step: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT) if make is None else make()
    if make is None:
        ids = torch.tensor(tokenizer(LONG_TEXT, add_special_tokens=False)["input_ids"], dtype=torch.int32)
    else:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, len(tokenizer), (200,), generator=generator, dtype=torch.int32)
    texts = TokenTextReader(tokenizer, ids)
    found = [text for start in range(0, len(ids), step) for text in texts.take(start, min(start + step, len(ids)))]
    assert len(found) == len(ids)
    expected = LONG_TEXT
    if make is not None:
        expected = str(tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False))
    assert "".join(found) == expected


def test_token_texts_do_not_depend_on_where_windows_begin() -> None:
    tokenizer = byte_fallback()
    words = ["▁a", *(f"<0x{byte:02X}>" for byte in "日本".encode()), "▁to", "<0xE2>", "a"]
    ids = torch.tensor(ids_of(tokenizer, *words), dtype=torch.int32)
    for step in range(1, 11):
        texts = TokenTextReader(tokenizer, ids)
        found = [text for start in range(0, len(ids), step) for text in texts.take(start, min(start + step, len(ids)))]
        assert found == ["a", "", "", "日", "", "", "本", " to", "", "�a"]


def test_the_first_token_may_be_passed_over() -> None:
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    ids = torch.tensor(tokenizer("the package", add_special_tokens=False)["input_ids"], dtype=torch.int32)
    assert TokenTextReader(tokenizer, ids).take(1, len(ids)) == TokenTextReader(tokenizer, ids).take(0, len(ids))[1:]


def test_windows_of_a_tokenizer_written_in_python_are_read_no_further_than_they_go() -> None:
    class Slow:
        """Stands for one like BioGPT's: a word a token, of which none closes the text."""

        is_fast = False
        longest = 0

        def convert_ids_to_tokens(self, token: int) -> str:
            return f"w{token}"

        def decode(self, ids: Any, **_: Any) -> str:
            self.longest = max(self.longest, len(ids))
            return " ".join(f"w{token}" for token in ids)

    slow: Any = Slow()
    reader = TokenTextReader(slow, torch.arange(40, dtype=torch.int32))
    found = reader.take(0, 5)
    assert slow.longest == 5
    assert "".join([*found, *reader.take(5, 40)]) == " ".join(f"w{token}" for token in range(40))


def test_a_perplexity_beyond_all_numbers_is_shown_and_null_in_json() -> None:
    text = text_of(2, 5000.0)
    assert json.loads(json.dumps(score_json(text.tally, 100)))["perplexity"] is None
    assert table([text])[1].split()[3] == "inf"
    assert len(table([text, text])) == 4


def test_an_impossible_token_has_a_null_log_probability(tmp_path: Path) -> None:
    path = tmp_path / "tokens.jsonl"
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    with PerTokenFile(path, [text_of(7, 0.0)], tokenizer) as per_token:
        per_token.write(Window([2, 43], [43, 314], position=5), torch.tensor([-math.inf, -0.5]))
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [(line["position"], line["token_id"], line["logprob"]) for line in lines] == [(5, 43, None), (6, 314, -0.5)]
