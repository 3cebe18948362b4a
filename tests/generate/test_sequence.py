"""A sequence's text: final as it comes, cut at stop strings, and in the end what all tokens decode to."""

from collections.abc import Callable
from collections.abc import Sequence as Items
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tests.generate.tokenizers import byte_fallback, byte_level, ids_of, metaspace
from tests.quick import examples
from tiered.generate import Sampler, SamplingParams, Sequence
from tiered.generate.sequence import Decoder

DOCS = Path(__file__).parents[1] / "data/models/opt-docs-8m"
GREEDY = Sampler(SamplingParams(), 0)
LONG = 10_000


@cache
def kind_of(make: Callable[[], PreTrainedTokenizerBase]) -> PreTrainedTokenizerBase:
    return make()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(DOCS, local_files_only=True)
    return loaded


def sequence(
    decoder: Decoder, stops: Items[str] = (), eos: frozenset[int] = frozenset(), max_new_tokens: int = LONG
) -> Sequence:
    return Sequence([1], GREEDY, decoder, max_new_tokens, eos, stops)


def feed(found: Sequence, tokens: Items[int]) -> list[str]:
    """Append until the sequence ends; the text after every token."""
    texts = []
    for token in tokens:
        found.append(token)
        texts.append(found.text)
        if found.finish_reason is not None:
            break
    return texts


def assert_grows(texts: Items[str]) -> None:
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts))


class Letters:
    """A tokenizer whose tokens are characters; 0 is a special token."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(chr(token) for token in token_ids if token or not skip_special_tokens)


class Pieces:
    """Like SentencePiece: a token is a word with the space before it, and a text's first space goes."""

    words = ("\n", " a", " b", "c", " ", "  ", " \n", "x\n")

    def decode(self, token_ids: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(self.words[token] for token in token_ids).removeprefix(" ")


class Bytes:
    """A byte-level tokenizer, as directly as can be."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool = False) -> str:
        return bytes(token_ids).decode(errors="replace")


def letters(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def test_text_comes_token_by_token() -> None:
    assert feed(sequence(Letters()), letters("abc")) == ["a", "ab", "abc"]


def test_the_last_token_allowed_ends_the_sequence() -> None:
    found = sequence(Letters(), max_new_tokens=3)
    assert feed(found, letters("abcdef")) == ["a", "ab", "abc"]
    assert (found.finish_reason, found.token_ids) == ("length", letters("abc"))


def test_the_end_token_ends_the_sequence_and_is_no_text() -> None:
    found = sequence(Letters(), eos=frozenset({0, 7}))
    feed(found, [*letters("ab"), 0, *letters("c")])
    assert (found.finish_reason, found.text, found.token_ids) == ("stop", "ab", [97, 98, 0])


def test_an_end_token_that_is_ignored_is_no_text_either() -> None:
    found = sequence(Letters())
    assert feed(found, [*letters("ab"), 0, *letters("c")])[-1] == "abc"
    assert found.finish_reason is None


@pytest.mark.parametrize("stop", ["b", "bc", "cd", "bcd"])
def test_a_stop_string_ends_the_text_before_it(stop: str) -> None:
    found = sequence(Letters(), [stop])
    texts = feed(found, letters("abcdef"))
    assert (found.finish_reason, found.text) == ("stop", "abcdef".partition(stop)[0])
    assert_grows(texts)


def test_what_may_become_a_stop_string_is_held_back() -> None:
    found = sequence(Letters(), ["abc"])
    assert feed(found, letters("xababd")) == ["x", "x", "x", "xab", "xab", "xababd"]
    assert found.finish_reason is None


def test_what_was_held_back_comes_at_the_end() -> None:
    for max_new_tokens, eos in ((3, frozenset[int]()), (LONG, frozenset({0}))):
        found = sequence(Letters(), ["abc"], eos, max_new_tokens)
        feed(found, [*letters("xab"), 0])
        assert found.text == "xab"


def test_the_earliest_of_several_stop_strings_counts() -> None:
    found = sequence(Letters(), ["cd", "bcde", "zz"])
    feed(found, letters("abcde"))
    assert found.text == "ab"  # "cd" is complete first; "bcde" never comes to be

    class Whole:
        def decode(self, token_ids: list[int], skip_special_tokens: bool = False) -> str:
            return "abcde" * len(token_ids)

    found = sequence(Whole(), ["cd", "bcde"])
    feed(found, [1])
    assert (found.text, found.finish_reason) == ("a", "stop")


def test_a_stop_string_wins_over_the_length() -> None:
    found = sequence(Letters(), ["c"], max_new_tokens=3)
    feed(found, letters("abc"))
    assert (found.text, found.finish_reason) == ("ab", "stop")


@examples(200)
@given(
    text=st.text("ab\n", max_size=60),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=3),
    max_new_tokens=st.integers(1, 60),
)
def test_any_text_is_cut_at_its_first_stop_and_never_shrinks(text: str, stops: list[str], max_new_tokens: int) -> None:
    found = sequence(Letters(), stops, max_new_tokens=max_new_tokens)
    texts = feed(found, letters(text))
    assert_grows(texts)
    seen = text[: len(found.token_ids)]
    complete = [seen.find(stop) for stop in stops if stop in seen]
    if complete:
        assert (found.finish_reason, found.text) == ("stop", seen[: min(complete)])
    elif found.finish_reason == "length":
        assert found.text == seen and len(seen) == max_new_tokens
    else:
        assert found.finish_reason is None
        assert seen.startswith(found.text)
        held = seen[len(found.text) :]
        assert len(held) < max(map(len, stops), default=1)


def test_half_a_character_is_held_back() -> None:
    texts = ["a", "a", "aä", "aä", "aä", "aä€", "aä€", "aä€", "aä€", "aä€😀"]
    assert feed(sequence(Bytes()), "aä€😀".encode()) == texts


def test_half_a_character_at_the_end_stays_what_it_decodes_to() -> None:
    found = sequence(Bytes(), max_new_tokens=3)
    feed(found, "a€".encode())
    assert found.text == "a\N{REPLACEMENT CHARACTER}"


@examples(100)
@given(text=st.text(max_size=80), stops=st.lists(st.text(min_size=1, max_size=3), max_size=2))
def test_bytes_of_any_text_never_show_what_must_be_taken_back(text: str, stops: list[str]) -> None:
    found = sequence(Bytes(), stops)
    texts = feed(found, text.encode())
    assert_grows(texts)
    assert all(text.startswith(shown) for shown in texts)


def many_lines(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    text = "".join(f"Line {i}: naïve café — 日本語 😀\n    indented, {i * i}\n\n" for i in range(20))
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_a_real_tokenizer_s_text_grows_to_what_all_tokens_decode_to(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = many_lines(tokenizer)
    assert len(ids) > 300
    found = sequence(tokenizer, max_new_tokens=len(ids))
    texts = feed(found, ids)
    assert_grows(texts)
    assert found.text == tokenizer.decode(ids, skip_special_tokens=True)
    assert not any("\N{REPLACEMENT CHARACTER}" in text for text in texts)


@pytest.mark.parametrize("seed", range(5))
def test_random_tokens_of_a_real_tokenizer_give_what_they_decode_to(
    tokenizer: PreTrainedTokenizerBase, seed: int
) -> None:
    ids = torch.randint(0, len(tokenizer), (300,), generator=torch.Generator().manual_seed(seed)).tolist()
    found = sequence(tokenizer, max_new_tokens=len(ids))
    assert_grows(feed(found, ids))
    assert found.text == tokenizer.decode(ids, skip_special_tokens=True)


@examples(100)
@given(tokens=st.lists(st.integers(0, len(Pieces.words) - 1), min_size=1, max_size=120))
def test_lines_that_begin_with_a_space_keep_it(tokens: list[int]) -> None:
    tokens = [1, 3] * 20 + tokens
    found = sequence(Pieces(), max_new_tokens=len(tokens))
    assert_grows(feed(found, tokens))
    prompt = found.prompt_ids
    assert found.text == Pieces().decode(prompt + tokens).removeprefix(Pieces().decode(prompt))
    assert found.text.startswith(" ac ac")  # the first space begins the completion, not the text


def test_a_sequence_advances_by_what_its_sampler_chooses() -> None:
    found = Sequence([1], Sampler(SamplingParams(repetition_penalty=3.0), 0), Letters(), 3, frozenset())
    logits = torch.zeros(100)
    logits[97], logits[98] = 2.0, 1.0
    for _ in range(2):
        found.advance(logits)
    # The second time, the first choice has become less likely.
    assert (found.token_ids, found.text, found.logprobs) == ([97, 98], "ab", None)


def test_log_probabilities_are_recorded_for_every_token_if_asked_for() -> None:
    found = Sequence([1], GREEDY, Letters(), 2, frozenset(), logprobs=2)
    for likely in (97, 98):
        found.advance(torch.nn.functional.one_hot(torch.tensor(likely), 100).float() * 5)
    assert found.logprobs is not None and len(found.logprobs) == len(found.token_ids) == 2
    assert [found.logprobs.top(index)[0][0] for index in range(2)] == [97, 98]


def test_offsets_are_where_each_token_s_text_begins() -> None:
    found = Sequence([1], GREEDY, Bytes(), LONG, frozenset(), logprobs=0)
    for token in "aé语b".encode():
        found.append(token)
    assert found.offsets == [0, 1, 1, 2, 2, 2, 3]
    assert found.token_texts == ["a", "", "é", "", "", "语", "b"]


def test_a_space_before_the_first_word_of_a_completion_is_text_that_stops_find() -> None:
    llama = byte_fallback()
    prompt, tokens = ids_of(llama, "<s>", "▁a"), ids_of(llama, "▁to", "▁to")
    found = Sequence(prompt, GREEDY, llama, 2, frozenset())
    assert feed(found, tokens) == [" to", " to to"]
    assert (found.token_texts, found.offsets) == ([" to", " to"], [0, 3])
    stopped = Sequence(prompt, GREEDY, llama, LONG, frozenset(), [" to"])
    assert feed(stopped, tokens) == [""]
    assert (stopped.finish_reason, stopped.token_texts, stopped.offsets) == ("stop", [" to"], [0])


def test_a_stop_string_in_bytes_that_may_be_none_ends_the_text_at_once() -> None:
    llama = byte_fallback()
    tokens = ids_of(llama, "a", *(f"<0x{byte:02X}>" for byte in "日本".encode()), "<0xFF>")
    found = sequence(llama, ["本"])
    assert feed(found, tokens)[-1] == "a日"
    assert (found.finish_reason, len(found.token_ids), found.token_texts[-4:]) == ("stop", 7, ["日", "", "", "本"])
    assert feed(sequence(llama), tokens) == ["a"] * 8  # which may become seven replacement characters, and has


def test_tokens_that_end_a_text_or_are_special_add_nothing_to_it() -> None:
    found = sequence(Letters(), eos=frozenset({7}))
    feed(found, [97, 0, 98, 7])
    assert (found.text, found.token_texts, found.offsets) == ("ab", ["a", "", "b", ""], [0, 1, 1, 2])


@pytest.mark.parametrize("kind", [byte_level, byte_fallback, metaspace])
@examples(100)
@given(data=st.data())
def test_pieces_token_texts_offsets_and_stops_agree(
    kind: Callable[[], PreTrainedTokenizerBase], data: st.DataObject
) -> None:
    decoder = kind_of(kind)
    tokens = data.draw(st.lists(st.integers(0, len(decoder) - 1), min_size=1, max_size=30))
    whole = Sequence([1], GREEDY, decoder, len(tokens), frozenset(), logprobs=0)
    assert_grows(feed(whole, tokens))
    assert "".join(whole.token_texts) == whole.text
    for text, offset in zip(whole.token_texts, whole.offsets, strict=True):
        assert whole.text[offset : offset + len(text)] == text
    start = data.draw(st.integers(0, max(0, len(whole.text) - 1)))
    stop = whole.text[start : start + data.draw(st.integers(1, 4))]
    if stop:
        cut = Sequence([1], GREEDY, decoder, len(tokens), frozenset(), [stop], logprobs=0)
        assert_grows(feed(cut, tokens))
        seen = "".join(cut.token_texts)
        assert cut.finish_reason == "stop" and cut.text == seen[: seen.find(stop)] and stop in seen
        assert all(offset <= len(cut.text) for offset in cut.offsets)
