"""The flag: set from any thread, seen by the one that computes, lowered again."""

import threading

import pytest

from tiered.errors import InterruptedRun
from tiered.kernels import CancelFlag


def test_a_flag_is_down_at_first() -> None:
    flag = CancelFlag()
    assert not flag.is_set
    flag.check()


def test_a_flag_set_in_another_thread_interrupts_this_one() -> None:
    flag = CancelFlag()
    thread = threading.Thread(target=flag.set)
    thread.start()
    thread.join()
    assert flag.is_set
    with pytest.raises(InterruptedRun) as caught:
        flag.check()
    assert caught.value.exit_code == 130


def test_a_cleared_flag_lets_work_go_on() -> None:
    flag = CancelFlag()
    flag.set()
    flag.clear()
    flag.check()
