"""Whether a conversion fits: memory against --ram, bytes against the free disk. Checked before work.

What a conversion takes follows from the recipes and the weight files' format alone, so that the budget that a refusal
names is enough when the command is repeated with it.
"""

import errno
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import torch

from tiered.convert.blocks import RECORDS_NBYTES, BlockRecipe, TensorRecipe
from tiered.convert.compression import COMPRESSING_NBYTES, is_candidate
from tiered.convert.panels import rooms_nbytes
from tiered.convert.recipe import ConvertOptions
from tiered.convert.source import PANEL_NBYTES
from tiered.convert.workers import quantizing_nbytes
from tiered.errors import BudgetError, ConfigError, DiskFullError, ReadError
from tiered.plan.budget import BASELINE_VARIES_NBYTES, GROWTH_NBYTES
from tiered.proc import process_peak_rss_bytes, process_rss_bytes
from tiered.store.format import tensor_nbytes
from tiered.store.sweep import SWEEP_NBYTES
from tiered.units import MIB, format_budget, format_size

_SPACE_SLACK_NBYTES: Final = 4 * MIB


class RamCheck:
    """`--ram` against what a conversion of `blocks` takes at its peak. The process is measured when this is made,
    before weights are read: later it would hold some of the memory that is added to the measured size."""

    def __init__(self, options: ConvertOptions, blocks: Sequence[BlockRecipe]) -> None:
        self._ram_bytes, self._baseline = options.ram_bytes, process_rss_bytes()
        self._compresses = options.settings()["compress"] != "none"
        self.writes(blocks)

    def writes(self, blocks: Sequence[BlockRecipe]) -> None:
        """From now on the conversion is one of `blocks`."""
        written = [_writing_nbytes(tensor, block, self._compresses) for block in blocks for tensor in block.tensors]
        schemes = {tensor.scheme for block in blocks for tensor in block.tensors if tensor.scheme is not None}
        self._writing = max(written, default=0) + SWEEP_NBYTES + quantizing_nbytes(schemes)

    def require(self, reading_nbytes: int) -> None:
        """Raise BudgetError where the conversion takes more than `--ram`, of which reading takes `reading_nbytes`."""
        if self._ram_bytes is None:
            return
        working = reading_nbytes + self._writing + GROWTH_NBYTES
        needed = max(process_peak_rss_bytes(), self._baseline + working)
        if needed <= self._ram_bytes:
            return
        named = needed + BASELINE_VARIES_NBYTES
        raise BudgetError(
            f"--ram {format_budget(self._ram_bytes)}: converting this takes up to {format_budget(named)} "
            f"({format_size(self._baseline)} for the interpreter and its libraries, {format_size(reading_nbytes)} to "
            f"read the source, {format_size(working - reading_nbytes)} to quantize and write); "
            f"pass at least --ram {format_budget(named)}",
            smallest_bytes=named,
        )


def check_space(folder: Path, needed_nbytes: int, reclaimed_nbytes: int = 0) -> None:
    """Raise DiskFullError where `folder`'s disk has no room for `needed_nbytes` once `reclaimed_nbytes` are freed."""
    free = shutil.disk_usage(_existing(folder)).free + reclaimed_nbytes
    needed = needed_nbytes + _SPACE_SLACK_NBYTES
    if needed > free:
        raise DiskFullError(
            f"{folder}: the store needs {format_size(needed)}, the disk has {format_size(free)} free; "
            "free some space or choose a folder on another disk with -o"
        )


@contextmanager
def os_errors_named(folder: Path) -> Iterator[None]:
    """Turn errors of the operating system inside the `with` statement into errors that say what to do."""
    try:
        yield
    except OSError as error:
        name = error.filename or folder
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError(
                f"{name}: the disk is full; finished blocks are kept: "
                "free some space and run the same command again to resume"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise ConfigError(
                f"{name}: {error.strerror}; choose another folder with -o, or change who may use it"
            ) from error
        if error.errno == errno.EIO:
            raise ReadError(f"{name}: {error.strerror}; run the same command again to resume") from error
        raise


def on_same_disk(one: Path, other: Path) -> bool:
    return _existing(one).stat().st_dev == _existing(other).stat().st_dev


def _writing_nbytes(tensor: TensorRecipe, block: BlockRecipe, compresses: bool) -> int:
    """Memory of writing a tensor: panels of codes, scales and zeros (written after all codes), and compression; or
    records of rows, in the making and made."""
    nbytes = 0
    # A byte and a tenth of codes, scales and zeros at most for each weight, of which a panel itself has at least two.
    codes_nbytes = rooms_nbytes(min(PANEL_NBYTES, 2 * tensor.numel) * 5 // 8)
    if tensor.by_row:
        return 4 * min(RECORDS_NBYTES, tensor.nbytes(torch.float32)) + codes_nbytes
    if tensor.scheme is not None:
        parts = tensor.scheme.parts(*tensor.matrix)
        nbytes += codes_nbytes
        nbytes += sum(tensor_nbytes(*part) for name, part in parts.items() if name != "q")
    if compresses and is_candidate(tensor, block.role, torch.bfloat16):
        nbytes += min(COMPRESSING_NBYTES, 8 * tensor.numel)
    return nbytes


def _existing(path: Path) -> Path:
    """`path` or the nearest folder above it that exists."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())
