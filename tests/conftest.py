"""What tests of different modules share."""

import gc
import importlib.util
import os
import sys
from collections.abc import Generator, Iterator
from importlib import metadata
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any, Final

import pytest
from _pytest.pathlib import LOCK_TIMEOUT, cleanup_numbered_dir

from tests.quick import Quick
from tests.shared import FOLDER_VARIABLE
from tiered.units import MIB
from tools.pins import read_pins

if TYPE_CHECKING:
    from tests.tiny import Tiny

ROOT: Final = Path(__file__).parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--pins", type=Path, help="a constraints file: end at once unless the tests run on its versions")
    parser.addoption("--quick", action="store_true", help="what a change runs first: see tests/quick.py")


def pytest_configure(config: pytest.Config) -> None:
    """Make sure that what is installed, and imported, is what the file of --pins says."""
    # For workers and the processes of tests: threads that wait must not take the processor from those that work.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    config.pluginmanager.register(Quick(config))
    if hasattr(config, "workerinput"):
        # What computes by default on every processor has one here, as other workers have the others: threads that wait
        # for each other where processors are short take many times as long. Tests of several threads name them.
        os.sched_getaffinity = lambda _: {0}
    path: Path | None = config.getoption("--pins")
    if path is None:
        return
    pins = read_pins(path.read_text(encoding="utf-8"))
    # Some are for other systems, and the lowest file has none for the programs that test.
    found = {distribution.name: distribution.version for distribution in reversed(list(metadata.distributions()))}
    found |= {name: imported_version(name) for name in ("torch", "transformers")}
    wrong = {name: found[name] for name in pins.keys() & found.keys() if found[name].partition("+")[0] != pins[name]}
    if wrong:
        pytest.exit(f"{path}: pins other versions than are imported here: {wrong}; run tools/setup", returncode=3)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Begin to remove the temporary folders of all but the last few runs. pytest would do it when this one has ended,
    for half a minute; while tests run nobody waits for it."""
    folders: pytest.TempPathFactory = session.config._tmp_path_factory  # type: ignore[attr-defined]
    if folders._given_basetemp is None:  # as a worker's is
        newest, count = folders.getbasetemp(), int(session.config.getini("tmp_path_retention_count"))
        old = (newest.parent, "pytest-", count, newest.stat().st_mtime - LOCK_TIMEOUT)
        Thread(target=cleanup_numbered_dir, args=old, daemon=True).start()


def imported_version(name: str) -> str:
    """The version of what `import name` would find, which takes seconds: this process may only hand out tests."""
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None
    beside = metadata.distributions(name=name, path=[str(Path(spec.origin).parents[1])])
    return next((distribution.version for distribution in beside), f"of {spec.origin}")


def pytest_report_header(config: pytest.Config) -> str:
    return f"transformers {metadata.version('transformers')} (pins: {config.getoption('--pins') or 'not looked at'})"


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Leave what collecting makes, imported modules above all, out of all garbage collections to come.

    A process that runs tests has a million objects from there that are no garbage, and would look through them all
    again and again: see `tiered.process.importing`, which does the same for commands.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Begin every test with one thread of torch, whatever number the runtime of an earlier one has set.

    What tests compute is so small that a second one only costs time, many times over where workers share the cores.
    """
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """For what is made once for all workers: beside their own folders, which pytest removes with it in time."""
    folder = tmp_path_factory.getbasetemp() / "shared"
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = tmp_path_factory.getbasetemp().with_name("shared")
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FOLDER_VARIABLE, str(folder))
        yield


@pytest.fixture(scope="session", autouse=True)
def sizes_checked_once() -> Iterator[None]:
    """Check a configuration's sizes, for which its graph is built, once in this process, however often it is opened.

    That is two fifths of building a graph, and tests build those of the same few models thousands of times.
    """
    if (skeleton := sys.modules.get("tiered.arch.skeleton")) is None:
        yield
        return
    original, passed = skeleton._check_sizes, set()

    def check(config: Any) -> None:
        if (content := config.to_json_string(use_diff=False)) not in passed:
            original(config)
            passed.add(content)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(skeleton, "_check_sizes", check)
        yield


@pytest.fixture(scope="session")
def tiny() -> "Tiny":
    """Tiny models of every family, made when first asked for."""
    from tests.tiny import Tiny

    return Tiny()


@pytest.fixture(scope="module")
def build() -> Iterator[Any]:
    """setup.py as a module: the native sources, the flags, and how they are compiled."""
    pytest.importorskip("setuptools")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)  # its paths are relative
        spec = importlib.util.spec_from_file_location("tiered_setup", ROOT / "setup.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(scope="module")
def steady_baseline() -> Iterator[None]:
    """Let this process's peak, which every plan begins with, be above what a module's tests will reach, and stay.

    The blocks of tiny models are smaller than the noise in the size of a process that imports and compares. The peak is
    only said to be so high: touching as much memory takes up to two seconds, in every module and worker.
    """
    from tiered.proc import process_peak_rss_bytes

    raised = process_peak_rss_bytes() + 512 * MIB
    with pytest.MonkeyPatch.context() as patch:
        for reader in ("tiered.host", "tiered.cli.measuring"):
            patch.setattr(f"{reader}.process_peak_rss_bytes", lambda: max(raised, process_peak_rss_bytes()))
        patch.setattr("tiered.host.reset_peak_rss", lambda: None)
        yield
