"""Small tokenizers of every kind there is, made on the spot: how their tokens become text is that of the real ones."""

from typing import Any, Final

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

SPECIAL: Final = ("<unk>", "<s>", "</s>")
WORDS: Final = (
    "▁",
    "▁▁",
    "▁a",
    "a",
    "b",
    "▁to",
    "to",
    "n",
    "'t",
    "▁n",
    "▁n't",
    ".",
    "▁.",
    "?",
    "é",
    "▁日本",
    "語",
    "\n",
)
_BYTES: Final = tuple(f"<0x{byte:02X}>" for byte in range(256))


def byte_fallback(*extra: str) -> PreTrainedTokenizerFast:
    """As Llama 2's and Mistral's: words with the space before them, bytes for the rest, a text's first space dropped.

    `extra` are more words, the first of the vocabulary.
    """
    decoder = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    model = models.BPE(_numbered(SPECIAL, extra, _BYTES, WORDS), [], unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return _finished(tokenizer, decoders.Sequence(decoder))


def metaspace() -> PreTrainedTokenizerFast:
    """As T5's and XGLM's."""
    model = models.Unigram([(word, -float(at)) for at, word in enumerate((*SPECIAL, *WORDS))], unk_id=0)
    return _finished(Tokenizer(model), decoders.Metaspace())


def cleaning() -> PreTrainedTokenizerFast:
    """One whose text loses the spaces before punctuation."""
    words = (
        "do",
        "▁do",
        "▁n",
        "n",
        "'t",
        "t",
        "▁n't",
        "'",
        "▁'",
        "▁",
        "s",
        "▁.",
        ".",
        "▁,",
        "?",
        "v",
        "e",
        "re",
        "▁x",
        "éé",
    )
    model = models.Unigram([(word, -float(at)) for at, word in enumerate((*SPECIAL, *words))], unk_id=0)
    return _finished(Tokenizer(model), decoders.Metaspace(), clean_up_tokenization_spaces=True)


def wordpiece() -> PreTrainedTokenizerFast:
    """As BERT's: words without spaces, and their ends."""
    words = ("a", "##a", "do", "##n", "'", "t", ".", "##s", "日")
    return _finished(Tokenizer(models.WordPiece(_numbered(SPECIAL, words), unk_token="<unk>")), decoders.WordPiece())


def byte_level() -> PreTrainedTokenizerFast:
    """As GPT-2's: tokens are bytes, among them halves of characters and a half together with what is before it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    longer = [_spelled(text.encode()) for text in ("the", " to", "é", "日", "a b")]
    longer += [
        _spelled(raw) for raw in (b"a\xe2", b"\x82\xacb", b"\xf0\x9f", b"\x98\x80", b"\xe2\x82", b"\xff\xfe", b" \xe6")
    ]
    model = models.BPE(_numbered(SPECIAL, alphabet, longer), [])
    return _finished(Tokenizer(model), decoders.ByteLevel())


def ids_of(tokenizer: PreTrainedTokenizerBase, *tokens: str) -> list[int]:
    """Ids of tokens of the vocabulary."""
    found = [tokenizer.convert_tokens_to_ids(token) for token in tokens]
    assert tokenizer.unk_token_id not in found
    return [one for one in found if isinstance(one, int)]


def _spelled(raw: bytes) -> str:
    """`raw` as a byte-level vocabulary spells it."""
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if all(byte < 0x80 for byte in raw):
        return level.pre_tokenize_str(raw.decode())[0][0]
    # Any byte as a character of its own, in the order that every byte-level vocabulary has.
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return "".join(chr(byte) if byte in plain else chr(0x100 + others.index(byte)) for byte in raw)


def _numbered(*groups: Any) -> dict[str, int]:
    return {word: at for at, word in enumerate(dict.fromkeys(word for group in groups for word in group))}


def _finished(tokenizer: Tokenizer, decoder: Any, **more: Any) -> PreTrainedTokenizerFast:
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens(list(SPECIAL))
    # Two that no text is made of by itself: one that is shown, one that is not.
    tokenizer.add_tokens([AddedToken("<shown>", normalized=False)])
    tokenizer.add_special_tokens(["<hidden>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", **more
    )
