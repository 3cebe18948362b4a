"""The tokenizer of a store: the files of a source that are one, or another that `--tokenizer` names in their place.

In: a folder's files. Out: what is written beside the blocks. A folder may have the two files of metaseq's OPT release
instead of any that transformers knows; the store gets them under the names of Hugging Face's OPT, which has the same.
"""

import json
import os
import tempfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, Self

import xxhash

from tiered.arch import build_skeleton, load_config, read_tokenizer
from tiered.convert.folder import locked
from tiered.convert.place import Folder, LocalFiles
from tiered.convert.room import os_errors_named
from tiered.errors import CheckpointError, ConfigError
from tiered.files import MOST_JSON_NBYTES, parse_json, read_whole
from tiered.store import atomic_write
from tiered.store.beside import COPIED, TOKENIZER, VOCABULARIES, check_packages

_VOCAB: Final = "gpt2-vocab.json"
_MERGES: Final = "gpt2-merges.txt"
_FIRST: Final = ({"<s>", "<BOS>"}, {"<pad>", "<PAD>"}, {"</s>", "<EOS>"}, {"<unk>", "<UNK>"})
"""What metaseq demands of the first four tokens of its vocabularies."""
_ALONE: Final = b'{"tokenizer_class": "PreTrainedTokenizerFast"}\n'
"""Says of a tokenizer.json that it is all there is: transformers adds no tokens of the model's family to it."""
_CONFIG: Final = "config.json"

Read = Callable[[str], bytes]
BesideFiles = Mapping[str, Callable[[], bytes]]
"""What lies beside the blocks, by file name."""


def files_beside(name: str, names: Collection[str], read: Read) -> BesideFiles:
    """What a store keeps of the folder called `name` that has the files `names`, each by its name in the store.

    Reading raises CheckpointError where metaseq's vocabulary is not one of OPT's.
    """
    found: dict[str, Callable[[], bytes]] = {file: partial(read, file) for file in COPIED if file in names}
    if found.keys().isdisjoint(VOCABULARIES) and {_VOCAB, _MERGES} <= set(names):
        path = Path(name, _VOCAB)
        found["vocab.json"] = lambda: _checked_vocabulary(path, read(_VOCAB))[0]
        found["merges.txt"] = partial(read, _MERGES)
        found.setdefault("tokenizer_config.json", lambda: _opt_settings(_checked_vocabulary(path, read(_VOCAB))[1]))
    return found


@dataclass(frozen=True)
class GivenTokenizer:
    """The tokenizer that `--tokenizer` names: what a store gets instead of the source's."""

    path: Path
    files: Mapping[str, bytes]

    @classmethod
    def read(cls, path: Path) -> Self:
        """That of the folder or tokenizer.json at `path`; raises ConfigError where there is none, or it lacks packages,
        and CheckpointError where files are damaged."""
        path = path.expanduser()
        # Not Path's: a name may be longer than any path.
        if not os.path.exists(path):  # noqa: PTH110
            raise ConfigError(f"--tokenizer {path}: no such file or folder; pass a folder with a tokenizer's files")
        if not path.is_dir():
            content = read_whole(path, CheckpointError)
            value = parse_json(content, path, CheckpointError, "pass a tokenizer.json, or a folder with such files")
            if not isinstance(value, dict) or not isinstance(value.get("model"), dict):
                raise ConfigError(f"--tokenizer {path}: not a tokenizer.json; pass that, or the folder of such files")
            return cls(path, {"tokenizer.json": content, "tokenizer_config.json": _ALONE})
        place = LocalFiles(Folder(path))
        beside = files_beside(str(path), place.names, lambda name: read_whole(place.path(name), CheckpointError))
        if beside.keys().isdisjoint(VOCABULARIES):
            raise ConfigError(
                f"--tokenizer {path}: has no tokenizer (none of {', '.join(VOCABULARIES)}, nor {_VOCAB} with "
                f"{_MERGES}); pass a folder that has one"
            )
        files = {name: read() for name, read in beside.items() if name in TOKENIZER}
        check_packages(str(path), files, lambda name: files[name])
        return cls(path, files)

    @property
    def digest(self) -> str:
        """Equal digests: the same files."""
        digest = xxhash.xxh3_128()
        for name, content in sorted(self.files.items()):
            digest.update(f"{name}\0{len(content)}\0".encode() + content)
        return digest.hexdigest()

    def check(self, config: bytes, vocab_size: int) -> None:
        """Raise ConfigError unless it can be loaded for the model that `config` (config.json) describes, whose tokens
        are 0 to `vocab_size` - 1."""
        name, remedy = f"--tokenizer {self.path}", "pass the one that the model was trained with"
        with tempfile.TemporaryDirectory(prefix="tiered-") as folder:
            for file, content in {**self.files, _CONFIG: config}.items():
                Path(folder, file).write_bytes(content)
            tokenizer = read_tokenizer(Path(folder), name, ConfigError, remedy)
        text, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1], default=("", -1))
        if largest < 0:
            raise ConfigError(f"{name}: has no tokens; {remedy}")
        if largest >= vocab_size:
            raise ConfigError(
                f"{name}: has tokens up to {largest} ({json.dumps(text, ensure_ascii=False)}), this model knows 0 to "
                f"{vocab_size - 1}; {remedy}"
            )

    def in_place_of(self, beside: BesideFiles) -> BesideFiles:
        """`beside` with this tokenizer instead of its own."""
        rest = {name: read for name, read in beside.items() if name not in TOKENIZER}
        return rest | {name: partial(bytes, content) for name, content in self.files.items()}

    def check_store(self, folder: Path) -> None:
        """Raise ConfigError unless it fits the model of the store at `folder`."""
        vocab_size = build_skeleton(load_config(folder)).embedding.num_embeddings
        config = read_whole(folder / _CONFIG, CheckpointError, MOST_JSON_NBYTES)
        with os_errors_named(folder):
            self.check(config, vocab_size)

    def put_into(self, folder: Path) -> None:
        """Write it into the store at `folder`, instead of the one that may be there. After a kill the same call goes
        on; until then the store has no tokenizer."""
        with locked(folder), os_errors_named(folder):
            for name in (*VOCABULARIES, *TOKENIZER):
                (folder / name).unlink(missing_ok=True)
            for name in sorted(self.files, key=VOCABULARIES.__contains__):  # these last
                atomic_write(folder / name, self.files[name])


def _checked_vocabulary(path: Path, content: bytes) -> tuple[bytes, list[str]]:
    """A vocabulary of metaseq, and its first four tokens; raises CheckpointError where it is not numbered as OPT's."""
    vocabulary = parse_json(content, path, CheckpointError, "download the file again")
    pairs = vocabulary.items() if isinstance(vocabulary, dict) else ()
    by_id = {number: text for text, number in pairs if type(number) is int}
    first = [by_id.get(number) for number in range(len(_FIRST))]
    if any(text not in allowed for text, allowed in zip(first, _FIRST, strict=True)):
        found = ", ".join(map(repr, first))
        raise CheckpointError(
            f"{path}: expected the tokens <s>, <pad>, </s> and <unk> as 0 to 3, found {found}; that is not how OPT's "
            "tokens are numbered: take the file of metaseq's projects/OPT/assets, or the tokenizer of any OPT on the "
            "hub (all sizes have the same)"
        )
    return content, [str(text) for text in first]


def _opt_settings(first: list[str]) -> bytes:
    """tokenizer_config.json as Hugging Face's OPT has it: the token that ends a text also begins one."""
    _, pad, end, _ = first
    value = {
        "tokenizer_class": "GPT2Tokenizer",
        "add_bos_token": True,
        "add_prefix_space": False,
        "errors": "replace",
        "bos_token": end,
        "eos_token": end,
        "unk_token": end,
        "pad_token": pad,
    }
    return (json.dumps(value, indent=1) + "\n").encode()
