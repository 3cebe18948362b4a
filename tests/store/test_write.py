"""Writing a block: any reader opens it, it appears whole or not at all, and a full disk says so."""

import errno
import fcntl
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from tests.quick import examples, represented
from tests.store.make import bytes_of, random_bytes, random_quantized, write_block
from tiered.errors import DiskFullError
from tiered.kernels import decode_planes, encode_planes
from tiered.quant import GroupScheme
from tiered.store import ALIGNMENT, CHUNK_NBYTES, PAGE, BlockWriter, FileInfo, atomic_write, hash_chunk, read_header
from tiered.store.block import PAD_PREFIX, read_layout

INT4 = GroupScheme(4)
DTYPES = (torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float32)


def assert_well_formed(root: Path, file: FileInfo) -> None:
    path = root / file.path
    assert path.stat().st_size == file.nbytes
    assert file.nbytes % PAGE == 0
    content = path.read_bytes()
    assert all(chunk.checksum == hash_chunk(content[chunk.offset : chunk.stop]) for chunk in file.chunks)
    assert len(file.chunks) == len(file.checksums)
    assert FileInfo.from_json(json.loads(json.dumps(file.to_json())), 2) == file
    entries, metadata, data_start = read_header(path)
    assert data_start % PAGE == 0
    assert metadata["format"] == "pt"
    assert all(entry.offset % ALIGNMENT == 0 for entry in entries if not entry.name.startswith(PAD_PREFIX))


@examples(30, HealthCheck.function_scoped_fixture)
@given(
    tensors=st.dictionaries(
        st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=40).filter(
            lambda name: not name.startswith("__")
        ),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(1, 17), max_size=3)),
        max_size=6,
    )
)
def test_any_reader_opens_a_block_with_equal_tensors(
    tmp_path: Path, tensors: dict[str, tuple[torch.dtype, list[int]]]
) -> None:
    plain = {name: (torch.randn(shape) * 50).to(dtype) for name, (dtype, shape) in tensors.items()}
    file = write_block(tmp_path, "blocks/x.safetensors", plain)
    assert_well_formed(tmp_path, file)
    found = {n: t for n, t in load_file(tmp_path / file.path).items() if not n.startswith(PAD_PREFIX)}
    assert found.keys() == plain.keys()
    for name, tensor in plain.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)


def test_parts_and_frames_are_tensors_to_any_reader(tmp_path: Path) -> None:
    codes, wide = random_quantized(3, 128, INT4), torch.randn(20, 50).bfloat16()
    file = write_block(tmp_path, "x.safetensors", {}, {"fc": (INT4, codes)}, {"wide": wide})
    assert_well_formed(tmp_path, file)
    found = load_file(tmp_path / file.path)
    for part, tensor in codes._asdict().items():
        assert torch.equal(found[f"fc.{part}"], tensor)
    out, frame = torch.ones(20, 50).bfloat16(), encode_planes(bytes_of(wide), torch.bfloat16)
    assert bytes_of(found["wide.planes"]) == frame
    decode_planes(frame, [len(frame)], 4096, bytes_of(out), torch.bfloat16, "wide")
    assert torch.equal(out, wide)
    with safe_open(tmp_path / file.path, "pt") as opened:
        assert set(opened.metadata()) == {"format", "tiered"}


def test_a_block_of_nothing_is_a_file_too(tmp_path: Path) -> None:
    file = write_block(tmp_path, "x.safetensors", {})
    assert_well_formed(tmp_path, file)
    assert load_file(tmp_path / file.path) == {}


@pytest.mark.parametrize("extra", [-PAGE, 0, PAGE])
def test_a_block_about_a_chunk_long_has_a_checksum_for_every_chunk(extra: int, tmp_path: Path) -> None:
    file = write_block(tmp_path, "x.safetensors", {"a": random_bytes(CHUNK_NBYTES + extra, 1)})
    assert file.nbytes == file.header_nbytes + CHUNK_NBYTES + extra
    assert len(file.checksums) == (3 if extra > 0 else 2)
    assert_well_formed(tmp_path, file)


def test_pieces_of_any_size_make_the_same_block(tmp_path: Path) -> None:
    data = random_bytes(5 * CHUNK_NBYTES + 77, 3)
    files = []
    for number, step in enumerate((data.nbytes, CHUNK_NBYTES // 3, 3 * CHUNK_NBYTES + 1)):
        with BlockWriter(tmp_path / f"{number}.safetensors", tmp_path, ["a"]) as writer:
            view = bytes_of(data)
            writer.start_unit("a")
            writer.add("a", torch.uint8, data.shape, (view[at : at + step] for at in range(0, len(view), step)))
            files.append(writer.finish())
    assert_well_formed(tmp_path, files[0])
    assert len({file.checksums for file in files}) == 1
    assert len(files[0].checksums) == 7


@pytest.mark.parametrize("refusal", represented(["at once", "while writing"], ["while writing"]))
def test_where_the_page_cache_cannot_be_bypassed_the_bytes_are_the_same(
    refusal: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = random_bytes(5 * CHUNK_NBYTES + 77, 3)
    files = [write_block(tmp_path, "direct.safetensors", {"a": data})]
    if refusal == "at once":
        monkeypatch.setattr("tiered.store.sweep.bypass_cache", lambda fd, bypass: False)
    else:
        monkeypatch.setattr(Path, "open", lambda path, mode: io.BufferedRandom(CachedDisk(path, mode)))
    files.append(write_block(tmp_path, "cached.safetensors", {"a": data}))
    assert files[0].checksums == files[1].checksums
    monkeypatch.undo()
    for file in files:
        assert_well_formed(tmp_path, file)


class CachedDisk(io.FileIO):
    """A file system that takes the wish for direct writes and then refuses them."""

    def write(self, data: Any) -> int:
        if fcntl.fcntl(self, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return super().write(data)


def test_an_error_in_the_writing_thread_reaches_the_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: object, data: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    disk = type("BrokenDisk", (io.FileIO,), {"write": refuse})
    monkeypatch.setattr(Path, "open", lambda path, mode: io.BufferedRandom(disk(path, mode)))
    with pytest.raises(OSError, match="Input/output error"):
        write_block(tmp_path, "x.safetensors", {"a": random_bytes(CHUNK_NBYTES, 0)})
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors.part"]


def test_the_same_tensors_make_the_same_bytes(tmp_path: Path) -> None:
    plain, codes = {"a": torch.ones(3)}, random_quantized(3, 128, INT4)
    for name in ("one", "two"):
        write_block(tmp_path, name, plain, {"fc": (INT4, codes)}, {"wide": torch.zeros(50, 50, dtype=torch.float16)})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize("length", [1, 60, 240])
def test_the_header_has_room_for_long_names_and_many_frames(length: int, tmp_path: Path) -> None:
    names = [f"{'n' * length}.{i}" for i in range(12)]
    frames = 100
    with BlockWriter(tmp_path / "x.safetensors", tmp_path, names, len(names) * frames) as writer:
        for name in names:
            writer.start_unit(name)
            payload = [memoryview(bytes(1000))] * frames  # sizes of four digits; a chunk's have up to eight
            writer.add_planes(f"{name}.q", torch.bfloat16, (1 << 14, 6400), payload, 1 << 22)
            for part in ("scale", "zero"):
                writer.add(f"{name}.{part}", torch.uint8, (1, 1), [memoryview(b"1")])
            writer.add_weight(name, (1 << 14, 1 << 14), GroupScheme(8, 128))
        assert_well_formed(tmp_path, writer.finish())


def test_until_it_is_finished_a_block_is_a_part(tmp_path: Path) -> None:
    path, part = tmp_path / "blocks/x.safetensors", tmp_path / "blocks/x.safetensors.part"
    with BlockWriter(path, tmp_path, ["a"]) as writer:
        writer.start_unit("a")
        writer.add("a", torch.uint8, (5,), [memoryview(b"12345")])
        assert part.exists() and not path.exists()
        assert writer.finish().path == "blocks/x.safetensors"
        assert path.exists() and not part.exists()


def test_a_failure_leaves_a_part_that_the_next_attempt_overwrites(tmp_path: Path) -> None:
    path, part = tmp_path / "x.safetensors", tmp_path / "x.safetensors.part"
    with pytest.raises(KeyboardInterrupt), BlockWriter(path, tmp_path, ["a"]) as writer:
        writer.start_unit("a")
        writer.add("a", torch.uint8, (1 << 20,), [memoryview(bytes(1 << 20))])
        raise KeyboardInterrupt
    assert part.exists() and not path.exists()
    file = write_block(tmp_path, "x.safetensors", {"a": torch.ones(3)})
    assert_well_formed(tmp_path, file)
    assert not part.exists()


def refusing(number: int) -> Callable[..., Any]:
    def refuse(*args: Any) -> None:
        raise OSError(number, os.strerror(number))

    return refuse


@pytest.mark.parametrize("number", represented([errno.ENOSPC, errno.EDQUOT], [errno.ENOSPC]))
@pytest.mark.parametrize("call", ["fsync", "fdatasync"])
def test_a_disk_full_at_a_flush_is_told_and_the_part_stays(
    call: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"tiered.store.write.os.{call}", refusing(number))
    monkeypatch.setattr(
        "tiered.store.sweep.bypass_cache", lambda fd, bypass: False
    )  # what is not cached needs no flush
    tensor = random_bytes(5 * CHUNK_NBYTES, 0)
    with pytest.raises(DiskFullError, match=r"x\.safetensors\.part: the disk is full .*free some space and run the sa"):
        write_block(tmp_path, "x.safetensors", {"a": tensor})
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors.part"]


@pytest.mark.parametrize("nbytes", [10, 5000, 1 << 20])
def test_a_disk_full_while_writing_is_told_whatever_is_buffered(nbytes: int, tmp_path: Path) -> None:
    # The kernel's own full disk: every write fails, also the one that closing the file would try again.
    (tmp_path / "x.safetensors.part").symlink_to("/dev/full")
    with pytest.raises(DiskFullError, match=r"x\.safetensors\.part: the disk is full"):
        write_block(tmp_path, "x.safetensors", {"a": random_bytes(nbytes, 0)})
    assert not (tmp_path / "x.safetensors").exists()


class SmallDisk(io.FileIO):
    """A file on a disk with room for `room` bytes."""

    room = 0

    def write(self, data: Any) -> int:
        count = min(len(data), self.room - self.tell())
        if count <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(memoryview(data)[:count])


@pytest.mark.parametrize("room", [0, 1000, 9000, 12288, 14000, 1 << 20])
def test_a_disk_that_fills_up_is_told_wherever_it_does(
    room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SmallDisk, "room", room)
    monkeypatch.setattr(Path, "open", lambda path, mode: io.BufferedRandom(SmallDisk(path, mode)))
    tensors = {f"t{i}": random_bytes(1100, i) for i in range(1000)}
    with pytest.raises(DiskFullError, match=r"x\.safetensors\.part: the disk is full"):
        write_block(tmp_path, "x.safetensors", tensors)
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors.part"]


def test_a_disk_too_full_for_another_file_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "open", refusing(errno.ENOSPC))
    with pytest.raises(DiskFullError, match=r"x\.safetensors\.part: the disk is full"):
        write_block(tmp_path, "x.safetensors", {"a": torch.ones(3)})


def test_another_failure_to_write_stays_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiered.store.write.os.fsync", refusing(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        write_block(tmp_path, "x.safetensors", {"a": torch.ones(3)})
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors.part"]


def test_a_written_block_is_durable_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def traced_fsync(fd: int) -> None:
        order.append("fsync " + Path(f"/proc/self/fd/{fd}").readlink().name)
        fsync(fd)

    def traced_replace(path: Path, target: Path) -> Path:
        order.append("rename")
        return replace(path, target)

    monkeypatch.setattr("tiered.store.write.os.fsync", traced_fsync)
    monkeypatch.setattr(Path, "replace", traced_replace)
    write_block(tmp_path, "x.safetensors", {"a": torch.ones(3)})
    assert order == ["fsync x.safetensors.part", "rename", f"fsync {tmp_path.name}"]
    order.clear()
    atomic_write(tmp_path / "manifest.json", "{}")
    assert order == ["fsync manifest.json.part", "rename", f"fsync {tmp_path.name}"]


@pytest.mark.parametrize("content", ["text: ü\n", b"\0bytes"])
def test_an_atomic_write_replaces_the_whole_content(content: str | bytes, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"something longer than what replaces it")
    atomic_write(path, content)
    assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_an_atomic_write_on_a_full_disk_keeps_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    (tmp_path / "file.part").symlink_to("/dev/full")
    with pytest.raises(DiskFullError, match=r"file\.part: the disk is full"):
        atomic_write(path, "new")
    assert path.read_text() == "old"


def test_a_layout_reads_from_what_was_written(tmp_path: Path) -> None:
    file = write_block(tmp_path, "x.safetensors", {"a": torch.ones(3)})
    assert read_layout(tmp_path, file).weights["a"].shape == (3,)
