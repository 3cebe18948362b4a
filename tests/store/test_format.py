"""Headers: what is written is read back, what is damaged is refused by name, nothing else is ever raised."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from safetensors.torch import save_file

from tests.quick import examples
from tests.store.make import random_quantized, write_block
from tiered.errors import CheckpointError, StoreError
from tiered.quant import GroupScheme
from tiered.store import ALIGNMENT, PAGE, checkpoint_header, read_header
from tiered.store.block import read_layout
from tiered.store.file import FileInfo
from tiered.store.format import DTYPES, TensorEntry, hash_chunk, header_bytes, tensor_nbytes

INT4 = GroupScheme(4)
FAST = examples(150, HealthCheck.function_scoped_fixture)


def write_table(path: Path, table: Any, data: bytes = b"") -> Path:
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def one(**changes: Any) -> dict[str, Any]:
    """The header of a file with 8 bytes of data, with one tensor that is right but for `changes`."""
    return {"a": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8], **changes}}


@pytest.fixture(scope="module")
def block(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, FileInfo]:
    root = tmp_path_factory.mktemp("format")
    plain = {"layer.norm": torch.arange(5, dtype=torch.float16), "layer.bias": torch.ones(3, dtype=torch.bfloat16)}
    quantized = {"layer.fc": (INT4, random_quantized(3, 128, INT4))}
    compressed = {"layer.wide": torch.zeros(100, 100, dtype=torch.bfloat16)}
    return root, write_block(root, "layer.safetensors", plain, quantized, compressed)


def test_a_header_is_padded_with_spaces_to_where_the_data_starts() -> None:
    entries = [TensorEntry("a", torch.float16, (2, 3), PAGE, 12), TensorEntry("b", torch.uint8, (4,), PAGE + 12, 4)]
    raw = header_bytes(entries, {"k": "v"}, PAGE)
    assert len(raw) == PAGE
    assert struct.unpack("<Q", raw[:8])[0] == PAGE - 8
    table = json.loads(raw[8:])
    assert raw.endswith(b" " * 100) and table["b"] == {"dtype": "U8", "shape": [4], "data_offsets": [12, 16]}


def test_entries_and_metadata_read_back(tmp_path: Path) -> None:
    entries = [TensorEntry("a", torch.float16, (2, 3), PAGE, 12), TensorEntry("b", torch.uint8, (4,), PAGE + 12, 4)]
    (tmp_path / "x").write_bytes(header_bytes(entries, {"k": "v"}, PAGE) + bytes(16))
    assert read_header(tmp_path / "x") == (entries, {"k": "v"}, PAGE)


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_reads_as_the_safetensors_library_writes_it(name: str, tmp_path: Path) -> None:
    tensors = {"scalar": torch.zeros((), dtype=DTYPES[name]), "matrix": torch.zeros(3, 5, dtype=DTYPES[name])}
    save_file(tensors, tmp_path / "x", {"made": "by hand"})
    entries, metadata, start = read_header(tmp_path / "x")
    assert {e.name: (e.dtype, e.shape) for e in entries} == {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}
    assert [e.offset for e in entries] == [start, start + entries[0].nbytes]
    assert metadata == {"made": "by hand"}


def test_empty_tensors_may_lie_anywhere(tmp_path: Path) -> None:
    empty = {"dtype": "F32", "shape": [0, 3], "data_offsets": [0, 0]}
    path = write_table(tmp_path / "x", {**one(), "empty": empty}, bytes(8))
    assert {entry.name: entry.nbytes for entry in read_header(path)[0]} == {"a": 8, "empty": 0}


@pytest.mark.parametrize(
    "content",
    [b"", b"1234567", struct.pack("<Q", 0), struct.pack("<Q", 1 << 63) + b"{}", struct.pack("<Q", 100) + b"{}"],
    ids=["empty", "seven bytes", "no header", "huge claim", "truncated header"],
)
def test_a_file_without_a_whole_header_is_refused_with_its_size(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(StoreError, match=rf"x\.safetensors: .*file has {len(content)}; not a whole safetensors file"):
        read_header(tmp_path / "x.safetensors")


def test_a_header_larger_than_the_format_allows_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "x").open("wb") as file:
        file.write(struct.pack("<Q", 200 << 20))
        file.truncate(300 << 20)  # a hole: takes no space
    with pytest.raises(StoreError, match="header claims 209,715,200 bytes"):
        read_header(tmp_path / "x")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"gone\.safetensors: missing"):
        read_header(tmp_path / "gone.safetensors")


def test_a_checkpoint_s_damage_is_the_checkpoint_s(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"PK\3\4 a zip file, and no safetensors")
    with pytest.raises(CheckpointError, match=r"x: header claims .* not a whole safetensors file; download the fi"):
        checkpoint_header(tmp_path / "x")


DAMAGED: dict[str, Any] = {
    "not JSON": b"{",
    "NUL bytes": b"\0" * 64,
    "not UTF-8": b'{"\xff": 1}',
    "deeply nested": b"[" * 100_000,
    "a list": [],
    "a number": 7,
    "an entry that is no object": {"a": 5},
    "an entry that is a list": {"a": [1]},
    "no dtype": {"a": {"shape": [8], "data_offsets": [0, 8]}},
    "unknown dtype": one(dtype="F8_E4M3"),
    "dtype that is a list": one(dtype=[1]),
    "no shape": {"a": {"dtype": "U8", "data_offsets": [0, 8]}},
    "shape that is a number": one(shape=8),
    "shape of text": one(shape=["8"]),
    "fractional shape": one(shape=[8.5]),
    "infinite shape": b'{"a":{"dtype":"U8","shape":[1e999],"data_offsets":[0,8]}}',
    "negative shape": one(shape=[-8]),
    "twice negative shape": one(shape=[-2, -4]),
    "shape whose size wraps around": {"a": one()["a"], "b": one(shape=[1 << 32, 1 << 32], data_offsets=[8, 8])["a"]},
    "shape beyond 64 bits": one(shape=[1 << 70]),
    "true as a shape": {"a": {"dtype": "U8", "shape": [8, True], "data_offsets": [0, 8]}},
    "one offset": one(data_offsets=[0]),
    "text offsets": one(data_offsets="08"),
    "infinite offset": b'{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,1e999]}}',
    "negative offset": one(data_offsets=[-8, 0]),
    "backward offsets": one(data_offsets=[8, 0]),
    "size that is not the shape's": one(shape=[7]),
    "a hole": one(shape=[4], data_offsets=[4, 8]),
    "data behind the last tensor": one(shape=[4], data_offsets=[0, 4]),
    "less data than claimed": one(shape=[16], data_offsets=[0, 16]),
    "overlapping tensors": {"a": one()["a"], "b": one()["a"]},
    "metadata that is a number": {"__metadata__": 5, **one()},
    "no tensors but data": {},
}


@pytest.mark.parametrize("what", DAMAGED)
def test_damaged_headers_are_refused_by_name(what: str, tmp_path: Path) -> None:
    path = write_table(tmp_path / "x.safetensors", DAMAGED[what], bytes(8))
    with pytest.raises(StoreError, match=r"x\.safetensors: .*convert the model again$"):
        read_header(path)


def test_an_unknown_dtype_is_told_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"tensor a has dtype 'F8_E4M3'; known are U8, .*BF16"):
        read_header(write_table(tmp_path / "x", one(dtype="F8_E4M3"), bytes(8)))


def assert_consistent(path: Path, size: int) -> None:
    """Either `path` is refused by name, or every tensor lies inside it, one behind the other."""
    try:
        entries, _, start = read_header(path)
    except StoreError as error:
        assert str(path) in str(error)
        return
    position = start
    for entry in entries:
        assert entry.offset == position
        assert entry.nbytes == tensor_nbytes(entry.dtype, entry.shape) >= 0
        position += entry.nbytes
    assert position == size


@FAST
@given(edits=st.lists(st.tuples(st.integers(0, 1 << 30), st.integers(0, 255)), min_size=1, max_size=6))
def test_any_mutated_header_is_refused_or_consistent(
    block: tuple[Path, FileInfo], tmp_path: Path, edits: list[tuple[int, int]]
) -> None:
    root, file = block
    content = bytearray((root / file.path).read_bytes())
    text = 8 + len(bytes(content[8:]).split(b" ", 1)[0])
    for at, byte in edits:
        content[at % text] = byte
    path = tmp_path / file.path
    path.write_bytes(content)
    assert_consistent(path, len(content))
    try:
        layout = read_layout(tmp_path, file)
    except StoreError as error:
        assert str(path) in str(error)
        return
    for weight in layout.weights.values():
        for entry in weight.parts.values():
            assert entry.offset % ALIGNMENT == 0
            assert entry.offset >= 0 and entry.offset + entry.nbytes <= layout.memory_nbytes


NUMBERS = st.one_of(st.integers(-10, 100), st.integers(1 << 31, 1 << 66), st.floats(), st.booleans(), st.none())
VALUES = st.recursive(
    st.one_of(NUMBERS, st.text(max_size=4), st.sampled_from(["U8", "F16"])),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(["dtype", "shape"]), inner, max_size=3)
    ),
    max_leaves=5,
)


@FAST
@given(key=st.sampled_from(["dtype", "shape", "data_offsets"]), value=VALUES)
def test_any_value_in_any_field_is_refused_or_consistent(tmp_path: Path, key: str, value: Any) -> None:
    assert_consistent(path := write_table(tmp_path / "x", one(**{key: value}), bytes(8)), path.stat().st_size)


@given(st.binary(max_size=200))
@FAST
def test_any_file_is_refused_or_consistent(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    assert_consistent(tmp_path / "x", len(content))


def test_a_checksum_is_that_of_the_bytes_alone() -> None:
    assert hash_chunk(b"abc") == hash_chunk(memoryview(b"xabc")[1:]) == "78af5f94892f3950"


def test_sizes_count_every_element() -> None:
    assert tensor_nbytes(torch.bfloat16, (3, 5)) == 30
    assert tensor_nbytes(torch.float32, ()) == 4
    assert tensor_nbytes(torch.float32, (0, 7)) == 0
