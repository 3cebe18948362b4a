"""Whether a conversion fits: memory against --ram, bytes against the free disk. Checked before work."""

import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import psutil
import torch

from tiered.convert.compression import Compression, is_candidate
from tiered.convert.recipe import BlockRecipe, TensorRecipe
from tiered.convert.source import PANEL_NBYTES
from tiered.errors import BudgetError, ConfigError, DiskFullError, ReadError
from tiered.store.format import tensor_nbytes
from tiered.units import MIB, format_budget, format_size

_SLACK_NBYTES: Final = 48 * MIB
"""Allocator, threads' stacks, headers: measured, see tests/convert/test_memory.py."""
_SPACE_SLACK_NBYTES: Final = 4 * MIB


def check_ram(ram_bytes: int | None, source_nbytes: int, blocks: Iterable[BlockRecipe], rule: Compression) -> None:
    """Raises BudgetError where the conversion would take more than `ram_bytes` at its peak."""
    if ram_bytes is None:
        return
    now = psutil.Process().memory_info().rss
    largest = max(_tensor_working_nbytes(tensor, block, rule) for block in blocks for tensor in block.tensors)
    working = source_nbytes + 2 * PANEL_NBYTES + largest + _SLACK_NBYTES
    needed = max(peak_rss_bytes(), now + working)
    if needed > ram_bytes:
        raise BudgetError(
            f"--ram {format_budget(ram_bytes)}: converting this takes up to {format_budget(needed)} "
            f"({format_size(now)} for the interpreter and its libraries, {format_size(source_nbytes)} to read and "
            f"quantize the source, {format_size(working - source_nbytes)} to write); "
            f"pass at least --ram {format_budget(needed)}",
            smallest_bytes=needed,
        )


def check_space(folder: Path, needed_nbytes: int, reclaimed_nbytes: int = 0) -> None:
    """Raises DiskFullError where the disk of `folder` lacks room for `needed_nbytes` more."""
    free = shutil.disk_usage(_existing(folder)).free + reclaimed_nbytes
    needed = needed_nbytes + _SPACE_SLACK_NBYTES
    if needed > free:
        raise DiskFullError(
            f"{folder}: the store needs {format_size(needed)}, the disk has {format_size(free)} free; "
            "free some space or choose a folder on another disk with -o"
        )


@contextmanager
def os_errors_named(folder: Path) -> Iterator[None]:
    """Turn what the operating system refuses anywhere inside the block into errors that say what to do."""
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


def peak_rss_bytes() -> int:
    """VmHWM of this process."""
    for line in Path(f"/proc/{os.getpid()}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return int(psutil.Process().memory_info().rss)


def _tensor_working_nbytes(tensor: TensorRecipe, block: BlockRecipe, rule: Compression) -> int:
    """What grows with a tensor: its scales and zeros wait for the codes to be written, a payload for its table."""
    nbytes = 0
    if tensor.scheme is not None:
        scale = tensor.scheme.scale_shape(*tensor.matrix)
        nbytes += tensor_nbytes(torch.float16, scale) + tensor_nbytes(torch.uint8, scale)
    if rule.mode != "none" and is_candidate(tensor, block.role):
        # The frames, and once more while they are joined.
        nbytes += 2 * tensor.numel * (1 if tensor.scheme is not None else 4)
    return nbytes


def _existing(path: Path) -> Path:
    """`path` or the nearest folder above it that exists."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())
