"""Mounts an OPT checkpoint of any size whose bytes are made when they are read, to convert models larger than the disk.

    python -m tools.fuse_checkpoint MOUNTPOINT configs/models/opt-175b.toml --layers 24 [--parts 8] [--shards 124]

    MOUNTPOINT/raw            metaseq's checkpoint_last-model_part-P-shardS.pt; these have no config.json, so:
                              tiered convert MOUNTPOINT/shape.toml --from MOUNTPOINT/raw -o OUT
    MOUNTPOINT/huggingface    the same model: tiered convert MOUNTPOINT/huggingface -o OUT

It runs until it is unmounted (`umount MOUNTPOINT`, or Ctrl-C), and says then what was read and what making it took.
Reads bypass the page cache, so that none of it counts as the converter's memory. Needs Linux's FUSE (/dev/fuse, the
package fuse3) and the Python package pyfuse3 (`pip install pyfuse3`).
"""

import argparse
import errno
import os
import resource
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

try:
    import pyfuse3
    import trio
except ImportError as missing:
    raise SystemExit(f"{missing}; 'pip install pyfuse3' (which needs libfuse3-dev and pkg-config to build)") from None

from tiered.convert.synthetic import ShapeFile
from tiered.errors import TieredError
from tiered.units import format_size, parse_size
from tools.made_checkpoint import MadeFile, MadeModel

Folder = Mapping[str, "MadeFile | Folder"]
_ROOT: Final = int(pyfuse3.ROOT_INODE)
_FOREVER_SECONDS: Final = 3600.0


class MadeFolder(pyfuse3.Operations):  # type: ignore[misc, unused-ignore]
    """The calls of FUSE over a tree of made files, which is never changed."""

    def __init__(self, root: Folder) -> None:
        super().__init__()
        self.nbytes_read = 0
        # An inode's number is its place in these, from _ROOT on.
        self._nodes: list[MadeFile | Folder] = []
        self._children: dict[int, dict[bytes, int]] = {}
        self._number(root)

    def _number(self, node: "MadeFile | Folder") -> int:
        inode = len(self._nodes) + _ROOT
        self._nodes.append(node)
        if not isinstance(node, MadeFile):
            self._children[inode] = {os.fsencode(name): self._number(child) for name, child in node.items()}
        return inode

    def _node(self, inode: int) -> "MadeFile | Folder":
        return self._nodes[inode - _ROOT]

    async def getattr(self, inode: int, ctx: Any = None) -> Any:
        return self._attributes(inode)

    async def lookup(self, parent_inode: int, name: bytes, ctx: Any = None) -> Any:
        inode = self._children.get(parent_inode, {}).get(name)
        if inode is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return self._attributes(inode)

    async def opendir(self, inode: int, ctx: Any) -> int:
        return inode

    async def readdir(self, fh: int, start_id: int, token: Any) -> None:
        entries = list(self._children[fh].items())
        for number in range(start_id, len(entries)):
            name, inode = entries[number]
            if not pyfuse3.readdir_reply(token, name, self._attributes(inode), number + 1):
                break

    async def open(self, inode: int, flags: int, ctx: Any) -> Any:
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise pyfuse3.FUSEError(errno.EROFS)
        return pyfuse3.FileInfo(fh=inode, direct_io=True)

    async def read(self, fh: int, off: int, size: int) -> bytes | memoryview:
        node = self._node(fh)
        assert isinstance(node, MadeFile)
        data = node.read(off, size)
        self.nbytes_read += len(data)
        return data

    def _attributes(self, inode: int) -> Any:
        node = self._node(inode)
        found = pyfuse3.EntryAttributes()
        found.st_ino = inode
        found.entry_timeout = found.attr_timeout = _FOREVER_SECONDS
        if isinstance(node, MadeFile):
            found.st_mode, found.st_size = stat.S_IFREG | 0o444, node.nbytes
        else:
            found.st_mode = stat.S_IFDIR | 0o555
        return found


@contextmanager
def mounted(folder: MadeFolder, place: Path) -> Iterator[threading.Thread]:
    """`folder` mounted at the empty folder `place`, served by the thread, which ends when it is unmounted.

    Raises RuntimeError where it cannot be mounted.
    """
    pyfuse3.init(folder, str(place), {*pyfuse3.default_options, "fsname=made", "ro"})
    thread = threading.Thread(target=trio.run, args=(pyfuse3.main,), name="fuse", daemon=True)
    thread.start()
    try:
        yield thread
    finally:
        # It may be unmounted already: that is how it usually ends.
        subprocess.run(["fusermount3", "-u", str(place)], check=False, capture_output=True)
        thread.join()
        pyfuse3.close(unmount=False)


def both_forms(model: MadeModel, name: str, parts: int, shards: int, shard_nbytes: int) -> Folder:
    """The tree that is mounted: one model in both forms."""
    raw, huggingface = model.raw(parts, shards), model.huggingface(shard_nbytes)
    return {"raw": raw, "huggingface": huggingface, "shape.toml": model.shape(name)}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.fuse_checkpoint", description="Mounts a checkpoint that is made when it is read."
    )
    parser.add_argument("mountpoint", type=Path, help="an empty folder")
    parser.add_argument("shape", type=Path, help="a toml file of an OPT's shape, such as configs/models/opt-175b.toml")
    parser.add_argument("--layers", type=int, help="as many instead of the shape's")
    parser.add_argument("--parts", type=int, default=8, help="model-parallel parts (default: 8)")
    parser.add_argument("--shards", type=int, default=124, help="shards of each part (default: 124)")
    parser.add_argument("--shard-size", default="10GB", help="of safetensors files, at most (default: 10GB)")
    options = parser.parse_args(arguments)
    try:
        shape = ShapeFile.read(options.shape)
        model, size = MadeModel.of_shape(shape, options.layers), parse_size(options.shard_size)
    except TieredError as error:
        print(f"fuse_checkpoint: error: {error}", file=sys.stderr)
        return error.exit_code
    for number in (signal.SIGTERM, signal.SIGINT):  # the second is ignored where a script starts this with &
        signal.signal(number, signal.default_int_handler)
    folder = MadeFolder(both_forms(model, shape.name, options.parts, options.shards, size))
    before = resource.getrusage(resource.RUSAGE_SELF)
    with mounted(folder, options.mountpoint) as thread, suppress(KeyboardInterrupt):
        print(f"{options.mountpoint}: mounted; 'umount {options.mountpoint}' ends this", flush=True)
        thread.join()
    after = resource.getrusage(resource.RUSAGE_SELF)
    user, system = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
    print(f"{format_size(folder.nbytes_read)} read; {user:.1f} s of processor time here, {system:.1f} s in the kernel")
    return 0


if __name__ == "__main__":
    sys.exit(main())
