"""Loads a store's tokenizer and generation configuration; errors name the file to blame."""

import json
import shlex
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from transformers import GenerationConfig, PreTrainedTokenizerBase

from tiered.arch import read_tokenizer
from tiered.errors import StoreError, shortened
from tiered.files import MOST_JSON_NBYTES, read_whole
from tiered.store import Store
from tiered.store.beside import VOCABULARIES, check_beside

_GENERATION_FILE: Final = "generation_config.json"
_LONGEST_VALUE: Final = 40
"""How many characters of a value are shown."""
_CHANGES: Final[dict[str, Any]] = {
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "max_new_tokens": None,
    "max_length": None,
    "min_new_tokens": 0,
    "min_length": 0,
    "max_time": None,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "sequence_bias": None,
    "exponential_decay_length_penalty": None,
    "guidance_scale": 1.0,
    "watermarking_config": None,
    "token_healing": False,
    "remove_invalid_values": False,
    "penalty_alpha": None,
    "dola_layers": None,
    "force_words_ids": None,
    "constraints": None,
}
"""Fields that change what transformers generates, with the values it assumes where they are not set."""
SAMPLING: Final[dict[str, Any]] = {
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "min_p": None,
    "top_h": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}
"""More such fields, which count only where do_sample is true."""


def load_tokenizer(store: Store) -> PreTrainedTokenizerBase:
    """The tokenizer that was copied into the store; raises StoreError where it is missing or damaged."""
    found = load_tokenizer_if_any(store)
    if found is None:
        raise StoreError(f"{store.path}: has no tokenizer; {_remedy(store)} gives it the model's")
    return found


def load_tokenizer_if_any(store: Store) -> PreTrainedTokenizerBase | None:
    """As `load_tokenizer`; None where the store has none, and so takes and gives token ids only."""
    check_beside(store.path)
    if not any((store.path / name).is_file() for name in VOCABULARIES):
        return None
    return read_tokenizer(store.path, str(store.path), StoreError, f"put the model's own there: {_remedy(store)}")


def _remedy(store: Store) -> str:
    return f"'tiered convert {shlex.quote(str(store.path))} --tokenizer PATH'"


def load_generation_config(store: Store) -> GenerationConfig:
    """The store's generation settings as transformers reads them: from generation_config.json, or from config.json
    where there is none. Raises StoreError where that file is damaged."""
    path = _generation_file(store)
    read_whole(path, StoreError, MOST_JSON_NBYTES)  # an unreadable file has an error of its own
    legacy: dict[str, Any] = {} if path.name == _GENERATION_FILE else {"_from_model_config": True}
    try:
        return GenerationConfig.from_pretrained(store.path, path.name, local_files_only=True, **legacy)
    except Exception as error:
        # transformers may raise anything on values that it did not expect.
        raise StoreError(
            f"{path}: cannot be used ({shortened(error)}); copy the model's own file there, or remove it"
        ) from error


@dataclass(frozen=True)
class GenerationSettings:
    """A store's generation settings, for commands: they honour what ends a text, and have options for the rest."""

    file: str
    """Name of the file that says it."""
    eos_ids: frozenset[int]
    """Every token that ends a text."""
    stops: tuple[str, ...]
    """Texts that end it."""
    others: Mapping[str, Any]
    """All other settings that change what transformers generates, by field name."""

    def ignored(self, stated: Collection[str]) -> str | None:
        """A line that names the settings not honoured, or None. `stated`: names of settings that options replace."""
        found = [f"{name} {_shown(value)}" for name, value in self.others.items() if name not in stated]
        if not found:
            return None
        return (
            f"ignored   {self.file}: {', '.join(found)}; only what ends a text is taken from it, pass options instead"
        )


def load_generation_settings(store: Store, tokenizer: PreTrainedTokenizerBase | None) -> GenerationSettings:
    """The store's settings. Where none of its files names an end token, the tokenizer's counts.

    Without a tokenizer there is no text to find stop strings in: they are among the others.

    Raises StoreError, naming file and field, for end tokens that are no integers and stop strings that are no texts.
    """
    config, path = load_generation_config(store), _generation_file(store)
    ids, stops = config.eos_token_id, config.stop_strings
    if ids is None and tokenizer is not None:
        ids = tokenizer.eos_token_id
    eos = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if not all(type(token) is int for token in eos):
        raise _wrong(path, "eos_token_id", "a token id, or a list of them", ids)
    texts = [] if stops is None else [stops] if isinstance(stops, str) else stops
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise _wrong(path, "stop_strings", "a text that is not empty, or a list of them", stops)
    others = _others(config)
    if tokenizer is None and texts:
        others, texts = {**others, "stop_strings": texts}, []
    return GenerationSettings(path.name, frozenset(eos), tuple(texts), others)


def _generation_file(store: Store) -> Path:
    """The file that transformers takes generation settings from."""
    path = store.path / _GENERATION_FILE
    return path if path.is_file() else store.path / "config.json"


def _others(config: GenerationConfig) -> dict[str, Any]:
    """The fields whose values differ from what transformers assumes where they are not set."""
    fields = {**_CHANGES, **(SAMPLING if config.do_sample is True else {})}
    found = {name: getattr(config, name, None) for name in fields}
    return {name: value for name, value in found.items() if value not in (None, [], {}, fields[name])}


def _wrong(path: Path, field: str, expected: str, found: object) -> StoreError:
    return StoreError(f"{path}: {field}: expected {expected}, found {_shown(found)}; correct it, or remove the field")


def _shown(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 3] + "..."
