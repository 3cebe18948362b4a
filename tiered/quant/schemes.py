"""How a quantized weight is laid out: its bits, its groups, and the shapes and bytes that follow.

A store records a scheme by its name, the converter follows it, and kernels are chosen by it. It holds no data.

    w[o, i] = scale[o, i // group_size] * (q[o, i] - zero[o, i // group_size])

`scale` is fp16 and `zero` u8, both [out, in / group_size]. `q` is u8: at 8 bits one code per byte, [out, in];
at 4 bits two per byte, [out, in / 2], in the order that `pack.py` describes.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Final, Self

from tiered.errors import ConfigError

BITS: Final = (4, 8)
GROUP_SIZES: Final = (32, 64, 128)
DEFAULT_GROUP_SIZE: Final = 64

_NAME = re.compile(r"int(\d+)(?:-g(\d+))?")
_SCALE_NBYTES: Final = 2  # fp16
_ZERO_NBYTES: Final = 1  # u8


def folded(shape: Sequence[int]) -> tuple[int, int]:
    """(rows, in) of a weight of `shape` [..., in]: a stack's matrices lie one below the other.

    >>> folded((8, 128, 64))
    (1024, 64)
    """
    *leading, in_features = shape
    return prod(leading), in_features


@dataclass(frozen=True)
class GroupScheme:
    """A linear weight [out, in] in asymmetric integer codes, one scale and zero per group along `in`.

    >>> GroupScheme(bits=4).nbytes(1, 64)
    35
    """

    bits: int  # per code: 4 or 8
    group_size: int = DEFAULT_GROUP_SIZE  # weights along `in` that share a scale and a zero: 32, 64 or 128

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in BITS:
            raise ConfigError(f"quantization bits {self.bits!r}: expected 4 or 8")
        if type(self.group_size) is not int or self.group_size not in GROUP_SIZES:
            raise ConfigError(f"quantization group size {self.group_size!r}: expected 32, 64 or 128")

    @classmethod
    @lru_cache
    def parse(cls, name: str) -> Self:
        """The scheme called `name`: "int4-g64", or "int4" for the default group size."""
        match = _NAME.fullmatch(name)
        if match is None:
            raise ConfigError(f"quantization {name!r}: expected a name such as int4-g64 or int8-g64")
        bits, group_size = match.groups()
        return cls(int(bits), DEFAULT_GROUP_SIZE if group_size is None else int(group_size))

    @property
    def name(self) -> str:
        """Its name in options, manifests and block files: "int4-g64"."""
        return f"int{self.bits}-g{self.group_size}"

    @property
    def max_code(self) -> int:
        """The largest code and the largest zero: 15 or 255."""
        return (1 << self.bits) - 1

    @property
    def group_q_nbytes(self) -> int:
        """Bytes that one group's codes take."""
        return self.group_size * self.bits // 8

    def accepts(self, out_features: int, in_features: int) -> bool:
        """Whether a weight of this shape can be held; one that cannot stays 16-bit."""
        return out_features > 0 and in_features > 0 and in_features % self.group_size == 0

    def q_shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        """Shape of `q`: [out, in] at 8 bits, [out, in / 2] at 4."""
        return out_features, self._groups(out_features, in_features) * self.group_q_nbytes

    def scale_shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        """Shape of `scale`: [out, in / group_size]."""
        return out_features, self._groups(out_features, in_features)

    def zero_shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        """Shape of `zero`, which is that of `scale`."""
        return self.scale_shape(out_features, in_features)

    def nbytes(self, out_features: int, in_features: int) -> int:
        """Bytes of `q`, `scale` and `zero` together, without padding."""
        groups = out_features * self._groups(out_features, in_features)
        return groups * (self.group_q_nbytes + _SCALE_NBYTES + _ZERO_NBYTES)

    def _groups(self, out_features: int, in_features: int) -> int:
        """Groups in one row."""
        if not self.accepts(out_features, in_features):
            raise ConfigError(
                f"weight [{out_features}, {in_features}]: {self.name} expects `in` to be a positive multiple "
                f"of {self.group_size}; keep it 16-bit or choose another group size"
            )
        return in_features // self.group_size
