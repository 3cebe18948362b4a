"""An opened store: its manifest, its blocks with checked headers, its tape. Reads headers only."""

import gc
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tiered.errors import StoreError
from tiered.files import MOST_JSON_NBYTES, check_regular, read_whole
from tiered.store.block import BlockLayout, read_layout
from tiered.store.file import Kind
from tiered.store.format import CHUNK_NBYTES
from tiered.store.manifest import DAMAGED, MANIFEST_NAME, VERSION, BlockInfo, Manifest, OldStoreError
from tiered.store.unit import Unit, joined

PROGRESS_NAME = "conversion.json"
"""What an unfinished conversion leaves in place of a manifest."""
UPGRADE_NAME = "upgrade.json"
"""What an unfinished upgrade leaves beside a manifest of version 1."""


@dataclass(frozen=True)
class Store:
    """A store whose headers have been read and found consistent; its data is checked when it is read."""

    path: Path
    manifest: Manifest
    layouts: Mapping[str, BlockLayout]
    """The layout of each block file, by its path as the manifest spells it."""

    @classmethod
    def open(cls, path: Path | str) -> "Store":
        """Open the store at `path`.

        Raises StoreError where there is none, it is foreign, half-converted, truncated or damaged, and ReadError where
        the operating system will not let it be read.
        """
        folder = Path(path)
        with _no_collection():
            manifest = read_manifest(folder)
            layouts = {file.path: read_layout(folder, file) for file in manifest.files}
        check_config_is_there(folder)
        _check_embedding(folder, manifest, layouts)
        return cls(folder, manifest, layouts)

    @property
    def name(self) -> str:
        return self.path.resolve().name.removesuffix(".tiered")

    @cached_property
    def blocks(self) -> dict[str, BlockInfo]:
        """Every block by name."""
        return {block.name: block for block in self.manifest.blocks}

    @cached_property
    def tape(self) -> tuple[BlockInfo, ...]:
        """The blocks of one pass, in order: every layer, then the head."""
        return tuple(self.blocks[name] for name in self.manifest.tape)

    def layout(self, block: BlockInfo) -> BlockLayout:
        """The layout of a block's file."""
        return self.layouts[block.file.path]

    def file_path(self, block: BlockInfo) -> Path:
        return self.path / block.file.path

    @property
    def vocab_size(self) -> int:
        """Rows of the token embedding."""
        (weight,) = self.layout(self.blocks["embed"]).weights.values()
        return weight.shape[0]

    def units_of_pass(self, on_demand: bool) -> tuple[tuple[Unit, ...], ...]:
        """Of each block of the tape, the units that are read ahead of a pass, in the order of use: all of them, or, if
        experts are read `on_demand`, when they are chosen, the dense ones."""
        return self.dense_units if on_demand else self.tape_units

    @cached_property
    def tape_units(self) -> tuple[tuple[Unit, ...], ...]:
        """Of each block of the tape, the units of a pass that reads layers whole, in the order of use. Neighbouring
        experts are joined up to CHUNK_NBYTES, as each unit costs a moment."""
        return tuple(tuple(_joined_experts(self.layout(block).units)) for block in self.tape)

    @cached_property
    def dense_units(self) -> tuple[tuple[Unit, ...], ...]:
        """Of each block of the tape, the units that every token uses, in the order of use."""
        return self._units("dense")

    @cached_property
    def expert_units(self) -> tuple[tuple[Unit, ...], ...]:
        """Of each block of the tape, its experts, each of which is a unit, by number."""
        return self._units("expert")

    @cached_property
    def small_units(self) -> tuple[tuple[Unit, ...], ...]:
        """Of each block of the tape, the units that are copied once, to stay in memory for good."""
        return self._units("small")

    def _units(self, kind: Kind) -> tuple[tuple[Unit, ...], ...]:
        return tuple(tuple(unit for unit in self.layout(b).units if unit.kind == kind) for b in self.tape)

    @property
    def tape_nbytes(self) -> int:
        """S of the bound: bytes one pass streams when nothing is resident and layers are read whole."""
        return sum(unit.nbytes for units in self.tape_units for unit in units)


def _joined_experts(units: Sequence[Unit]) -> Iterator[Unit]:
    """`units` without small ones, neighbouring experts joined."""
    run: list[Unit] = []
    for unit in units:
        can_join = unit.kind == "expert"
        if run and not (can_join and unit.offset + unit.nbytes - run[0].offset <= CHUNK_NBYTES):
            yield joined(run)
            run = []
        if can_join:
            run.append(unit)
        elif unit.kind != "small":
            yield unit
    if run:
        yield joined(run)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep the garbage collector from looking through some 100,000 new objects again and again, none of them garbage:
    that takes as long as everything else."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def read_manifest(folder: Path) -> Manifest:
    """The manifest alone, so that damaged block files can be looked into; raises as `Store.open`."""
    path = folder / MANIFEST_NAME
    try:
        text = read_whole(path, StoreError, MOST_JSON_NBYTES)
    except (FileNotFoundError, ValueError):
        # ValueError: no path can have this name.
        raise StoreError(_why_no_manifest(folder)) from None
    try:
        return Manifest.from_json(text, path)
    except OldStoreError:
        if not (folder / UPGRADE_NAME).exists():
            raise
        raise StoreError(
            f"{folder}: the upgrade to format version {VERSION} has not finished; "
            f"run 'tiered convert {shlex.quote(str(folder))}' again"
        ) from None


def _check_embedding(folder: Path, manifest: Manifest, layouts: Mapping[str, BlockLayout]) -> None:
    """Raises StoreError unless the block `embed` is one table, whose rows are the vocabulary."""
    file = next(block.file.path for block in manifest.blocks if block.name == "embed")
    shapes = [weight.shape for weight in layouts[file].weights.values()]
    if [len(shape) for shape in shapes] != [2]:
        raise StoreError(f"{folder / file}: holds tensors {shapes}, expected the token embedding alone; {DAMAGED}")


def check_config_is_there(folder: Path) -> None:
    """Raises StoreError unless the store at `folder` has a config.json that can be opened."""
    path = folder / "config.json"
    try:
        check_regular(path, StoreError)
    except FileNotFoundError:
        raise StoreError(f"{path}: missing; convert the model again") from None


def _why_no_manifest(folder: Path) -> str:
    if not folder.exists():
        return f"{folder}: no such store; make one with 'tiered convert MODEL -o {shlex.quote(str(folder))}'"
    if not folder.is_dir():
        return f"{folder}: a file, expected the folder that 'tiered convert' wrote"
    if (folder / PROGRESS_NAME).exists():
        return f"{folder}: the conversion has not finished; run the same 'tiered convert' command again to resume it"
    if (folder / "config.json").exists():
        return (
            f"{folder}: a model folder, not a store (no {MANIFEST_NAME}); "
            f"convert it first with 'tiered convert {shlex.quote(str(folder))}'"
        )
    return f"{folder}: not a store (no {MANIFEST_NAME}); pass the folder that 'tiered convert' wrote"
