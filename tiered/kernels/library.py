"""The native library: found, checked, and described to ctypes. Nothing here computes.

In: the file that the package's build left beside this module. Out: a `Library`, or the reason why there is none, which
`tiered doctor` shows. Called by `kernels.py`.
"""

import ctypes
import functools
import os
from collections.abc import Sequence
from ctypes import POINTER, c_char_p, c_int32, c_int64, c_void_p
from enum import IntEnum
from pathlib import Path
from typing import Final

from tiered.errors import ConfigError

LIBRARY_PATH: Final = Path(__file__).with_name("libtiered_kernels.so")
LIBRARY_VARIABLE: Final = "TIERED_KERNEL_LIBRARY"
"""Environment variable that names another file, for developers: a build for sanitizers, or one that emulates tiles."""
ABI_VERSION: Final = 7


class Level(IntEnum):
    """Instruction sets a kernel is written for, each a superset of the one before it."""

    SCALAR = 0
    AVX2 = 1
    AVX512 = 2
    AMX = 3


class Status(IntEnum):
    """What a native call returns."""

    OK = 0
    CANCELLED = 1
    BAD_ARGUMENT = 2
    NO_MEMORY = 3
    NOT_FINITE = 4


class Dtype(IntEnum):
    """Element types of activations, of weights to be quantized and of a codebook's scales; codes to be looked up."""

    BF16 = 0
    F32 = 1
    F16 = 2
    E8M0 = 3
    CODE8 = 4
    CODE4 = 5


class Format(IntEnum):
    """How a weight is stored."""

    INT4 = 0
    INT8 = 1
    DENSE_BF16 = 2
    CODEBOOK = 3


class WeightArgument(ctypes.Structure):
    """tk_weight of tiered_kernels.h."""

    _fields_ = [
        ("format", c_int32),
        ("group", c_int32),
        ("out", c_int64),
        ("in_", c_int64),
        ("q", c_void_p),
        ("scale", c_void_p),
        ("zero", c_void_p),
        ("values", c_void_p),
        ("scale_dtype", c_int32),
    ]


class LookupArgument(ctypes.Structure):
    """tk_lookup of tiered_kernels.h."""

    _fields_ = [
        ("table", c_void_p),
        ("scale", c_void_p),
        ("zero", c_void_p),
        ("groups", c_int64),
        ("group", c_int64),
    ]


_FUNCTIONS: Final[dict[str, tuple[object, Sequence[object]]]] = {
    "tk_abi_version": (c_int32, []),
    "tk_refusal": (c_char_p, [c_int32]),
    "tk_create": (c_void_p, [c_int32, c_int32]),
    "tk_destroy": (None, [c_void_p]),
    "tk_scratch_nbytes": (c_int64, [c_void_p]),
    "tk_trim": (None, [c_void_p]),
    "tk_linear": (
        c_int32,
        [
            *(c_void_p, POINTER(WeightArgument), c_void_p, c_int64, c_int64, c_void_p, c_int32),
            *(c_void_p, c_int64, c_int32, c_int32, c_void_p),
        ],
    ),
    "tk_dequantize": (c_int32, [c_void_p, POINTER(WeightArgument), c_int64, c_int64, c_void_p, c_int32]),
    "tk_by_head": (
        c_int32,
        [
            *(c_void_p, c_void_p, c_int64, c_int64, c_int64, c_int64, c_int32),
            *(c_void_p, c_int64, POINTER(c_int64), c_void_p, POINTER(c_int64), c_void_p),
        ],
    ),
    "tk_repack": (c_int32, [c_void_p, c_int64, c_int32, c_int64, c_int64, c_int32, c_int32, c_void_p]),
    "tk_widen": (
        c_int32,
        [
            *(c_void_p, c_int32, c_void_p, c_int64, c_int64, c_void_p),
            *(c_void_p, c_int64, c_int64, c_void_p, c_void_p),
        ],
    ),
    "tk_read_rows": (c_int64, [c_int32, c_int64, c_int64, c_int64, c_int64, c_void_p]),
    "tk_encode_planes": (c_int64, [c_int32, c_void_p, c_int64, c_void_p, c_int64]),
    "tk_decode_planes": (c_int32, [c_int32, c_void_p, POINTER(c_int64), c_int64, c_int64, c_void_p, c_int64]),
    **dict.fromkeys(
        ("tk_attention", "tk_delta_step", "tk_scan_step", "tk_conv"), (c_int32, [c_void_p, c_void_p, c_void_p])
    ),
    "tk_quantize": (
        c_int32,
        [
            *(c_void_p, c_void_p, c_int32, c_int64, c_int64, c_int64, c_int32, c_int32, c_int32),
            *(c_void_p, c_void_p, c_void_p, POINTER(LookupArgument), c_void_p),
        ],
    ),
}


class Library:
    """The opened library. Its functions are attributes, named as in tiered_kernels.h; calls release the GIL."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError where `path` is missing, cannot be opened, or belongs to another version."""
        refusal = path.with_name(path.name + ".refusal")
        if not path.exists():
            why = refusal.read_text().strip() if refusal.exists() else "the package's build has not been run"
            raise ConfigError(f"{path.name} was not built: {why}")
        self._best: Level | None = None
        try:
            self._opened = ctypes.CDLL(str(path))
            version = self._opened.tk_abi_version()
        except (OSError, AttributeError) as error:
            raise ConfigError(f"{path.name} cannot be used: {error}; install tiered again") from None
        if version != ABI_VERSION:
            raise ConfigError(
                f"{path.name} has interface version {version}, expected {ABI_VERSION}: it was built from other "
                "sources; install tiered again"
            )
        for name, (result, arguments) in _FUNCTIONS.items():
            try:
                function = getattr(self._opened, name)
            except AttributeError as error:
                raise ConfigError(f"{path.name} is out of date: {error}; install tiered again") from None
            function.restype, function.argtypes = result, list(arguments)

    def __getattr__(self, name: str) -> "ctypes._NamedFuncPointer":
        if name not in _FUNCTIONS:
            raise AttributeError(name)
        return getattr(self._opened, name)  # type: ignore[no-any-return]

    def refusal(self, level: Level) -> str | None:
        """Why `level` cannot run here; None where it can."""
        text: bytes | None = self.tk_refusal(int(level))
        return None if text is None else text.decode()

    def best_level(self) -> Level:
        """The fastest instruction set that can run here."""
        if self._best is None:  # asked for once per tensor; a virtual machine's host answers each question
            self._best = next(level for level in reversed(Level) if self.refusal(level) is None)
        return self._best


@functools.cache
def load_library() -> Library | str:
    """The library, or why there is none. Opened once per process."""
    try:
        return Library(Path(os.environ.get(LIBRARY_VARIABLE) or LIBRARY_PATH))
    except ConfigError as error:
        return str(error)
