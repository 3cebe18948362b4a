"""Settings of the process that open runtimes share are put back with the last, in whatever order they close."""

import sys
from contextlib import ExitStack

import pytest

from tiered.plan.process import Process


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
