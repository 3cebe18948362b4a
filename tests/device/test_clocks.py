"""The vector clocks: what no event orders is found, whatever came first by chance, and what one orders is let pass."""

import threading
from collections.abc import Callable

import pytest
import torch

from tiered.device.clocks import COMPUTE, IN, OUT, Clock, Clocks, RaceError


@pytest.fixture
def clocks() -> Clocks:
    return Clocks()


MEMORY = torch.zeros(100, dtype=torch.uint8)


def bytes_at(start: int, stop: int) -> torch.Tensor:
    return MEMORY[start:stop]


def in_thread(work: Callable[[], None]) -> None:
    """Let another thread of the host do `work`; what it raises is raised."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]


def copy(clocks: Clocks, start: int, stop: int, *after: Clock) -> Clock:
    return clocks.issue(IN, "copying", writes=[bytes_at(start, stop)], after=after)


def compute(clocks: Clocks, start: int, stop: int) -> None:
    clocks.issue(COMPUTE, "computing", reads=[bytes_at(start, stop)])


def test_computing_with_what_may_not_have_arrived_is_a_race_that_names_both(clocks: Clocks) -> None:
    copy(clocks, 0, 10)
    with pytest.raises(
        RaceError, match=r"^computing \(computing\), reading .* behind copying \(copies to the device\), w"
    ):
        compute(clocks, 0, 10)


def test_computing_may_wait_for_the_copy_or_the_host_for_it(clocks: Clocks) -> None:
    clocks.wait(copy(clocks, 0, 10), COMPUTE)
    compute(clocks, 0, 10)
    clocks.host_waits(copy(clocks, 20, 30))
    compute(clocks, 20, 30)


def test_what_another_thread_of_the_host_has_waited_for_orders_nothing_here(clocks: Clocks) -> None:
    copied = copy(clocks, 0, 10)
    in_thread(lambda: clocks.host_waits(copied))
    with pytest.raises(RaceError):
        compute(clocks, 0, 10)


def test_a_copy_over_what_may_still_be_computed_with_is_a_race(clocks: Clocks) -> None:
    clocks.wait(copy(clocks, 0, 10), COMPUTE)
    used = clocks.record(COMPUTE)
    compute(clocks, 0, 10)
    with pytest.raises(RaceError, match=r"^copying .* writing to memory"):
        copy(clocks, 0, 10, used)  # recorded too early


def test_a_copy_may_come_after_the_last_use(clocks: Clocks) -> None:
    clocks.wait(copy(clocks, 0, 10), COMPUTE)
    for _ in range(3):
        compute(clocks, 0, 10)
    copy(clocks, 0, 10, clocks.record(COMPUTE))


def test_the_host_may_write_what_was_copied_only_after_the_copy(clocks: Clocks) -> None:
    copied = clocks.issue(OUT, "copying", reads=[bytes_at(0, 10)])
    with pytest.raises(RaceError, match=r"^writing memory of the host \(the host\)"):
        clocks.host_writes(bytes_at(0, 10))
    clocks.host_waits(copied)
    clocks.host_writes(bytes_at(0, 10))


@pytest.mark.parametrize(("start", "stop"), [(0, 5), (5, 30), (12, 18), (19, 40), (0, 40)])
def test_bytes_that_overlap_race_wherever_they_begin(clocks: Clocks, start: int, stop: int) -> None:
    copy(clocks, 4, 20)
    with pytest.raises(RaceError):
        compute(clocks, start, stop)


def test_bytes_beside_each_other_do_not_race_even_where_a_third_access_touched_both(clocks: Clocks) -> None:
    copied = copy(clocks, 0, 40)
    clocks.wait(copied, COMPUTE)
    compute(clocks, 0, 10)
    copy(clocks, 10, 40)
    copy(clocks, 40, 50)
    compute(clocks, 0, 10)


def test_giving_memory_back_after_a_race_says_nothing_more(clocks: Clocks) -> None:
    copy(clocks, 0, 10)
    with pytest.raises(RaceError):
        compute(clocks, 0, 10)
    start = bytes_at(0, 10).data_ptr()
    clocks.forget(start, start + 10)


def test_memory_that_was_given_back_begins_anew(clocks: Clocks) -> None:
    copy(clocks, 0, 10)
    start = bytes_at(0, 10).data_ptr()
    with pytest.raises(RaceError, match="giving memory back"):
        clocks.forget(start, start + 10)
    in_thread(lambda: compute(clocks, 0, 10))


def test_histories_stay_short(clocks: Clocks) -> None:
    used = clocks.record(COMPUTE)
    for start in (0, 10, 5, 30) * 20:
        clocks.wait(copy(clocks, start, start + 30, used), COMPUTE)
        for _ in range(10):
            compute(clocks, start, start + 30)
        used = clocks.record(COMPUTE)
    histories = clocks._ranges._histories
    assert len(histories) <= 8 and all(len(history.reads) <= 1 for history in histories.values())
