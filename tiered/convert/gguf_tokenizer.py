"""The tokenizer in a GGUF file, as the files that transformers keeps one in.

In: the path of the file with the metadata. Out: tokenizer.json and what belongs to it, its chat template too. They are
made by transformers' own conversion, which puts GPT-2's way to split text where it does not know a file's: such a file
is refused here.
"""

import importlib
import json
import tempfile
from pathlib import Path
from typing import Any, Final

from transformers import PreTrainedTokenizerFast

from tiered.convert.gguf_file import Metadata, Omitted
from tiered.errors import CheckpointError, ConfigError, shortened
from tiered.store.beside import TOKENIZER

_REMEDY: Final = "pass the original model's with --tokenizer PATH"
_TOKENIZER: Final = "tokenizer.json"
_ADDED: Final = '"added_tokens": '
_LIKE_GPT2: Final = ("gpt-2", "phi-2")
"""Names of the way in which GPT-2's tokenizer splits text."""
_LIKE_LLAMA3: Final = (
    *("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"),
    "tekken",
)
"""Those of tokenizers that take a piece of text whole where it is a token, however merges would build it, and begin a
text with a token unless the file says otherwise. llama.cpp knows both by the name; transformers' conversion does not,
and makes other tokens than the model's own tokenizer."""


def tokenizer_of(path: Path, metadata: Metadata, vocab_size: int) -> dict[str, bytes]:
    """The files of the tokenizer of a model whose tokens are 0 to `vocab_size` - 1, by name; none where the file at
    `path` has no tokenizer.

    Raises ConfigError where transformers is too old to make them, and CheckpointError where it cannot, or where there
    are tokens that the model does not know.
    """
    kind = metadata.get("tokenizer.ggml.model", "none")
    if kind in ("none", "no_vocab"):
        return {}
    tokens = metadata.get("tokenizer.ggml.tokens")
    count = tokens.count if isinstance(tokens, Omitted) else 0
    if not 0 < count <= vocab_size:
        raise CheckpointError(f"{path}: expected a tokenizer of 1 to {vocab_size:,} tokens, found {count:,}; {_REMEDY}")
    try:
        mapping: Any = importlib.import_module("transformers.integrations.gguf.gguf_tokenizer_mapping")
    except ImportError:
        raise ConfigError(
            f"{path}: making its tokenizer takes transformers 5.24 or newer; install it, or {_REMEDY}"
        ) from None
    split = metadata.get("tokenizer.ggml.pre")
    if kind == "gpt2" and split not in (*mapping.GGUF_PRE_TOKENIZER_SPLITS, *_LIKE_GPT2):
        raise CheckpointError(
            f"{path}: its tokenizer splits text in a way that transformers does not know (tokenizer.ggml.pre is "
            f"{split!r}); {_REMEDY}"
        )
    begins = split in _LIKE_LLAMA3 and "tokenizer.ggml.add_bos_token" not in metadata
    with tempfile.TemporaryDirectory(prefix="tiered-") as folder:
        made = Path(folder, "made")
        try:
            _make(path, made, whole=split in _LIKE_LLAMA3, begins=begins)
        except BaseException as error:
            # As with any tokenizer, damage may raise anything; see `tiered.arch.read_tokenizer`.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise CheckpointError(
                f"{path}: transformers cannot read its tokenizer ({shortened(error)}); {_REMEDY}"
            ) from error
        found = {name: (made / name).read_bytes() for name in TOKENIZER if (made / name).is_file()}
    return {**found, _TOKENIZER: _without_others(found[_TOKENIZER].decode(), count).encode()}


def _make(path: Path, made: Path, *, whole: bool, begins: bool) -> None:
    """Put the tokenizer of the file at `path` into the folder `made`: one that takes words `whole`, and `begins` texts
    whatever the file says."""
    # Alone in a folder, as a tokenizer.json beside it would be taken in its place.
    alone = made.with_name("gguf")
    alone.mkdir()
    (alone / "model.gguf").symlink_to(path.absolute())
    options: dict[str, Any] = {"gguf_file": "model.gguf", **({"add_bos_token": True} if begins else {})}
    tokenizer = PreTrainedTokenizerFast.from_pretrained(alone, **options)
    if whole:
        tokenizer.backend_tokenizer.model.ignore_merges = True
    tokenizer.save_pretrained(made)


def _without_others(content: str, count: int) -> str:
    """tokenizer.json without the tokens from `count` on, which the file does not have: transformers adds the special
    ones of the class that it converts with."""
    start = content.index(_ADDED) + len(_ADDED)
    added, stop = json.JSONDecoder().raw_decode(content, start)
    return content[:start] + json.dumps([token for token in added if token["id"] < count]) + content[stop:]
