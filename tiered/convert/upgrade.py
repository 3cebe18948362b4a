"""The upgrade of a store: format version 1 becomes version 2 where it is, block by block, with the same weights.

In: a store's folder. Out: the same folder, byte for byte what converting the model anew would give. Called by
`tiered.convert.convert_checkpoint`.

The order of writes makes every kill harmless: upgrade.json, by which other commands know; each block to .part and
renamed when whole, then entered in upgrade.json; manifest.json; and last upgrade.json is removed. Until then the
manifest is of version 1 and lists blocks as they were; a block says itself of which version it is.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any, Final

from tiered.arch import build_skeleton, load_config
from tiered.convert.block import finished_block, is_block, write_block
from tiered.convert.blocks import BlockRecipe
from tiered.convert.compression import Compression
from tiered.convert.convert import ConvertProgress, ConvertResult, ProgressFunction
from tiered.convert.folder import locked, remove_stray_parts
from tiered.convert.recipe import ConvertOptions, StoreRecipe, make_recipe
from tiered.convert.room import RamCheck, check_space, os_errors_named
from tiered.convert.stored import READING_NBYTES, StoredBlock
from tiered.errors import ConfigError, StoreError
from tiered.files import read_json, read_whole
from tiered.quant import GroupScheme, Scheme
from tiered.store import FileInfo, Manifest, atomic_write
from tiered.store.beside import VOCABULARIES
from tiered.store.block import BlockLayout, read_layout
from tiered.store.manifest import DAMAGED, MANIFEST_NAME, VERSION
from tiered.store.open import UPGRADE_NAME

_OLD: Final = 1


def upgrade_store(folder: Path, options: ConvertOptions, report: ProgressFunction | None) -> ConvertResult:
    """Make the store at `folder` one of format version 2; nothing is done where it is one already.

    Raises ConfigError for options other than `ram_bytes`, StoreError for a damaged store, BudgetError, DiskFullError
    and ReadError. Whatever ends it, finished blocks are kept and the same call goes on.
    """
    if replace(options, ram_bytes=None) != ConvertOptions():
        raise ConfigError(
            f"{folder}: a store, which is upgraded with the weights that it has; drop all options but --ram, or pass "
            "the checkpoint that it was made from"
        )
    started = perf_counter()
    with os_errors_named(folder), locked(folder):
        manifest = _read_manifest(folder)
        if manifest is not None:
            (folder / UPGRADE_NAME).unlink(missing_ok=True)  # killed before the last step
            return _result(folder, manifest, started, 0, VERSION)
        old = Manifest.from_json(read_whole(folder / MANIFEST_NAME, StoreError), folder / MANIFEST_NAME, _OLD)
        upgrade = _Upgrade(folder, old, options, report)
        manifest = upgrade.run()
    return _result(folder, manifest, started, upgrade.resumed, _OLD)


class _Upgrade:
    """One attempt, while the folder is locked."""

    def __init__(self, folder: Path, old: Manifest, options: ConvertOptions, report: ProgressFunction | None) -> None:
        self._folder, self._old, self._report = folder, old, report
        self._recipe = _recipe_of(folder, old)
        RamCheck(options, self._recipe.files).require(READING_NBYTES)
        self._entered = _entered(folder)
        self._infos: dict[str, FileInfo] = {}
        self._layouts: dict[str, BlockLayout] = {}
        """Of the files that are of version 1."""
        files = {file.path: file for file in old.files}
        for block in self._recipe.files:
            self._look_at(block, files[block.path])
        self.resumed = len(self._infos)

    def run(self) -> Manifest:
        """Upgrade what is left; returns the new manifest."""
        folder, infos = self._folder, self._infos
        remove_stray_parts(folder)
        left = (block for block in self._recipe.files if block.path in self._layouts)
        room = (max(self._nbytes(block), self._layouts[block.path].file.nbytes) for block in left)
        check_space(folder, max(room, default=0))
        self._enter()
        sizes = {block.path: self._nbytes(block) for block in self._recipe.files}
        skipped = done = sum(sizes[path] for path in infos)
        for block in self._recipe.files:
            if block.path in infos:
                continue
            before, expected = done, sizes[block.path]

            def advance(nbytes: int, block: BlockRecipe = block, most: int = before + expected) -> None:
                nonlocal done
                done = min(done + nbytes, most)
                if self._report is not None:
                    self._report(ConvertProgress(block.name, done, sum(sizes.values()), skipped))

            layout = self._layouts[block.path]
            # What was compressed with zstd stays compressed.
            rule = Compression("planes" if layout.compressed else "none")
            with StoredBlock(folder, layout) as source:
                infos[block.path] = write_block(folder, block, source, rule, advance)
            self._enter()
            advance(before + expected - done)
        blocks = tuple(replace(block, file=infos[block.file.path]) for block in self._old.blocks)
        compress = self._old.quantization.get("compress", "none")
        quantization = {**self._old.quantization, "compress": "planes" if compress == "zstd" else compress}
        files = tuple(infos[file.path] for file in self._old.files)
        manifest = replace(self._old, quantization=quantization, files=files, blocks=blocks)
        atomic_write(folder / MANIFEST_NAME, manifest.to_json())
        (folder / UPGRADE_NAME).unlink()
        return manifest

    def _look_at(self, block: BlockRecipe, old: FileInfo) -> None:
        """Find out whether the file of `block` is still of version 1. Raises StoreError where it is of neither, and
        where it is of version 2 in units that are not known."""
        try:
            layout = read_layout(self._folder, old, _OLD)
        except StoreError:
            info = self._finished(block)
            if info is None and is_block(self._folder, block):
                raise StoreError(
                    f"{self._folder / block.path}: upgraded already, by a version of tiered with other units, which "
                    "was stopped before it had entered them in upgrade.json; go on with that version, or convert the "
                    "model again"
                ) from None
            if info is None:
                raise
            self._infos[block.path] = info
            return
        if not block.fits(layout, has_records=False):
            raise StoreError(
                f"{self._folder / block.path}: holds other tensors than config.json and manifest.json describe; "
                f"{DAMAGED}"
            )
        self._layouts[block.path] = layout

    def _finished(self, block: BlockRecipe) -> FileInfo | None:
        """The entry of a file that an earlier attempt has written; None where it is none.

        The checksums are those of then, but for a file whose entry a kill has prevented.
        """
        entered = self._entered.get(block.path)
        if entered is not None:
            with suppress(StoreError):
                read_layout(self._folder, entered)
                return entered
        return finished_block(self._folder, block)

    def _nbytes(self, block: BlockRecipe) -> int:
        layout = self._layouts.get(block.path)
        if layout is None:
            return self._infos[block.path].nbytes
        weights = layout.weights
        return block.nbytes(lambda tensor: next(iter(weights[tensor.name].parts.values())).dtype)

    def _enter(self) -> None:
        """Write upgrade.json durably: the entries of the files that are of version 2."""
        value = {"files": [info.to_json() for info in self._infos.values()]}
        atomic_write(self._folder / UPGRADE_NAME, json.dumps(value) + "\n")


def _read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a store of this version; None where it is of version 1."""
    path = folder / MANIFEST_NAME
    value = read_json(path, StoreError, DAMAGED)
    if isinstance(value, dict) and type(value.get("version")) is int and value["version"] == _OLD:
        return None
    return Manifest.from_json(json.dumps(value), path)


def _entered(folder: Path) -> Mapping[str, FileInfo]:
    """What upgrade.json holds, by path; nothing where it is missing or not what `_enter` writes."""
    # Without it, the checksums of finished files are computed from them.
    with suppress(FileNotFoundError, StoreError, KeyError, TypeError, ValueError):
        value: Any = read_json(folder / UPGRADE_NAME, StoreError, "")
        return {info.path: info for info in (FileInfo.from_json(raw, VERSION) for raw in value["files"])}
    return {}


def _recipe_of(folder: Path, old: Manifest) -> StoreRecipe:
    """What converting the model of the store with the same options would make today."""
    skeleton = build_skeleton(load_config(folder))
    try:
        layers = old.quantization.get("layers")
        scheme = None if layers is None else Scheme.parse(str(layers))
        if scheme is not None and not isinstance(scheme, GroupScheme):
            raise ConfigError(f"layers in {scheme.name}, which stores of version 1 never have")
        options = ConvertOptions(
            quant="none" if scheme is None else f"int{scheme.bits}",
            group_size=64 if scheme is None else scheme.group_size,
            synthetic=old.synthetic,
            distinct_blocks=old.distinct_blocks,
        )
        recipe = make_recipe(skeleton, options)
    except ConfigError as error:
        raise StoreError(f"{folder / MANIFEST_NAME}: does not fit config.json ({error}); {DAMAGED}") from None
    paths, known = {block.path for block in recipe.files}, {file.path for file in old.files}
    if paths != known:
        raise StoreError(
            f"{folder / MANIFEST_NAME}: lists other files than config.json has blocks "
            f"({', '.join(sorted(paths ^ known)[:5])}); {DAMAGED}"
        )
    return recipe


def _result(folder: Path, manifest: Manifest, started: float, resumed: int, version: int) -> ConvertResult:
    layouts = (read_layout(folder, file) for file in manifest.files)
    return ConvertResult(
        store=folder,
        blocks=len(manifest.blocks),
        nbytes=sum(file.nbytes for file in manifest.files),
        weights=sum(layout.weight_count for layout in layouts),
        seconds=perf_counter() - started,
        resumed_blocks=resumed,
        scheme=manifest.quantization.get("layers") or "none",
        unquantized=(),
        warnings=(),
        synthetic=manifest.synthetic,
        has_tokenizer=any((folder / name).exists() for name in VOCABULARIES),
        upgraded_from=version,
    )
