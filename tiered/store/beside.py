"""The files beside the blocks: those of a checkpoint that a store keeps verbatim, and what its tokenizer needs.

In: names of files and their contents. Out: what is copied, what is missing. `convert/` copies them and asks before it
begins whether the tokenizer will load; whoever loads it asks again, because that may be on another machine.
"""

import importlib.util
import re
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import Final

from tiered.errors import ConfigError, StoreError
from tiered.files import read_whole

_SENTENCEPIECE: Final = (
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "sentencepiece.model",
    "spm.model",
    "tiktoken.model",
)
"""Vocabularies that need a further package to be read; transformers takes them where there is no other one."""
_TEKKEN: Final = "tekken.json"
_OTHERS: Final = ("tokenizer.json", "vocab.json", "vocab.txt")
VOCABULARIES: Final = (*_OTHERS, _TEKKEN, *_SENTENCEPIECE)
"""One of these holds the tokens themselves; without any, transformers makes up an empty tokenizer."""
COPIED: Final = (
    "config.json",
    "generation_config.json",
    *VOCABULARIES,
    "merges.txt",
    "emoji.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
"""Copied verbatim into the store where the source has them."""
TOKENIZER: Final = tuple(name for name in COPIED if name not in ("config.json", "generation_config.json"))
"""Those that are the tokenizer's, with its chat template."""
_TIKTOKEN: Final = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")
"""A line of a vocabulary as tiktoken keeps it, whatever the file is called."""
_SPECIAL: Final = re.compile(rb'"special_tokens"\s*:')
"""Present in a tekken.json that transformers reads by itself; older files need the package that made them."""


def check_packages(name: str, names: Collection[str], read: Callable[[str], bytes]) -> None:
    """Raise ConfigError where the tokenizer among `names`, which `read` reads, needs a package that is not installed.

    `name` is what the error calls the folder.
    """
    if any(other in names for other in _OTHERS):
        return
    vocabulary = next((file for file in (_TEKKEN, *_SENTENCEPIECE) if file in names), None)
    if vocabulary is None:
        return
    content = read(vocabulary)
    if vocabulary == _TEKKEN:
        packages = {} if _SPECIAL.search(content) else {"mistral_common": "mistral-common"}
    elif _TIKTOKEN.match(content):
        packages = {"tiktoken": "tiktoken"}
    else:
        packages = {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf"}
    missing = [package for module, package in packages.items() if not _is_installed(module)]
    if missing:
        raise ConfigError(
            f"{name}: its tokenizer is {vocabulary} alone, which takes {' and '.join(missing)} to read; "
            f"'pip install {' '.join(missing)}', then run the same command again"
        )


def check_beside(folder: Path) -> None:
    """Read every file beside the blocks of the store `folder`, so that a disk's error is not taken for a bad tokenizer.

    Raises ReadError where the operating system cannot read a file, StoreError where it is not a regular file,
    ConfigError where a package is missing.
    """
    found: set[str] = set()
    for name in COPIED:
        with suppress(FileNotFoundError):
            read_whole(folder / name, StoreError)
            found.add(name)
    check_packages(str(folder), found, lambda name: read_whole(folder / name, StoreError))


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package is missing
        return False
