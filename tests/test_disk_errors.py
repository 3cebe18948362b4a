"""Whatever the operating system fails to read or write, exit code 1 and the name of that very file."""

import errno
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.commands import CHECKPOINT, Done, copy_store, make_store, run_here

REQUEST = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "Hi", "max_tokens": 2}}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("errors"))


def failing(*_: object, **__: object) -> Any:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def failing_on(name: str, action: Callable[..., Any]) -> Callable[..., Any]:
    """`action`, whose first argument is a file's descriptor, failing for files called `name`."""

    def act(fd: int, *arguments: Any, **options: Any) -> Any:
        if Path(f"/proc/self/fd/{fd}").readlink().name == name:
            failing()
        return action(fd, *arguments, **options)

    return act


class FailingFile(io.BytesIO):
    """A file on a disk that is broken."""

    def read(self, *_: object) -> bytes:
        return bytes(failing())


def break_file(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Have every read of a file called `name` fail, by whichever of our ways it is read."""
    original = os.fdopen

    def fdopen(fd: int, *arguments: Any) -> Any:
        broken = Path(f"/proc/self/fd/{fd}").readlink().name == name
        return FailingFile() if broken else original(fd, *arguments)

    monkeypatch.setattr(os, "fdopen", fdopen)
    for call in ("pread", "preadv"):
        monkeypatch.setattr(os, call, failing_on(name, getattr(os, call)))


def assert_named(done: Done, path: Path) -> None:
    assert done.code == 1, done
    assert done.err.splitlines()[-1].startswith(f"tiered: {path}: "), done.err
    assert "Input/output error" in done.err and "Traceback" not in done.err


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "model.safetensors"])
def test_a_failed_read_of_the_source_names_the_source(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_file(monkeypatch, name)
    assert_named(run_here("convert", CHECKPOINT, "-o", tmp_path / "out"), CHECKPOINT / name)


def test_a_failed_read_of_weights_while_they_are_converted_names_the_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "preadv", failing_on("model.safetensors", os.preadv))
    assert_named(run_here("convert", CHECKPOINT, "-o", tmp_path / "out"), CHECKPOINT / "model.safetensors")
    assert (tmp_path / "out" / "conversion.json").exists()


@pytest.mark.parametrize(
    ("call", "name"),
    [("tiered.store.sweep.Sweep._write", "blocks/embed.safetensors.part"), ("os.fsync", "conversion.json.part")],
)
def test_a_failed_write_names_the_output(call: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call, failing)
    assert_named(run_here("convert", CHECKPOINT, "-o", tmp_path / "out"), tmp_path / "out" / name)


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", "config.json"])
def test_a_failed_read_beside_the_blocks_is_no_corruption(
    name: str, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = copy_store(original, tmp_path)
    break_file(monkeypatch, name)
    assert_named(run_here("generate", store, "-p", "Hello", "-n", "2", "--no-measure"), store / name)


@pytest.mark.parametrize("call", ["write", "fdatasync"])
def test_a_failed_write_of_results_names_them(
    call: str, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests, results = tmp_path / "requests.jsonl", tmp_path / "results.jsonl"
    requests.write_text(json.dumps(REQUEST) + "\n")
    monkeypatch.setattr(os, call, failing_on(results.name, getattr(os, call)))
    done = run_here("batch", original, "-i", requests, "-o", results, "--batch", "1", "--no-measure")
    assert_named(done, results)


def test_a_failed_read_of_what_a_job_is_names_it(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests, results = tmp_path / "requests.jsonl", tmp_path / "results.jsonl"
    requests.write_text(json.dumps(REQUEST) + "\n")
    command = ("batch", original, "-i", requests, "-o", results, "--batch", "1", "--no-measure")
    assert run_here(*command).code == 0
    break_file(monkeypatch, "results.jsonl.job")
    assert_named(run_here(*command), tmp_path / "results.jsonl.job")
