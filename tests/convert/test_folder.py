"""What a conversion may do to the folder it is pointed at."""

import contextlib
import errno
import json
import os
import pkgutil
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.convert.models import TRAINED, store_digest
from tiered.convert import ConvertOptions, convert_checkpoint
from tiered.convert.folder import locked, state_of
from tiered.errors import ConfigError, DiskFullError, ReadError, StoreError
from tiered.store import BlockWriter, Store

Usage = namedtuple("Usage", "total used free")
MEANWHILE = "another conversion has begun there meanwhile; run the same command again"


class Stop(Exception):
    """Ends a conversion at a chosen block, as a crash would."""


def stop_at(monkeypatch: pytest.MonkeyPatch, name: str, error: Exception | None = None) -> None:
    """Make writing block `name` fail after some of its bytes."""
    finish = BlockWriter.finish

    def failing(self: BlockWriter) -> object:
        if self._path.name.startswith(name):
            raise error or Stop
        return finish(self)

    monkeypatch.setattr(BlockWriter, "finish", failing)


@pytest.fixture
def half(tmp_path: Path) -> Path:
    """An unfinished conversion of the trained checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, "layer-004")
        with pytest.raises(Stop):
            convert_checkpoint(TRAINED, tmp_path / "half", ConvertOptions())
    return tmp_path / "half"


def test_a_finished_store_is_kept_unless_forced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert_checkpoint(TRAINED, out, ConvertOptions())
    before = store_digest(out)
    with pytest.raises(ConfigError, match=r"already a finished store; replace it with --force"):
        convert_checkpoint(TRAINED, out, ConvertOptions(quant="int8"))
    assert store_digest(out) == before
    convert_checkpoint(TRAINED, out, ConvertOptions(quant="int8", force=True))
    assert Store.open(out).manifest.quantization["layers"] == "int8-g64"
    convert_checkpoint(TRAINED, out, ConvertOptions(force=True))
    assert store_digest(out) == before


@pytest.mark.parametrize("force", [False, True])
def test_a_users_folder_is_never_touched(force: bool, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "blocks").mkdir(parents=True)
    (out / "blocks" / "precious.txt").write_text("mine")
    (out / "manifest.json").write_text('{"format": "another program"}')
    before = store_digest(out)
    with pytest.raises(ConfigError, match="nothing in it is touched"):
        convert_checkpoint(TRAINED, out, ConvertOptions(force=force))
    assert store_digest(out) == before


def test_the_source_folder_is_no_output(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(TRAINED, source)
    before = store_digest(source)
    with pytest.raises(ConfigError, match="nothing in it is touched"):
        convert_checkpoint(source, source, ConvertOptions(force=True))
    assert store_digest(source) == before


def test_force_leaves_a_users_files_in_a_store(tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert_checkpoint(TRAINED, out, ConvertOptions())
    (out / "notes.txt").write_text("mine")
    (out / "blocks" / "notes.txt").write_text("mine")
    convert_checkpoint(TRAINED, out, ConvertOptions(force=True))
    assert (out / "notes.txt").read_text() == (out / "blocks" / "notes.txt").read_text() == "mine"


def test_an_empty_folder_is_used(tmp_path: Path) -> None:
    assert state_of(tmp_path) == "new"
    convert_checkpoint(TRAINED, tmp_path, ConvertOptions())
    assert state_of(tmp_path) == "finished"


def test_the_same_call_resumes_and_the_bytes_are_the_same(half: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="run the same 'tiered convert' command again"):
        Store.open(half)
    times = {path.name: path.stat().st_mtime_ns for path in (half / "blocks").glob("*.safetensors")}
    assert len(times) == 6  # embed, outer, four layers
    (half / "blocks" / "stray.safetensors.part").write_text("left by a kill")
    result = convert_checkpoint(TRAINED, half, ConvertOptions())
    assert result.resumed_blocks == len(times)
    assert all((half / "blocks" / name).stat().st_mtime_ns == time for name, time in times.items())
    convert_checkpoint(TRAINED, tmp_path / "whole", ConvertOptions())
    assert store_digest(half) == store_digest(tmp_path / "whole")


def test_resuming_with_other_settings_is_refused_or_forced(half: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"other settings \(quant 'int4' there, 'int8' now\)"):
        convert_checkpoint(TRAINED, half, ConvertOptions(quant="int8"))
    result = convert_checkpoint(TRAINED, half, ConvertOptions(quant="int8", force=True))
    assert result.resumed_blocks == 0
    convert_checkpoint(TRAINED, tmp_path / "whole", ConvertOptions(quant="int8"))
    assert store_digest(half) == store_digest(tmp_path / "whole")


def test_resuming_from_a_fine_tuned_copy_is_refused(half: Path, tmp_path: Path) -> None:
    other = tmp_path / "opt-docs-8m"
    shutil.copytree(TRAINED, other)
    content = bytearray((other / "model.safetensors").read_bytes())
    content[-4_000_000:] = bytes(4_000_000)
    (other / "model.safetensors").write_bytes(content)
    with pytest.raises(ConfigError, match="another checkpoint"):
        convert_checkpoint(other, half, ConvertOptions())


def test_a_forced_command_resumes_its_own_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    convert_checkpoint(TRAINED, out, ConvertOptions(quant="int8"))
    with monkeypatch.context() as patch:
        stop_at(patch, "layer-004")
        with pytest.raises(Stop):
            convert_checkpoint(TRAINED, out, ConvertOptions(force=True))
    assert convert_checkpoint(TRAINED, out, ConvertOptions(force=True)).resumed_blocks == 6


def test_a_damaged_block_is_written_again(half: Path, tmp_path: Path) -> None:
    block = half / "blocks" / "layer-002.safetensors"
    block.write_bytes(block.read_bytes()[:-4096])
    assert convert_checkpoint(TRAINED, half, ConvertOptions()).resumed_blocks == 5
    convert_checkpoint(TRAINED, tmp_path / "whole", ConvertOptions())
    assert store_digest(half) == store_digest(tmp_path / "whole")


def test_a_kill_between_the_last_two_steps_is_finished_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, unlink = tmp_path / "out", Path.unlink

    def failing(self: Path, missing_ok: bool = False) -> None:
        if self.name == "conversion.json":
            raise Stop
        unlink(self, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", failing)
        with pytest.raises(Stop):
            convert_checkpoint(TRAINED, out, ConvertOptions())
    Store.open(out)
    result = convert_checkpoint(TRAINED, out, ConvertOptions())
    assert result.resumed_blocks == 10 and not (out / "conversion.json").exists()


def test_a_kill_while_discarding_takes_no_old_block_for_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, unlink = tmp_path / "out", Path.unlink
    convert_checkpoint(TRAINED, out, ConvertOptions(compress="none"))

    def failing(self: Path, missing_ok: bool = False) -> None:
        if self.name == "layer-003.safetensors":
            raise Stop
        unlink(self, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", failing)
        with pytest.raises(Stop):
            convert_checkpoint(TRAINED, out, ConvertOptions(clip="minmax", force=True))
    assert (out / "blocks" / "layer-005.safetensors").exists()
    assert convert_checkpoint(TRAINED, out, ConvertOptions(clip="minmax")).resumed_blocks == 0


def test_a_full_disk_is_named_and_resumable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_at(patch, "layer-004", OSError(errno.ENOSPC, "No space left on device"))
        with pytest.raises(DiskFullError, match="run the same command again to resume"):
            convert_checkpoint(TRAINED, out, ConvertOptions())
    assert convert_checkpoint(TRAINED, out, ConvertOptions()).resumed_blocks == 6


@pytest.mark.parametrize(("number", "error"), [(errno.EROFS, ConfigError), (errno.EIO, ReadError)])
def test_what_the_system_refuses_is_named(
    number: int, error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(monkeypatch, "layer-004", OSError(number, "refused by a test"))
    with pytest.raises(error, match="refused by a test"):
        convert_checkpoint(TRAINED, tmp_path / "out", ConvertOptions())


def test_too_little_space_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10 << 30, 10 << 30, 1 << 20))
    with pytest.raises(DiskFullError, match=r"the store needs .* MiB, the disk has 1 MiB free"):
        convert_checkpoint(TRAINED, tmp_path / "out", ConvertOptions())
    assert not (tmp_path / "out").exists()


def test_an_output_below_a_file_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "afile").touch()
    with pytest.raises(ConfigError, match=r"afile/x/y: .*afile is a file, expected a folder; choose another with -o"):
        convert_checkpoint(TRAINED, tmp_path / "afile" / "x" / "y", ConvertOptions())


def test_a_progress_file_too_large_to_be_one_is_not_parsed(tmp_path: Path) -> None:
    (tmp_path / "conversion.json").touch()
    os.truncate(tmp_path / "conversion.json", 65 << 20)  # sparse
    with pytest.raises(ConfigError, match=r"expected at most 67,108,864\); delete the folder"):
        convert_checkpoint(TRAINED, tmp_path)


def test_two_conversions_into_one_folder_do_not_mix(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(ConfigError, match="another conversion is writing to it"):
        convert_checkpoint(TRAINED, tmp_path, ConvertOptions())


@pytest.mark.parametrize(
    ("moment", "finished", "force", "message"),
    [
        ("convert.open_checkpoint", True, False, "already a finished store"),
        ("convert.convert.locked", True, False, "already a finished store"),
        ("convert.convert.locked", False, False, MEANWHILE),
        ("convert.convert.check_space", True, False, "already a finished store"),
        ("convert.convert.check_space", False, False, MEANWHILE),
        ("convert.convert.check_space", True, True, MEANWHILE),
        ("convert.convert.check_space", False, True, MEANWHILE),
    ],
)
def test_what_another_process_did_after_we_looked_is_not_overwritten(
    moment: str, finished: bool, force: bool, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It begins, and may end, while we open the checkpoint, while we decide, or just before we take the lock."""
    out = tmp_path / "out"
    with_another_before(monkeypatch, moment, lambda: another(out, finished))
    with pytest.raises(ConfigError, match=message):
        convert_checkpoint(TRAINED, out, ConvertOptions(force=force))
    assert state_of(out) == ("finished" if finished else "unfinished")
    assert len(list((out / "blocks").glob("*.safetensors"))) == (10 if finished else 6)


def test_what_another_process_began_while_we_opened_the_checkpoint_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with_another_before(monkeypatch, "convert.open_checkpoint", lambda: another(out, False))
    assert convert_checkpoint(TRAINED, out, ConvertOptions()).resumed_blocks == 6
    Store.open(out)


def another(out: Path, finished: bool) -> None:
    """What another process does in `out`: a conversion, or most of one."""
    with pytest.MonkeyPatch.context() as patch:
        if not finished:
            stop_at(patch, "layer-004")
        with contextlib.suppress(Stop):
            convert_checkpoint(TRAINED, out, ConvertOptions())


def with_another_before(monkeypatch: pytest.MonkeyPatch, moment: str, act: Callable[[], None]) -> None:
    """Have `act` run before `tiered.{moment}` does, once."""
    original = pkgutil.resolve_name(f"tiered.{moment}")

    def meanwhile(*arguments: Any) -> Any:
        monkeypatch.setattr(f"tiered.{moment}", original)
        act()
        return original(*arguments)

    monkeypatch.setattr(f"tiered.{moment}", meanwhile)


def test_a_store_that_is_finished_while_we_wait_to_resume_it_is_kept(
    half: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before: dict[Path, int] = {}

    def finish() -> None:
        another(half, True)
        before.update({path: path.stat().st_mtime_ns for path in half.rglob("*")})

    with_another_before(monkeypatch, "convert.open_checkpoint", finish)
    with pytest.raises(ConfigError, match="already a finished store"):
        convert_checkpoint(TRAINED, half, ConvertOptions())
    assert {path: path.stat().st_mtime_ns for path in half.rglob("*")} == before


def test_a_kill_while_the_disk_is_probed_leaves_what_the_same_call_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def killed(folder: Path, _: int) -> float:
        (folder / "bandwidth.part").write_bytes(b"noise")
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr("tiered.convert.compression.read_bandwidth", killed)
        with pytest.raises(Stop):
            convert_checkpoint(TRAINED, out, ConvertOptions(quant="none"))
    assert state_of(out) == "unfinished"
    convert_checkpoint(TRAINED, out, ConvertOptions(quant="none", compress="none", force=True))
    assert not (out / "bandwidth.part").exists()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["manifest.json", "conversion.json"])
def test_a_pipe_in_the_output_folder_is_not_waited_for(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(ConfigError, match=r"nothing in it is touched|not a progress file"):
        convert_checkpoint(TRAINED, tmp_path)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"format": "tiered-conversion", "version": 99}'])
def test_a_foreign_progress_file_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "conversion.json").write_text(content)
    with pytest.raises(ConfigError, match=r"conversion\.json: not a progress file"):
        convert_checkpoint(TRAINED, tmp_path, ConvertOptions())
    convert_checkpoint(TRAINED, tmp_path, ConvertOptions(force=True))
    assert json.loads((tmp_path / "manifest.json").read_text())["format"] == "tiered-store"
