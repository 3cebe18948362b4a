"""Only regular files are read, whatever somebody has put in their place, and errors name the file."""

import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tiered.errors import CheckpointError, ReadError, StoreError
from tiered.files import check_regular, errors_of, read_json, read_whole, reading


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


STRANGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a folder": (Path.mkdir, "a folder, expected a file"),
    "a pipe": (os.mkfifo, "a named pipe, expected a file"),
    "a socket": (make_socket, "a socket, expected a file"),
    "a link to a device": (lambda path: path.symlink_to("/dev/zero"), "a device, expected a file"),
    "a link to nothing": (lambda path: path.symlink_to("gone"), "a link to gone, which does not exist"),
    "a link to itself": (lambda path: path.symlink_to(path.name), "a link that leads back to itself"),
}


@pytest.mark.parametrize(("make", "message"), STRANGE.values(), ids=STRANGE.keys())
@pytest.mark.parametrize("error", [CheckpointError, StoreError])
def test_what_is_no_file_is_named_and_not_waited_for(
    make: Callable[[Path], object],
    message: str,
    error: type[CheckpointError | StoreError],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    path = Path("x.json")
    make(path)
    for act in (check_regular, read_whole):
        with pytest.raises(error, match=rf"x\.json: {message}; put the file itself there"):
            act(path, error)


def test_a_file_and_a_link_to_one_are_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"content")
    (tmp_path / "b").symlink_to("a")
    assert [read_whole(tmp_path / name, StoreError) for name in "ab"] == [b"content"] * 2
    assert check_regular(tmp_path / "b", StoreError) == 7


def test_no_file_is_for_the_caller_to_explain(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_whole(tmp_path / "gone", StoreError)
    with pytest.raises(FileNotFoundError):
        check_regular(tmp_path / "gone" / "further", StoreError)
    (tmp_path / "a").touch()
    for act in (check_regular, read_whole):
        with pytest.raises(FileNotFoundError, match="a/further"):
            act(tmp_path / "a" / "further", StoreError)


def test_what_is_too_large_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    os.truncate(tmp_path / "a", 1 << 40)  # sparse
    with pytest.raises(CheckpointError, match=r"has 1,099,511,627,776 bytes, expected at most 536,870,912"):
        read_whole(tmp_path / "a", CheckpointError)
    with pytest.raises(CheckpointError, match=r"expected at most 67,108,864; make it anew"):
        read_json(tmp_path / "a", CheckpointError, "make it anew")


def test_what_the_system_refuses_to_read_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(ReadError, match=r"/x: cannot be read: Input/output error"), reading(tmp_path / "x"):
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_errors_without_a_name_are_given_one_and_others_keep_theirs(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"'.*/x'") as caught, errors_of(tmp_path / "x"):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    assert (caught.value.errno, caught.value.filename) == (errno.EIO, str(tmp_path / "x"))
    with pytest.raises(OSError, match="other"), errors_of(tmp_path / "x"):
        raise OSError(errno.EIO, os.strerror(errno.EIO), "other")
