"""A checkpoint as a source of weights: names mapped, shapes checked, tensors read in row panels.

What becomes of a panel, one thread does with it that reads it too (`panels.py`); what is made comes in order.
"""

import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal, NamedTuple

import torch
import xxhash

from tiered.convert.blocks import BlockRecipe, RangeRecipe, TensorRecipe
from tiered.convert.index import Require, WeightIndex
from tiered.convert.names import NameMap
from tiered.convert.panels import Makers, Panels, rooms_nbytes
from tiered.convert.place import WeightFiles
from tiered.convert.quantized import PLAIN, method_of_type, refuse_quantized
from tiered.convert.source import PANEL_NBYTES, Fetching, Packed, StoredTensor, tensor_bytes
from tiered.convert.stored_rows import StoredRows, checked
from tiered.convert.taken import Taken
from tiered.convert.tokenizer import files_beside
from tiered.convert.transposed import transposed_panels, turned
from tiered.errors import CheckpointError
from tiered.quant import GroupScheme, QuantizedTensor, folded

_PIECE_NUMEL: Final = 1 << 20


class Checkpoint:
    """A `WeightSource` over the files of a checkpoint."""

    def __init__(
        self,
        files: WeightFiles,
        index: WeightIndex,
        names: NameMap,
        blocks: Sequence[BlockRecipe],
        claimed_dtype: torch.dtype,
        clip: Literal["mse", "minmax"],
        keeps: bool,
        require: Require,
        made: Mapping[str, bytes] = MappingProxyType({}),
    ) -> None:
        """`blocks` are all block files of the store, `made` the files beside them that are not as the checkpoint has
        them. Whatever is quantized already is to be kept where the conversion `keeps`; else it may be quantized anew.

        Raises CheckpointError where files that are here hold other tensors than `blocks` need (files that would have
        to be read whole are not compared), and what `require` raises for the memory that reading takes.
        """
        self._files, self._index, self._names, self._blocks = files, index, names, blocks
        self._claimed_dtype, self._keeps, self._require = claimed_dtype, keeps, require
        self._made = made
        self.warnings = names.warnings
        self._released: frozenset[str] = frozenset()
        self._line: deque[tuple[_Read, Iterator[_Rows]]] = deque()
        """What is read of the open block, in order, and the rows that are made of it."""
        self._makers = Makers()
        self._made_rows = StoredRows(files.name, clip)
        self.identity: Mapping[str, Any] = {
            "kind": files.kind,
            "name": files.name,
            "revision": files.revision,
            "fingerprint": self._fingerprint(),
        }
        for block in blocks:
            self._check(block)
        require(self._working_nbytes())

    @property
    def taken(self) -> tuple[Taken, ...]:
        return self._made_rows.taken

    def extra_files(self) -> Mapping[str, Callable[[], bytes]]:
        made = {name: partial(bytes, content) for name, content in self._made.items()}
        return {**files_beside(self._files.name, self._files.names, self._files.read), **made}

    def room_nbytes(self, blocks: Sequence[BlockRecipe]) -> Mapping[Path, int]:
        return self._files.room_nbytes(self._files_of(blocks))

    @contextmanager
    def opened(self, blocks: Sequence[BlockRecipe], fetching: Fetching) -> Iterator[Iterator[BlockRecipe]]:
        try:
            yield self._one_by_one(blocks, fetching)
            # Only now: with the last files gone, a resumed conversion could not even list the tensors.
            self._release(self._files_of(self._blocks))
        finally:
            self._makers.close()
            self._line.clear()
            self._made_rows.close()
            self._index.reader.close()

    def dtype(self, tensor: TensorRecipe) -> torch.dtype:
        stored = self._stored(self._names.sources[tensor.name][0])
        return self._claimed_dtype if stored is None else self._plain_dtype(stored)

    def plain(self, part: RangeRecipe) -> Iterator[memoryview]:
        for rows in self._rows_of(part):
            assert isinstance(rows, torch.Tensor)
            # In pieces that are still in the cache when they are hashed, having been copied.
            for piece in rows.view(-1).split(_PIECE_NUMEL):
                yield tensor_bytes(piece)

    def packed(self, part: RangeRecipe) -> Packed:
        tensor, matrix = part.whole, folded(part.shape)
        assert tensor.scheme is not None
        scheme = tensor.scheme
        # One allocation each: small results of every panel, kept between freed buffers, would fragment memory.
        scale = torch.empty(scheme.scale_shape(*matrix), dtype=scheme.scale_dtype)
        zero = torch.empty(scheme.zero_shape(*matrix), dtype=torch.uint8)

        def codes() -> Iterator[memoryview]:
            scales, zeros = tensor_bytes(scale), tensor_bytes(zero)
            done = 0
            for rows in self._rows_of(part):
                assert isinstance(rows, QuantizedTensor)
                # Plain copies: torch would wake its own threads for them.
                for whole, piece in ((scales, rows.scale), (zeros, rows.zero)):
                    row_nbytes = len(whole) // matrix[0]
                    whole[done * row_nbytes : (done + len(piece)) * row_nbytes] = tensor_bytes(piece)
                done += len(rows.q)
                yield tensor_bytes(rows.q)

        return Packed(codes(), [tensor_bytes(scale)], [tensor_bytes(zero)])

    def _one_by_one(self, blocks: Sequence[BlockRecipe], fetching: Fetching) -> Iterator[BlockRecipe]:
        """The blocks, ordered by the last of the files that each needs, so that few files are needed at once.

        Files that no remaining block needs are released on the way.
        """
        ours = self._files_of(self._blocks)
        waiting = sorted(blocks, key=lambda block: max(self._files_of([block]), default=""))  # stable within a file
        while waiting:
            self._release(ours - self._files_of(waiting))
            block = waiting[0]
            files = sorted(self._files_of([block]))
            if not all(self._files.is_here(file) for file in files):
                fetching(block)
                for file in files:
                    self._files.path(file)
                # A file whose format is only known now may have to be read whole.
                self._require(self._working_nbytes())
            self._open(block)
            yield block
            del waiting[0]

    def _open(self, block: BlockRecipe) -> None:
        """Check all tensors of `block`, whose files are here, and make it the open block."""
        for file in sorted(self._files_of([block])):
            self._index.reader.tensors(self._files.path(file))
        self._check(block)
        if block.role == "embed" and self._names.duplicate_head is not None:
            self._check_duplicate_head(self._names.duplicate_head, block.tensors[0].name)
        ranges = [part for unit in block.units(self.dtype) for part in unit.ranges]
        parts = [
            part
            for each in ranges
            for part in (each.whole.records(self.dtype(each.whole)) if each.whole.by_row else (each,))
        ]
        reads = [(read, part.whole) for part in parts for read in self._reads(part)]
        line = self._makers.line([self._rows(read, tensor) for read, tensor in reads])
        self._line = deque(zip((read for read, _ in reads), line, strict=True))

    def _check(self, block: BlockRecipe) -> None:
        """Raise CheckpointError where files that are here hold other shapes or types than `block` needs."""
        wrong: list[str] = []
        for tensor in block.tensors:
            names = self._names.sources[tensor.name]
            shape, dtype = _part_shape(tensor.shape, len(names)), None
            for name in names:
                stored = self._stored(name)
                if stored is None:
                    continue
                refuse_quantized(f"{self._files.name}: {name}", method_of_type(stored.dtype))
                dtype = dtype or self._plain_dtype(stored)
                expected = turned(shape) if self._is_turned(tensor) else shape
                if stored.shape != expected:
                    wrong.append(f"{name} is {list(stored.shape)}, expected {list(expected)}")
                elif stored.dtype not in PLAIN:
                    wrong.append(f"{name} holds {stored.dtype}, expected floating point")
                elif self._differs_from_declared(name, tensor, stored):
                    wrong.append(self._difference(name, tensor, stored))
                elif self._plain_dtype(stored) != dtype:
                    wrong.append(f"{name} holds {stored.dtype}, others of {tensor.name} {dtype}")
        if wrong:
            raise CheckpointError(
                f"{self._files.name}: {len(wrong)} tensors of {block.name} are not what config.json describes: "
                f"{'; '.join(wrong[:5])}{'; …' if len(wrong) > 5 else ''}"
            )

    def _differs_from_declared(self, name: str, tensor: TensorRecipe, stored: StoredTensor) -> bool:
        """Whether `tensor` was to be kept as config.json says of it before its files came, they say otherwise, and it
        cannot be quantized anew: that would lose what was to be kept, or values are not known for sure where
        config.json is wrong, or the scheme is one of checkpoints, whose codes are not made here."""
        declared = self._index.declared.get(name)
        was_believed = self._files.kind == "hub" and declared is not None and declared.scheme == tensor.scheme
        if not was_believed or tensor.scheme is None or stored.scheme == tensor.scheme:
            return False
        return self._keeps or not stored.is_certain or not isinstance(tensor.scheme, GroupScheme)

    def _difference(self, name: str, tensor: TensorRecipe, stored: StoredTensor) -> str:
        """What differs from what config.json says, and what to do."""
        assert tensor.scheme is not None
        found = "in no scheme of a store" if stored.scheme is None else stored.scheme.name
        advice = "download all and convert the folder, where tensors count"
        if not stored.is_certain:
            advice += "; it cannot be quantized anew, as its zeros are stored by a rule that only config.json tells"
        elif self._keeps:
            advice += ", or pass --quant int4 or int8, which quantizes it anew"
        return f"{name} is {found}, expected {tensor.scheme.name} by what quantization_config says of it ({advice})"

    def _release(self, files: frozenset[str]) -> None:
        """Release `files`, which no block needs any more."""
        if files - self._released:
            self._index.reader.close()  # an open file would go on taking its space
        for name in sorted(files - self._released):
            self._files.release(name)
        self._released |= files

    def _working_nbytes(self) -> int:
        """Bytes of memory that reading the files that are here takes at most."""
        here = [self._files.path(name) for name in self._index.files if self._files.is_here(name)]
        reading = max((self._index.reader.working_nbytes(path) for path in here), default=0)
        # Of these a panel is there twice, as a strip of columns too.
        strips = (
            min(PANEL_NBYTES, math.prod(tensor.shape[-2:]) * self.dtype(tensor).itemsize)
            for block in self._blocks
            for tensor in block.tensors
            if self._is_turned(tensor)
        )
        return reading + rooms_nbytes(max(strips, default=0))

    def _files_of(self, blocks: Iterable[BlockRecipe]) -> frozenset[str]:
        """The weight files that the blocks are read from."""
        names = [name for block in blocks for name in self._checkpoint_names(block)]
        return frozenset(file for name in names for file in self._index.files_of(name))

    def _checkpoint_names(self, block: BlockRecipe) -> list[str]:
        names = [name for tensor in block.tensors for name in self._names.sources[tensor.name]]
        if block.role == "embed" and self._names.duplicate_head is not None:
            names.append(self._names.duplicate_head)
        return names

    def _stored(self, name: str) -> StoredTensor | None:
        """A tensor's type and shape; None where its file would have to be fetched, or read whole, to know them."""
        file = self._index.file_of[name]
        if not self._files.is_here(file):
            return None
        path = self._files.path(file)
        tensors = self._index.reader.known(path)
        if tensors is not None and name not in tensors:
            raise CheckpointError(f"{path}: lacks tensor {name}, which the checkpoint's index places there")
        return None if tensors is None else tensors[name]

    def _is_turned(self, tensor: TensorRecipe) -> bool:
        """Whether the checkpoint has the tensor transposed. What is put together from several are linear layers'."""
        names = self._names.sources[tensor.name]
        if not tensor.is_transposed or len(names) > 1:
            return False
        stored = self._stored(names[0])
        return stored is None or stored.method is None

    def _reads(self, part: RangeRecipe) -> list["_Read"]:
        """Where the rows of `part` are: its tensor may be the rows of several, of equal size, one after the other."""
        names = self._names.sources[part.whole.name]
        if self._is_turned(part.whole):
            return [_Read(names[0], None if part.number is None else part.rows, is_turned=True)]
        if part.number is None:
            return [_Read(name, None, self._has_codes(name, part.whole)) for name in names]
        each = part.whole.matrix[0] // len(names)
        return [
            _Read(
                names[index],
                range(max(part.start - index * each, 0), min(part.stop - index * each, each)),
                self._has_codes(names[index], part.whole),
            )
            for index in range(part.start // each, -(-part.stop // each))
        ]

    def _has_codes(self, name: str, tensor: TensorRecipe) -> bool:
        """Whether the checkpoint has the very codes of `tensor`, of which `name` is a part, that the store is to
        hold."""
        stored = self._stored(name)
        return tensor.scheme is not None and stored is not None and stored.scheme == tensor.scheme

    def _method(self, tensor: TensorRecipe) -> str | None:
        """How the checkpoint quantizes `tensor`, whose files are here; None where it does not."""
        stored = (self._stored(name) for name in self._names.sources[tensor.name])
        return next((found.method for found in stored if found is not None and found.method), None)

    def _plain_dtype(self, stored: StoredTensor) -> torch.dtype:
        """The dtype of `stored` where it is not quantized in the store."""
        return stored.dtype if stored.method is None else self._claimed_dtype

    def _rows_of(self, part: RangeRecipe) -> Iterator["_Rows"]:
        """The rows of `part` as the store holds them, in order."""
        for read in self._reads(part):
            if self._line and self._line[0][0] == read:
                yield from self._line.popleft()[1]
            else:
                (made,) = self._makers.line([self._rows(read, part.whole)])
                yield from made

    def _rows(self, read: "_Read", tensor: TensorRecipe) -> "Panels[_Rows]":
        """How rows of `tensor` are made from what is read."""
        method, dtype = self._method(tensor), self.dtype(tensor)
        if read.is_packed:
            assert method is not None
            packed = self._index.reader.packed(self._path(read), read.name, read.rows)
            return packed.then(lambda panel, _: self._made_rows.taken_over(panel, tensor, method))
        if tensor.scheme is not None:
            quantized = partial(self._made_rows.quantized, tensor=tensor, method=method)
            coded = self._index.reader.coded(self._path(read), read.name, read.rows)
            # Codes, scales and zeros are at most three quarters of numbers in 16 bits, and of codes before and after
            # they are put in order.
            if coded is not None:
                return coded.then(quantized, coded.nbytes * 3 // 4)
            panels = self._panels(read)
            return panels.then(quantized, panels.nbytes * 3 // 4)
        panels = self._panels(read)
        if method is not None:
            return panels.then(
                partial(self._made_rows.rounded, tensor=tensor, method=method, dtype=dtype), panels.nbytes
            )
        return panels.then(lambda panel, _: checked(panel, tensor.name))

    def _panels(self, read: "_Read") -> Panels[torch.Tensor]:
        panels_of = partial(transposed_panels, self._index.reader) if read.is_turned else self._index.reader.panels
        return panels_of(self._path(read), read.name, read.rows)

    def _path(self, read: "_Read") -> Path:
        return self._files.path(self._index.file_of[read.name])

    def _check_duplicate_head(self, head: str, embed: str) -> None:
        """Raise CheckpointError unless `head`, the stored copy of a tied head, equals the embedding `embed`."""
        (embedding,) = self._names.sources[embed]
        same = self._stored(head) == self._stored(embedding)
        if same:
            pairs = zip(self._panels(_Read(embedding)), self._panels(_Read(head)), strict=True)
            same = all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)
        if not same:
            raise CheckpointError(
                f"{self._files.name}: config.json ties the output projection to the embedding, but {head} differs from "
                f"{embedding}; set tie_word_embeddings to false in config.json if the projection is meant to be used"
            )

    def _fingerprint(self) -> str:
        """A digest of the weight files, of which file holds each tensor, and of the files that are copied."""
        digest = xxhash.xxh3_128(self._files.fingerprint(self._index.files).encode())
        digest.update(json.dumps(sorted(self._index.file_of.items())).encode())
        for name, read in sorted(self.extra_files().items()):
            digest.update(name.encode() + b"\0" + read())
        return digest.hexdigest()


_Rows = torch.Tensor | QuantizedTensor
"""Rows as the store holds them."""


class _Read(NamedTuple):
    """A tensor of the checkpoint, or some rows of it."""

    name: str
    rows: range | None = None
    is_packed: bool = False
    """As the codes that the checkpoint has, rather than as numbers."""
    is_turned: bool = False
    """The checkpoint has its columns as rows."""


def _part_shape(shape: tuple[int, ...], count: int) -> tuple[int, ...]:
    """The shape of each of `count` equal tensors whose rows, one after the other, make up a tensor of `shape`."""
    if count == 1:
        return shape
    rows, in_features = folded(shape)
    return rows // count, in_features
