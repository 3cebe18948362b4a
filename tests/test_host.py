"""The host: runtimes share it, each with a budget of its own, and the process's settings are put back with the last."""

import os
import queue
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest

from tests.runtimes import run_greedy
from tests.tiny import Tiny
from tests.waiting import SECONDS, wait_until
from tiered.errors import ConfigError, InterruptedRun
from tiered.host import Host, Process
from tiered.kernels import Mode
from tiered.plan import Workload
from tiered.runtime import Options, Runtime
from tiered.units import GIB


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_switch_interval_is_put_back_with_the_last(order: tuple[int, int]) -> None:
    process, before = Process(), sys.getswitchinterval()
    stacks = [ExitStack(), ExitStack()]
    sys.setswitchinterval(0.004)
    try:
        for stack in stacks:
            stack.enter_context(process.member())
        stacks[order[0]].close()
        assert sys.getswitchinterval() == pytest.approx(5e-4)
        stacks[order[1]].close()
        assert sys.getswitchinterval() == pytest.approx(0.004)
    finally:
        sys.setswitchinterval(before)


def test_the_process_takes_what_its_largest_plan_says() -> None:
    process = Process()
    assert process.planned_nbytes == 0
    with process.member() as one, process.member() as other:
        one.planned_nbytes, other.planned_nbytes = 100, 300
        assert process.planned_nbytes == 300
    assert process.planned_nbytes == 0


def test_plans_of_a_parent_process_do_not_count() -> None:
    process = Process()
    with process.member() as member:
        member.planned_nbytes = 100
        member.pid = 0  # as if this process were a child of the one that opened it
        assert member.is_forked
        assert process.planned_nbytes == 0


PROMPT = (5, 9, 11, 20)
STEPS = 4


def open_on(host: Host | None, tiny: Tiny, name: str) -> Runtime:
    options = Options(dtype="float32", ram=16 * GIB, threads=1)
    return Runtime(tiny.store(name), Workload(max_context=16), options, host=host)


def test_two_runtimes_share_a_host_and_compute_what_each_does_alone(tiny: Tiny) -> None:
    alone = []
    for name in ("opt", "llama"):
        with open_on(None, tiny, name) as runtime:
            alone.append(run_greedy(runtime, [PROMPT], STEPS).tokens)
    with Host(threads=1) as host:
        with open_on(host, tiny, "opt") as target, open_on(host, tiny, "llama") as draft:
            computing = [thread for thread in threading.enumerate() if thread.name.startswith("tiered-compute")]
            assert len(computing) == 1 and target.host is draft.host
            # By turns, and with the second one's streams open while the first one's are.
            for _ in range(2):
                found = [run_greedy(runtime, [PROMPT], STEPS, end=False).tokens for runtime in (target, draft)]
                assert found == alone
            # Each has its own budget, and the second one's counts what the first one's plan takes.
            assert draft.plan.needs.baseline >= target.plan.nbytes
            # Closing one leaves the other as it is.
            with open_on(host, tiny, "llama"):
                pass
            assert run_greedy(target, [PROMPT], STEPS, end=False).tokens == alone[0]
        with open_on(host, tiny, "opt") as again:
            assert run_greedy(again, [PROMPT], STEPS).tokens == alone[0]
    assert not any(thread.name.startswith("tiered-") for thread in threading.enumerate())


def test_a_host_ends_with_the_last_of_its_runtimes(tiny: Tiny) -> None:
    host = Host(threads=1)
    with open_on(host, tiny, "opt") as last:
        with open_on(host, tiny, "llama"):
            pass
        assert len(run_greedy(last, [PROMPT], STEPS).tokens[0]) == STEPS
    assert not any(thread.name.startswith("tiered-") for thread in threading.enumerate())


def test_work_that_fails_or_is_interrupted_leaves_that_of_others_alone() -> None:
    with Host(threads=1) as host, ThreadPoolExecutor(3) as callers:
        begun, go = threading.Event(), threading.Event()

        def waits() -> int:
            begun.set()
            while not go.wait(0.001):
                host.cancel.check()
            return 1

        def fails() -> None:
            raise ValueError("by itself")

        first = callers.submit(host.compute, waits, "first")
        assert begun.wait(SECONDS)
        failing = callers.submit(host.compute, fails, "second")
        queued = callers.submit(host.compute, lambda: 3, "third")
        wait_until(lambda: len(host._calls) == 3)
        host.interrupt("third")
        assert not first.done()
        go.set()
        assert first.result(SECONDS) == 1
        with pytest.raises(ValueError, match="by itself"):
            failing.result(SECONDS)
        with pytest.raises(InterruptedRun):
            queued.result(SECONDS)
        assert host.compute(lambda: 4) == 4 and not host.cancel.is_set

        begun.clear()
        go.clear()
        running = callers.submit(host.compute, waits, "first")
        assert begun.wait(SECONDS)
        after = callers.submit(host.compute, lambda: 5, "second")
        host.interrupt("first")
        with pytest.raises(InterruptedRun):
            running.result(SECONDS)
        assert after.result(SECONDS) == 5


def test_closing_one_runtime_leaves_the_pass_of_another_alone(tiny: Tiny) -> None:
    with Host(threads=1) as host, ThreadPoolExecutor(1) as caller, open_on(host, tiny, "opt") as target:
        alone = run_greedy(target, [PROMPT], STEPS, end=False).tokens
        for _ in range(5):
            with open_on(host, tiny, "llama") as other:
                run_greedy(other, [PROMPT], 1, end=False)
                running = caller.submit(run_greedy, target, [PROMPT], STEPS, end=False)
            assert running.result(SECONDS).tokens == alone


def test_a_runtime_cannot_want_other_kernels_than_its_host_has(tiny: Tiny) -> None:
    with Host(threads=1) as host, pytest.raises(ConfigError, match="all runtimes of a host compute alike"):
        options = Options(dtype="float32", kernel_mode=Mode.FAST)
        Runtime(tiny.store("opt"), Workload(max_context=16), options, host=host)


def test_what_is_asked_for_while_the_host_closes_is_run_or_refused() -> None:
    class Queue(queue.SimpleQueue[Any]):
        """Somebody leaves the host at the moment at which a call is queued."""

        def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
            if item is not None:
                leaving.start()
                leaving.join(0.2)  # for good, if nothing keeps it from leaving
            super().put(item)

    host = Host(threads=1)
    leaving = threading.Thread(target=host.__exit__, args=(None, None, None))
    host._queue = Queue()
    host.__enter__()
    with ThreadPoolExecutor(1) as caller:
        assert caller.submit(host.compute, lambda: 7).result(SECONDS) == 7
    leaving.join()


def test_an_interruption_leaves_the_host_ready_for_more() -> None:
    with Host(threads=1) as host:

        def work() -> None:
            os.kill(os.getpid(), signal.SIGINT)
            while True:
                host.cancel.check()

        with pytest.raises(KeyboardInterrupt):
            host.compute(work)
        assert not host.cancel.is_set
        assert host.compute(lambda: 7) == 7
