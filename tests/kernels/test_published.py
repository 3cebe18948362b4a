"""Codes of published checkpoints, natively and by the reference: the same bits, whatever the packing and the shape."""

import os
from pathlib import Path

import pytest
import torch

from tiered.kernels import published as native
from tiered.kernels.library import load_library
from tiered.quant import pack_int4, published

pytestmark = pytest.mark.inputs("tiered/kernels", "tiered/quant", "tests/kernels")

SHAPES = [(8, 128), (24, 384), (64, 256), (200, 1280)]
"""Rows and columns: less than a tile of the kernel's, several, and some of one."""


def words(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31 - 1, (rows, columns), dtype=torch.int32, generator=generator)


def packed_data(packing: published.Packing, rows: int, columns: int, bits: int) -> torch.Tensor:
    """Random codes, in a slice of a wider tensor, as rectangles of a checkpoint's tensors may be."""
    if packing == "awq":
        return words(columns, rows // 8 + 3)[:, 1 : rows // 8 + 1]
    if packing == "columns":
        return words(columns * bits // 32, rows + 5)[:, 2 : rows + 2]
    wide = words(rows, columns * bits // 32 + 2)[:, 1:-1]
    return wide if packing == "rows" else wide.view(torch.uint8)


@pytest.mark.parametrize("packing", ["rows", "rows_high_first", "columns", "awq"])
@pytest.mark.parametrize("group_size", [2, 32, 64, 128])
def test_nibbles_are_put_in_the_references_order(packing: published.Packing, group_size: int) -> None:
    assert not isinstance(load_library(), str)
    for rows, columns in SHAPES:
        data = packed_data(packing, rows, columns, 4)
        expected = published.repacked(data, packing, 4, group_size)
        assert torch.equal(native.repacked(data, packing, 4, group_size), expected)
        assert torch.equal(expected, pack_int4(published.published_codes(data, packing, 4), group_size))


@pytest.mark.parametrize("packing", ["rows", "columns"])
def test_bytes_are_turned_as_the_reference_does(packing: published.Packing) -> None:
    for rows, columns in SHAPES:
        data = packed_data(packing, rows, columns, 8)
        expected = published.repacked(data, packing, 8, 64)
        assert torch.equal(native.repacked(data, packing, 8, 64), expected)


def test_what_a_packing_says_is_where_codes_are() -> None:
    """By hand: one row of two codes, and one column of eight rows."""
    of = published.published_codes
    assert of(torch.tensor([[0x21]], dtype=torch.uint8), "rows", 4).tolist() == [[1, 2]]
    assert of(torch.tensor([[0x21]], dtype=torch.uint8), "rows_high_first", 4).tolist() == [[2, 1]]
    assert of(torch.tensor([[0b11100100]], dtype=torch.uint8), "rows", 2).tolist() == [[0, 1, 2, 3]]
    assert of(torch.tensor([[0x76543210]], dtype=torch.int32), "columns", 4).tolist() == [list(range(8))]
    assert of(torch.tensor([[0x03020100]], dtype=torch.int32), "columns", 8).tolist() == [[0, 1, 2, 3]]
    found = of(torch.tensor([[0x75316420]], dtype=torch.int32), "awq", 4)
    assert found.flatten().tolist() == list(range(8))


@pytest.mark.parametrize("values", [16, 256])
@pytest.mark.parametrize("has_zero", [False, True])
@pytest.mark.parametrize("groups", [16, 64, 200, "any order"])
def test_numbers_are_those_of_the_reference(values: int, has_zero: bool, groups: int | str) -> None:
    """Also where the last group of columns is cut, and where a table has no numbers."""
    generator, columns = torch.Generator().manual_seed(1), 256
    table = torch.randn(values, generator=generator)
    table[3], table[5] = torch.nan, torch.inf
    codes = words(7, columns // 4 if values == 256 else columns // 8).view(torch.uint8)
    count = -(-columns // groups) if isinstance(groups, int) else 5
    of = groups if isinstance(groups, int) else torch.randint(0, count, (columns,), generator=generator)
    scale = torch.rand(7, count, generator=generator)
    zero = torch.randint(0, 17, (7, count), dtype=torch.int16, generator=generator) if has_zero else None
    expected = published.widened(codes, table, scale, zero, of)
    found = native.widened(codes, table, scale, zero, of)
    assert found.dtype == expected.dtype == torch.float32 and found.isnan().sum() > 0
    torch.testing.assert_close(found, expected, rtol=0.0, atol=0.0, equal_nan=True)


def test_scales_that_do_not_fit_are_an_error_and_nothing_beyond_them_is_read() -> None:
    codes, table = torch.zeros(4, 64, dtype=torch.uint8), torch.ones(256)
    for scale in (torch.ones(4, 3), torch.ones(3, 2)):
        with pytest.raises((ValueError, IndexError, RuntimeError)):
            native.widened(codes, table, scale, None, 32)
    with pytest.raises(ValueError, match="scales and zeros"):
        native.widened(codes, table, torch.ones(4, 2), None, torch.full((64,), 2))


def test_pieces_of_a_file_are_read_until_one_cannot_be(tmp_path: Path) -> None:
    path, data = tmp_path / "file", words(10, 8)
    path.write_bytes(data.numpy().tobytes())
    fd = os.open(path, os.O_RDONLY)
    try:
        out = torch.zeros(10, 12, dtype=torch.uint8)
        assert native.read_rows(fd, 8, 32, 12, out) == 10
        assert torch.equal(out, data.view(torch.uint8)[:, 8:20])
        os.truncate(path, 9 * 32 + 16)
        assert native.read_rows(fd, 8, 32, 12, out) == 9
    finally:
        os.close(fd)
