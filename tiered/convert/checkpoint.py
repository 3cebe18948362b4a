"""A Hugging Face checkpoint as a source of weights: names mapped, shapes checked, tensors read in row panels."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import pairwise
from typing import Any, Final, Literal

import torch
import xxhash

from tiered.convert.index import WeightIndex
from tiered.convert.names import NameMap
from tiered.convert.quantized import PLAIN, already_quantized, method_of_type
from tiered.convert.recipe import BlockRecipe, TensorRecipe
from tiered.convert.source import Packed, StoredTensor, WeightFiles, tensor_bytes
from tiered.convert.workers import Quantizers, one_torch_thread
from tiered.errors import CheckpointError
from tiered.files import read_whole
from tiered.quant import folded
from tiered.store.beside import COPIED

_PIECE_NUMEL: Final = 1 << 20
_GREATEST: Final = torch.finfo(torch.bfloat16).max


class Checkpoint:
    """A `WeightSource` over the files of a checkpoint."""

    synthetic = False

    def __init__(
        self,
        files: WeightFiles,
        index: WeightIndex,
        names: NameMap,
        embed_name: str,
        claimed_dtype: torch.dtype,
        clip: Literal["mse", "minmax"],
    ) -> None:
        self._files, self._index, self._names, self._clip = files, index, names, clip
        self._embed_name, self._claimed_dtype = embed_name, claimed_dtype
        self._released: frozenset[str] = frozenset()
        self._following: dict[str, str] = {}
        """Checkpoint name -> the one that will be read next, in the open block."""
        self._begun: dict[str, Iterator[torch.Tensor]] = {}
        """Panels of the tensor that follows, whose first may already be on its way."""
        self._quantizers = Quantizers()
        self._identity = {
            "kind": files.kind,
            "name": files.name,
            "revision": files.revision,
            "fingerprint": self._fingerprint(),
        }

    @property
    def identity(self) -> Mapping[str, Any]:
        return self._identity

    @property
    def warnings(self) -> tuple[str, ...]:
        return self._names.warnings

    def extra_files(self) -> Mapping[str, Callable[[], bytes]]:
        return {name: partial(self._read_small, name) for name in COPIED if name in self._files.names}

    def files_of(self, block: BlockRecipe) -> frozenset[str]:
        return frozenset(self._index.file_of[name] for name in self._checkpoint_names(block))

    def check(self, block: BlockRecipe) -> None:
        wrong: list[str] = []
        for tensor in block.tensors:
            names = self._names.sources[tensor.name]
            shape, dtype = _part_shape(tensor.shape, len(names)), None
            for name in names:
                stored = self._stored(name)
                if stored is None:
                    continue
                method = method_of_type(stored.dtype)
                if method is not None:
                    raise already_quantized(f"{self._files.name}: {name}", method)
                dtype = dtype or stored.dtype
                if stored.shape != shape:
                    wrong.append(f"{name} is {list(stored.shape)}, expected {list(shape)}")
                elif stored.dtype not in PLAIN:
                    wrong.append(f"{name} holds {stored.dtype}, expected floating point")
                elif stored.dtype != dtype:
                    wrong.append(f"{name} holds {stored.dtype}, others of {tensor.name} {dtype}")
        if wrong:
            raise CheckpointError(
                f"{self._files.name}: {len(wrong)} tensors of {block.name} are not what config.json describes: "
                f"{'; '.join(wrong[:5])}{'; …' if len(wrong) > 5 else ''}"
            )

    def fetch(self, block: BlockRecipe) -> None:
        for file in sorted(self.files_of(block)):
            self._files.path(file)

    def open_block(self, block: BlockRecipe) -> None:
        for file in sorted(self.files_of(block)):
            self._index.reader.tensors(self._files.path(file))
        self.check(block)
        if block.role == "embed" and self._names.duplicate_head is not None:
            self._check_duplicate_head(self._names.duplicate_head)
        self._begun.clear()
        names = [name for tensor in block.tensors for name in self._names.sources[tensor.name]]
        self._following = dict(pairwise(names))

    def dtype(self, tensor: TensorRecipe) -> torch.dtype:
        stored = self._stored(self._names.sources[tensor.name][0])
        return self._claimed_dtype if stored is None else stored.dtype

    def plain(self, tensor: TensorRecipe) -> Iterator[memoryview]:
        for panel in self._panels(self._names.sources[tensor.name]):
            # In pieces that are mostly still in the cache when they are copied and hashed.
            for piece in panel.view(-1).split(_PIECE_NUMEL):
                _check_finite(piece, tensor.name)
                yield tensor_bytes(piece)

    def packed(self, tensor: TensorRecipe) -> Packed:
        assert tensor.scheme is not None
        scheme = tensor.scheme
        # In one piece each: what is left of every panel, between what is freed again, would leave memory full of holes.
        scale = torch.empty(scheme.scale_shape(*tensor.matrix), dtype=torch.float16)
        zero = torch.empty(scheme.zero_shape(*tensor.matrix), dtype=torch.uint8)

        def codes() -> Iterator[memoryview]:
            scales, zeros = tensor_bytes(scale), tensor_bytes(zero)
            done = 0
            for panel in self._panels(self._names.sources[tensor.name]):
                for part in self._quantizers.quantize(panel, scheme, self._clip, f"{self._files.name}: {tensor.name}"):
                    # Plain copies: torch would wake its own threads for them.
                    count = part.zero.nbytes
                    scales[2 * done : 2 * (done + count)] = tensor_bytes(part.scale)
                    zeros[done : done + count] = tensor_bytes(part.zero)
                    done += count
                    yield tensor_bytes(part.q)

        return Packed(codes(), [tensor_bytes(scale)], [tensor_bytes(zero)])

    def release(self, files: frozenset[str]) -> None:
        if files - self._released:
            self._index.reader.close()  # an open file would go on taking its space
        for name in sorted(files - self._released):
            self._files.release(name)
        self._released |= files

    def fetch_nbytes(self, blocks: Iterable[BlockRecipe]) -> tuple[int, ...]:
        needed = frozenset().union(*(self.files_of(block) for block in blocks))
        return tuple(self._files.nbytes(name) or 1 for name in sorted(needed) if not self._files.is_here(name))

    def working_nbytes(self) -> int:
        here = [self._files.path(name) for name in self._index.files if self._files.is_here(name)]
        return max((self._index.reader.working_nbytes(path) for path in here), default=0)

    def close(self) -> None:
        self._begun.clear()
        self._quantizers.close()
        self._index.reader.close()

    def _checkpoint_names(self, block: BlockRecipe) -> list[str]:
        names = [name for tensor in block.tensors for name in self._names.sources[tensor.name]]
        if block.role == "embed" and self._names.duplicate_head is not None:
            names.append(self._names.duplicate_head)
        return names

    def _stored(self, name: str) -> StoredTensor | None:
        """What the file says of a tensor; None where asking would mean fetching it or reading it all."""
        file = self._index.file_of[name]
        if not self._files.is_here(file):
            return None
        path = self._files.path(file)
        tensors = self._index.reader.known(path)
        if tensors is not None and name not in tensors:
            raise CheckpointError(f"{path}: lacks tensor {name}, which the checkpoint's index places there")
        return None if tensors is None else tensors[name]

    def _panels(self, names: Iterable[str]) -> Iterator[torch.Tensor]:
        """The rows of these tensors, one tensor after the other."""
        for name in names:
            panels = self._begun.pop(name, None) or self._begin(name)
            following = self._following.get(name)
            if following is not None and following not in self._begun:
                self._begun[following] = self._begin(following)
            yield from panels

    def _begin(self, name: str) -> Iterator[torch.Tensor]:
        return self._index.reader.panels(self._files.path(self._index.file_of[name]), name)

    def _check_duplicate_head(self, head: str) -> None:
        """A tied head that is also stored must be the embedding, or the model would be another than it says."""
        (embedding,) = self._names.sources[self._embed_name]
        same = self._stored(head) == self._stored(embedding)
        if same:
            pairs = zip(self._panels([embedding]), self._panels([head]), strict=True)
            same = all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)
        if not same:
            raise CheckpointError(
                f"{self._files.name}: config.json ties the output projection to the embedding, but {head} differs from "
                f"{embedding}; set tie_word_embeddings to false in config.json if the projection is meant to be used"
            )

    def _read_small(self, name: str) -> bytes:
        return read_whole(self._files.path(name), CheckpointError)

    def _fingerprint(self) -> str:
        """Of the weight files, the tensors' places, and what is copied."""
        digest = xxhash.xxh3_128(self._files.fingerprint(self._index.files).encode())
        digest.update(json.dumps(sorted(self._index.file_of.items())).encode())
        for name, read in sorted(self.extra_files().items()):
            digest.update(name.encode() + b"\0" + read())
        return digest.hexdigest()


def _check_finite(values: torch.Tensor, name: str) -> None:
    """Raise CheckpointError where one of `values` is not finite, or would not be in the types that runs compute in.

    The quantizer tests what it quantizes itself.
    """
    if not values.numel():
        return
    with one_torch_thread():
        low, high = (float(end) for end in values.aminmax())  # NaN where there is one
    if max(abs(low), abs(high)) <= _GREATEST:
        return
    bad = int((~(values.abs() <= _GREATEST)).sum())
    raise CheckpointError(
        f"{name}: expected finite weights, found {bad:,} among {values.numel():,} that are NaN, infinite or beyond "
        "what bfloat16 holds; check the source checkpoint"
    )


def _part_shape(shape: tuple[int, ...], count: int) -> tuple[int, ...]:
    """The shape of each of the `count` tensors whose rows make up one of `shape`."""
    rows, in_features = folded(shape)
    return shape if count == 1 else (rows // count, in_features)
