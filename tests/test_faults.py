"""Whatever is wrong with a store or a disk: one named error, its exit code, no hang, no traceback, nothing left."""

import errno
import json
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.commands import CHECKPOINT, Done, copy_store, make_store, run_here, smallest_ram
from tests.quick import represented
from tests.runtimes import run_greedy
from tests.warm import run_warm
from tiered.convert import ConvertOptions, ConvertProgress, convert_checkpoint
from tiered.errors import BudgetError, ReadError, StoreError
from tiered.io import Arena
from tiered.plan import Workload
from tiered.runtime import Options, Runtime
from tiered.store import Store

pytestmark = pytest.mark.usefixtures("steady_baseline")

LAYER = "blocks/layer-003.safetensors"
EMBED = "blocks/embed.safetensors"
OUTER = "blocks/outer.safetensors"
PROMPT = [[2, 100, 200, 300, 400]]
STEPS = 4
REMEDIES = (
    "convert",
    "put the model's own config.json there",
    "download the file again",
)
"""Every message about a damaged store says what to do."""


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("faults"))


@pytest.fixture
def store(original: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return copy_store(original, tmp_path)


def generate(store: Path, *words: str) -> Done:
    return run_here("generate", store, "-p", "Hello", "-n", "4", "--no-measure", *words)


def assert_refused(done: Done, *told: str) -> None:
    """Exit code 4 and one plain message that says all of `told` and what to do."""
    assert done.code == 4, done
    assert done.err.startswith("tiered: ") and done.err.count("\n") == 1, done.err
    for text in told:
        assert text in done.err
    assert any(remedy in done.err for remedy in REMEDIES), done.err


# What is no store.


def test_a_missing_store(tmp_path: Path) -> None:
    assert_refused(generate(tmp_path / "none.tiered"), f"{tmp_path / 'none.tiered'}: no such store")


def test_a_model_folder() -> None:
    assert_refused(generate(CHECKPOINT), str(CHECKPOINT), "a model folder, not a store")


def test_a_file(tmp_path: Path) -> None:
    (tmp_path / "model").write_bytes(b"GGUF")
    assert_refused(generate(tmp_path / "model"), f"{tmp_path / 'model'}: a file")


def test_some_other_folder(tmp_path: Path) -> None:
    assert_refused(generate(tmp_path), f"{tmp_path}: not a store", "manifest.json")


def test_an_unfinished_conversion(tmp_path: Path) -> None:
    def stop(progress: ConvertProgress) -> None:
        if "layer-002" in progress.block:
            raise KeyboardInterrupt

    store = tmp_path / "half.tiered"
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(CHECKPOINT, store, ConvertOptions(), stop)
    assert_refused(generate(store), str(store), "has not finished", "again to resume")


# Damage on disk.


def edit_manifest(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    return edit_json("manifest.json", change)


def edit_json(name: str, change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def damage(store: Path) -> None:
        path = store / name
        value = json.loads(path.read_text(encoding="utf-8"))
        change(value)
        path.write_text(json.dumps(value), encoding="utf-8")

    return damage


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda store: void((store / name).write_bytes(content))


def void(_: object) -> None:
    """For lambdas whose value nobody wants."""


def truncate(name: str, keep: float) -> Callable[[Path], None]:
    return lambda store: os.truncate(store / name, int((store / name).stat().st_size * keep))


def zeros(name: str) -> Callable[[Path], None]:
    return lambda store: void((store / name).write_bytes(bytes((store / name).stat().st_size)))


def remove(name: str) -> Callable[[Path], None]:
    return lambda store: (store / name).unlink()


def flip(name: str, place: float) -> Callable[[Path], None]:
    """Damage one bit, `place` of the way through the file."""

    def damage(store: Path) -> None:
        with (store / name).open("r+b") as file:
            position = int((store / name).stat().st_size * place)
            file.seek(position)
            byte = file.read(1)[0]
            file.seek(position)
            file.write(bytes([byte ^ 4]))

    return damage


DAMAGE: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "manifest of something else": (write("manifest.json", b'{"name": "an app"}'), ("manifest.json", "not a tiered")),
    "manifest is not JSON": (write("manifest.json", b'{"format": "tiered-st'), ("manifest.json", "not valid JSON")),
    "manifest is not text": (write("manifest.json", b"\xff\xfe\x00\x01"), ("manifest.json", "not text")),
    "manifest of a newer version": (
        edit_manifest(lambda value: value.update(version=3)),
        ("manifest.json", "version 3", "reads version 2", "or use the tiered that wrote it"),
    ),
    "manifest lacks a key": (edit_manifest(lambda value: value.pop("tape")), ("manifest.json", "tape")),
    "manifest with another prefix": (
        edit_manifest(lambda value: value["blocks"][2].update(prefix="elsewhere.")),
        ("manifest.json", "block layer-000 has prefix 'elsewhere.'", "convert it again"),
    ),
    "manifest with another prefix of the head": (
        edit_manifest(lambda value: value["blocks"][-1].update(prefix="elsewhere.")),
        ("manifest.json", "block head has prefix 'elsewhere.'", "convert it again"),
    ),
    "configuration with more layers than anybody has": (
        edit_json("config.json", lambda value: value.update(num_hidden_layers=2_000_000_000)),
        ("config.json", "num_hidden_layers is 2000000000", "put the model's own config.json there"),
    ),
    "configuration with more layers than the store": (
        edit_json("config.json", lambda value: value.update(num_hidden_layers=400)),
        ("config.json", "describes 400 layers, the store has 8", "put it back"),
    ),
    "tokenizer configuration that fails only in use": (
        edit_json("tokenizer_config.json", lambda value: value.update(model_max_length=[1])),
        ("its tokenizer cannot be used",),
    ),
    "manifest points outside": (
        edit_manifest(lambda value: value["files"][0].update(path="../../etc/passwd")),
        ("manifest.json", "points outside the store"),
    ),
    "block missing": (remove(LAYER), (LAYER,)),
    "block truncated": (truncate(LAYER, 0.5), (LAYER,)),
    "block empty": (truncate(LAYER, 0), (LAYER,)),
    "block too long": (lambda store: os.truncate(store / LAYER, 1 << 22), (LAYER,)),
    "bit flip in a layer": (flip(LAYER, 0.7), (LAYER, "chunk 2", "is corrupt", "tiered verify")),
    "bit flip in the embedding": (flip(EMBED, 0.9), (EMBED, "chunk 1", "is corrupt")),
    "bit flip in the outer block": (flip(OUTER, 0.6), (OUTER, "chunk 2", "is corrupt")),
    "header length is absurd": (flip(LAYER, 0), (LAYER,)),
    "bit flip in a header": (flip(LAYER, 0.0001), (LAYER,)),
    "a block of zeros": (
        lambda store: void((store / LAYER).write_bytes(bytes((store / LAYER).stat().st_size))),
        (LAYER,),
    ),
    "configuration missing": (remove("config.json"), ("config.json", "missing")),
    "configuration is not JSON": (write("config.json", b"{"), ("config.json",)),
    "tokenizer is damaged": (write("tokenizer.json", b"{"), ("tokenizer",)),
}


@pytest.mark.parametrize(("damage", "told"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_store_is_refused_by_name(store: Path, damage: Callable[[Path], None], told: tuple[str, ...]) -> None:
    damage(store)
    assert_refused(generate(store), *told)
    assert generate(store).out == ""


@pytest.mark.slow
def test_the_exit_code_of_a_process_is_that_of_the_error(store: Path) -> None:
    flip(LAYER, 0.7)(store)
    done = run_warm(store.parent, "generate", store, "-p", "Hello", "-n", "4")
    assert_refused(done, LAYER, "is corrupt")


def test_damage_is_found_even_where_compute_would_come_first(store: Path) -> None:
    """A chunk's checksum is tested before anything is computed from it: no text appears."""
    flip("blocks/layer-000.safetensors", 0.7)(store)
    done = generate(store, "--prefetch", "0")
    assert_refused(done, "layer-000")
    assert done.out == ""


# Failures while running: a system call that misbehaves.


class Disk:
    """os.preadv, except for call number `at` (and every `every`-th after it), which `trouble` answers."""

    def __init__(self, at: int, trouble: Callable[[int, Sequence[memoryview], int, int], int], every: int = 1) -> None:
        self._at, self._trouble, self._every = at, trouble, every
        self._lock = threading.Lock()
        self.calls = 0

    def __call__(self, fd: int, buffers: Sequence[memoryview], offset: int, flags: int, /) -> int:
        with self._lock:
            number = self.calls
            self.calls += 1
        if number >= self._at and (number - self._at) % self._every == 0:
            return self._trouble(fd, buffers, offset, flags)
        return os.preadv(fd, buffers, offset, flags)


def fail_with(number: int) -> Callable[[int, Sequence[memoryview], int, int], int]:
    def trouble(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    return trouble


def short_by(nbytes: int) -> Callable[[int, Sequence[memoryview], int, int], int]:
    """Reads `nbytes` less than asked for, but something."""

    def trouble(fd: int, buffers: Sequence[memoryview], offset: int, flags: int) -> int:
        count = os.preadv(fd, buffers, offset, flags)
        return max(count - nbytes, min(count, 4096))

    return trouble


@pytest.fixture
def emptied(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, int]]:
    """What every arena still lent when it was closed."""
    left: list[dict[str, int]] = []
    close = Arena.close

    def note_and_close(arena: Arena) -> None:
        left.append(dict(arena.in_use))
        close(arena)

    monkeypatch.setattr(Arena, "close", note_and_close)
    return left


def streaming(store: Path, disk: Disk | None = None, **fields: Any) -> Runtime:
    """A runtime that streams most of the store in every pass."""
    opened, workload = Store.open(store), Workload(1, 16, 8)
    options = replace(Options(dtype="float32", threads=1), **fields)
    with pytest.raises(BudgetError) as refused, Runtime(opened, workload, replace(options, ram=1 << 20)):
        pass
    runtime = Runtime(opened, workload, replace(options, ram=refused.value.smallest_bytes))
    if disk is not None:
        runtime._preadv = disk
    return runtime


def threads_of_ours() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("tiered")]


@pytest.fixture(scope="module")
def expected(original: Path) -> Sequence[Sequence[int]]:
    """The tokens of an undisturbed run, and how many reads it takes."""
    with streaming(original) as runtime:
        return run_greedy(runtime, PROMPT, STEPS).tokens


@pytest.mark.parametrize("prefetch", [None, 0])
@pytest.mark.parametrize("at", represented([0, 1, 2, 3, 6, 12, 25, 40], [0, 3, 40]))
def test_a_failed_read_ends_the_run_by_name(
    original: Path, emptied: list[dict[str, int]], at: int, prefetch: int | None
) -> None:
    disk = Disk(at, fail_with(errno.EIO))
    with (
        streaming(original, disk, prefetch=prefetch) as runtime,
        pytest.raises(ReadError, match=r"\.safetensors: read of .* failed: Input/output error \(EIO\); check the disk"),
    ):
        run_greedy(runtime, PROMPT, STEPS)
    assert disk.calls > at
    assert emptied[-1] == {}
    assert threads_of_ours() == []


@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("at", represented([0, 3, 7, 11], [3]))
def test_after_a_passing_failure_the_runtime_can_be_used_again(
    original: Path, expected: Sequence[Sequence[int]], at: int, resident: bool
) -> None:
    # Three calls fail: reads of several blocks, which are under way together.
    disk = Disk(at, fail_with(errno.EIO), every=1)
    runtime = streaming(original, disk)
    if resident:
        runtime = Runtime(runtime.store, runtime.workload, replace(runtime.options, ram=None))
        runtime._preadv = disk
    with runtime:
        with pytest.raises(ReadError):
            run_greedy(runtime, PROMPT, STEPS)
        disk._at = 1 << 60
        for _ in range(2):
            assert run_greedy(runtime, PROMPT, STEPS, end=False).tokens == expected


@pytest.mark.parametrize(
    ("trouble", "every"),
    [
        (short_by(4096), 1),
        (short_by(3000), 3),
        (short_by(1 << 20), 1),
        (fail_with(errno.EINTR), 2),
        (fail_with(errno.EINVAL), 10**9),
    ],
    ids=["a page short", "short within a page", "page by page", "interrupted", "O_DIRECT refused"],
)
def test_reads_that_come_short_or_have_to_be_repeated_give_the_same_tokens(
    original: Path,
    expected: Sequence[Sequence[int]],
    trouble: Callable[[int, Sequence[memoryview], int, int], int],
    every: int,
) -> None:
    with streaming(original, Disk(4, trouble, every)) as runtime:
        assert run_greedy(runtime, PROMPT, STEPS).tokens == expected


def test_a_store_that_is_truncated_while_running(store: Path, emptied: list[dict[str, int]]) -> None:
    def cut(fd: int, buffers: Sequence[memoryview], offset: int, flags: int) -> int:
        os.truncate(store / LAYER, 1 << 16)
        return os.preadv(fd, buffers, offset, flags)

    with (
        streaming(store, Disk(25, cut)) as runtime,
        pytest.raises(StoreError, match=r"layer-003\.safetensors: ends at byte [\d,]+, expected .* convert"),
    ):
        run_greedy(runtime, PROMPT, STEPS)
    assert emptied[-1] == {}
    assert threads_of_ours() == []


def test_a_store_that_is_removed_before_it_is_read(store: Path) -> None:
    with streaming(store) as runtime:
        shutil.rmtree(store / "blocks")
        with pytest.raises((StoreError, ReadError), match=r"safetensors: missing"):
            run_greedy(runtime, PROMPT, STEPS)
    assert threads_of_ours() == []


def test_bytes_that_change_after_they_were_found_good_are_found_where_always_is_asked_for(store: Path) -> None:
    def damage(fd: int, buffers: Sequence[memoryview], offset: int, flags: int) -> int:
        flip(LAYER, 0.7)(store)
        return os.preadv(fd, buffers, offset, flags)

    words = ("--verify", "always", "--ram", smallest_ram(generate(store, "--ram", "1MiB").err))
    with with_disk(Disk(25, damage, 10**9)):
        assert_refused(generate(store, *words), LAYER, "is corrupt")


def with_disk(disk: Disk) -> AbstractContextManager[object]:
    """Runtimes read through `disk` meanwhile."""
    return mock.patch.object(Runtime, "_preadv", staticmethod(disk))


@pytest.mark.parametrize("at", [0, 5, 30])
def test_the_command_ends_with_1_on_a_failed_read(original: Path, at: int) -> None:
    words = ("--ram", smallest_ram(generate(original, "--ram", "1MiB").err))
    with with_disk(Disk(at, fail_with(errno.EIO))):
        done = generate(original, *words)
    assert done.code == 1
    assert done.err.startswith("tiered: ") and done.err.count("\n") == 1, done.err
    assert str(original / "blocks") in done.err and "(EIO); check the disk" in done.err
    assert threads_of_ours() == []
