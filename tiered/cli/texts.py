"""The prompts and texts that a command was given, in words or as token ids: in options, files or on standard input.

`commands.py` calls it before it imports what loads torch, so that a mistake is answered at once.
"""

import io
import os
import re
import stat
import sys
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Final

import click

from tiered.errors import cut

_MOST_TEXT_NBYTES: Final = 512 << 20
"""Of one text: more than any corpus that is scored whole, but a limit for a pipe that never ends."""
_STANDARD_INPUT: Final = Path("-")
"""The path by which options name standard input."""
_ID: Final = re.compile(r"-?[0-9]{1,18}")
_LONGEST_SHOWN: Final = 40


TokenIds = Sequence[int]
"""Token ids as they were given; whether the model has them is not known here."""


def read_prompts(
    stated: Sequence[str],
    files: Sequence[Path],
    stated_ids: Sequence[str],
    id_files: Sequence[Path],
    prompt_tokens: int | None,
    sequences: int,
) -> tuple[str | TokenIds, ...]:
    """The prompts of -p, -f, --prompt-ids and --ids-file, in this order, else that of standard input; none where
    `prompt_tokens` asks for random ones."""
    prompts = [("-p", text) for text in stated]
    prompts += [_prompt_of(path) for path in files]
    ids = [_parse_ids("--prompt-ids", text) for text in stated_ids]
    ids += [_parse_ids(*read_text(path)) for path in id_files]
    if prompt_tokens is not None and (prompts or ids):
        raise click.UsageError("--prompt-tokens makes its own prompts; drop -p, -f, --prompt-ids and --ids-file")
    if prompt_tokens is None and sequences > 1:
        raise click.UsageError("--sequences repeats what --prompt-tokens makes; repeat -p for a batch of your own")
    if prompt_tokens is None and not prompts and not ids:
        if sys.stdin.isatty():
            raise click.UsageError(
                "no prompt: pass -p TEXT, -f FILE or --prompt-ids IDS, or pipe text to standard input"
            )
        prompts = [_prompt_of(_STANDARD_INPUT)]
    for source, text in prompts:
        # Bytes that are not UTF-8 arrive as lone surrogates where Python lets them pass.
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise click.UsageError(f"{source}: not UTF-8; pass text in that encoding")
    return (*(text for _, text in prompts), *ids)


def _prompt_of(path: Path) -> tuple[str, str]:
    """Name and text of a file, or of standard input; every line end becomes a line feed."""
    name, text = read_text(path)
    return name, io.IncrementalNewlineDecoder(None, translate=True).decode(text, final=True)


def read_texts(files: Sequence[Path], id_files: Sequence[Path]) -> tuple[tuple[str, str | TokenIds], ...]:
    """Names and texts of `files`, then names and token ids of `id_files`; of standard input where there are neither."""
    if files or id_files:
        named = [(name, _parse_ids(name, text)) for name, text in map(read_text, id_files)]
        return (*map(read_text, files), *named)
    if sys.stdin.isatty():
        raise click.UsageError("no text: pass -f FILE or --ids-file FILE, or pipe text to standard input")
    return (read_text(_STANDARD_INPUT),)


def _parse_ids(name: str, text: str) -> TokenIds:
    """The token ids in `text`: numbers with commas or white space between them, which may stand in brackets."""
    inner = text.strip()
    if inner.startswith("[") and inner.endswith("]"):
        inner = inner[1:-1]
    ids = array("q")
    for found in re.finditer(r"[^\s,]+", inner):
        piece = found[0]
        if not _ID.fullmatch(piece):
            shown = cut(piece, _LONGEST_SHOWN)
            raise click.UsageError(f"{name}: expected token ids such as 2,100,524, found {shown!r}")
        ids.append(int(piece))
    if not ids:
        raise click.UsageError(f"{name}: expected token ids such as 2,100,524, found none")
    return ids


def read_text(path: Path) -> tuple[str, str]:
    """The name of the file at `path` in messages, and the text in it, which must be UTF-8; line ends as they are.

    Pipes and terminals are read to their end. Devices without an end are refused, and so is a text that is too
    large.
    """
    name = "standard input" if path == _STANDARD_INPUT else str(path)
    try:
        if path == _STANDARD_INPUT:
            return name, _decoded(sys.stdin.buffer, name)
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
            is_device = stat.S_ISCHR(found.st_mode) or stat.S_ISBLK(found.st_mode)
            if is_device and not file.isatty() and not path.samefile(os.devnull):
                raise click.UsageError(f"{name}: a device, expected a text; pass a file or a pipe")
            return name, _decoded(file, name)
    except OSError as error:
        raise click.UsageError(f"{name}: cannot be read: {error.strerror}") from None


def _decoded(file: BinaryIO, name: str) -> str:
    content = file.read(_MOST_TEXT_NBYTES + 1)
    if len(content) > _MOST_TEXT_NBYTES:
        raise click.UsageError(f"{name}: more than {_MOST_TEXT_NBYTES >> 20} MiB; split it")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise click.UsageError(f"{name}: not UTF-8 ({error.reason} at byte {error.start}); convert it") from None
