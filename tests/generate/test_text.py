"""The text of a completion is what its tokenizer decodes, however it comes: as a whole, in pieces, by tokens."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tests.commands import CHECKPOINT
from tests.generate import tokenizers
from tests.generate.tokenizers import ids_of
from tests.quick import examples
from tiered.generate.text import CompletionText

KINDS = {
    "trained": lambda: AutoTokenizer.from_pretrained(CHECKPOINT, local_files_only=True),
    "byte level": tokenizers.byte_level,
    "byte fallback": tokenizers.byte_fallback,
    "metaspace": tokenizers.metaspace,
    "wordpiece": tokenizers.wordpiece,
    "cleaning": tokenizers.cleaning,
}
TOKENIZERS = {kind: make() for kind, make in KINDS.items()}


def completed(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    """What the tokenizer itself says that `tokens` add."""
    before, whole = (str(tokenizer.decode(list(ids), skip_special_tokens=True)) for ids in (prompt, [*prompt, *tokens]))
    return next(whole[size:] for size in range(len(before), -1, -1) if whole.startswith(before[:size]))


def assert_exact(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], tokens: Sequence[int]) -> None:
    """Text after every token, what is final of it, and where the tokens' own texts lie."""
    found = CompletionText(tokenizer, prompt)
    finals = [""]
    for count, token in enumerate(tokens, 1):
        found.append(token)
        assert found.text == completed(tokenizer, prompt, tokens[:count])
        finals.append(found.text[: found.final])
    assert all(later.startswith(earlier) for earlier, later in pairwise([*finals, found.text]))
    ends = found.ends
    assert len(ends) == len(tokens) and ends == sorted(ends)
    assert not tokens or ends[-1] == len(found.text)


@pytest.mark.parametrize("kind", KINDS)
@examples(100)
@given(data=st.data())
def test_random_tokens_give_what_the_tokenizer_decodes(kind: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[kind]
    token = st.integers(0, len(tokenizer) - 1)
    # Few different ones, so that they meet in every order.
    few = st.lists(token, min_size=1, max_size=6).flatmap(lambda some: st.lists(st.sampled_from(some), max_size=40))
    prompt = data.draw(st.one_of(st.just([]), st.lists(st.sampled_from(tokenizer.all_special_ids), max_size=3), few))
    assert_exact(tokenizer, prompt, data.draw(few))


FALLBACK_RUNS = st.lists(
    st.one_of(
        st.text("aé日😀\n", max_size=4).map(lambda text: [f"<0x{byte:02X}>" for byte in text.encode()]),
        st.sampled_from([["▁to"], ["▁"], ["<hidden>"], ["<shown>"], ["<0xFF>"], ["<0xE2>", "<0x82>"], ["</s>"]]),
    ),
    max_size=12,
)


@examples(100)
@given(before=FALLBACK_RUNS, after=FALLBACK_RUNS)
def test_runs_of_bytes_give_what_the_tokenizer_decodes(before: list[list[str]], after: list[list[str]]) -> None:
    tokenizer = TOKENIZERS["byte fallback"]
    prompt, tokens = (ids_of(tokenizer, *[w for run in runs for w in run]) if runs else [] for runs in (before, after))
    assert_exact(tokenizer, prompt, tokens)


def test_a_character_that_the_prompt_began_is_the_completion_s() -> None:
    fallback, level = TOKENIZERS["byte fallback"], TOKENIZERS["byte level"]
    for tokenizer, half in ((fallback, ["<0xE2>", "<0x82>"]), (level, ["âĤ"])):
        rest = ["<0xAC>", "▁to"] if tokenizer is fallback else ["¬", "Ġto"]
        found = CompletionText(tokenizer, ids_of(tokenizer, "a", *half))
        texts = []
        for token in ids_of(tokenizer, *rest):
            found.append(token)
            texts.append(found.text)
        assert texts == ["€", "€ to"]


def test_a_text_that_loses_spaces_before_punctuation_comes_when_it_stays() -> None:
    tokenizer = TOKENIZERS["cleaning"]
    found = CompletionText(tokenizer, ids_of(tokenizer, "▁do"))
    shown = []
    for token in ids_of(tokenizer, "▁do", "▁n", "'t", "▁.", "▁do"):
        found.append(token)
        shown.append(found.text[: found.final])
    assert shown == [" do", " do", " do", " do", " don't. do"]
    # What was there after a token, but did not stay, is not its own.
    assert found.token_texts == [" do", "", "n't", ".", " do"]


@pytest.mark.parametrize("strip", [lambda text: text.strip(" "), lambda text: text.lstrip(" ")], ids=["both", "left"])
def test_decoders_that_drop_every_space_around_a_text_keep_those_inside(strip: Callable[[str], str]) -> None:
    class Stripping:
        def decode(self, token_ids: list[int], skip_special_tokens: bool = False) -> str:
            return strip("".join((" ", " a", "b", "  ")[token] for token in token_ids))

    prompt, tokens = [1], [0, 0, 1, 0, 3, 2, 0, 1, 3, 3, 2]
    found = CompletionText(Stripping(), prompt)
    for count, token in enumerate(tokens, 1):
        found.append(token)
        assert found.text == Stripping().decode(prompt + tokens[:count])[1:]


def test_a_tokenizer_written_in_python_may_rewrite_all_of_a_text() -> None:
    class Joining:
        is_fast = False

        def decode(self, token_ids: list[int], skip_special_tokens: bool = False) -> str:
            quotes = iter("“”" * len(token_ids))
            text = " ".join(("foo@@", "bar", "'")[token] for token in token_ids).replace("@@ ", "")
            return "".join(next(quotes) if letter == "'" else letter for letter in text)

    prompt, tokens = [2, 1], [0, 0, 1, 2, 1]
    found = CompletionText(Joining(), prompt)
    for token in tokens:
        found.append(token)
    assert (found.text, found.final) == (" foofoobar ” bar", 0)


@pytest.mark.parametrize(
    ("kind", "prompt", "words"),
    [
        ("byte fallback", ["a"] * 400, ["a"] * 400),
        ("byte fallback", ["a"], ["▁"] * 400),
        ("byte fallback", ["a"], ["</s>"] * 400),
        ("byte fallback", ["a", "<0xE2>"], ["</s>"] * 400),
        ("byte level", ["a"], ["a", "b", "Ġto", "âĤ", "¬"] * 100),
    ],
)
def test_what_is_decoded_does_not_grow_with_prompt_or_completion(
    kind: str, prompt: list[str], words: list[str]
) -> None:
    longest = 0

    class Counting:
        def decode(self, token_ids: list[int], skip_special_tokens: bool = False) -> str:
            nonlocal longest
            longest = max(longest, len(token_ids))
            return str(TOKENIZERS[kind].decode(token_ids, skip_special_tokens=skip_special_tokens))

        def convert_ids_to_tokens(self, token: int) -> object:
            return TOKENIZERS[kind].convert_ids_to_tokens(token)

    before, tokens = (ids_of(TOKENIZERS[kind], *some) for some in (prompt, words))
    found = CompletionText(Counting(), before)
    for token in tokens:
        found.append(token)
    assert longest <= 4
    assert found.text == completed(TOKENIZERS[kind], before, tokens)


def test_characters_of_a_run_of_bytes_belong_to_the_tokens_that_complete_them() -> None:
    tokenizer = TOKENIZERS["byte fallback"]
    found = CompletionText(tokenizer)
    for token in ids_of(tokenizer, *(f"<0x{byte:02X}>" for byte in "日本é".encode()), "a", "<0xFF>", "a"):
        found.append(token)
    assert found.text == "日本éa�a"
    assert found.ends == [0, 0, 1, 1, 1, 2, 2, 3, 4, 4, 6]
