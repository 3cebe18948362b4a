"""Machines by name or path, and the profile of this one, which is kept per file system."""

import os
import stat
from pathlib import Path

import pytest

from tiered.errors import ConfigError
from tiered.plan import machines
from tiered.plan.hardware import Hardware
from tiered.plan.machines import (
    find_profile,
    hardware_files,
    load_hardware,
    profile_path,
    profiles_folder,
    save_hardware,
)


@pytest.fixture
def machine() -> Hardware:
    return load_hardware("t4-208gb")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_machine_has_a_name_or_a_path(machine: Hardware, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_hardware(machine, tmp_path / "mine.toml")
    assert load_hardware(str(tmp_path / "mine.toml")) == machine
    monkeypatch.chdir(tmp_path)
    assert load_hardware("mine.toml") == machine


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"machine 't5': expected the path of a .toml file, or one of cloud-96vcpu, "):
        load_hardware("t5")
    assert "t4-208gb" in hardware_files()


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe", "binary", "huge", "other"])
def test_a_file_that_describes_no_machine_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "machine.toml"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "huge":
        path.write_bytes(b"#" * (2 << 20))
    elif kind != "missing":
        path.write_bytes(b"\xff\xfe" if kind == "binary" else b'name = "a model"')
    with pytest.raises(ConfigError, match=r"machine\.toml: "):
        load_hardware(str(path))


def test_a_profile_is_found_for_every_folder_of_its_file_system(machine: Hardware, tmp_path: Path) -> None:
    assert find_profile(tmp_path) is None
    path = profile_path(tmp_path)
    save_hardware(machine, path)
    (tmp_path / "store.tiered").mkdir()
    (tmp_path / "file").touch()
    assert (
        find_profile(tmp_path) == find_profile(tmp_path / "store.tiered") == find_profile(tmp_path / "file") == machine
    )
    other = Path("/proc")
    assert other.stat().st_dev != tmp_path.stat().st_dev
    assert find_profile(other) is None and profile_path(other) != path


def test_another_host_with_the_same_processor_has_a_profile_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = profile_path(tmp_path)
    (tmp_path / "machine-id").write_text("0123456789abcdef0123456789abcdef\n")
    monkeypatch.setattr(machines, "_MACHINE_ID", tmp_path / "machine-id")
    assert profile_path(tmp_path) != mine and "-01234567-" in profile_path(tmp_path).name
    monkeypatch.setattr(machines, "_MACHINE_ID", tmp_path / "none")
    assert profile_path(tmp_path).name.endswith(".toml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[disk", "is no TOML file"),
        ("", "has no"),
        ("format = 1\n", "is in format 1, expected 2: another version of tiered wrote it"),
        ("format = 3\n", "is in format 3, expected 2: another version of tiered wrote it"),
    ],
)
def test_a_damaged_profile_and_one_of_another_format_say_what_to_run(text: str, message: str, tmp_path: Path) -> None:
    path = profile_path(tmp_path)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(
        ConfigError, match=f"{path.name}: {message}.*; measure it again: tiered profile --dir {tmp_path}"
    ):
        find_profile(tmp_path)


def test_a_missing_folder_is_no_place_of_a_profile(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="gone: No such file or directory; name a store, or a folder"):
        find_profile(tmp_path / "gone")


def test_profiles_are_where_the_user_keeps_caches(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert profiles_folder() == cache / "tiered/profiles"
    monkeypatch.setenv("HOME", str(tmp_path))
    for none in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", none)
        assert profiles_folder() == tmp_path / ".cache/tiered/profiles"


def test_a_profile_that_cannot_be_written_leaves_the_old_one(
    machine: Hardware, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "profile.toml"
    save_hardware(machine, path)

    def interrupted(_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("tiered.plan.machines.tomli_w.dumps", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_hardware(load_hardware("epyc-7742"), path)
    assert load_hardware(str(path)) == machine
    assert list(tmp_path.iterdir()) == [path]


def test_a_profile_can_be_read_by_whoever_may_read_the_users_files(machine: Hardware, tmp_path: Path) -> None:
    save_hardware(machine, tmp_path / "profile.toml")
    (tmp_path / "plain").touch()
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("profile.toml", "plain")]
    assert modes[0] == modes[1]
