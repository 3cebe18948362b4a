"""Checkpoints as metaseq writes them: `NAME[-model_part-P][-shardS].pt`, whatever is left out.

In: a folder's files. Out: for each model-parallel part, its tensors by metaseq's names and where in which files they
lie, which `opt.py` puts together. A part is one file with its tensors, or, as its training has left it (fairscale's
FSDP), a file for each shard: all parameters of a layer are flattened into one vector, which is padded and cut into as
many equal slices as there are shards. Missing, extra, doubled and truncated files are found here.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from math import prod
from pathlib import Path
from typing import Any, Final

import xxhash

from tiered.convert.gather import Extent, Region, cut
from tiered.convert.place import WeightFiles
from tiered.convert.torch_file import TorchTensor, load_torch_file
from tiered.errors import SHOWN, CheckpointError, some
from tiered.files import reading

_NAME: Final = re.compile(r"(?P<series>.+?)(?:-model_part-(?P<part>\d{1,9}))?(?:-shard(?P<shard>\d{1,9}))?\.pt")
_FLAT: Final = re.compile(r"(?:^|\.)flat_param_\d+$")
_WRAPPERS: Final = re.compile(r"\b(?:_fsdp_wrapped_module|_fpw_module)\.")
"""Modules of the training program within the names of parameters."""
_OUT: Final = "decoder.layers.0.self_attn.out_proj.weight"
"""[hidden, hidden / parts]"""
_SPLIT: Final = re.compile(r"(embed_tokens|qkv_proj|fc1|fc2)\.weight$")
"""Weights of which no two files hold the same values."""
_SAMPLES: Final = 8
_SAMPLE_NBYTES: Final = 4096


@dataclass(frozen=True)
class Series:
    """The files of one checkpoint: NAME, and which of the two numbers their names have."""

    name: str
    has_part: bool
    has_shard: bool
    files: Mapping[tuple[int, int], str]
    """(part, shard) -> file."""

    @property
    def counts(self) -> tuple[int, int]:
        """How many parts and shards there are, going by the largest numbers."""
        return max(part for part, _ in self.files) + 1, max(shard for _, shard in self.files) + 1

    def file(self, part: int, shard: int) -> str:
        """What the file of a part and shard is called, whether or not it is there."""
        numbers = (f"-model_part-{part}" * self.has_part, f"-shard{shard}" * self.has_shard)
        return self.files.get((part, shard), f"{self.name}{''.join(numbers)}.pt")

    def whole(self, where: str, parts: int, shards: int) -> None:
        """Raise CheckpointError where files are missing, or extra, if there are so many parts and shards of each."""
        extra = sorted(number for number in self.files if number[0] >= parts or number[1] >= shards)
        # One by one: a number in a name may be of any size.
        every = ((part, shard) for part in range(parts) for shard in range(shards))
        missing = (number for number in every if number not in self.files)
        count = parts * shards - len(self.files) + len(extra)
        if count or extra:
            what = "lacks some of" if count else "has more than"
            found = [self.file(*number) for number in (islice(missing, SHOWN) if count else extra)]
            raise CheckpointError(
                f"{where}: {what} the {parts * shards} files of {parts} parts x {shards} shards that belong together: "
                f"{some(found, count)}; {'put them there' if count else 'remove them'}"
            )


def find_series(files: WeightFiles, only: str | None) -> Series | None:
    """The checkpoint among `files` that `only`, one of its files, belongs to, or the only one; None where there is
    none. Raises CheckpointError where there are several, or files are missing."""
    found: dict[tuple[str, bool, bool], dict[tuple[int, int], str]] = defaultdict(dict)
    for name in sorted(files.names):
        match = _NAME.fullmatch(name)
        if match is None:
            continue
        series = found[match["series"], match["part"] is not None, match["shard"] is not None]
        other = series.setdefault((int(match["part"] or 0), int(match["shard"] or 0)), name)
        if other != name:
            raise CheckpointError(f"{files.name}: {other} and {name} have the same number; remove one of them")
    every = [Series(*key, series) for key, series in found.items()]
    chosen = [series for series in every if only is None or only in series.files.values()]
    if len(chosen) > 1:
        kinds = [f"{min(series.files.values())} ({len(series.files)} files)" for series in every]
        raise CheckpointError(
            f"{files.name}: holds several checkpoints: {some(kinds)}; remove the files that do not belong to the "
            "model, or pass a file of the one that is meant in place of the folder"
        )
    if not chosen:
        return None
    chosen[0].whole(files.name, *chosen[0].counts)
    return chosen[0]


def read_series(files: WeightFiles, series: Series) -> list[dict[str, Region]]:
    """The tensors of each part, by metaseq's names."""
    parts: list[dict[str, Region]] = []
    every: list[_Shard] = []
    for part in range(series.counts[0]):
        for shard in range(series.counts[1]):
            every.append(_Shard.read(files.path(series.file(part, shard))).sharing(every[:1]))
        parts.append(_whole_part(files, series, part, every[-series.counts[1] :]))
        out = parts[0].get(_OUT)
        if not part and out is not None and len(out.shape) == 2 and out.shape[1]:
            series.whole(files.name, out.shape[0] // out.shape[1], series.counts[1])
    _check_doubled(parts, every)
    return parts


@dataclass(frozen=True)
class _Vector:
    """Parameters that are flattened into one vector, as a shard's metadata tells."""

    key: str
    """What the vector is called."""
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    padding: int
    """Values at the end of this shard's slice that are none."""

    @property
    def parameters(self) -> tuple[object, ...]:
        """What all shards must agree on."""
        return self.key, self.names, self.shapes


@dataclass(frozen=True)
class _Shard:
    """What one file holds."""

    path: Path
    tensors: Mapping[str, Region]
    vectors: tuple[_Vector, ...]

    @classmethod
    def read(cls, path: Path) -> "_Shard":
        loaded = load_torch_file(path)
        model = loaded.get("model", loaded) if isinstance(loaded, dict) else None
        found = model.items() if isinstance(model, dict) else ()
        tensors = {
            _WRAPPERS.sub("", name): tensor.region(path, name)
            for name, tensor in found
            if isinstance(name, str) and isinstance(tensor, TorchTensor)
        }
        if not tensors:
            raise CheckpointError(
                f"{path}: holds no tensors; expected a checkpoint of metaseq ('model': tensors by name)"
            )
        if not any(map(_FLAT.search, tensors)):
            return cls(path, tensors, ())
        try:
            return cls(path, tensors, tuple(_vectors(loaded["shard_metadata"])))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"{path}: its shard_metadata does not say which parameters are flattened ({error!r:.200}); "
                "download the file again"
            ) from None

    def sharing(self, others: Iterable["_Shard"]) -> "_Shard":
        """The same, with the names and shapes of `others` where they are the same: a thousand copies take memory."""
        known = {vector.parameters: vector for other in others for vector in other.vectors}
        vectors = (replace(known.get(vector.parameters, vector), padding=vector.padding) for vector in self.vectors)
        return replace(self, vectors=tuple(vectors))


def _vectors(metadata: Any) -> Iterator[_Vector]:
    for module in metadata["param_metadata"]:
        for key, value in module["params"].items():
            names, shapes, padding = tuple(value["names"]), tuple(map(tuple, value["shapes"])), value["padding"]
            numels = tuple(value["numels"])
            if any(size < 0 for size in chain.from_iterable(shapes)):
                raise ValueError(f"{key}: shapes {shapes}")
            if len(names) != len(shapes) or numels != tuple(map(prod, shapes)):
                raise ValueError(f"{key}: {len(names)} names, {len(shapes)} shapes, {len(numels)} sizes")
            if type(padding) is not int or padding < 0:
                raise ValueError(f"{key}: padding {padding!r}")
            path = module["fsdp_path"]
            within = tuple(_WRAPPERS.sub("", ".".join(filter(None, (path, name)))) for name in (key, *names))
            yield _Vector(within[0], within[1:], shapes, padding)


def _whole_part(files: WeightFiles, series: Series, part: int, shards: Sequence[_Shard]) -> dict[str, Region]:
    """The tensors of a part, each in as many files as it happens to be spread over."""
    first = shards[0]
    if not first.vectors and len(shards) > 1:
        raise CheckpointError(f"{first.path}: has no flattened parameters, though there are {len(shards)} shards of it")
    tensors = dict(first.tensors)
    for number, vector in enumerate(first.vectors):
        tensors.pop(vector.key, None)
        whole = _whole_vector(files, series, part, shards, number)
        start = 0
        for name, shape in zip(vector.names, vector.shapes, strict=True):
            nbytes = prod(shape) * whole.dtype.itemsize
            tensors[name] = Region(whole.dtype, shape, cut(whole.extents, start, nbytes))
            start += nbytes
    flat = sorted(filter(_FLAT.search, tensors))
    if flat:
        raise CheckpointError(f"{first.path}: its shard_metadata does not say what is in {some(flat)}")
    return tensors


def _whole_vector(files: WeightFiles, series: Series, part: int, shards: Sequence[_Shard], number: int) -> Region:
    """A vector of flattened parameters without its padding: the slices of all shards, one after the other."""
    vector = shards[0].vectors[number]
    total = sum(map(prod, vector.shapes))
    extents: list[Extent] = []
    slices: list[Region] = []
    for shard in shards:
        here = shard.vectors[number] if number < len(shard.vectors) else None
        region = shard.tensors.get(vector.key)
        if here is None or region is None or here.parameters != vector.parameters:
            raise CheckpointError(f"{shard.path}: has other parameters in {vector.key} than {shards[0].path.name}")
        slices.append(region)
        if (region.dtype, region.shape) != (slices[0].dtype, slices[0].shape) or here.padding > prod(region.shape):
            raise CheckpointError(
                f"{shard.path}: {vector.key} is {list(region.shape)} with {here.padding} values of padding, expected "
                f"{list(slices[0].shape)} as in {shards[0].path.name}; download the file again"
            )
        extents += cut(region.extents, 0, region.nbytes - here.padding * region.dtype.itemsize)
    found = sum(extent.nbytes for extent in extents) // slices[0].dtype.itemsize
    if found != total:
        series.whole(files.name, series.counts[0], -(-total // max(1, prod(slices[0].shape))))
        raise CheckpointError(
            f"{shards[0].path} and the other shards of part {part}: {vector.key} has {found:,} values, expected "
            f"{total:,}; download them again"
        )
    return Region(slices[0].dtype, (total,), tuple(extents))


def _check_doubled(parts: Sequence[Mapping[str, Region]], shards: Iterable[_Shard]) -> None:
    """Raise CheckpointError where two files hold the same values, other than of what every part has all of."""
    split: Counter[Path] = Counter()
    for extent in chain.from_iterable(r.extents for part in parts for name, r in part.items() if _SPLIT.search(name)):
        split[extent.path] += extent.nbytes
    seen: dict[str, Path] = {}
    for shard in shards:
        regions = sorted(shard.tensors.values(), key=lambda region: -region.nbytes)
        if 8 * split[shard.path] < sum(region.nbytes for region in regions):
            continue
        digest = xxhash.xxh3_128()
        with reading(shard.path), shard.path.open("rb", buffering=0) as file:
            for number, region in enumerate(regions[:_SAMPLES]):
                # Elsewhere in each: at one place all might be of norms, which every part has.
                step = -(-region.nbytes // _SAMPLES)
                for _, offset, nbytes in cut(region.extents, number * step, min(step, _SAMPLE_NBYTES)):
                    file.seek(offset)
                    digest.update(file.read(nbytes))
        other = seen.setdefault(digest.hexdigest(), shard.path)
        if other is not shard.path:
            raise CheckpointError(f"{shard.path}: holds the same weights as {other.name}; download it again")
