"""Weights that a checkpoint holds quantized look like plain ones: a reader above the reader of its files.

In: the index of the files, in which a weight is several tensors (`X.qweight`, `X.scales`, ...), and what config.json
says. Out: an index in which it is one, by the name that it has in 16 bits (`X.weight`), whose rows come as codes or as
numbers. Called by `open.py`.

A panel of rows is a rectangle of each tensor: nothing is ever whole in memory.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeVar

import torch

from tiered.convert.formats import Format
from tiered.convert.index import WeightIndex
from tiered.convert.kinds import KINDS, Kind, config_of
from tiered.convert.panels import Panels, rooms_nbytes
from tiered.convert.place import WeightFiles
from tiered.convert.published import Settings
from tiered.convert.source import PANEL_NBYTES, StoredTensor, WeightReader
from tiered.errors import CheckpointError, shortened
from tiered.kernels import CodedRows
from tiered.quant import QuantizedTensor, folded
from tiered.units import PAGE, round_up

_PANEL_NBYTES: Final = PANEL_NBYTES // 2
"""Bytes of a panel, as numbers or as codes. Larger ones are taken apart no faster, and several are in memory at a time.
"""
_PANEL_ROWS: Final = 64
"""Rows of a panel of codes are a multiple of this: a cache line of words, in formats that keep weights transposed."""
_PANEL_PARTS: Final = 3
"""Times its bytes that taking a panel apart takes: what is read, what is made of it, and scales with what is made of
them on the way."""
_WORD_ROWS: Final = 16
"""Rows that share a word, at most."""
_NOT_ITS_FORMAT: Final = (ValueError, KeyError, TypeError, IndexError, ZeroDivisionError, RuntimeError)
"""What arithmetic with tensors that do not fit each other raises."""

Made = TypeVar("Made")


@dataclass(frozen=True)
class _Found:
    """A quantized weight: of which kind, and which of the checkpoint's tensors are which part of it."""

    kind: Kind
    names: Mapping[str, str]
    """Part -> name."""
    unread: tuple[str, ...]


def quantized_index(index: WeightIndex, files: WeightFiles, config: Mapping[str, Any]) -> WeightIndex:
    """`index` with each quantized weight in place of its tensors; itself where there is none. `config` is what
    config.json says of the quantization.

    Raises CheckpointError where tensors are not what their format has; so does whatever reads such a weight later.
    """
    found = _find(index.file_of)
    if not found:
        return index
    used = {name for each in found.values() for name in (*each.names.values(), *each.unread)}
    file_of = {name: file for name, file in index.file_of.items() if name not in used}
    others: dict[str, frozenset[str]] = {}
    for logical, each in found.items():
        file_of[logical] = index.file_of[each.names[each.kind.main]]
        all_files = frozenset(index.file_of[name] for name in each.names.values())
        if len(all_files) > 1:
            others[logical] = all_files
    reader = QuantizedReader(index, files, found, _settings(config))

    def said(name: str) -> Mapping[str, Any]:
        # Of a folder tensors count.
        return config_of(config, name.removesuffix(".weight")) if files.kind == "hub" else config

    declared = {name: StoredTensor(torch.float32, (), *each.kind.declared(said(name))) for name, each in found.items()}
    return replace(index, reader=reader, file_of=file_of, others=others, declared=declared)


class QuantizedReader(WeightReader):
    """A `WeightReader` of the weights `found`, and of the plain ones beside them. It keeps what each weight is."""

    def __init__(self, index: WeightIndex, files: WeightFiles, found: Mapping[str, _Found], settings: Settings) -> None:
        self._index, self._files, self._found, self._settings = index, files, found, settings
        self._inner = index.reader
        self._of_main = {each.names[each.kind.main]: logical for logical, each in found.items()}
        self._used = {name for each in found.values() for name in (*each.names.values(), *each.unread)}
        self._formats: dict[str, Format] = {}
        self._known: dict[Path, Mapping[str, StoredTensor]] = {}

    def tensors(self, path: Path) -> Mapping[str, StoredTensor]:
        if path not in self._known:
            self._known[path] = _Tensors(self, self._inner.tensors(path), self._of_main, self._used)
        return self._known[path]

    def known(self, path: Path) -> Mapping[str, StoredTensor] | None:
        return self.tensors(path) if self._inner.known(path) is not None else None

    def panels(self, path: Path, name: str, rows: range | None = None) -> Panels[torch.Tensor]:
        if name not in self._found:
            return self._inner.panels(path, name, rows)
        found = self.format_of(name)

        def numbers(read: Callable[..., torch.Tensor], inside: range, out: torch.Tensor) -> torch.Tensor:
            return found.coded(read, inside).numbers(out)

        return self._made(name, rows, 4 * found.stored.shape[-1], 4, numbers)

    def coded(self, path: Path, name: str, rows: range | None = None) -> Panels[CodedRows] | None:
        if name not in self._found:
            return None
        found = self.format_of(name)
        return self._made(name, rows, found.stored.shape[-1], 1, found.coded)

    def packed(self, path: Path, name: str, rows: range | None = None) -> Panels[QuantizedTensor]:
        found = self.format_of(name)
        assert found.stored.scheme is not None
        row_nbytes = found.stored.shape[-1] * found.stored.scheme.bits // 8
        return self._made(name, rows, row_nbytes, 1, found.codes)

    def rectangle(
        self,
        path: Path,
        name: str,
        rows: range | None = None,
        columns: range | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Of a plain tensor."""
        return self._inner.rectangle(path, name, rows, columns, out)

    def working_nbytes(self, path: Path) -> int:
        return max(self._inner.working_nbytes(path), rooms_nbytes(_PANEL_PARTS * _PANEL_NBYTES))

    def close(self) -> None:
        self._inner.close()

    def format_of(self, name: str) -> Format:
        """The quantized weight `name`, whose files are here."""
        if name not in self._formats:
            found = self._found[name]
            try:
                parts = {part: self._stored(full) for part, full in found.names.items()}
                self._formats[name] = found.kind.describe(parts, self._reader(name), self._settings)
            except _NOT_ITS_FORMAT as error:
                raise self._misfit(name, error) from None
        return self._formats[name]

    def _misfit(self, name: str, error: Exception) -> CheckpointError:
        names = ", ".join(sorted(self._found[name].names.values()))
        return CheckpointError(
            f"{self._files.name}: {name}: its tensors ({names}) are not what their format has: "
            f"{shortened(error)}; download the checkpoint again, or pass the original one, of 16 or 32 bits"
        )

    def _stored(self, name: str) -> StoredTensor:
        return self._inner.tensors(self._path(name))[name]

    def _path(self, name: str) -> Path:
        return self._files.path(self._index.file_of[name])

    def _reader(self, name: str, out: torch.Tensor | None = None) -> Callable[..., torch.Tensor]:
        """Reads rectangles of the tensors of `name`, those with its codes into `out`."""
        names, main = self._found[name].names, self._found[name].kind.main

        def read(part: str, rows: range | None = None, columns: range | None = None) -> torch.Tensor:
            # Beyond a tensor the file goes on with others.
            for wanted, count in zip((rows, columns), folded(self._stored(names[part]).shape or (1,)), strict=True):
                if wanted is not None and not 0 <= wanted.start <= wanted.stop <= count:
                    raise IndexError(f"expected {names[part]} to have {wanted.stop} rows or columns, found {count}")
            path = self._path(names[part])
            return self._inner.rectangle(path, names[part], rows, columns, out if part == main else None)

        return read

    def _made(
        self, name: str, rows: range | None, row_nbytes: int, times: int, make: Callable[..., Made]
    ) -> Panels[Made]:
        """Panels of these rows as `make` makes them, rows of `row_nbytes` from what is so many times smaller."""
        count, _ = folded(self.format_of(name).stored.shape)
        rows = range(count) if rows is None else rows
        step = max(1, _PANEL_NBYTES // max(1, row_nbytes))
        step = max(step // _PANEL_ROWS * _PANEL_ROWS, min(step, _PANEL_ROWS))
        starts, made_nbytes = range(rows.start, rows.stop, step), round_up(min(step, len(rows)) * row_nbytes, PAGE)

        def made(number: int, room: torch.Tensor) -> Made:
            inside = range(starts[number], min(starts[number] + step, rows.stop))
            try:
                return make(self._reader(name, room[made_nbytes:]), inside, room[:made_nbytes])
            except _NOT_ITS_FORMAT as error:
                raise self._misfit(name, error) from None

        # Of words that hold several rows, some are of those before and behind.
        read_nbytes = (min(step, len(rows)) + _WORD_ROWS) * row_nbytes // times
        return Panels(len(starts), made, made_nbytes + read_nbytes)


class _Tensors(Mapping[str, StoredTensor]):
    """The tensors of a file, quantized weights in place of theirs. What a weight is, is found out when it is asked
    for: its parts may lie in files that are not here yet."""

    def __init__(
        self, reader: QuantizedReader, inner: Mapping[str, StoredTensor], of_main: Mapping[str, str], used: set[str]
    ) -> None:
        self._reader, self._inner = reader, inner
        self._quantized = frozenset(of_main[name] for name in inner if name in of_main)
        self._used = used

    def __getitem__(self, name: str) -> StoredTensor:
        if name in self._quantized:
            return self._reader.format_of(name).stored
        if name in self._used:
            raise KeyError(name)
        return self._inner[name]

    def __iter__(self) -> Iterator[str]:
        yield from self._quantized
        yield from (name for name in self._inner if name not in self._used)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return name in self._quantized or (name in self._inner and name not in self._used)


def _find(names: Collection[str]) -> dict[str, _Found]:
    """The quantized weights among the tensors `names` of a checkpoint, by the names they have in 16 bits."""
    found: dict[str, _Found] = {}
    taken: set[str] = set()
    for kind in KINDS:
        for base in [name.removesuffix(kind.mark) for name in names if name.endswith(kind.mark)]:
            there = {f"{base}{end}": part for end, part in kind.parts.items() if f"{base}{end}" in names}
            parts = {part: name for name, part in there.items() if part}
            if all(part in parts for part in kind.needed) and taken.isdisjoint(parts.values()):
                unread = tuple(name for name, part in there.items() if not part)
                found[f"{base}{kind.name}"] = _Found(kind, parts, unread)
                taken.update(there)
    return found


def _settings(config: Mapping[str, Any]) -> Settings:
    """What config.json says that tensors do not; fields that make no sense are passed over, as tensors will tell."""
    block = config.get("weight_block_size")
    is_block = isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)
    return Settings(
        (block[0], block[1]) if is_block and isinstance(block, list) else Settings.block,
        str(config.get("checkpoint_format")) == "gptq_v2",
    )
