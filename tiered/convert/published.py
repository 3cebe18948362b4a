"""The quantized formats in which checkpoints are published: which tensors hold a weight, and what they hold of it.

In: the tensors of one weight, by the part of it that they are. Out: its `Format`. What a format says of itself in
config.json is often out of date, and to believe it gives another model without an error: bits, groups, orders and zeros
are taken from the tensors, and what they leave open from config.json, as `Settings`. `kinds.py` says which function is
for which tensors.

Every function raises ValueError where the tensors are not what it expects of its format.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, prod, sqrt
from typing import Any, Final

import torch
from torch import Tensor

from tiered.convert.formats import Floats, Format, Group, Integers, Read, Table, group_scheme
from tiered.convert.source import StoredTensor
from tiered.quant import CODEBOOKS, CodebookScheme, Scheme
from tiered.quant.published import published_codes
from tiered.quant.schemes import GROUP_SIZES

_SAMPLE_ROWS: Final = 64
"""Rows whose mean tells whether zeros are stored as they are."""
_SURE: Final = 3
"""Deviations of that mean that it is on the other side of half a step at least, where it is believed. A step is 0.4 of
the weights' deviation in 4 bits, and 0.02 in 8, of which a row of 4096 has a mean that is 0.7 steps from zero."""
_EXPONENTS: Final = (torch.uint8, torch.float8_e8m0fnu)
"""Dtypes of scales that are powers of two."""

Parts = Mapping[str, StoredTensor]


@dataclass(frozen=True)
class Settings:
    """What config.json says of the quantization, as far as tensors do not tell."""

    block: tuple[int, int] = (128, 128)
    """Rows and columns of an FP8 weight that share a scale, the last ones cut off."""
    zeros_as_they_are: bool = False
    """GPTQ's zeros are stored as they are ("gptq_v2"), not one less."""


def gptq(parts: Parts, read: Read, settings: Settings) -> Format:
    """`qweight` i32 [in * bits / 32, out], `qzeros` i32 [groups, out * bits / 32], `scales` [groups, out] and `g_idx`
    [in], the group of each column. AWQ has the same names, but words along `out`.
    """
    (words, out), (groups, width) = parts["qweight"].shape, parts["scales"].shape
    _check_dtypes(parts, words=("qweight", "qzeros"), scale="scales")
    if width == 8 * out:
        return _awq(parts)
    bits, rest = divmod(32 * parts["qzeros"].shape[-1], out)
    _expect(width == out and not rest and parts["qzeros"].shape[0] == groups, "qweight, qzeros and scales that fit")
    _expect(bits in (2, 4, 8), f"2, 4 or 8 bits, found {bits}")
    in_ = 32 * words // bits
    order = _group_of("g_idx", parts, read, in_, groups)
    per, (offset, most, is_certain) = 32 // bits, _zero_offset(bits, read, settings)
    scheme = group_scheme(bits, in_ // groups) if order is None and most < 256 else None

    def unpack(read: Read, rows: range) -> Group:
        first = rows.start // per
        words = read("qzeros", columns=range(first, -(-rows.stop // per)))
        zero = published_codes(words, "rows", bits)[:, rows.start - first * per :][:, : len(rows)]
        # One more than 15 is 16, as in auto-gptq's layer for any order of columns.
        zero = zero.to(torch.int16) + offset
        scale = read("scales", columns=rows).t()
        return Group(read("qweight", columns=rows), "columns", bits, scale, zero.t())

    stored = replace(_stored((out, in_), f"gptq int{bits}", scheme), is_certain=is_certain)
    return Integers(stored, unpack, order)


def _zero_offset(bits: int, read: Read, settings: Settings) -> tuple[int, int, bool]:
    """What is to be added to GPTQ's zeros, 1, or 0 where they are stored as they are; the largest zero; and whether
    tensors tell so.

    Symmetric weights have the middle for a zero, so what is stored tells. Of others the mean does: it is close to 0,
    so codes are as much above as below the zero. Raises ValueError where that is not what config.json says. In 8 bits
    config.json is believed: half a step is a hundredth of weights' deviation there, and their mean may be that far off.
    """
    zeros, middle = published_codes(read("qzeros"), "rows", bits), 1 << (bits - 1)
    low, high = (int(end) for end in zeros.aminmax())
    if low == high and low in (middle - 1, middle):
        return middle - low, middle, True
    offset = 0 if settings.zeros_as_they_are else 1
    if bits == 8:
        return offset, high + offset, False
    rows = range(min(_SAMPLE_ROWS, zeros.shape[1]))
    q = published_codes(read("qweight", columns=rows), "columns", bits)
    found = q.float().mean(1) - zeros[:, : len(rows)].float().mean(0)
    # Of a single row nothing tells how far its mean is from zero by chance.
    deviation = float(found.std()) / sqrt(len(rows)) if len(rows) > 1 else inf
    beyond = float(found.mean() - 0.5) if offset == 0 else float(0.5 - found.mean())
    said, other = ("as they are", "less one") if offset == 0 else ("less one", "as they are")
    _expect(
        beyond <= _SURE * deviation,
        f"zeros that are stored {said}, as config.json says (checkpoint_format: gptq or gptq_v2); but weights have "
        f"a mean of zero where they are stored {other}",
    )
    return offset, high + offset, True


def _awq(parts: Parts) -> Format:
    """`qweight` i32 [in, out / 8], `qzeros` i32 [groups, out / 8], `scales` [groups, out]; zeros are as they are."""
    (in_, words), (groups, out) = parts["qweight"].shape, parts["scales"].shape
    fits = in_ % groups == 0 and parts["qzeros"].shape == (groups, words)
    _expect(fits and "g_idx" not in parts, "qweight, qzeros and scales of the version gemm")

    def unpack(read: Read, rows: range) -> Group:
        words = range(rows.start // 8, -(-rows.stop // 8))
        skipped = rows.start - 8 * words.start
        zero = published_codes(read("qzeros", columns=words), "awq", 4)[skipped:][: len(rows)]
        scale = read("scales", columns=rows).t()
        return Group(read("qweight", columns=words), "awq", 4, scale, zero, skipped)

    return Integers(_stored((out, in_), "awq int4", group_scheme(4, in_ // groups)), unpack)


def packed(parts: Parts, read: Read, settings: Settings) -> Format:
    """What compressed-tensors calls `weight_packed`: integers in words, or nibbles of floats in bytes."""
    if parts["weight_packed"].dtype == torch.uint8:
        divisor = "weight_global_scale" if "weight_global_scale" in parts else None
        return _fp4(parts, "weight_packed", "weight_scale", read, divisor=divisor)
    has_zero = "weight_zero_point" in parts
    _check_dtypes(parts, ("weight_packed", *(["weight_zero_point"] if has_zero else [])), "weight_scale")
    _expect("weight_shape" in parts, "a tensor weight_shape beside it")
    out, in_ = (int(size) for size in read("weight_shape").view(-1))
    words = parts["weight_packed"].shape[1]
    bits = 32 * words // in_
    whole = 32 * words == in_ * bits and parts["weight_packed"].shape[0] == out
    _expect(whole and bits in (2, 4, 8), f"2, 4 or 8 bits, found {words} words for rows of {in_}")
    groups = _columns(parts["weight_scale"], out)
    order = _group_of("weight_g_idx", parts, read, in_, groups)
    scheme = group_scheme(bits, in_ // groups) if order is None else None
    per = 32 // bits
    _expect(not has_zero or parts["weight_zero_point"].shape == (-(-out // per), groups), f"zeros of {groups} groups")

    def unpack(read: Read, rows: range) -> Group:
        words, scale = read("weight_packed", rows), _rows(read, parts, "weight_scale", rows)
        # Numbers are signed, and what is stored is that much more: zeros too.
        zero = torch.full(scale.shape, 1 << (bits - 1), dtype=torch.uint8)
        if has_zero:
            first = rows.start // per
            zeros = read("weight_zero_point", range(first, -(-rows.stop // per)))
            zero = published_codes(zeros, "columns", bits)[:, rows.start - first * per :][:, : len(rows)].t()
        return Group(words, "rows", bits, scale, zero)

    return Integers(_stored((out, in_), f"compressed-tensors int{bits}", scheme), unpack, order)


def scaled(parts: Parts, read: Read, settings: Settings) -> Format:
    """A weight in 8 bits, or in nibbles of floats, with a scale beside it: FP8, integers, NVFP4 of ModelOpt."""
    weight, scale = parts["weight"], parts["scale"]
    if weight.dtype == torch.uint8:
        return _fp4(parts, "weight", "scale", read, factor="scale_2" if "scale_2" in parts else None)
    _expect("scale_2" not in parts, "no second scale")
    if weight.dtype == torch.int8:
        return _int8(parts, "int8")
    _expect(weight.dtype.is_floating_point and weight.dtype.itemsize == 1, f"8 bits, found {weight.dtype}")
    _expect("zero_point" not in parts, "no zeros beside floats")
    block = _fp8_block(weight.shape, scale.shape, settings)
    # Rows of a matrix are read as they are needed; any other shape with one number for each row, or for all, whole.
    is_vector = block[1] == weight.shape[-1] and scale.shape[-1:] != (1,)
    return Floats(_stored(weight.shape, "fp8", None), "weight", "scale", block, is_vector)


def _fp8_block(shape: tuple[int, ...], found: tuple[int, ...], settings: Settings) -> tuple[int, int]:
    """Rows and columns of a weight of this `shape` that share one of the scales, which are of shape `found`.

    Shapes tell, not counts: of rows of 128 * 128 values there are as many scales for blocks as there are rows.
    """
    *stack, out, in_ = shape
    high, wide = settings.block
    if prod(found) == prod(stack):
        return out, in_
    if found == (*stack, -(-out // high), -(-in_ // wide)):
        return high, wide
    if found in ((*stack, out), (*stack, out, 1)):
        return 1, in_
    if found[:-1] == (*stack, out) and in_ % found[-1] == 0:
        return 1, in_ // found[-1]
    raise ValueError(
        f"expected one scale, one for each row, or one for each {high} x {wide} values of {list(shape)}, found "
        f"{list(found)}"
    )


def _int8(parts: Parts, method: str) -> Format:
    """`weight` i8 [out, in], `scale` [out, groups] and perhaps `zero_point` i8."""
    out, in_ = parts["weight"].shape
    _check_dtypes(parts, (), "scale")
    groups = _columns(parts["scale"], out)
    _expect(in_ % groups == 0, f"groups of equal size, found {groups} for rows of {in_}")

    def unpack(read: Read, rows: range) -> Group:
        scale = _rows(read, parts, "scale", rows)
        zero = torch.full(scale.shape, 128, dtype=torch.uint8)
        if "zero_point" in parts:
            zero = _rows(read, parts, "zero_point", rows).view(torch.uint8) ^ 128
        return Group(read("weight", rows).view(torch.uint8) ^ 128, "rows", 8, scale, zero)

    return Integers(_stored((out, in_), method, group_scheme(8, in_ // groups)), unpack)


def bitsandbytes_int8(parts: Parts, read: Read, settings: Settings) -> Format:
    """`weight` i8 [out, in], and `scale`, the largest magnitude of each row, which is 127."""
    _expect(parts["weight"].dtype == torch.int8, f"int8, found {parts['weight'].dtype}")
    # Others are orders of a device's memory, in which nothing has been published for years.
    _expect("format" not in parts or int(read("format").max()) == 0, "the format of rows")
    integers = _int8(parts, "bitsandbytes int8")
    assert isinstance(integers, Integers)
    inner = integers.unpack

    def unpack(read: Read, rows: range) -> Group:
        found = inner(read, rows)
        return replace(found, scale=found.scale.float() / 127)

    return Integers(integers.stored, unpack)


def _fp4(
    parts: Parts, weight: str, scale: str, read: Read, *, factor: str | None = None, divisor: str | None = None
) -> Format:
    """Nibbles of E2M1, the first value in the low one, with scales E4M3 for 16 values and one for all (NVFP4), or with
    scales E8M0 for 32 (MXFP4)."""
    (out, nbytes), (rows, groups) = parts[weight].shape, parts[scale].shape
    size, rest = divmod(2 * nbytes, groups)
    _expect(rows == out and not rest, f"scales of {out} rows, found {list(parts[scale].shape)}")
    is_mx = parts[scale].dtype in _EXPONENTS
    whole = factor or divisor
    _expect(is_mx or parts[scale].dtype == torch.float8_e4m3fn, f"scales of FP8, found {parts[scale].dtype}")
    _expect((size, whole is None) == ((32, True) if is_mx else (16, False)), "one scale for all beside groups of 16")
    _expect("zero_point" not in parts and "weight_zero_point" not in parts, "no zeros beside floats")

    def unpack(read: Read, rows: range) -> tuple[Tensor, Tensor]:
        q, scales = read(weight, rows), read(scale, rows)
        if is_mx:
            return q, scales.view(torch.uint8)
        scales = scales.float()
        return q, scales * read(factor).float().view(()) if factor else scales / read(str(divisor)).float().view(())

    stored = _stored((out, 2 * nbytes), "mxfp4" if is_mx else "nvfp4", CodebookScheme("mxfp4", 32) if is_mx else None)
    return Table(stored, unpack, _table("mxfp4"))


def mxfp4_experts(parts: Parts, read: Read, settings: Settings) -> Format:
    """`blocks` u8 [experts, out, groups, 16]: nibbles of E2M1, the first value in the low one; `scales`: exponents."""
    *leading, groups, nbytes = parts["blocks"].shape
    _expect(parts["blocks"].dtype == torch.uint8 and nbytes == 16, "blocks of 16 bytes")
    _expect(parts["scales"].shape == (*leading, groups), f"scales {[*leading, groups]}")
    _expect(parts["scales"].dtype in _EXPONENTS, f"scales that are exponents, found {parts['scales'].dtype}")

    def unpack(read: Read, rows: range) -> tuple[Tensor, Tensor]:
        blocks = read("blocks", range(rows.start * groups, rows.stop * groups))
        return blocks.view(len(rows), -1), read("scales", rows).view(torch.uint8)

    shape = (*leading, 32 * groups)
    return Table(_stored(shape, "mxfp4", CodebookScheme("mxfp4", 32)), unpack, _table("mxfp4"))


def bitsandbytes_4bit(parts: Parts, read: Read, settings: Settings) -> Format:
    """`weight`, nibbles of all values in one row, the first in the high one; `absmax` for each block of them, perhaps
    quantized itself; `quant_map`, the 16 values; `quant_state`, JSON."""
    state: dict[str, Any] = json.loads(bytes(read("quant_state").view(torch.uint8).view(-1).tolist()))
    kind, size, (out, in_) = str(state["quant_type"]), int(state["blocksize"]), map(int, state["shape"])
    _expect(in_ % size == 0, f"rows of whole blocks of {size} values, found rows of {in_}")
    table, itemsize = read("quant_map").float().view(-1), parts["weight"].dtype.itemsize
    fitting = [group for group in GROUP_SIZES if size % group == 0]
    is_known = bool(fitting) and torch.equal(table, _table("nf4")) and kind == "nf4"

    def unpack(read: Read, rows: range) -> tuple[Tensor, Tensor]:
        words = read("weight", range(rows.start * in_ // 2 // itemsize, rows.stop * in_ // 2 // itemsize))
        q = words.view(torch.uint8).view(len(rows), -1)
        blocks = range(rows.start * in_ // size, rows.stop * in_ // size)
        scale = read("absmax", columns=blocks).view(-1)
        if "nested_absmax" in parts:
            places = torch.arange(blocks.start, blocks.stop) // int(state["nested_blocksize"])
            nested = read("nested_quant_map").view(-1)[scale.int()]
            scale = nested * read("nested_absmax").view(-1)[places] + float(state["nested_offset"])
        return q, scale.view(len(rows), -1)

    scheme = CodebookScheme("nf4", max(fitting)) if is_known else None
    return Table(_stored((out, in_), f"bitsandbytes {kind}", scheme), unpack, table, "rows_high_first")


def _group_of(part: str, parts: Parts, read: Read, in_: int, groups: int) -> Tensor | None:
    """The group of each column, by the tensor `part`; None where they are in order, in groups of equal size."""
    in_order = torch.arange(in_) // (in_ // groups)
    if part not in parts:
        _expect(in_ % groups == 0, f"groups of equal size, found {groups} for rows of {in_}")
        return None
    found = read(part).view(-1).long()
    _expect(len(found) == in_, f"{part} of {in_} columns, found {len(found)}")
    low, high = (int(end) for end in found.aminmax())
    if low < 0 and low == high:  # none is given
        found = in_order
    else:
        _expect(low == 0 and high == groups - 1, f"{part} of {groups} groups, found {low} to {high}")
    return None if torch.equal(found, in_order) and in_ % groups == 0 else found


def _check_dtypes(parts: Parts, words: Sequence[str], scale: str) -> None:
    """Raise ValueError unless these parts are words of 32 bits, and the scales floats."""
    for part in words:
        _expect(parts[part].dtype == torch.int32, f"{part} in words of 32 bits, found {parts[part].dtype}")
    _expect(parts[scale].dtype.is_floating_point, f"scales that are floats, found {parts[scale].dtype}")


def _columns(scale: StoredTensor, out: int) -> int:
    """The groups in each row that `scale`, of one, of `out`, or of [out, groups] numbers, is for."""
    shape = scale.shape
    is_one = prod(shape) == 1
    _expect(is_one or (len(shape) in (1, 2) and shape[0] == out), f"scales of {out} rows, found {list(shape)}")
    return 1 if is_one or len(shape) == 1 else shape[1]


def _rows(read: Read, parts: Parts, part: str, rows: range) -> Tensor:
    """Rows of a tensor of which there may be one number for all, or one for each row."""
    shape = parts[part].shape
    if prod(shape) == 1:
        return read(part).view(1, 1).expand(len(rows), 1)
    return read(part, rows) if len(shape) == 2 else read(part, columns=rows).view(-1, 1)


def _stored(shape: tuple[int, ...], method: str, scheme: Scheme | None) -> StoredTensor:
    return StoredTensor(torch.float32, shape, method, scheme)


def _table(codebook: str) -> Tensor:
    return torch.tensor(CODEBOOKS[codebook].values, dtype=torch.float32)


def _expect(fits: bool, what: str) -> None:
    if not fits:
        raise ValueError(f"expected {what}")
