"""Widen a checkpoint's feed-forward layers to any size, without changing what the model computes.

    python tools/inflate.py SRC DST --size 2GB

In: a Hugging Face folder with safetensors weights. Out: the same model with more feed-forward rows, random
ones, whose columns in the layer after are zero: the new activations are multiplied by zero, so the text
stays the same at any size. That makes a large checkpoint to stream from a small one. Tensors are written
in pieces: memory stays at the largest tensor of SRC and a few times `PIECE_NBYTES`, whatever the size.
Called by tools/demo and tests.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import safe_open

from tiered.errors import CheckpointError, ConfigError, TieredError
from tiered.units import format_size, parse_size, round_up

PIECE_NBYTES: Final = 16 << 20
SHARD_BYTES: Final = 500_000_000
WIDTH_MULTIPLE: Final = 128  # whole quantization groups
SPREAD: Final = 0.02
INDEX: Final = "model.safetensors.index.json"
WEIGHT_SUFFIXES: Final = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".index.json")
TORCH_TYPES: Final = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass(frozen=True)
class Family:
    """Where a model type keeps its feed-forward layers."""

    width: str  # key of the configuration
    grow_rows: tuple[str, ...]  # ends of names of tensors [width, ...] that get random rows
    grow_columns: str  # end of the name of the tensor [hidden, width] that gets zero columns


GATED: Final = Family(
    width="intermediate_size",
    grow_rows=(".gate_proj.weight", ".gate_proj.bias", ".up_proj.weight", ".up_proj.bias"),
    grow_columns=".down_proj.weight",
)
FAMILIES: Final = {
    "opt": Family(width="ffn_dim", grow_rows=(".fc1.weight", ".fc1.bias"), grow_columns=".fc2.weight"),
    "llama": GATED,
    "mistral": GATED,
    "qwen3": GATED,
}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of the source: where it lies and what it is."""

    name: str
    path: Path
    dtype: str  # as safetensors spells it
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * TORCH_TYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Checkpoint:
    """A source folder, checked: its configuration and tensors."""

    folder: Path
    config: dict[str, Any]
    family: Family
    entries: tuple[TensorEntry, ...]

    @property
    def width(self) -> int:
        return int(self.config[self.family.width])

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries)

    def widened(self, entry: TensorEntry, width: int) -> TensorEntry:
        """`entry` with the shape it has in a model whose feed-forward layers have `width` rows."""
        shape = entry.shape
        if entry.name.endswith(self.family.grow_rows):
            shape = (width, *shape[1:])
        elif entry.name.endswith(self.family.grow_columns):
            shape = (shape[0], width)
        return TensorEntry(entry.name, entry.path, entry.dtype, shape)


def inflate(source: Path, target: Path, size_bytes: int, *, force: bool = False, seed: int = 0) -> int:
    """Write the widened checkpoint to `target` and return its tensors' bytes, a little over `size_bytes`.

    config.json is written last: a folder without one is unfinished.
    """
    checkpoint = read_checkpoint(source)
    width = width_for(checkpoint, size_bytes)
    prepare_target(source, target, force)
    wide = [checkpoint.widened(entry, width) for entry in checkpoint.entries]
    shards = split(wide, SHARD_BYTES)
    generator = torch.Generator().manual_seed(seed)
    before = {entry.name: entry for entry in checkpoint.entries}
    weight_map: dict[str, str] = {}
    done = 0
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_shard(target / name, shard, before, generator)
        weight_map |= {entry.name: name for entry in shard}
        done += sum(entry.nbytes for entry in shard)
        say(f"{name}: {format_size(done)} of {format_size(sum(entry.nbytes for entry in wide))}")
    index = {"metadata": {"total_size": done}, "weight_map": weight_map}
    write_json(target / INDEX, index)
    for path in source.iterdir():
        if path.is_file() and path.name != "config.json" and not path.name.endswith(WEIGHT_SUFFIXES):
            shutil.copyfile(path, target / path.name)
    write_json(target / "config.json", checkpoint.config | {checkpoint.family.width: width})
    return done


def read_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`; raises where it cannot be widened."""
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; expected a Hugging Face checkpoint folder")
    config = json.loads(path.read_text(encoding="utf-8"))
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise ConfigError(f"{path}: model_type is {kind!r}, expected one of {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    entries = tuple(entry for path in weight_files(folder) for entry in read_entries(path))
    checkpoint = Checkpoint(folder, config, family, entries)
    for entry in entries:
        if checkpoint.widened(entry, checkpoint.width).shape != entry.shape:
            expected = checkpoint.widened(entry, checkpoint.width).shape
            raise CheckpointError(
                f"{entry.path}: {entry.name} has shape {list(entry.shape)}, expected {list(expected)} "
                f"by {family.width} = {checkpoint.width} of config.json"
            )
    for suffix in (family.grow_rows[0], family.grow_columns):
        found = sum(entry.name.endswith(suffix) for entry in entries)
        layers = config["num_hidden_layers"]
        if found != layers:
            raise CheckpointError(f"{folder}: found {found} tensors named *{suffix}, expected {layers}, one per layer")
    return checkpoint


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, one or sharded."""
    if (folder / INDEX).is_file():
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        files = [folder / name for name in sorted(set(index["weight_map"].values()))]
    else:
        files = [folder / "model.safetensors"]
    for path in files:
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file; expected weights in the safetensors format")
    return files


def read_entries(path: Path) -> Iterator[TensorEntry]:
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - a file is not iterable
            tensor = file.get_slice(name)
            if tensor.get_dtype() not in TORCH_TYPES:
                raise CheckpointError(
                    f"{path}: {name} has dtype {tensor.get_dtype()}, expected one of {', '.join(TORCH_TYPES)}"
                )
            yield TensorEntry(name, path, tensor.get_dtype(), tuple(tensor.get_shape()))


def width_for(checkpoint: Checkpoint, size_bytes: int) -> int:
    """The least multiple of WIDTH_MULTIPLE that, as width, gives a checkpoint of at least `size_bytes`."""
    if size_bytes < checkpoint.nbytes:
        raise ConfigError(
            f"--size {format_size(size_bytes)}: {checkpoint.folder} has {format_size(checkpoint.nbytes)} "
            "already; ask for more than that"
        )
    per_row = sum(checkpoint.widened(entry, checkpoint.width + 1).nbytes - entry.nbytes for entry in checkpoint.entries)
    missing = size_bytes - checkpoint.nbytes
    return round_up(checkpoint.width + -(-missing // per_row), WIDTH_MULTIPLE)


def prepare_target(source: Path, target: Path, force: bool) -> None:
    """Make `target` an empty folder; with `force` old weights in it are removed, other files overwritten."""
    if target.exists() and not target.is_dir():
        raise ConfigError(f"{target}: is a file, expected a folder to write to")
    if target.resolve() == source.resolve():
        raise ConfigError(f"{target}: is the source itself; name another folder")
    target.mkdir(parents=True, exist_ok=True)
    if any(target.iterdir()) and not force:
        raise ConfigError(f"{target}: is not empty; pass --force to overwrite, or name another folder")
    for pattern in ("model*.safetensors", INDEX, "config.json"):
        for path in target.glob(pattern):
            path.unlink()


def split(entries: Sequence[TensorEntry], shard_bytes: int) -> list[list[TensorEntry]]:
    """Runs of `entries` of about `shard_bytes` each."""
    shards: list[list[TensorEntry]] = [[]]
    held = 0
    for entry in entries:
        if shards[-1] and held + entry.nbytes > shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(entry)
        held += entry.nbytes
    return shards


def write_shard(
    path: Path, entries: Sequence[TensorEntry], before: dict[str, TensorEntry], generator: torch.Generator
) -> None:
    """Write a safetensors file by hand: its library wants all tensors of a file in memory at once."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        end = offset + entry.nbytes
        header[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data starts aligned
    with path.open("wb") as file, ExitStack() as stack:
        file.write(len(text).to_bytes(8, "little") + text)
        sources = {old: stack.enter_context(safe_open(old, "pt")) for old in {e.path for e in entries}}
        for entry in entries:
            tensor = sources[entry.path].get_tensor(entry.name)
            for piece in pieces(tensor, entry.shape, generator):
                file.write(piece.contiguous().flatten().view(torch.uint8).numpy().data)


def pieces(tensor: torch.Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Iterator[torch.Tensor]:
    """`tensor` widened to `shape`, as runs of rows: random rows below, zero columns to the right."""
    rows = max(1, PIECE_NBYTES // (4 * torch.Size(shape[1:]).numel()))  # [rows, ...] of float32 random numbers
    if tensor.shape[1:] == shape[1:]:
        yield tensor
        for start in range(len(tensor), shape[0], rows):
            fresh = torch.randn(min(rows, shape[0] - start), *shape[1:], generator=generator)
            yield (fresh * SPREAD).to(tensor.dtype)
    else:
        for part in torch.split(tensor, rows):
            wide = part.new_zeros(len(part), *shape[1:])
            wide[:, : part.shape[1]] = part
            yield wide


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="inflate.py", description="Widen a checkpoint; its text stays the same.")
    parser.add_argument("source", metavar="SRC", type=Path, help="checkpoint folder in the Hugging Face layout")
    parser.add_argument("target", metavar="DST", type=Path, help="folder to write")
    parser.add_argument("--size", required=True, help="bytes of weights wanted, such as 2GB")
    parser.add_argument("--seed", type=int, default=0, help="of the random rows (default: 0)")
    parser.add_argument("--force", action="store_true", help="overwrite a checkpoint in DST")
    options = parser.parse_args(arguments)
    try:
        size = parse_size(options.size)
        nbytes = inflate(options.source, options.target, size, force=options.force, seed=options.seed)
    except TieredError as error:
        say(f"error: {error}")
        return error.exit_code
    say(f"{options.target}: {format_size(nbytes)} of weights")
    return 0


def say(text: str) -> None:
    print(f"inflate: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
