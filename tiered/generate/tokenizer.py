"""A store's tokenizer and generation configuration, or a named error."""

from collections.abc import Sequence
from typing import Any, Final

from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from tiered.errors import StoreError
from tiered.store import Store

_VOCABULARIES: Final = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
"""One of these holds the tokens themselves; without any, transformers makes up an empty tokenizer."""


def load_tokenizer(store: Store) -> PreTrainedTokenizerBase:
    """The tokenizer that was copied into the store; raises StoreError where it is missing or damaged."""
    if not any((store.path / name).is_file() for name in _VOCABULARIES):
        raise StoreError(
            f"{store.path}: has no tokenizer (none of {', '.join(_VOCABULARIES)}); "
            "copy the model's tokenizer files into the store"
        )
    try:
        return AutoTokenizer.from_pretrained(store.path, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        # Whatever a tokenizer's own code raises on a damaged file.
        raise StoreError(
            f"{store.path}: its tokenizer cannot be loaded ({error}); copy the model's tokenizer files into the store"
        ) from error


def load_generation_config(store: Store) -> GenerationConfig | None:
    """The store's generation_config.json, if it has one; raises StoreError where it is damaged."""
    path = store.path / "generation_config.json"
    if not path.is_file():
        return None
    try:
        return GenerationConfig.from_pretrained(store.path)
    except Exception as error:
        raise StoreError(f"{path}: cannot be used ({error}); copy the model's own file there, or remove it") from error


def eos_ids(store: Store, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Every token that ends a text, by the generation configuration, else by the tokenizer."""
    config = load_generation_config(store)
    found: Any = None if config is None else config.eos_token_id
    if found is None:
        found = tokenizer.eos_token_id
    return frozenset(found if isinstance(found, Sequence) else [found] if found is not None else [])
