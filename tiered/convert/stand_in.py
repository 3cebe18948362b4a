"""A tokenizer for synthetic stores: one token for each byte, and the ends of a text. Any prompt passes through it."""

import json
from typing import Final

BYTE_TOKENS: Final = 256
BOS_ID: Final = 256
EOS_ID: Final = 257
PAD_ID: Final = 258
LEAST_VOCAB: Final = 259
_SPECIAL: Final = {"bos_token": ("<s>", BOS_ID), "eos_token": ("</s>", EOS_ID), "pad_token": ("<pad>", PAD_ID)}


def tokenizer_files(max_length: int) -> dict[str, bytes]:
    """tokenizer.json and tokenizer_config.json, as transformers loads them. Token i < 256 is byte i."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocab = {char: byte for byte, char in enumerate(_byte_characters())}
    vocab |= {text: index for text, index in _SPECIAL.values()}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text, _ in _SPECIAL.values()])
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_length}
    config |= {key: text for key, (text, _) in _SPECIAL.items()}
    return {
        "tokenizer.json": (tokenizer.to_str(pretty=True) + "\n").encode(),
        "tokenizer_config.json": (json.dumps(config, indent=1) + "\n").encode(),
    }


def _byte_characters() -> list[str]:
    """The printable character that byte-level tokenizers write for each byte: itself, or one from 256 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    characters, substitutes = [], 0
    for byte in range(BYTE_TOKENS):
        if byte in printable:
            characters.append(chr(byte))
        else:
            characters.append(chr(256 + substitutes))
            substitutes += 1
    return characters
