"""`tiered verify`: every kind of damage is named, and the exit code says what kind it was."""

import json
import os
import pty
import signal
import subprocess
from pathlib import Path

import pytest

from tests.commands import Done, run_here
from tests.waiting import SECONDS, wait_until
from tests.warm import WarmProcess, start_warm, tiered
from tiered.convert import ConvertOptions, convert_checkpoint
from tiered.store import CHUNK_NBYTES, Store

SHAPE = """
name = "two-chunks"
[config]
model_type = "opt"
dtype = "bfloat16"
vocab_size = 272
hidden_size = 1024
ffn_dim = 4096
num_hidden_layers = 2
num_attention_heads = 8
max_position_embeddings = 64
word_embed_proj_dim = 1024
tie_word_embeddings = true
pad_token_id = 1
bos_token_id = 2
eos_token_id = 2
"""
LAYER = "blocks/layer-000.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store whose layers have four chunks each: header, small tensors, and two units."""
    folder = tmp_path_factory.mktemp("verify")
    (folder / "four-chunks.toml").write_text(SHAPE)
    options = ConvertOptions(synthetic=True, quant="none")
    convert_checkpoint(str(folder / "four-chunks.toml"), folder / "original.tiered", options)
    return folder / "original.tiered"


@pytest.fixture
def store(original: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    subprocess.run(["cp", "-r", original, tmp_path / "copy.tiered"], check=True)
    return tmp_path / "copy.tiered"


def verify(*arguments: str | Path) -> Done:
    return run_here("verify", *arguments)


def flip(path: Path, position: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 0x10]))


def test_a_whole_store_is_clean(store: Path) -> None:
    done = verify(store)
    assert done.code == 0, done.err
    assert "every checksum is right" in done.out
    assert "GB/s" in done.out
    assert done.err == ""


def test_every_flipped_bit_is_named(store: Path) -> None:
    info = next(file for file in Store.open(store).manifest.files if file.path == LAYER)
    assert len(info.chunks) == 4
    first, last = info.chunks[1], info.chunks[3]
    flip(store / LAYER, last.stop - 1)
    flip(store / LAYER, first.stop - 1)
    flip(store / "blocks/embed.safetensors", 100_000)
    done = verify(store)
    assert done.code == 4
    lines = done.out.splitlines()
    assert lines[0].startswith("blocks/embed.safetensors: chunk 1 (bytes 8,192 to ")
    assert lines[1].startswith(
        f"{LAYER}: chunk 1 (bytes {first.offset:,} to {first.stop:,}) is corrupt: expected xxh3 "
    )
    assert first.checksum in lines[1]
    assert lines[2].startswith(f"{LAYER}: chunk 3 (bytes {last.offset:,} to {info.nbytes:,}) is corrupt")
    assert "3 problems in 2 of 4 files" in done.err
    assert "convert the model again" in done.err


def test_missing_truncated_and_flipped_files_are_all_named(store: Path) -> None:
    (store / "blocks/embed.safetensors").unlink()
    os.truncate(store / LAYER, CHUNK_NBYTES + 70_000)
    flip(store / LAYER, CHUNK_NBYTES // 2)
    flip(store / "blocks/layer-001.safetensors", 3)  # its header length
    done = verify(store, "--json")
    assert done.code == 4
    report = json.loads(done.out)
    found = [(f["file"], f["chunk"]) for f in report["findings"]]
    second = "blocks/layer-001.safetensors"
    assert found == [("blocks/embed.safetensors", None), (LAYER, None), (LAYER, 2), (second, None), (second, 0)]
    problems = [f["problem"] for f in report["findings"]]
    assert "missing" in problems[0]
    assert "expected" in problems[1] and "16,847,216" in problems[1]
    assert report["findings"][2]["expected"] != report["findings"][2]["found"]


def test_a_missing_config_is_named(store: Path) -> None:
    (store / "config.json").unlink()
    done = verify(store)
    assert done.code == 4
    assert "config.json: missing" in done.out


def test_what_is_no_store_is_refused(tmp_path: Path, store: Path) -> None:
    done = verify(tmp_path)
    assert done.code == 4
    assert "not a store (no manifest.json)" in done.err
    manifest = store / "manifest.json"
    manifest.write_text(manifest.read_text()[:-100])
    done = verify(store)
    assert done.code == 4
    assert "manifest.json: not valid JSON" in done.err


def test_json_counts_every_byte(store: Path) -> None:
    done = verify(store, "--json", "--threads", "3")
    report = json.loads(done.out)
    files = [file for file in (store / "blocks").iterdir() if file.suffix == ".safetensors"]
    assert report["bytes_read"] == sum(file.stat().st_size for file in files)
    assert report["files"] == len(files)
    assert report["chunks"] == sum(len(file.chunks) for file in Store.open(store).manifest.files)
    assert report["findings"] == []
    assert report["bytes_per_second"] == pytest.approx(report["bytes_read"] / report["seconds"])


@pytest.mark.inputs("tiered/cli", "tiered/io")
def test_a_terminal_sees_how_far_it_is(store: Path) -> None:
    own, theirs = pty.openpty()
    try:
        streams = (os.devnull, os.devnull, os.ttyname(theirs))
        with WarmProcess(tiered, ("verify", str(store)), streams, TERM="xterm") as process:
            assert process.wait(SECONDS) == 0
        os.close(theirs)
        assert b"copy.tiered" in os.read(own, 1 << 16)
    finally:
        os.close(own)


@pytest.mark.slow
def test_ctrl_c_ends_it_before_it_has_read_everything(store: Path, tmp_path: Path) -> None:
    # A thousand names for one file are a store that takes long to read.
    manifest = json.loads((store / "manifest.json").read_text())
    layer = next(file for file in manifest["files"] if file["path"] == LAYER)
    for number in range(1000):
        path = f"blocks/copy-{number:03d}.safetensors"
        (store / path).hardlink_to(store / LAYER)
        manifest["files"].append({**layer, "path": path})
    (store / "manifest.json").write_text(json.dumps(manifest))
    out, err = tmp_path / "out", tmp_path / "err"
    with start_warm("verify", store, "--threads", "1", out=out, err=err) as process:
        wait_until(lambda: is_reading_blocks(process.pid))
        process.send_signal(signal.SIGINT)
        assert process.wait(SECONDS) == 130
    assert err.read_text(encoding="utf-8").strip() == "tiered: interrupted"


def is_reading_blocks(pid: int) -> bool:
    """Whether the process has a block file open."""
    try:
        return any(".safetensors" in str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir())
    except FileNotFoundError:  # a file was closed while we looked
        return False
