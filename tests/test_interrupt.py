"""Ctrl-C ends a run soon and leaves nothing behind; in a program, the runtime can be used again after it."""

import contextlib
import os
import pty
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest

from tests.commands import make_store
from tests.quick import represented
from tests.runtimes import reserved, run_greedy, run_segments, streaming
from tests.waiting import SECONDS, wait_until
from tests.warm import WarmProcess, tiered
from tiered.cache import SequenceKV
from tiered.convert import ConvertOptions, convert_checkpoint
from tiered.errors import InterruptedRun
from tiered.model import Segment
from tiered.plan.shapes import STORE_SHAPE_NAME
from tiered.runtime import Runtime
from tiered.store import Store
from tiered.stream import StreamThread

SHAPE = """
name = "deep"
[config]
model_type = "opt"
dtype = "bfloat16"
vocab_size = 272
hidden_size = 2048
ffn_dim = 8192
num_hidden_layers = 24
num_attention_heads = 32
max_position_embeddings = 2048
word_embed_proj_dim = 2048
tie_word_embeddings = true
pad_token_id = 1
bos_token_id = 2
eos_token_id = 2
"""
PROMPT = [[2, 100, 200, 300, 400]]
STEPS = 3


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 30 MB whose passes take long: 24 layers over one file."""
    folder = tmp_path_factory.mktemp("deep")
    (folder / "deep.toml").write_text(SHAPE, encoding="utf-8")
    options = ConvertOptions(synthetic=True, distinct_blocks=1)
    convert_checkpoint(str(folder / "deep.toml"), folder / "deep.tiered", options)
    return folder / "deep.tiered"


@dataclass
class Run:
    """A command on a terminal."""

    child: WarmProcess
    master: int
    shown: str = ""

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + SECONDS
        while text not in self.shown:
            assert time.monotonic() < deadline and self.child.poll() is None, self.shown
            self.read(0.1)

    def read(self, seconds: float = 0.0) -> None:
        # A terminal whose other end has closed answers EIO.
        with contextlib.suppress(OSError):
            while select.select([self.master], [], [], seconds)[0]:
                self.shown += os.read(self.master, 1 << 16).decode()
                seconds = 0.0

    def interrupt(self) -> None:
        """Press Ctrl-C, and wait until the command has ended: long before it would by itself, however slow a machine
        that is shared may be. The contract is one second."""
        os.write(self.master, b"\x03")
        self.child.wait(SECONDS)
        self.read()


@contextlib.contextmanager
def on_a_terminal(words: Sequence[str | Path], folder: Path, command: Callable[..., None] = tiered) -> Iterator[Run]:
    """`command` with `words` as the foreground job of a terminal, in an empty folder and with one for temporary
    files."""
    for name in ("work", "temporary"):
        (folder / name).mkdir()
    master, slave = pty.openpty()
    variables = {"TERM": "xterm", "TMPDIR": str(folder / "temporary")}
    streams = [os.ttyname(slave)] * 3
    try:
        with WarmProcess(command, list(map(str, words)), streams, folder / "work", **variables) as child:
            yield Run(child, master)
    finally:
        os.close(slave)
        os.close(master)


def contents(folder: Path) -> dict[str, int]:
    """When each file was written; but for the shape, which the first run that comes so far leaves there."""
    files = (path for path in folder.rglob("*") if path.name != STORE_SHAPE_NAME)
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in files}


def measuring_for_long(*words: str) -> None:
    """The command, which would measure the disk for minutes: until it is interrupted, however late that is."""
    with mock.patch("tiered.bench.raw.SUSTAINED", 5000.0):
        tiered(*words)


CASES: dict[str, tuple[tuple[str, ...], str]] = {
    "a long prefill": (("--prompt-tokens", "1900", "-n", "100", "--ram", "1GiB"), "block 1/"),
    "decode": (("-p", "Hello", "-n", "500", "--ignore-eos"), "block 2"),
    "decode without read-ahead": (("-p", "Hello", "-n", "500", "--ignore-eos", "--prefetch", "0"), "block 2"),
    "measuring the disk": (("-p", "Hello", "-n", "1"), "measuring"),
}


@pytest.mark.parametrize(("words", "moment"), represented(CASES.values(), [CASES["decode"]]), ids=CASES.keys())
def test_ctrl_c_ends_a_run_soon_and_leaves_nothing_behind(
    deep: Path, tmp_path: Path, words: tuple[str, ...], moment: str
) -> None:
    before = contents(deep)
    # Not all of it fits: there is something to stream and to measure.
    command = ("generate", str(deep), "--ram", "600MiB", *words, "--trace", str(tmp_path / "trace.json"))
    with on_a_terminal(command, tmp_path, measuring_for_long) as run:
        run.wait_for(moment)
        run.interrupt()
    assert run.child.returncode == 130, run.shown
    assert run.shown.rstrip().endswith("tiered: interrupted"), run.shown
    assert "Traceback" not in run.shown and "Error" not in run.shown, run.shown
    assert contents(deep) == before
    assert {path.name for path in tmp_path.rglob("*")} == {"work", "temporary"}


# In a program.


class SlowDisk:
    """os.preadv, a little later. Its first read presses Ctrl-C if it `interrupts`."""

    def __init__(self, seconds: float, interrupts: bool = False) -> None:
        self._seconds, self._interrupts = seconds, interrupts

    def __call__(self, fd: int, buffers: Sequence[memoryview], offset: int, flags: int, /) -> int:
        interrupts, self._interrupts = self._interrupts, False
        if interrupts:
            main = threading.main_thread().ident
            assert main is not None
            signal.pthread_kill(main, signal.SIGINT)
        time.sleep(self._seconds)
        return os.preadv(fd, buffers, offset, flags)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store.open(make_store(tmp_path_factory.mktemp("interrupt")))


@contextlib.contextmanager
def ctrl_c_after(seconds: float) -> Iterator[None]:
    """Ctrl-C in the main thread `seconds` from now."""
    main = threading.main_thread().ident
    assert main is not None
    timer = threading.Timer(seconds, signal.pthread_kill, (main, signal.SIGINT))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


@pytest.fixture(scope="module")
def expected(store: Store) -> Sequence[Sequence[int]]:
    with streaming(store) as runtime:
        return run_greedy(runtime, PROMPT, STEPS).tokens


@pytest.mark.parametrize("prefetch", [None, 0])
@pytest.mark.parametrize("milliseconds", represented([0, 7, 30, 65, 110, 200], [30]))
def test_the_runtime_can_be_used_again_after_ctrl_c(
    store: Store, expected: Sequence[Sequence[int]], milliseconds: int, prefetch: int | None
) -> None:
    # The computation waits for the disk nearly all the time, or reads and computes in turn.
    with streaming(store, SlowDisk(0.01), prefetch=prefetch) as runtime:
        runtime.start_streaming()
        for _ in range(2):
            with contextlib.ExitStack() as stack:
                # Reserved before: what is interrupted while it reserves has got nothing that it could give back.
                kv = reserved(stack, runtime, len(PROMPT[0]) + 100)
                with pytest.raises(KeyboardInterrupt), ctrl_c_after(milliseconds / 1000):
                    run_passes(runtime, kv, 100)
            assert runtime._memory.pool.is_empty
        for _ in range(2):
            assert run_greedy(runtime, PROMPT, STEPS, end=False).tokens == expected
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("tiered")]
    assert runtime._memory.arena.in_use == {}


def run_passes(runtime: Runtime, kv: SequenceKV, count: int) -> None:
    """So many passes of `PROMPT` and what follows it, and then a wait: an interruption may come that late."""
    ids = PROMPT[0]
    for _ in range(count):
        (logits,) = run_segments(runtime, [Segment(kv, ids, 1)])
        ids = [int(logits[-1].argmax())]
    time.sleep(SECONDS)


def test_ctrl_c_while_tables_are_read_leaves_the_runtime_usable(
    store: Store, expected: Sequence[Sequence[int]]
) -> None:
    with streaming(store, SlowDisk(0.2, interrupts=True)) as runtime:
        with pytest.raises(KeyboardInterrupt):
            runtime.start_streaming()
        assert run_greedy(runtime, PROMPT, 2).tokens[0] == expected[0][:2]


def test_ctrl_c_while_tables_are_read_and_leaving_at_once_ends_every_thread(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(KeyboardInterrupt), streaming(store, SlowDisk(0.2, interrupts=True)) as runtime:
        runtime.start_streaming()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("tiered")]
    assert runtime._memory.arena.in_use == {}
    assert not caplog.records


def test_ctrl_c_again_and_again_while_reading_ends_leaves_no_thread(store: Store) -> None:
    begun, may_end, main = threading.Event(), threading.Event(), threading.main_thread().ident
    read = set[str]()
    assert main is not None

    def disk(fd: int, buffers: Sequence[memoryview], offset: int, flags: int, /) -> int:
        path = str(Path(f"/proc/self/fd/{fd}").readlink())
        if path in read:  # ahead, as its small tensors came with the tables
            begun.set()
            assert may_end.wait(SECONDS)
        elif "layer-" in path:
            read.add(path)
        return os.preadv(fd, buffers, offset, flags)

    def interrupt(thread: StreamThread) -> None:
        wait_until(lambda: thread._stop.is_set())  # it is waited for
        for _ in range(3):
            signal.pthread_kill(main, signal.SIGINT)
            time.sleep(0.05)
        may_end.set()

    with streaming(store, disk) as runtime:
        runtime.start_streaming()
        thread = runtime._streaming
        assert thread is not None and begun.wait(SECONDS)
        other = threading.Thread(target=interrupt, args=(thread,))
        other.start()
        with pytest.raises(KeyboardInterrupt):
            runtime.stop_streaming()
        other.join()
        # Of Python's own idea of a thread nothing is left that could be asked, if its wait was interrupted.
        assert thread.ready.is_there and thread.ready.result().loop.is_closed()


def test_a_pass_that_another_thread_cancels_ends_as_interrupted(
    store: Store, expected: Sequence[Sequence[int]]
) -> None:
    with streaming(store, SlowDisk(0.01)) as runtime:

        def cancel(done: int, total: int) -> None:
            # In the pass and before its last block: between two passes there would be nothing to interrupt.
            if done == 1:
                other = threading.Thread(target=runtime.host.interrupt, args=(runtime,))
                other.start()
                other.join()

        with contextlib.ExitStack() as stack:
            segment = Segment(reserved(stack, runtime, len(PROMPT[0])), PROMPT[0])
            with pytest.raises(InterruptedRun):
                run_segments(runtime, [segment], on_block=cancel)
        assert run_greedy(runtime, PROMPT, STEPS).tokens == expected
