"""The conversion: a source of weights becomes a store, block by block, resumable at every point.

In: an opened source, the store's recipe, an output folder. Out: a finished store. Called by
`tiered.convert.convert_checkpoint`.

The order of writes makes every kill harmless: conversion.json (what is being done), small files, each block to
.part and renamed when whole, manifest.json, and last conversion.json is removed.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

from tiered.convert.block import finished_block, write_block
from tiered.convert.blocks import BlockRecipe
from tiered.convert.compression import Compression
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
from tiered.convert.recipe import ConvertOptions, StoreRecipe
from tiered.convert.room import check_space, on_same_disk, os_errors_named
from tiered.convert.source import WeightSource
from tiered.convert.taken import Taken
from tiered.convert.tokenizer import BesideFiles, GivenTokenizer
from tiered.errors import ConfigError
from tiered.store import FileInfo, atomic_write
from tiered.store.beside import VOCABULARIES
from tiered.store.manifest import MANIFEST_NAME
from tiered.store.open import PROGRESS_NAME


@dataclass(frozen=True)
class ConvertProgress:
    """Where a conversion stands; passed to the caller's function after every few MiB."""

    block: str
    nbytes_done: int
    """Bytes of the store that are written, including those that earlier attempts finished."""
    nbytes_total: int
    nbytes_skipped: int
    """The part of `nbytes_done` that earlier attempts finished; it says nothing about this attempt's speed."""
    downloading: bool = False
    """The block's files are being downloaded; nothing is written until that is done."""


ProgressFunction = Callable[[ConvertProgress], None]


@dataclass(frozen=True)
class ConvertResult:
    """A finished conversion."""

    store: Path
    blocks: int
    """Blocks in the manifest; a repeated synthetic layer counts every time."""
    nbytes: int
    """Bytes of all block files together."""
    weights: int
    """How many weights the block files hold."""
    seconds: float
    resumed_blocks: int
    """Block files that an earlier attempt had finished."""
    scheme: str
    """How the layers are quantized: a scheme's name such as "int4-g64", or "none"."""
    unquantized: tuple[str, ...]
    """Linear weights that keep the checkpoint's precision because their shape does not fit the groups."""
    warnings: tuple[str, ...]
    synthetic: bool
    kept: tuple[str, ...] = ()
    """Matrices of layers that keep the checkpoint's precision because no linear layer multiplies by them, where they
    are more than a few of the layers' weights."""
    plain: tuple[str, ...] = ()
    """Those that were not to be quantized because the checkpoint has not quantized them either."""
    upgraded_from: int | None = None
    """The format version of a store that was upgraded; that of today where it was one already. None: converted."""
    has_tokenizer: bool = True
    """Whether the store has a tokenizer: one without takes and gives token ids only."""
    taken: tuple[Taken, ...] = ()
    """What became of weights that the checkpoint holds quantized, as far as this attempt converted them."""
    tokenizer: Path | None = None
    """Where the tokenizer is from that the store got instead of the source's."""

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.weights


class Conversion:
    """One conversion into one output folder. It is also the `Ledger` that downloads are entered in."""

    def __init__(
        self,
        folder: Path,
        options: ConvertOptions,
        report: ProgressFunction | None,
        tokenizer: GivenTokenizer | None = None,
    ) -> None:
        """`tokenizer`: what the store has instead of the source's."""
        self._folder, self._options, self._report, self._tokenizer = folder, options, report, tokenizer
        self._progress = self._usable()
        self._infos: dict[str, FileInfo] = {}
        self._done_nbytes = self._total_nbytes = self._skipped_nbytes = 0
        self._held = ExitStack()
        self._locked = False

    @property
    def downloaded(self) -> frozenset[str]:
        """Files that this conversion fetched, in earlier attempts too."""
        return frozenset(self._progress.downloaded)

    def enter_download(self, name: str) -> None:
        """Record durably that this conversion downloads `name`, and so may delete it."""
        self._hold_folder()
        self._progress = replace(self._progress, downloaded=(*self._progress.downloaded, name)).save(self._folder)

    def run(self, open_source: Callable[[], tuple[WeightSource, StoreRecipe]]) -> ConvertResult:
        """Convert what `open_source` opens."""
        started = perf_counter()
        with self._held, os_errors_named(self._folder):
            source, recipe = open_source()
            self._begin(source, recipe)
            resumed = len(self._infos)
            self._convert(source, recipe)
        return ConvertResult(
            store=self._folder,
            blocks=len(recipe.blocks),
            nbytes=sum(info.nbytes for info in self._infos.values()),
            weights=recipe.weights,
            seconds=perf_counter() - started,
            resumed_blocks=resumed,
            scheme=recipe.quantization["layers"] or "none",
            unquantized=recipe.unquantized,
            kept=recipe.kept,
            plain=recipe.plain,
            warnings=source.warnings,
            taken=source.taken,
            synthetic=recipe.synthetic,
            tokenizer=None if self._tokenizer is None else self._tokenizer.path,
            has_tokenizer=not self._beside(source).keys().isdisjoint(VOCABULARIES),
        )

    def _begin(self, source: WeightSource, recipe: StoreRecipe) -> None:
        """Check that the store fits on the disk, then write conversion.json, which claims the folder."""
        folder, identity = self._folder, source.identity
        if folder.exists():
            self._hold_folder()  # its contents must not change between a decision and what follows from it
        decided_on = self._progress
        progress = check_same_source(folder, self._progress, identity, self._options.force)
        mine = progress.source is not None and not progress.discarding
        if mine:
            found = {block.path: finished_block(folder, block) for block in recipe.files}
            self._infos = {path: info for path, info in found.items() if info is not None}
        self._total_nbytes = sum(block.nbytes(source.dtype) for block in recipe.files)
        rest = [block for block in recipe.files if block.path not in self._infos]
        rest_nbytes = sum(block.nbytes(source.dtype) for block in rest)
        self._skipped_nbytes = self._done_nbytes = self._total_nbytes - rest_nbytes
        going = (path for path in owned_files(folder) if not mine or path.name.endswith(".part"))
        needed = rest_nbytes + self._beside_nbytes(source, mine)
        self._check_space(source, rest, needed, sum(path.stat().st_size for path in going))

        self._hold_folder()
        if self._progress != decided_on:
            raise ConfigError(
                f"{folder}: another conversion has begun there meanwhile; run the same command again to go on"
            )
        if progress.discarding:
            progress = discard(folder, progress)
        # Before the disk is measured: the next attempt would refuse a folder that holds the measuring file alone.
        self._progress = replace(progress, source=identity).save(folder)
        remove_stray_parts(folder)
        if progress.compression is None:
            mode = self._options.settings()["compress"]
            rule = Compression.measure(mode, recipe.files, folder, rest_nbytes, source.dtype)
            self._progress = replace(self._progress, compression=rule).save(folder)

    def _check_space(self, source: WeightSource, rest: Sequence[BlockRecipe], needed: int, reclaimed: int) -> None:
        """Raise DiskFullError where there is no room for `needed` bytes in the folder and for what `rest` downloads.

        `reclaimed` bytes in the folder are going to be freed first.
        """
        for place, nbytes in source.room_nbytes(rest).items():
            if on_same_disk(self._folder, place):
                needed += nbytes
            else:
                check_space(place, nbytes)
        check_space(self._folder, needed, reclaimed)

    def _beside(self, source: WeightSource) -> BesideFiles:
        """What lies beside the blocks."""
        found = source.extra_files()
        return found if self._tokenizer is None else self._tokenizer.in_place_of(found)

    def _beside_nbytes(self, source: WeightSource, mine: bool) -> int:
        """Bytes that the files beside the blocks take in addition: those that exist are replaced one at a time."""
        nbytes = {name: len(read()) for name, read in self._beside(source).items()}
        there = {name for name in nbytes if mine and (self._folder / name).is_file()}
        return sum(nbytes[name] for name in nbytes.keys() - there) + max(nbytes.values(), default=0)

    def _convert(self, source: WeightSource, recipe: StoreRecipe) -> None:
        for name, read in self._beside(source).items():
            atomic_write(self._folder / name, read())
        rest = [block for block in recipe.files if block.path not in self._infos]
        with source.opened(rest, self._fetching) as blocks:
            for block in blocks:
                self._infos[block.path] = self._write(block, source)
            remove_strays(self._folder, frozenset(self._infos))
            manifest = recipe.manifest(self._infos, source.identity, self._rule.mode)
            atomic_write(self._folder / MANIFEST_NAME, manifest.to_json())
        (self._folder / PROGRESS_NAME).unlink()

    @property
    def _rule(self) -> Compression:
        assert self._progress.compression is not None
        return self._progress.compression

    def _write(self, block: BlockRecipe, source: WeightSource) -> FileInfo:
        expected, before = block.nbytes(source.dtype), self._done_nbytes

        def advance(nbytes: int) -> None:
            self._done_nbytes = min(self._done_nbytes + nbytes, before + expected)
            self._tell(block)

        info = write_block(self._folder, block, source, self._rule, advance)
        self._done_nbytes = before + expected
        self._tell(block)
        return info

    def _fetching(self, block: BlockRecipe) -> None:
        self._tell(block, downloading=True)

    def _tell(self, block: BlockRecipe, *, downloading: bool = False) -> None:
        if self._report is not None:
            done, total = self._done_nbytes, self._total_nbytes
            self._report(ConvertProgress(block.name, done, max(total, done), self._skipped_nbytes, downloading))

    def _hold_folder(self) -> None:
        """Create and lock the folder, and read its state again. Later calls do nothing."""
        if self._locked:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        self._held.enter_context(locked(self._folder))
        self._locked = True
        # Again, now that it cannot change: another process may have begun, or finished, since we looked.
        self._progress = self._usable()

    def _usable(self) -> ProgressFile:
        settings = self._options.settings()
        if self._tokenizer is not None:
            settings["tokenizer"] = self._tokenizer.digest
        return check_usable(self._folder, settings, self._options.force) or ProgressFile(settings)
