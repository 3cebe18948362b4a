"""OPT checkpoints of any size that lie nowhere: the bytes of their files are made when they are read.

In: a configuration. Out: files by name, in two forms: metaseq's shards as `tools.opt_forms` writes them, and Hugging
Face's safetensors. Both hold the same model. Only what is around the tensors exists (headers, pickles, directories of
zips); values come from one block of random numbers that is repeated, beginning elsewhere for each tensor. Called by
`tools.fuse_checkpoint` and `tools.hub_stand_in`; by itself it writes the second form to a disk:

    python -m tools.made_checkpoint configs/models/opt-2.7b.toml FOLDER
"""

import argparse
import json
import struct
import sys
import tempfile
import zipfile
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import lcm, prod
from pathlib import Path
from typing import Any, Final, NamedTuple, Self
from zlib import crc32

import numpy as np
import torch
from torch.serialization import skip_data
from transformers import AutoModelForCausalLM, PretrainedConfig

from tiered.arch import text_config
from tiered.convert.synthetic import ShapeFile
from tiered.errors import ConfigError, TieredError, named
from tools.opt_forms import flattened, fsdp_shard, metaseq_names, part_rules, part_tensors, save_checkpoint

MOST_READ_NBYTES: Final = 1 << 20
"""Up to this many bytes of a tensor are read without a copy."""
SPREAD: Final = 0.02
_LEAST_PERIOD: Final = 2_000_000
_ITEM: Final = 2
"""Bytes of a value in float16."""
_LOCAL_HEADER: Final = struct.Struct("<26xHH")
"""Of a file in a zip: how long its name and further fields are."""
_SHARD_NBYTES: Final = 2_000_000_000
_WRITTEN_NBYTES: Final = 64 << 20
_ROOT: Final = "checkpoint_last-model_part-{}-shard{}"


class Span(NamedTuple):
    """Bytes that begin at byte `phase` of what repeats every `period` bytes."""

    nbytes: int
    data: memoryview
    """A period, and MOST_READ_NBYTES of the next ones unless this span ends before."""
    period: int
    phase: int = 0

    @classmethod
    def of(cls, data: bytes) -> "Span":
        """`data` once."""
        return cls(len(data), memoryview(data), max(1, len(data)))

    def pieces(self) -> Iterator[memoryview]:
        for done in range(0, self.nbytes, MOST_READ_NBYTES):
            at = (self.phase + done) % self.period
            yield self.data[at : at + min(MOST_READ_NBYTES, self.nbytes - done)]


class MadeFile:
    """A file that is made when it is read."""

    def __init__(self, spans: Iterable[Span]) -> None:
        self._spans = [span for span in spans if span.nbytes]
        self._stops = list(accumulate(span.nbytes for span in self._spans))
        self.nbytes = self._stops[-1] if self._stops else 0

    @classmethod
    def of(cls, data: bytes) -> Self:
        """A file that is there."""
        return cls([Span.of(data)])

    def read(self, offset: int, nbytes: int) -> bytes | memoryview:
        """`nbytes` from `offset` on; fewer where the file ends before."""
        pieces = [piece for span in self.cut(offset, nbytes) for piece in span.pieces()]
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def cut(self, offset: int, nbytes: int) -> Iterator[Span]:
        """The spans of `nbytes` from `offset` on, as far as there are so many."""
        for index in range(bisect_right(self._stops, offset), len(self._spans)):
            span, stop = self._spans[index], self._stops[index]
            skipped = offset - (stop - span.nbytes)
            taken = min(span.nbytes - skipped, nbytes)
            if taken <= 0:
                return
            yield span._replace(nbytes=taken, phase=span.phase + skipped)
            offset, nbytes = offset + taken, nbytes - taken


class Values:
    """The values of all tensors of a model: blocks of random numbers that repeat."""

    def __init__(self, widths: Iterable[int]) -> None:
        """`widths`: the lengths of rows of which parts have some columns."""
        # Whole rows of each width, and an odd number of them, so that parts of a tensor do not begin alike.
        unit = lcm(*widths)
        count = unit * (_LEAST_PERIOD // unit | 1)
        self._values = (np.random.default_rng(0).standard_normal(count, np.float32) * SPREAD).astype(np.float16)
        self._all = _repeated(self._values)
        self._columns: dict[tuple[int, int, int], memoryview] = {}

    def span(self, name: str, shape: Sequence[int], dim: int | None, part: int, parts: int) -> Span:
        """What part `part` of `parts`, which share it along `dim`, has of the tensor `name`."""
        nbytes, period = _ITEM * prod(shape), self._values.nbytes
        width = shape[-1] if len(shape) > 1 else 1
        first = _ITEM * width * (crc32(name.encode()) % (len(self._values) // width))
        if dim is None:
            return Span(nbytes, self._all, period, first)
        mine = nbytes // parts
        if dim == 0:
            return Span(mine, self._all, period, first + part * mine)
        key = (width, part, parts)
        if key not in self._columns:
            self._columns[key] = _repeated(np.split(self._values.reshape(-1, width), parts, axis=1)[part])
        return Span(mine, self._columns[key], period // parts, first // parts)


class MadeModel:
    """An OPT model whose tensors have values as soon as they are read."""

    def __init__(self, config: PretrainedConfig) -> None:
        config.dtype = torch.float16
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
        self._config = json.loads(model.config.to_json_string())
        self._state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
        self._tensors = dict(metaseq_names(self._state))
        self._rules = {name: (sources, dim) for name, sources, dim in part_rules(self._tensors)}
        self._values = Values(self._tensors[one].shape[1] for (one, *_), dim in self._rules.values() if dim == 1)

    @classmethod
    def of_shape(cls, shape: ShapeFile, layers: int | None = None) -> Self:
        """A model of `shape`, with so many `layers` where a number is given; raises ConfigError for other families."""
        if shape.config.get("model_type") != "opt":
            raise ConfigError(f"{shape.name}: model_type {shape.config.get('model_type')!r}, expected 'opt'")
        return cls(text_config({**shape.config, **({} if layers is None else {"num_hidden_layers": layers})}))

    def raw(self, parts: int, shards: int) -> dict[str, MadeFile]:
        """The files of `parts` model-parallel parts of `shards` shards each, as metaseq's training leaves them."""
        modules = flattened(OrderedDict(part_tensors(self._tensors, 0, parts)))  # of the same shapes in all parts
        made: dict[tuple[int, ...], _Skeleton] = {}
        files: dict[str, MadeFile] = {}
        for part in range(parts):
            vectors = [MadeFile(self._vector(path, own, part, parts)) for path, (own, _) in modules.items()]
            for shard in range(shards):
                root = _ROOT.format(part, shard)
                held = [_slice(vector.nbytes, shard, shards) for vector in vectors]
                key = (len(root), *(nbytes for _, nbytes, _ in held))  # all in which files differ, but for their names
                if key not in made:
                    made[key] = _Skeleton.of(root, fsdp_shard(modules, shard, shards))
                slices = [
                    [*vector.cut(offset, nbytes), Span.of(bytes(padding))]
                    for vector, (offset, nbytes, padding) in zip(vectors, held, strict=True)
                ]
                files[f"{root}.pt"] = MadeFile(made[key].filled(root, slices))
        return files

    def huggingface(self, shard_nbytes: int) -> dict[str, MadeFile]:
        """config.json, and safetensors files of at most `shard_nbytes`, or of one tensor, with their index."""
        shards: list[list[tuple[str, str]]] = [[]]
        room = shard_nbytes
        for pair in zip(self._state, self._tensors, strict=True):
            nbytes = _ITEM * self._state[pair[0]].numel()
            if shards[-1] and nbytes > room:
                shards.append([])
                room = shard_nbytes
            shards[-1].append(pair)
            room -= nbytes
        names = [f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))]
        index = {
            "metadata": {"total_size": _ITEM * sum(tensor.numel() for tensor in self._state.values())},
            "weight_map": {name: file for file, shard in zip(names, shards, strict=True) for name, _ in shard},
        }
        return {
            **{name: MadeFile(self._safetensors(shard)) for name, shard in zip(names, shards, strict=True)},
            "model.safetensors.index.json": MadeFile.of(json.dumps(index).encode()),
            "config.json": MadeFile.of(json.dumps(self._config).encode()),
        }

    def shape(self, name: str) -> MadeFile:
        """A toml file of the model's shape, by which `tiered convert` is told how many heads it has."""
        fields = {key: value for key, value in self._config.items() if isinstance(value, bool | int | float | str)}
        lines = (f"{key} = {json.dumps(value)}\n" for key, value in fields.items())
        return MadeFile.of(f'name = "{name}"\n[config]\n{"".join(lines)}'.encode())

    def _vector(self, path: str, names: Iterable[str], part: int, parts: int) -> Iterator[Span]:
        """The parameters `names` of the module `path`, which are flattened into one vector."""
        for name in names:
            sources, dim = self._rules[".".join(filter(None, (path, name)))]
            for source in sources:
                yield self._values.span(source, self._tensors[source].shape, dim, part, parts)

    def _safetensors(self, shard: Iterable[tuple[str, str]]) -> Iterator[Span]:
        """A file with the tensors of which these are Hugging Face's and metaseq's names."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        spans = []
        end = 0
        for name, source in shard:
            shape = list(self._state[name].shape)
            spans.append(self._values.span(source, shape, None, 0, 1))
            end += spans[-1].nbytes
            header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [end - spans[-1].nbytes, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return iter([Span.of(len(text).to_bytes(8, "little") + text), *spans])


@dataclass(frozen=True)
class _Skeleton:
    """What a shard's file has around the slices of its vectors."""

    root: str
    """The file's name, which is in it as well."""
    around: tuple[bytes, ...]
    """Before the first slice, between the slices, and after the last."""

    @classmethod
    def of(cls, root: str, checkpoint: Mapping[str, Any]) -> "_Skeleton":
        """As torch saves `checkpoint`, in which the slices are on the meta device, to a file called `root`."""
        model: Mapping[str, torch.Tensor] = checkpoint["model"]
        # In memory that nobody touches: only where values would be is asked for.
        empty = OrderedDict((name, torch.empty_like(value, device="cpu")) for name, value in model.items())
        around, done = [b""], 0
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, f"{root}.pt")
            with skip_data():
                save_checkpoint({**checkpoint, "model": empty}, path, legacy=False)
            with zipfile.ZipFile(path) as zipped, path.open("rb") as file:
                for number, tensor in enumerate(model.values()):
                    entry = zipped.getinfo(f"{root}/data/{number}")
                    file.seek(entry.header_offset)
                    start = file.tell() + _LOCAL_HEADER.size + sum(_LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size)))
                    file.seek(done)
                    around[-1] += file.read(start - done)
                    if tensor.is_meta:
                        around.append(b"")
                    else:
                        around[-1] += tensor.numpy().tobytes()
                    done = start + entry.file_size
                file.seek(done)
                around[-1] += file.read()
        return cls(root, tuple(around))

    def filled(self, root: str, slices: Iterable[Iterable[Span]]) -> Iterator[Span]:
        """The file called `root`, a name of the same length, with these slices."""
        texts = [Span.of(text.replace(self.root.encode(), root.encode())) for text in self.around]
        for text, spans in zip(texts, slices, strict=False):
            yield text
            yield from spans
        yield texts[-1]


def _slice(nbytes: int, shard: int, shards: int) -> tuple[int, int, int]:
    """(offset, bytes, bytes of padding) of what `shard` of `shards` has of a vector of `nbytes`."""
    each = _ITEM * -(-nbytes // (_ITEM * shards))
    mine = max(0, min(each, nbytes - shard * each))
    return shard * each, mine, each - mine


def _repeated(values: np.ndarray[Any, np.dtype[np.float16]]) -> memoryview:
    """The bytes of `values` and, so that a read need not be put together, of their next periods."""
    period = values.tobytes()
    return memoryview(period * (1 + -(-MOST_READ_NBYTES // len(period))))


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Write such a checkpoint of an OPT shape in Hugging Face's form.")
    parser.add_argument("shape", type=Path, help="a file of configs/models, such as configs/models/opt-2.7b.toml")
    parser.add_argument("folder", type=Path, help="the folder to make, or an empty one")
    options = parser.parse_args(arguments)
    try:
        files = MadeModel.of_shape(ShapeFile.read(options.shape)).huggingface(_SHARD_NBYTES)
        _write(files, options.folder)
    except TieredError as error:
        print(f"made_checkpoint: error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _write(files: Mapping[str, MadeFile], folder: Path) -> None:
    """Write `files` into `folder`. Raises ConfigError where it has something in it, TieredError where writing fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if next(folder.iterdir(), None) is not None:
            raise ConfigError(f"{folder}: expected an empty folder, or none; name another, or delete it")
        # What says that there is a model comes last.
        for name in sorted(files, reverse=True):
            with (folder / name).open("wb") as file:
                for offset in range(0, files[name].nbytes, _WRITTEN_NBYTES):
                    file.write(files[name].read(offset, _WRITTEN_NBYTES))
    except OSError as error:
        raise TieredError(f"{folder}: {named(error)}") from error


if __name__ == "__main__":
    sys.exit(main())
