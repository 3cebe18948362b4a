"""The process around a command: closed streams, readers that go, many interrupts, locales of ASCII."""

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import pytest

from tests.commands import ROOT, TIERED, make_store, run_here
from tests.waiting import SECONDS

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
PROCESS = pytest.mark.inputs("tiered/__main__.py", "tiered/process.py")
ODD = "é日本\U0001f600"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp(ODD))


def shell(words: Sequence[str | Path], redirections: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command whose streams a shell redirects; what is left of them comes back."""
    return subprocess.run(
        ["sh", "-c", f'"$@" {redirections}', "sh", *map(str, words)],
        capture_output=True,
        encoding="utf-8",
        stdin=subprocess.DEVNULL,
        timeout=100,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )


@pytest.mark.parametrize("redirections", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_there_and_no_file_gets_their_numbers(redirections: str, tmp_path: Path) -> None:
    code = (
        "import sys; from tiered.process import open_streams, end_streams; open_streams();"
        f"file = open({str(tmp_path / 'file')!r}, 'w'); assert file.fileno() > 2;"
        "assert '<&-' not in sys.argv[1] or sys.stdin.read() == '';"
        "print('out'); print('err', file=sys.stderr); sys.exit(end_streams(5))"
    )
    done = shell((sys.executable, "-c", code, redirections), redirections)
    assert done.returncode == 5, done.stderr
    assert done.stdout == ("" if " >&-" in f" {redirections}" else "out\n")
    assert done.stderr == ("" if "2>&-" in redirections else "err\n")
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_behind_standard_output_is_named_once(unbuffered: str) -> None:
    done = shell((*TIERED, "generate", "--help"), ">/dev/full", PYTHONUNBUFFERED=unbuffered)
    assert (done.returncode, done.stderr) == (1, "tiered: standard output: No space left on device\n")


COLLECTING = """
import gc
from tiered.process import importing
for error in (None, ImportError()):
    try:
        with importing(is_command=True):
            assert not gc.isenabled()
            if error:
                raise error
    except ImportError:
        pass
    assert gc.isenabled()
assert gc.get_freeze_count() > 1000
frozen = gc.get_freeze_count()
with importing(is_command=False):
    assert not gc.isenabled()
assert gc.isenabled() and gc.get_freeze_count() == frozen
gc.disable()
with importing(is_command=True):  # who has switched it off wants it off
    pass
assert not gc.isenabled()
"""


def test_no_garbage_is_collected_during_imports_and_again_after_them() -> None:
    done = shell((sys.executable, "-c", COLLECTING), "")
    assert done.returncode == 0, done.stderr


def test_a_reader_that_goes_is_nothing_to_talk_about() -> None:
    assert shell((*TIERED, "generate", "--help"), "| :").stderr == ""


@PROCESS
def test_a_locale_of_ascii_takes_and_gives_utf8(store: Path, tmp_path: Path) -> None:
    text = tmp_path / f"{ODD}.txt"
    text.write_text(ODD, encoding="utf-8")
    words = ("score", store, "-f", text, "--no-measure", "--threads", "1")
    found = shell((*TIERED, *words), "", **ASCII)
    assert found.returncode == 0, found.stderr
    assert text.name in found.stdout
    assert found.stdout == run_here(*words).out


def test_an_argument_of_utf8_is_text_in_a_locale_of_ascii() -> None:
    done = shell((*TIERED, f"no-{ODD}"), "", **ASCII)
    assert done.returncode == 2
    assert f"No such command 'no-{ODD}'" in done.stderr


def test_a_name_cannot_write_on_the_screen_what_it_likes(tmp_path: Path) -> None:
    done = run_here("inspect", tmp_path / "a\x1b[2Jb\nc")
    assert done.code == 4
    assert done.err.count("\n") == 1 and "\x1b" not in done.err
    assert r"a\x1b[2Jb c: no such store" in done.err


def test_an_error_that_nobody_has_foreseen_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        raise LookupError("what\nis this")

    with mock.patch("tiered.store.Store.open", fail):
        done = run_here("inspect", tmp_path)
    assert done.code == 1 and done.err.count("\n") == 1
    assert done.err.startswith("tiered: internal error: LookupError: what is this (test_process.py:")
    with mock.patch("tiered.store.Store.open", fail), mock.patch.dict(os.environ, TIERED_TRACEBACK="1"):
        assert "Traceback" in run_here("inspect", tmp_path).err


@PROCESS
@pytest.mark.parametrize("when", ["while it imports", "while it runs"])
def test_many_interrupts_are_one(store: Path, when: str) -> None:
    words = (*TIERED, "generate", store, "-p", "Hello", "-n", "2000", "--ignore-eos", "--no-measure", "--threads", "1")
    process = subprocess.Popen(
        list(map(str, words)),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        # A background job's children would ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    with process:
        assert process.stdout is not None
        # Of its text little fits, so that it does not end before, however late the interrupts are.
        fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, 4096)
        if when == "while it runs":
            process.stdout.read(1)
        else:
            wait_for_import(process.pid, "torch")
        for _ in range(30):
            process.send_signal(signal.SIGINT)
            signal.sigtimedwait([], 0.01)
        _, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 130, err
    *so_far, last = filter(None, err.splitlines())
    assert last == b"tiered: interrupted"
    # A run that has begun says once how far it came. It may have, while this process did not come to interrupt it.
    assert [line.partition(b" generated, ended in pass ")[1] != b"" for line in so_far] == [True] * len(so_far)
    assert len(so_far) <= 1


def test_an_interrupt_in_a_destructor_is_not_lost() -> None:
    code = (
        "import os, signal, time; from tiered.process import catch_interrupts; catch_interrupts()\n"
        "class Ends:\n    def __del__(self): os.kill(os.getpid(), signal.SIGINT); time.sleep(0)\n"
        "try:\n    Ends(); time.sleep(60)\n"
        "except KeyboardInterrupt: print('seen')"
    )
    done = shell((sys.executable, "-c", code), "")
    assert (done.returncode, done.stdout, done.stderr) == (0, "seen\n", "")


def test_an_interrupt_that_comes_while_a_condition_takes_its_lock_comes_after_it() -> None:
    code = (
        "import os, signal, threading, time; from tiered.process import catch_interrupts; catch_interrupts()\n"
        "class Lock:\n"
        "    taken = 0\n"
        "    def acquire(self): pass\n"
        "    def release(self): pass\n"
        "    def __enter__(self): self.taken += 1; os.kill(os.getpid(), signal.SIGINT); time.sleep(0.1)\n"
        "    def __exit__(self, *_): self.taken -= 1\n"
        "lock = Lock()\n"
        "try:\n"
        "    with threading.Condition(lock): time.sleep(60)\n"
        "except KeyboardInterrupt: print(lock.taken)"
    )
    done = shell((sys.executable, "-c", code), "")
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")


def test_an_interrupt_that_comes_again_waits_like_others_and_comes_once() -> None:
    code = (
        "import os, signal, time; from tiered.process import catch_interrupts, interrupts_later; catch_interrupts()\n"
        "interrupts = signal.getsignal(signal.SIGINT).__self__\n"
        "done = []\n"
        "try:\n"
        "    with interrupts_later():\n"
        "        interrupts._come_again()\n"
        "        with interrupts_later(): time.sleep(0.1)\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        done.append('held')\n"
        "except KeyboardInterrupt: done.append('seen')\n"
        "time.sleep(0.1); print(*done)"
    )
    done = shell((sys.executable, "-c", code), "")
    assert (done.returncode, done.stdout, done.stderr) == (0, "held seen\n", "")


def test_an_interrupt_long_after_one_that_is_held_back_ends_the_process() -> None:
    code = (
        "import os, signal, time; from tiered import process; process._PATIENCE_SECONDS = 0.1\n"
        "process.catch_interrupts()\n"
        "with process.interrupts_later():\n"
        "    for _ in range(2): os.kill(os.getpid(), signal.SIGINT); time.sleep(0.2)\n"
        "print('not reached')"
    )
    done = shell((sys.executable, "-c", code), "")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "tiered: interrupted\n")


@pytest.mark.parametrize("waits", ["threading.Thread(target=time.sleep, args=(60,)).start()", "pass"])
def test_interrupts_end_a_command_that_has_ended_with_its_exit_code(waits: str) -> None:
    code = (
        "import sys, threading, time; from tiered import process\n"
        "process._PATIENCE_SECONDS = 0.1\n"
        f"process.catch_interrupts(); {waits}; process.no_more_interrupts(5)\n"
        "print('ended', flush=True); sys.exit(5)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ended\n"
        while process.poll() is None:
            process.send_signal(signal.SIGINT)
            signal.sigtimedwait([], 0.01)
        _, err = process.communicate()
    assert (process.returncode, err) == (5, b"")


def wait_for_import(pid: int, library: str) -> None:
    """Until the process has mapped a file of `library`, whose import then goes on for seconds."""
    while f"/{library}/" not in Path(f"/proc/{pid}/maps").read_text():
        signal.sigtimedwait([], 0.005)
