"""Ctrl-C at any moment of a pass, of opening a runtime and of leaving one: nothing is left behind that nobody knows.

A small model: what is interrupted is what the main thread does beside computing.
"""

import contextlib
import functools
import gc
import signal
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from tests.moments import Moments, named
from tests.runtimes import run_greedy, streaming
from tests.tiny import Tiny
from tests.waiting import wait_until
from tiered.host import PROCESS
from tiered.io import Arena
from tiered.options import Options
from tiered.plan import Tier
from tiered.prepare import measure_inputs
from tiered.units import GIB, MIB

WAITING: Final = (
    "/tiered/host.py",
    "/tiered/runtime.py",
    "/tiered/io/threads.py",
    "/tiered/outcome.py",
    "/tiered/stream/",
    "/threading.py",
)
"""Where the main thread meets others while a pass runs, and while a runtime closes."""
OPENING: Final = (
    *(
        "/tiered/host.py",
        "/tiered/runtime.py",
        "/tiered/opening.py",
        "/tiered/memory.py",
        "/tiered/prepare.py",
        "/tiered/process.py",
    ),
    *("/tiered/outcome.py", "/tiered/io/", "/tiered/device/", "/tiered/kernels/kernels.py", "/tiered/stream/bus.py"),
    *("/tiered/cache/outbox.py", "/tiered/model/attention.py", "/contextlib.py", "/threading.py"),
)
"""Where what a runtime opens is made, and where it waits."""
PROMPT: Final = [[5, 9, 11, 20]]


def test_the_runtime_can_be_used_again_after_ctrl_c_at_any_moment(tiny: Tiny) -> None:
    with streaming(tiny.store("opt"), context=16) as runtime:
        run = functools.partial(run_greedy, runtime, PROMPT, 2, end=False)
        expected, moments, met = run().tokens, Moments(WAITING), 0
        moments.trace(run)
        for moment, is_met in moments.interrupting(lambda: run):
            met += is_met
            assert run().tokens == expected, named(moment)
    # A wait that is not needed this time is not met: how many are depends on which thread is the first to come.
    assert met > 10, moments.seen


def test_ctrl_c_at_any_moment_of_leaving_a_runtime_leaves_no_thread(tiny: Tiny) -> None:
    runtime = streaming(tiny.store("opt"), context=16)

    def leave() -> None:
        runtime.__exit__(None, None, None)

    def opened() -> Any:
        runtime.__enter__()
        runtime.start_streaming()
        return leave

    moments, met = Moments(WAITING), 0
    moments.trace(opened())
    for moment, is_met in moments.interrupting(opened, every=8):
        met += is_met
        # It is left altogether, or leaving has not begun.
        if runtime.is_open:
            leave()
        threads = [thread.name for thread in threading.enumerate() if thread.name.startswith("tiered")]
        assert not threads, (named(moment), threads)
        assert runtime._memory.arena.in_use == {}, named(moment)
    assert met > 3, moments.seen


class Left:
    """What a process has that a runtime may leave behind."""

    def __init__(self) -> None:
        self.maps: list[weakref.ref[Any]] = []
        """The memory of all arenas there have been."""

    @contextlib.contextmanager
    def arena(self, nbytes: int) -> Iterator[Arena]:
        """`Arena`, noted."""
        with Arena(nbytes) as arena:
            self.maps.append(weakref.ref(arena._map))
            yield arena

    def found(self) -> dict[str, Any]:
        """By what it is."""
        return {
            "threads": sorted(thread.name for thread in threading.enumerate()),
            "native threads": len(list(Path("/proc/self/task").iterdir())),
            "files": sorted(filter(None, map(_target, Path("/proc/self/fd").iterdir()))),
            "mappings": len([memory for made in self.maps if (memory := made()) is not None and not memory.closed]),
            "runtimes": len(PROCESS._members),
            "opening": PROCESS.opening.locked(),
            "SIGINT": signal.getsignal(signal.SIGINT),
        }

    def is_as(self, before: dict[str, Any]) -> bool:
        """Whether nothing has been added. Native threads may have become fewer: what had ended already when they were
        counted, is forgotten by the system some time later."""
        found = self.found()
        return found | {"native threads": max(found["native threads"], before["native threads"])} == before


def _target(descriptor: Path) -> str:
    try:
        return f"{descriptor.name}: {descriptor.readlink()}"
    except OSError:  # that of the folder's own listing
        return ""


HYBRID: Final[dict[str, Any]] = {
    **{"tiers": (Tier.DISK, Tier.CPU, Tier.GPU), "device": "emulated", "vram": 256 * MIB, "decode_device": "cpu"},
    **{"kv": "cpu", "ram": 4 * GIB},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kv on disk", "device"])
def test_ctrl_c_at_any_moment_of_opening_a_runtime_leaves_nothing(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    asked = {"kv": "disk", "kv_folder": tmp_path} if name == "kv on disk" else HYBRID
    runtime, left = streaming(tiny.store("opt"), context=16, threads=2, **asked), Left()
    monkeypatch.setattr("tiered.memory.Arena", left.arena)

    def close() -> None:
        runtime.__exit__(None, None, None)

    def opening() -> Any:
        return runtime.__enter__

    # What the first one imports, and sets for good, is there.
    with runtime:
        expected = run_greedy(runtime, PROMPT, 2).tokens
    before, moments, met = left.found(), Moments(OPENING), 0
    moments.trace(runtime.__enter__)
    close()
    # All of them take a minute and a half, and many have one thing in common: that interrupts wait.
    for moment, is_met in moments.interrupting(opening, every=9):
        met += is_met
        if not is_met:
            close()
        assert not runtime.is_open
        deadline = time.monotonic() + 5  # what ends a native thread does not wait until the system has forgotten it
        while not left.is_as(before) and time.monotonic() < deadline:
            gc.collect()
        assert left.is_as(before), (named(moment), left.found(), before)
    assert met > 20, moments.seen
    with runtime:
        assert run_greedy(runtime, PROMPT, 2).tokens == expected


@pytest.mark.slow
def test_ctrl_c_at_any_moment_of_measuring_what_plans_are_made_from_leaves_nothing(tiny: Tiny) -> None:
    left = Left()
    measure = functools.partial(measure_inputs, tiny.store("opt"), Options(ram=4 * GIB, threads=2))
    measure()
    before, moments, met = left.found(), Moments(OPENING), 0
    moments.trace(measure)
    for _, is_met in moments.interrupting(lambda: measure, every=9):
        met += is_met
        wait_until(lambda: left.is_as(before))
    assert met > 5, moments.seen
