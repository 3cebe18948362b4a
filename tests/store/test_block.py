"""The layout of a block: every weight where its bytes are, compressed ones in their place, foreign ones refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.store.make import bytes_of, load_unit, random_bytes, random_quantized, write_block
from tiered.errors import StoreError
from tiered.quant import GroupScheme, QuantizedWeight
from tiered.store import ALIGNMENT, CHUNK_NBYTES, PAGE, BlockWriter, FileInfo
from tiered.store.block import BlockLayout, read_layout
from tiered.store.format import header_bytes, read_header

INT4, INT8 = GroupScheme(4), GroupScheme(8, 32)
PLAIN = {"norm": torch.arange(5, dtype=torch.float16), "bias": torch.randn(3, 7).to(torch.bfloat16)}
QUANTIZED = {"fc1": (INT4, random_quantized(3, 128, INT4)), "fc2": (INT8, random_quantized(5, 32, INT8))}
COMPRESSED = {"wide": torch.randn(3, 1000).half(), "long": torch.randn(9000).bfloat16()}


def whole(tmp_path: Path) -> tuple[FileInfo, BlockLayout]:
    """Three units: plain and quantized weights, a quantized one, and a quantized one with compressed weights."""
    file = write_block(tmp_path, "x.safetensors", PLAIN, QUANTIZED, COMPRESSED, starts=("fc2", "wide"))
    return file, read_layout(tmp_path, file)


def weights_of(root: Path, layout: BlockLayout) -> dict[str, torch.Tensor | QuantizedWeight]:
    return {
        name: weight.view(memory)
        for unit in layout.units
        for memory in [load_unit(root, unit)]
        for name, weight in unit.weights.items()
    }


def test_every_weight_is_what_was_written(tmp_path: Path) -> None:
    _, layout = whole(tmp_path)
    weights = weights_of(tmp_path, layout)
    assert list(layout.weights) == [*PLAIN, *QUANTIZED, *COMPRESSED]
    for name, expected in {**PLAIN, **COMPRESSED}.items():
        found = weights[name]
        assert isinstance(found, torch.Tensor) and found.dtype == expected.dtype
        assert torch.equal(found, expected)
    for name, (scheme, codes) in QUANTIZED.items():
        weight = weights[name]
        assert isinstance(weight, QuantizedWeight) and weight.scheme == scheme
        assert all(torch.equal(a, b) for a, b in zip(weight.codes, codes, strict=True))


def test_weights_are_views_of_their_unit_s_memory(tmp_path: Path) -> None:
    _, layout = whole(tmp_path)
    for unit in layout.units:
        memory = load_unit(tmp_path, unit)
        start = memory.data_ptr()
        for weight in unit.weights.values():
            view = weight.view(memory)
            tensors = [view] if isinstance(view, torch.Tensor) else list(view.codes)
            assert all(start <= t.data_ptr() < start + memory.nbytes for t in tensors)


def test_memory_is_the_extent_or_what_it_decodes_to_and_nothing_else(tmp_path: Path) -> None:
    _, layout = whole(tmp_path)
    *plain, compressed = layout.units
    assert all(unit.memory_nbytes == unit.nbytes and not unit.compressed for unit in plain)
    decoded = sum(tensor.nbytes for tensor in COMPRESSED.values())
    assert decoded <= compressed.memory_nbytes < decoded + 2 * ALIGNMENT + PAGE
    assert all(entry.offset % ALIGNMENT == 0 for w in compressed.weights.values() for entry in w.parts.values())
    assert layout.memory_nbytes == sum(unit.memory_nbytes for unit in layout.units)


def test_what_is_not_compressed_is_copied_beside_what_is(tmp_path: Path) -> None:
    file = write_block(tmp_path, "x.safetensors", PLAIN, QUANTIZED, COMPRESSED)
    layout = read_layout(tmp_path, file)
    weights = weights_of(tmp_path, layout)
    assert all(torch.equal(weights[n], t) for n, t in {**PLAIN, **COMPRESSED}.items())  # type: ignore[arg-type]
    for name, (_, codes) in QUANTIZED.items():
        assert all(torch.equal(a, b) for a, b in zip(weights[name].codes, codes, strict=True))  # type: ignore[union-attr]


def test_no_frame_crosses_a_chunk(tmp_path: Path) -> None:
    wide = torch.randn(CHUNK_NBYTES + 12_345, generator=torch.Generator().manual_seed(0)).bfloat16()
    first = torch.arange(CHUNK_NBYTES - 100, dtype=torch.uint8)  # so that the first frame does not fit
    file = write_block(tmp_path, "x.safetensors", {"first": first}, {}, {"wide": wide}, 1 << 18)
    (unit,) = read_layout(tmp_path, file).units
    chunks = [[move.tensor.name for move in moves] for moves in unit.moves]
    assert chunks[0] == ["first"] and {*chunks[1]} == {*chunks[2]} == {"wide"}
    assert torch.equal(unit.weights["wide"].view(load_unit(tmp_path, unit)), wide)  # type: ignore[arg-type]
    crossing = replace(unit.compressed[0], source=replace(unit.compressed[0].source, offset=CHUNK_NBYTES + PAGE))
    with pytest.raises(StoreError, match=r"x\.safetensors: wide: a frame crosses a chunk"):
        _ = replace(unit, compressed=(crossing,)).moves


def test_units_cover_the_file_behind_its_header_and_chunks_are_theirs(tmp_path: Path) -> None:
    file, layout = whole(tmp_path)
    assert [unit.name for unit in layout.units] == ["all", "fc2", "wide"]
    assert [list(unit.weights) for unit in layout.units] == [["norm", "bias", "fc1"], ["fc2"], ["wide", "long"]]
    position = file.header_nbytes
    for unit in layout.units:
        assert unit.offset == position and unit.nbytes % PAGE == 0
        chunks = [file.chunks[number] for number in unit.chunks]
        assert chunks[0].offset == unit.offset and chunks[-1].stop == unit.offset + unit.nbytes
        position += unit.nbytes
    assert position == file.nbytes
    assert file.units_nbytes == sum(unit.nbytes for unit in layout.units)


def test_a_block_counts_the_numbers_it_stands_for(tmp_path: Path) -> None:
    _, layout = whole(tmp_path)
    assert layout.weight_count == 5 + 21 + 3 * 128 + 5 * 32 + 3000 + 9000


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda units: units[:-1], "its metadata does not fit its tensors .*does not lie within one unit"),
        (lambda units: (), "data starts at byte"),
        (lambda units: (replace(units[0], offset=PAGE), *units[1:]), "data starts at byte"),
        (lambda units: (replace(units[0], nbytes=PAGE), *units[1:]), ".*does not lie within one unit"),
        (lambda units: (units[0], replace(units[1], nbytes=units[1].nbytes + PAGE)), ".*does not lie within one unit"),
    ],
)
def test_units_that_are_not_those_of_the_file_are_refused(change: Any, told: str, tmp_path: Path) -> None:
    tensors = {name: random_bytes(3 * PAGE, number) for number, name in enumerate("abc")}
    file = write_block(tmp_path, "x.safetensors", tensors, starts=("b", "c"))
    with pytest.raises(StoreError, match=rf"x\.safetensors: {told}"):
        read_layout(tmp_path, replace(file, units=change(file.units)))


def test_a_weight_whose_parts_lie_in_two_units_is_refused(tmp_path: Path) -> None:
    codes = random_quantized(64, 128, INT4)
    assert codes.q.nbytes == PAGE
    file = write_block(tmp_path, "x.safetensors", {}, {"fc": (INT4, codes)})
    (unit,) = file.units
    units = replace(unit, nbytes=PAGE), replace(unit, name="rest", offset=unit.offset + PAGE, nbytes=PAGE)
    with pytest.raises(StoreError, match=r"x\.safetensors: its metadata does not fit its tensors"):
        read_layout(tmp_path, replace(file, units=units))


def test_a_block_of_another_version_is_refused(tmp_path: Path) -> None:
    file, _ = whole(tmp_path)
    for version in (1, 3, "2"):
        edit_metadata(tmp_path, file, partial(dict.update, version=version))
        with pytest.raises(StoreError, match=r"x\.safetensors: a block of format version .*, expected 2"):
            read_layout(tmp_path, file)
    edit_metadata(tmp_path, file, lambda d: d.pop("version") and None)
    with pytest.raises(StoreError, match=r"x\.safetensors: a block of format version 1, expected 2"):
        read_layout(tmp_path, file)


def test_a_missing_file_is_named_with_the_remedy(tmp_path: Path) -> None:
    file, _ = whole(tmp_path)
    (tmp_path / file.path).unlink()
    with pytest.raises(StoreError, match=r"x\.safetensors: missing; the store is incomplete, convert the model again"):
        read_layout(tmp_path, file)


@pytest.mark.parametrize("path", ["x.safetensors/y", "x\0y", "\ud800"], ids=["below a file", "NUL", "surrogate"])
def test_a_path_that_cannot_exist_is_a_missing_file(path: str, tmp_path: Path) -> None:
    file, _ = whole(tmp_path)
    with pytest.raises(StoreError, match="missing"):
        read_layout(tmp_path, replace(file, path=path))


def test_a_truncated_file_is_told_with_both_sizes(tmp_path: Path) -> None:
    file, _ = whole(tmp_path)
    with (tmp_path / file.path).open("r+b") as opened:
        opened.truncate(PAGE)
    with pytest.raises(StoreError, match=rf"x\.safetensors: expected {file.nbytes:,} bytes, found 4,096; it is trunc"):
        read_layout(tmp_path, file)


def test_another_program_s_safetensors_is_no_block(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(4)}, tmp_path / "x.safetensors")
    nbytes = (tmp_path / "x.safetensors").stat().st_size
    with pytest.raises(StoreError, match=r"x\.safetensors: not a block of a tiered store"):
        read_layout(tmp_path, FileInfo("x.safetensors", nbytes, ("0",)))


def edit_metadata(root: Path, file: FileInfo, change: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrite the header of `file` with other metadata, all offsets staying true."""
    entries, metadata, data_start = read_header(root / file.path)
    described = json.loads(metadata["tiered"])
    described = change(described) or described
    content = (root / file.path).read_bytes()
    text = described if isinstance(described, str) else json.dumps(described)
    (root / file.path).write_bytes(header_bytes(entries, {"tiered": text}, data_start) + content[data_start:])


DAMAGE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no JSON": lambda d: "{",
    "deeply nested": lambda d: "[" * 5000,
    "a list": lambda d: "[]",
    "no weights": lambda d: d.pop("weights") and None,
    "weights that are text": lambda d: d.update(weights="abc"),
    "a weight that is not there": lambda d: d["weights"].update(fc3=d["weights"]["fc1"]),
    "an unknown scheme": lambda d: d["weights"]["fc1"].update(scheme="int3"),
    "a scheme that is a number": lambda d: d["weights"]["fc1"].update(scheme=4),
    "another scheme": lambda d: d["weights"]["fc1"].update(scheme="int8-g64"),
    "another shape": lambda d: d["weights"]["fc1"].update(shape=[3, 64]),
    "a shape that does not fit the groups": lambda d: d["weights"]["fc1"].update(shape=[3, 65]),
    "a shape of one": lambda d: d["weights"]["fc1"].update(shape=[384]),
    "a shape of infinity": lambda d: d["weights"]["fc1"].update(shape=[3, float("inf")]),
    "a compressed tensor that is not there": lambda d: d["planes"].update(narrow=d["planes"]["wide"]),
    "a compressed tensor of negative shape": lambda d: d["planes"]["wide"].update(shape=[-3, -1000]),
    "a compressed tensor of infinite shape": lambda d: d["planes"]["wide"].update(shape=[float("inf")]),
    "a compressed tensor of unknown dtype": lambda d: d["planes"]["wide"].update(dtype="F8"),
    "a compressed tensor of 32 bits": lambda d: d["planes"]["wide"].update(dtype="F32", shape=[1500]),
    "frames of no bytes": lambda d: d["planes"]["wide"].update(frame_nbytes=0),
    "frames of odd size": lambda d: d["planes"]["wide"].update(frame_nbytes=4095),
    "frames that do not add up": lambda d: d["planes"]["wide"].update(frames=[1]),
    "too few frames": lambda d: d["planes"]["wide"].update(frames=[sum(d["planes"]["wide"]["frames"])]),
    "negative frames": lambda d: d["planes"]["wide"]["frames"].extend([-5, 5]),
    "more than frames can hold": lambda d: d["planes"]["wide"].update(shape=[1 << 24], frame_nbytes=1 << 24),
}


def test_what_was_compressed_with_zstd_is_refused_in_version_2(tmp_path: Path) -> None:
    file, _ = whole(tmp_path)
    edit_metadata(tmp_path, file, lambda d: d.update(zstd=d.pop("planes")))
    with pytest.raises(StoreError, match=r"x\.safetensors: compressed with zstd .* convert the model again"):
        read_layout(tmp_path, file)


@pytest.mark.parametrize("what", DAMAGE)
def test_metadata_that_does_not_fit_is_refused_by_name(what: str, tmp_path: Path) -> None:
    file, _ = whole(tmp_path)
    edit_metadata(tmp_path, file, DAMAGE[what])
    with pytest.raises(StoreError, match=r"x\.safetensors: (its metadata does not fit|not a block)"):
        read_layout(tmp_path, file)


def test_a_block_whose_tensors_are_misaligned_is_not_ours(tmp_path: Path) -> None:
    file, _ = whole(tmp_path)
    entries, metadata, data_start = read_header(tmp_path / file.path)
    content = (tmp_path / file.path).read_bytes()
    first, pad = entries[0], entries[1]
    moved = [replace(pad, offset=first.offset), replace(first, offset=first.offset + pad.nbytes), *entries[2:]]
    (tmp_path / file.path).write_bytes(header_bytes(moved, metadata, data_start) + content[data_start:])
    with pytest.raises(StoreError, match=r"x\.safetensors: tensor norm is not aligned to 64 bytes"):
        read_layout(tmp_path, file)


def test_data_that_starts_off_a_page_is_not_ours(tmp_path: Path) -> None:
    file, _ = whole(tmp_path)
    entries, metadata, data_start = read_header(tmp_path / file.path)
    content = (tmp_path / file.path).read_bytes()
    shifted = [replace(entry, offset=entry.offset + 64) for entry in entries]
    (tmp_path / file.path).write_bytes(header_bytes(shifted, metadata, data_start + 64) + content[data_start:])
    with pytest.raises(StoreError, match=r"data starts at byte .* expected .* a multiple of 4096"):
        read_layout(tmp_path, replace(file, nbytes=file.nbytes + 64))


def test_pads_are_no_weights(tmp_path: Path) -> None:
    file = write_block(tmp_path, "x.safetensors", {"a": random_bytes(10, 0), "b": random_bytes(10, 1)})
    assert set(read_layout(tmp_path, file).weights) == {"a", "b"}


def ranged(root: Path, numbers: list[int], rows: list[int], described: Any) -> FileInfo:
    """A block with ranges of these numbers and rows of an int8 weight "w", which the metadata describes so."""
    with BlockWriter(root / "x.safetensors", root, [f"w#{number}" for number in numbers]) as writer:
        for number, count in zip(numbers, rows, strict=True):
            writer.start_unit(f"w#{number}")
            for part, tensor in zip(("q", "scale", "zero"), random_quantized(count, 32, INT8), strict=True):
                writer.add(f"w#{number}.{part}", tensor.dtype, tensor.shape, [bytes_of(tensor)])
        writer.add_weight("w", *described)
        return writer.finish()


@pytest.mark.parametrize("shape", [(5, 32), (2, 3, 32)])
def test_ranges_of_rows_are_one_weight(shape: tuple[int, ...], tmp_path: Path) -> None:
    rows = [2, 3] if len(shape) == 2 else [3, 3]
    layout = read_layout(tmp_path, ranged(tmp_path, [0, 1], rows, (shape, INT8, 2)))
    assert [list(unit.weights) for unit in layout.units] == [["w#0"], ["w#1"]]
    assert [weight.shape for unit in layout.units for weight in unit.weights.values()] == [(n, 32) for n in rows]
    assert [*layout.weights] == ["w"] and layout.weights["w"].shape == shape
    assert layout.weights["w"].parts["q#1"].shape == (rows[1], 32) and layout.weight_count == 32 * sum(rows)


@pytest.mark.parametrize(
    ("numbers", "rows", "described", "told"),
    [
        ([0, 2], [2, 3], ((5, 32), INT8, 2), "w: has ranges w#0, w#2"),
        ([1, 0], [2, 3], ((5, 32), INT8, 2), "expected 2 in order"),
        ([0, 1], [2, 3], ((5, 32), INT8, 3), "expected 3 in order"),
        ([0, 1], [2, 3], ((6, 32), INT8, 2), "its ranges have 5 rows"),
        ([0, 1], [2, 4], ((2, 3, 32), INT8, 2), "not its 2 experts"),
        ([0, 1], [2, 3], ((5, 64), INT8, 2), "expected"),
        ([0, 1], [2, 3], ((5, 32), None, 2), "w: has ranges w#0.q"),
        ([0, 1], [2, 3], ((5, 32), INT4, 2), "int4-g64 expects"),
        ([0, 1], [2, 3], ((160,), INT8, 2), "ranges of a weight of shape"),
        ([0, 1], [2, 3], ((5, 32), None, None), "neither quantized nor stored in ranges"),
    ],
)
def test_ranges_that_are_not_a_weight_s_are_refused(
    numbers: list[int], rows: list[int], described: Any, told: str, tmp_path: Path
) -> None:
    file = ranged(tmp_path, numbers, rows, described)
    with pytest.raises(StoreError, match=rf"x\.safetensors: .*{told}.*convert the model again"):
        read_layout(tmp_path, file)
