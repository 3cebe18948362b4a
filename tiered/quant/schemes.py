"""How a quantized weight is laid out: its codes, its groups, and the shapes and bytes that follow.

A store records a scheme by its name, the converter follows it, and kernels are chosen by it. It holds no data.

    GroupScheme      w[o, i] = scale[o, i // group_size] * (q[o, i] - zero[o, i // group_size])
    CodebookScheme   w[o, i] = scale[o, i // group_size] * values[q[o, i]]

`scale` is [out, in / group_size], of fp16, or of what belongs to the codebook; so is `zero`, in u8, where there is one.
`q` is u8: at 8 bits one code per byte, [out, in]; at 4 bits two per byte, [out, in / 2], in the order that `pack.py`
describes.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from typing import Final

import torch

from tiered.errors import ConfigError
from tiered.quant.codebook import CODEBOOKS, Codebook

BITS: Final = (4, 8)
GROUP_SIZES: Final = (32, 64, 128)
DEFAULT_GROUP_SIZE: Final = 64

_NAME: Final = re.compile(r"int(\d+)(?:-g(\d+))?")
_CODEBOOK_NAME: Final = re.compile(rf"({'|'.join(CODEBOOKS)})-g(\d+)")


def folded(shape: Sequence[int]) -> tuple[int, int]:
    """(rows, in) of a weight of `shape` [..., in]: a stack's matrices lie one below the other.

    >>> folded((8, 128, 64))
    (1024, 64)
    """
    *leading, in_features = shape
    return prod(leading), in_features


class Scheme:
    """What all schemes have in common: a linear weight [out, in] in groups along `in`, which share a scale."""

    bits: int
    """Per code: 4 or 8."""
    group_size: int
    """Weights along `in` that share a scale: 32, 64 or 128."""

    @staticmethod
    @lru_cache
    def parse(name: str) -> "Scheme":
        """The scheme called `name`: "int4-g64", "int4" for the default group size, or that of a codebook, "mxfp4-g32".

        Raises ConfigError for any other name.
        """
        if (match := _NAME.fullmatch(name)) is not None:
            bits, group_size = match.groups()
            return GroupScheme(int(bits), DEFAULT_GROUP_SIZE if group_size is None else int(group_size))
        if (match := _CODEBOOK_NAME.fullmatch(name)) is not None:
            return CodebookScheme(match[1], int(match[2]))
        raise ConfigError(f"quantization {name!r}: expected a name such as int4-g64, int8-g64 or mxfp4-g32")

    @property
    def name(self) -> str:
        """Its name in options, manifests and block files."""
        raise NotImplementedError

    @property
    def scale_dtype(self) -> torch.dtype:
        """The dtype of `scale`: float16, float32, or uint8, which is an exponent (`codebook.E8M0`)."""
        raise NotImplementedError

    @property
    def has_zero(self) -> bool:
        """Whether there are zeros; `zero` is [out, 0] where there are none."""
        raise NotImplementedError

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
        """Shape of `zero`: that of `scale`, or of no columns where there are no zeros."""
        out, groups = self.scale_shape(out_features, in_features)
        return out, groups if self.has_zero else 0

    def parts(self, out_features: int, in_features: int) -> Mapping[str, tuple[torch.dtype, tuple[int, int]]]:
        """The tensors that a store keeps for a weight, in order: dtype and shape of "q", "scale" and maybe "zero"."""
        shape = out_features, in_features
        parts = {"q": (torch.uint8, self.q_shape(*shape)), "scale": (self.scale_dtype, self.scale_shape(*shape))}
        return {**parts, "zero": (torch.uint8, self.zero_shape(*shape))} if self.has_zero else parts

    def nbytes(self, out_features: int, in_features: int) -> int:
        """Bytes of all parts together, without padding."""
        parts = self.parts(out_features, in_features).values()
        return sum(dtype.itemsize * prod(shape) for dtype, shape in parts)

    def _groups(self, out_features: int, in_features: int) -> int:
        """Groups in one row."""
        if not self.accepts(out_features, in_features):
            raise ConfigError(
                f"weight [{out_features}, {in_features}]: {self.name} expects `in` to be a positive multiple "
                f"of {self.group_size}; keep it 16-bit or choose another group size"
            )
        return in_features // self.group_size


@dataclass(frozen=True)
class GroupScheme(Scheme):
    """Asymmetric integer codes, one scale (fp16) and zero (u8) per group.

    >>> GroupScheme(bits=4).nbytes(1, 64)
    35
    """

    bits: int
    group_size: int = DEFAULT_GROUP_SIZE

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in BITS:
            raise ConfigError(f"quantization bits {self.bits!r}: expected 4 or 8")
        _check_group_size(self.group_size)

    @property
    def name(self) -> str:
        return f"int{self.bits}-g{self.group_size}"

    @property
    def scale_dtype(self) -> torch.dtype:
        return torch.float16

    @property
    def has_zero(self) -> bool:
        return True

    @property
    def max_code(self) -> int:
        """The largest code, 15 or 255, and the largest zero that `quantize` makes. GPTQ's zeros reach 16 at 4 bits,
        which every kernel takes."""
        return (1 << self.bits) - 1


@dataclass(frozen=True)
class CodebookScheme(Scheme):
    """Nibbles that are looked up in one of `CODEBOOKS`, one scale per group and no zeros.

    >>> CodebookScheme("mxfp4", 32).nbytes(1, 64)
    34
    """

    codebook: str
    group_size: int
    bits: int = field(default=4, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.codebook not in CODEBOOKS:
            raise ConfigError(f"codebook {self.codebook!r}: expected one of {', '.join(CODEBOOKS)}")
        _check_group_size(self.group_size)

    @property
    def name(self) -> str:
        return f"{self.codebook}-g{self.group_size}"

    @property
    def scale_dtype(self) -> torch.dtype:
        return self.values.scale_dtype

    @property
    def has_zero(self) -> bool:
        return False

    @property
    def values(self) -> Codebook:
        """What the codes stand for."""
        return CODEBOOKS[self.codebook]


def _check_group_size(group_size: int) -> None:
    if type(group_size) is not int or group_size not in GROUP_SIZES:
        raise ConfigError(f"quantization group size {group_size!r}: expected 32, 64 or 128")
