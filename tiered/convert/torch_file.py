"""What a file that `torch.save` wrote holds, and where in it the values of its tensors lie: none is read.

In: a path. Out: the pickled object with a `TorchTensor` for each tensor, and placeholders for what is neither a tensor
nor a plain container (configurations of training programs). Nothing is imported or called that a pickle names. Both
formats of torch are read: the zip of today, and the one of before torch 1.6.
"""

import errno
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from math import prod
from pathlib import Path
from pickle import BYTEARRAY8
from typing import IO, Any, ClassVar, Final, NoReturn

import torch

from tiered.convert.gather import Extent, Region, cut
from tiered.convert.torch_reader import ZIP_MAGIC
from tiered.errors import CheckpointError, ReadError, shortened
from tiered.files import check_regular

_STORAGES: Final = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_DTYPES: Final = {str(dtype).removeprefix("torch."): dtype for dtype in _STORAGES.values()}
_ZIP_ENTRY: Final = struct.Struct("<4s22xHH")
"""What a file in a zip begins with: magic, and how long its name and further fields are."""
_LEGACY_MAGIC: Final = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION: Final = 1001
_MOST_PICKLED_NBYTES: Final = 256 << 20
"""Names, shapes and settings of the largest checkpoints take a few MB."""
_MOST_LINE_NBYTES: Final = 1 << 16
_REMEDY: Final = "download the file again"


class _Fixed:
    """An object whose state a pickle cannot set."""

    __slots__ = ()

    def __setstate__(self, state: object) -> NoReturn:
        raise pickle.UnpicklingError("sets the state of a tensor")


class _Storage(_Fixed):
    __slots__ = ("dtype", "numel", "offset")

    def __init__(self, dtype: torch.dtype, numel: int, offset: int = 0) -> None:
        self.dtype, self.numel, self.offset = dtype, numel, offset

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


class TorchTensor(_Fixed):
    """A tensor of the file: part of a storage."""

    __slots__ = ("_start", "_storage", "_stride", "shape")

    def __init__(self, storage: Any, start: Any, shape: Any, stride: Any, *_: object) -> None:
        """As `torch._utils._rebuild_tensor_v2` is called; raises UnpicklingError for what makes no tensor."""
        counts = (start, *shape, *stride)
        if not isinstance(storage, _Storage) or len(shape) != len(stride):
            raise pickle.UnpicklingError("a tensor without storage or strides")
        if not all(type(count) is int and count >= 0 for count in counts):
            raise pickle.UnpicklingError("a tensor of impossible shape")
        last = start + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        if 0 not in shape and last >= storage.numel:
            raise pickle.UnpicklingError(f"a tensor of shape {list(shape)} in a storage of {storage.numel:,} values")
        self._storage, self._start = storage, start
        self.shape: tuple[int, ...] = tuple(shape)
        self._stride: tuple[int, ...] = tuple(stride)

    def region(self, path: Path, name: str) -> Region:
        """Where in `path`, from which it was read, its values are; raises CheckpointError where they are not in
        order. `name` is what the error calls it."""
        expected = 1
        for size, step in zip(reversed(self.shape), reversed(self._stride), strict=True):
            if size > 1 and step != expected:
                raise CheckpointError(
                    f"{path}: the values of {name} are not in order (shape {list(self.shape)}, strides "
                    f"{list(self._stride)}); save it with .contiguous()"
                )
            expected *= size
        dtype, storage = self._storage.dtype, self._storage
        whole = (Extent(path, storage.offset, storage.nbytes),)
        return Region(dtype, self.shape, cut(whole, self._start * dtype.itemsize, prod(self.shape) * dtype.itemsize))


class _Inert:
    """Stands for an object that is neither tensor nor container: takes whatever a pickle does to it, and is not
    changed by it."""

    __slots__ = ()

    def __new__(cls, *_: object, **__: object) -> "_Inert":
        return object.__new__(cls)

    def __call__(self, *_: object, **__: object) -> "_Inert":
        return self

    def __setstate__(self, state: object) -> None: ...

    def __setitem__(self, key: object, value: object) -> None: ...

    def append(self, item: object) -> None: ...

    def extend(self, items: object) -> None: ...

    def add(self, item: object) -> None: ...

    def update(self, items: object) -> None: ...


class _Parameter(_Fixed):
    """Called in place of the functions that make a parameter of a tensor."""

    __slots__ = ()

    def __call__(self, tensor: object, *_: object) -> object:
        return tensor


# The one written in Python: the other's list of remembered objects is as long as the largest number in a pickle.
class _Unpickler(pickle._Unpickler):
    # Without what fills memory of the length that a pickle claims before it reads: torch does not write it.
    dispatch: ClassVar = {code: load for code, load in pickle._Unpickler.dispatch.items() if code != BYTEARRAY8[0]}

    def __init__(self, file: Any, storages: "_Storages") -> None:
        super().__init__(file, encoding="utf-8")
        self._storages = storages

    def find_class(self, module: str, name: str) -> Any:
        if module in ("torch", "torch.cuda") and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if module == "torch._utils" and name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
            return TorchTensor
        if module == "torch._utils" and name in ("_rebuild_parameter", "_rebuild_parameter_with_state"):
            return _Parameter()
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch", "Size"):
            return tuple
        return _Inert

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, numel, *view = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or type(numel) is not int or numel < 0:
            raise pickle.UnpicklingError("a storage of unknown kind")
        if any(part is not None for part in view):
            raise pickle.UnpicklingError("a storage that is part of another, as before torch 0.4")
        return self._storages.at(str(key), dtype, numel)


class _Storages:
    """The storages of a file, by their keys. Those of the old format follow what is pickled: `offset` comes later."""

    def __init__(self, path: Path, zipped: "_Zip | None" = None) -> None:
        self._path, self._zip = path, zipped
        self.found: dict[str, _Storage] = {}

    def at(self, key: str, dtype: torch.dtype, numel: int) -> _Storage:
        if key not in self.found:
            storage = self.found[key] = _Storage(dtype, numel)
            if self._zip is not None:
                storage.offset = self._zip.extent(f"data/{key}", storage.nbytes).offset
        storage = self.found[key]
        if (storage.dtype, storage.numel) != (dtype, numel):
            raise pickle.UnpicklingError(f"storage {key} has two sizes")
        return storage


class _Zip:
    """Where the files in a zip are, none of which is compressed."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self._fd, self._path = file.fileno(), path
        self._entries = {entry.filename: entry for entry in zipfile.ZipFile(file).infolist()}
        self._nbytes = os.fstat(self._fd).st_size
        (pickled,) = [name for name in self._entries if name == "data.pkl" or name.endswith("/data.pkl")] or [""]
        if not pickled:
            raise CheckpointError(f"{path}: a zip without data.pkl, expected one that torch.save wrote; {_REMEDY}")
        self._root = pickled.removesuffix("data.pkl")
        if self.read("byteorder", b"little") != b"little":
            raise CheckpointError(f"{path}: its tensors are big-endian; save them anew on a little-endian machine")

    def read(self, name: str, default: bytes | None = None) -> bytes:
        """The file `name`, or `default` where there is none."""
        if default is not None and self._root + name not in self._entries:
            return default
        _, offset, nbytes = self.extent(name)
        if nbytes > _MOST_PICKLED_NBYTES:
            raise CheckpointError(f"{self._path}: {name} has {nbytes:,} bytes, expected names and shapes; {_REMEDY}")
        return os.pread(self._fd, nbytes, offset)

    def extent(self, name: str, least_nbytes: int = 0) -> Extent:
        """The bytes of the file `name`, at least so many."""
        entry = self._entries.get(self._root + name)
        if entry is None:
            raise CheckpointError(f"{self._path}: lacks its own part {name}; {_REMEDY}")
        magic, name_nbytes, extra_nbytes = _ZIP_ENTRY.unpack(os.pread(self._fd, _ZIP_ENTRY.size, entry.header_offset))
        offset = entry.header_offset + _ZIP_ENTRY.size + name_nbytes + extra_nbytes
        if magic != ZIP_MAGIC or entry.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(f"{self._path}: its part {name} is damaged or compressed; {_REMEDY}")
        if entry.file_size < least_nbytes or offset + entry.file_size > self._nbytes:
            raise CheckpointError(
                f"{self._path}: its part {name} has {min(entry.file_size, self._nbytes - offset):,} bytes, expected "
                f"{max(entry.file_size, least_nbytes):,}; {_REMEDY}"
            )
        return Extent(self._path, offset, entry.file_size)


class _Limited:
    """A file of which a pickle is read: the lengths it claims are believed up to a limit."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def read(self, nbytes: int) -> bytes:
        if nbytes > _MOST_PICKLED_NBYTES:
            raise pickle.UnpicklingError(f"a text of {nbytes:,} bytes")
        return self._file.read(nbytes)

    def readline(self) -> bytes:
        return self._file.readline(_MOST_LINE_NBYTES)


def load_torch_file(path: Path) -> Any:
    """What `path` holds; raises CheckpointError where it is damaged or in no format of torch."""
    try:
        check_regular(path, CheckpointError)
        with _explained(path), path.open("rb") as file:
            magic = file.read(len(ZIP_MAGIC))
            file.seek(0)
            if magic != ZIP_MAGIC:
                return _load_legacy(path, file)
            zipped = _Zip(file, path)
            return _Unpickler(BytesIO(zipped.read("data.pkl")), _Storages(path, zipped)).load()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; put it back") from None


def _load_legacy(path: Path, file: IO[bytes]) -> Any:
    storages, limited = _Storages(path), _Limited(file)

    def load() -> Any:
        return _Unpickler(limited, storages).load()

    magic, version = load(), load()
    if (magic, version) != (_LEGACY_MAGIC, _LEGACY_VERSION):
        raise pickle.UnpicklingError("not what torch.save writes")
    system = load()
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise CheckpointError(f"{path}: its tensors are big-endian; save them anew on a little-endian machine")
    loaded, keys = load(), load()
    offset, nbytes = file.tell(), os.fstat(file.fileno()).st_size
    for key in keys:
        storage = storages.found[key]
        if int.from_bytes(os.pread(file.fileno(), 8, offset), "little") != storage.numel:
            raise CheckpointError(f"{path}: has no storage of {storage.numel:,} values at byte {offset:,}; {_REMEDY}")
        storage.offset = offset + 8
        offset = storage.offset + storage.nbytes
    if offset > nbytes or len(set(keys)) != len(storages.found):
        raise CheckpointError(f"{path}: has {nbytes:,} bytes, expected {offset:,}; {_REMEDY}")
    return loaded


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn whatever damaged input raises into a CheckpointError."""
    try:
        yield
    except (CheckpointError, FileNotFoundError):
        raise
    except Exception as error:
        # An impossible offset in the file is its own mistake (EINVAL), all others are the system's.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise ReadError(f"{path}: cannot be read: {error.strerror}") from error
        raise CheckpointError(
            f"{path}: cannot be read as a torch checkpoint ({type(error).__name__}: {shortened(error)}); pickled code "
            f"is never run: {_REMEDY}"
        ) from None
