"""The server of forks is another worker's only while that one's pipe is what it was."""

import json
import os
from collections.abc import Iterator
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import warm
from tests.shared import FOLDER_VARIABLE


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """Stands for the process's own, which has not begun; what it starts is called "own"."""
    reader, writer = os.pipe()

    def ensure_running() -> None:
        found._forkserver_address, found._forkserver_alive_fd = "own", writer

    found = SimpleNamespace(_forkserver_address=None, _forkserver_alive_fd=None, ensure_running=ensure_running)
    monkeypatch.setattr(forkserver, "_forkserver", found)
    monkeypatch.setattr(resource_tracker, "ensure_running", lambda: None)
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    yield found
    for fd in {reader, writer, found._forkserver_alive_fd}:
        os.close(fd)


@pytest.mark.parametrize("case", ["as it was", "no reader", "another pipe", "a file", "gone"])
def test_only_a_server_that_is_still_there_is_shared(case: str, server: SimpleNamespace, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    path, inode = Path(f"/proc/{os.getpid()}/fd/{writer}"), os.fstat(writer).st_ino
    if case == "no reader":
        os.close(reader)
    elif case == "another pipe":
        inode += 1
    elif case == "a file":
        path = tmp_path / "file"
        path.touch()
    elif case == "gone":
        path = tmp_path / "gone"
    (tmp_path / "forkserver.json").write_text(json.dumps((str(path), inode, "another's")), encoding="utf-8")
    warm._share_server()
    assert server._forkserver_address == ("another's" if case == "as it was" else "own")
    told = json.loads((tmp_path / "forkserver.json").read_text(encoding="utf-8"))
    assert told[2] == server._forkserver_address
    assert told[1] == os.fstat(server._forkserver_alive_fd).st_ino
    for fd in {writer} if case == "no reader" else {reader, writer}:
        os.close(fd)
