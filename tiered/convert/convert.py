"""The conversion: a source of weights becomes a store, block by block, resumable at every point.

In: an opened source, its plan, an output folder. Out: a finished store. Called by `tiered.convert.convert_checkpoint`.

The order of writes makes every kill harmless: conversion.json (what is being done), small files, each block to
.part and renamed when whole, manifest.json, and last conversion.json is removed.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

from tiered.convert.block import finished_block, write_block
from tiered.convert.budget import RamCheck, check_space, on_same_disk, os_errors_named
from tiered.convert.compression import Compression, waiting_nbytes
from tiered.convert.folder import (
    ProgressFile,
    check_same_source,
    check_usable,
    discard,
    locked,
    owned_files,
    remove_stray_parts,
    remove_strays,
)
from tiered.convert.hub import cache_folder
from tiered.convert.options import ConvertOptions, ConvertProgress, ConvertResult, ProgressFunction
from tiered.convert.plan import StorePlan
from tiered.convert.recipe import BlockRecipe
from tiered.convert.source import WeightSource
from tiered.errors import ConfigError
from tiered.store import FileInfo, atomic_write
from tiered.store.beside import VOCABULARIES
from tiered.store.manifest import MANIFEST_NAME
from tiered.store.open import PROGRESS_NAME

OpenSource = Callable[[RamCheck], tuple[WeightSource, StorePlan]]
"""Opens what is to be converted; measures the process before it looks at weights."""


class Conversion:
    """One run into one output folder. Also the ledger that downloads are entered in before they begin."""

    def __init__(self, folder: Path, options: ConvertOptions, report: ProgressFunction | None) -> None:
        self._folder, self._options, self._report = folder, options, report
        self._progress = self._usable()
        self._ram = RamCheck(options.ram_bytes, options.settings()["compress"])
        self._infos: dict[str, FileInfo] = {}
        self._done_nbytes = self._total_nbytes = self._skipped_nbytes = 0
        self._held = ExitStack()
        self._locked = False

    @property
    def downloaded(self) -> frozenset[str]:
        """Files that this conversion fetched, in earlier attempts too."""
        return frozenset(self._progress.downloaded)

    def enter_download(self, name: str) -> None:
        """Remember, durably, that `name` is ours to delete."""
        self._hold_folder()
        self._progress = replace(self._progress, downloaded=(*self._progress.downloaded, name)).save(self._folder)

    def run(self, open_source: OpenSource) -> ConvertResult:
        """Convert what `open_source` opens."""
        started = perf_counter()
        with self._held, os_errors_named(self._folder):
            source, plan = open_source(self._ram)
            with closing(source):
                for block in plan.files:
                    source.check(block)
                self._begin(source, plan)
                resumed = len(self._infos)
                self._convert(source, plan)
        return ConvertResult(
            store=self._folder,
            blocks=len(plan.blocks),
            nbytes=sum(info.nbytes for info in self._infos.values()),
            weights=plan.weights,
            seconds=perf_counter() - started,
            resumed_blocks=resumed,
            scheme=plan.quantization["layers"] or "none",
            unquantized=plan.unquantized,
            warnings=source.warnings,
            synthetic=source.synthetic,
            has_tokenizer=not source.extra_files().keys().isdisjoint(VOCABULARIES),
        )

    def _begin(self, source: WeightSource, plan: StorePlan) -> None:
        """Check that all fits, then write conversion.json; afterwards the folder is ours."""
        folder, identity = self._folder, source.identity
        if folder.exists():
            self._hold_folder()  # what is decided from what lies there must still be so when it is acted on
        decided_on = self._progress
        progress = check_same_source(folder, self._progress, identity, self._options.force)
        mine = progress.source is not None and not progress.discarding
        if mine:
            found = {block.path: finished_block(folder, block) for block in plan.files}
            self._infos = {path: info for path, info in found.items() if info is not None}
        self._total_nbytes = sum(self._nbytes(block, source) for block in plan.files)
        rest = [block for block in plan.files if block.path not in self._infos]
        rest_nbytes = sum(self._nbytes(block, source) for block in rest)
        self._skipped_nbytes = self._done_nbytes = self._total_nbytes - rest_nbytes
        rule = progress.compression or Compression(self._options.settings()["compress"])
        self._ram.require(source.working_nbytes())
        going = (path for path in owned_files(folder) if not mine or path.name.endswith(".part"))
        needed = rest_nbytes + self._beside_nbytes(source, mine)
        if rule.mode != "none":
            needed += max((waiting_nbytes(block, source.dtype) for block in rest), default=0)
        self._check_space(source, rest, needed, sum(path.stat().st_size for path in going))

        self._hold_folder()
        if self._progress != decided_on:
            raise ConfigError(
                f"{folder}: another conversion has begun there meanwhile; run the same command again to go on"
            )
        if progress.discarding:
            progress = discard(folder, progress)
        # Before the probe: a folder with nothing but a file of ours would be somebody else's to the next attempt.
        self._progress = replace(progress, source=identity).save(folder)
        remove_stray_parts(folder)
        if progress.compression is None:
            rule = Compression.measure(rule.mode, plan.files, folder, rest_nbytes)
            self._progress = replace(self._progress, compression=rule).save(folder)

    def _check_space(self, source: WeightSource, rest: Sequence[BlockRecipe], needed: int, reclaimed: int) -> None:
        """Room for the bytes that the folder needs, and for what has to be downloaded for the blocks to come."""
        downloads = sorted(source.fetch_nbytes(rest), reverse=True)
        # With --delete-downloads two files are here at once (a block may straddle them), and the one that holds
        # the first tensors outside the layers.
        fetched = sum(downloads[:3] if self._options.delete_downloads else downloads)
        if fetched and on_same_disk(self._folder, cache_folder()):
            needed += fetched
        elif fetched:
            check_space(cache_folder(), fetched)
        check_space(self._folder, needed, reclaimed)

    def _beside_nbytes(self, source: WeightSource, mine: bool) -> int:
        """What the files beside the blocks will take: those that are there already are replaced one by one."""
        nbytes = {name: len(read()) for name, read in source.extra_files().items()}
        there = {name for name in nbytes if mine and (self._folder / name).is_file()}
        return sum(nbytes[name] for name in nbytes.keys() - there) + max(nbytes.values(), default=0)

    def _convert(self, source: WeightSource, plan: StorePlan) -> None:
        for name, read in source.extra_files().items():
            atomic_write(self._folder / name, read())
        order = _by_last_file(plan.files, source)
        self._release(order, source)
        for block in order:
            if block.path not in self._infos:
                self._infos[block.path] = self._write(block, source, plan)
                self._release(order, source)
        remove_strays(self._folder, frozenset(self._infos))
        manifest = plan.manifest(self._infos, source.identity, self._rule.mode, synthetic=source.synthetic)
        atomic_write(self._folder / MANIFEST_NAME, manifest.to_json())
        # Only now: with the last files gone, a resumed conversion could not even list the tensors.
        source.release(frozenset().union(*(source.files_of(block) for block in order)))
        (self._folder / PROGRESS_NAME).unlink()

    @property
    def _rule(self) -> Compression:
        assert self._progress.compression is not None
        return self._progress.compression

    def _write(self, block: BlockRecipe, source: WeightSource, plan: StorePlan) -> FileInfo:
        if source.fetch_nbytes([block]):
            self._tell(block, downloading=True)
            source.fetch(block)
            # A file whose format is only known now may have to be read whole.
            self._ram.require(source.working_nbytes())
        source.open_block(block)
        expected, before = self._nbytes(block, source), self._done_nbytes

        def advance(nbytes: int) -> None:
            self._done_nbytes = min(self._done_nbytes + nbytes, before + expected)
            self._tell(block)

        info = write_block(self._folder, block, source, self._rule, advance)
        self._done_nbytes = before + expected
        self._tell(block)
        return info

    def _tell(self, block: BlockRecipe, *, downloading: bool = False) -> None:
        if self._report is not None:
            done, total = self._done_nbytes, self._total_nbytes
            self._report(ConvertProgress(block.name, done, max(total, done), self._skipped_nbytes, downloading))

    def _release(self, order: Sequence[BlockRecipe], source: WeightSource) -> None:
        """Give back the files that only finished blocks need, unless nothing is left to do (see `_convert`)."""
        waiting = [source.files_of(block) for block in order if block.path not in self._infos]
        if waiting:
            done = frozenset().union(*(source.files_of(b) for b in order if b.path in self._infos))
            source.release(done - frozenset().union(*waiting))

    def _hold_folder(self) -> None:
        """Make the folder, keep others out of it and look again at what lies there, once."""
        if self._locked:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        self._held.enter_context(locked(self._folder))
        self._locked = True
        # Again, now that it cannot change: another process may have begun, or finished, since we looked.
        self._progress = self._usable()

    def _usable(self) -> ProgressFile:
        settings = self._options.settings()
        return check_usable(self._folder, settings, self._options.force) or ProgressFile(settings)

    @staticmethod
    def _nbytes(block: BlockRecipe, source: WeightSource) -> int:
        return block.nbytes(source.dtype)


def _by_last_file(blocks: Sequence[BlockRecipe], source: WeightSource) -> list[BlockRecipe]:
    """The blocks in the order in which their files complete, so that as few files as possible are needed at once."""

    def key(block: BlockRecipe) -> Any:
        return max(source.files_of(block), default="")

    return sorted(blocks, key=key)  # stable: blocks of one file keep their order
