"""The emulated device: its memory is bounded, copies come late and in order, and what is missing a wait shows."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from tiered.device import Device, Event, open_device
from tiered.device.clocks import RaceError
from tiered.device.copies import POISON, EmulatedEvent
from tiered.device.emulated import EmulatedDevice, Mode
from tiered.errors import BudgetError, ConfigError
from tiered.units import MIB, PAGE

N = 3 * PAGE


@contextmanager
def opened(device: EmulatedDevice) -> Iterator[EmulatedDevice]:
    try:
        yield device
    finally:
        device.close()


def filled(value: int, nbytes: int = N) -> torch.Tensor:
    return torch.full((nbytes,), value, dtype=torch.uint8)


def test_it_is_a_device() -> None:
    with opened(EmulatedDevice(MIB)) as emulated:
        device: Device = emulated
        assert device.name == "emulated" and "1 MiB" in device.description and device.where.type == "cpu"


def test_memory_is_aligned_counted_and_bounded() -> None:
    with opened(EmulatedDevice(4 * PAGE)) as device:
        first = device.borrow(PAGE + 1, "ring")
        assert first.nbytes == PAGE + 1 and first.data_ptr() % PAGE == 0
        second = device.borrow(2 * PAGE, "kv")
        with pytest.raises(BudgetError, match=r"outer: 4 KiB do not fit the 16 KiB .*: ring 8 KiB, kv 8 KiB; .*--vram"):
            device.borrow(1, "outer")
        device.release(first)
        device.borrow(PAGE, "outer")
        device.release(second)
        assert device.peak_nbytes == 4 * PAGE and device.in_use == {"outer": PAGE}


def test_what_is_given_back_or_discarded_is_poisoned() -> None:
    with opened(EmulatedDevice(MIB)) as device:
        memory = device.borrow(N, "ring")
        memory.fill_(1)
        device.discards(memory[:PAGE])
        assert torch.equal(memory, torch.cat([filled(POISON, PAGE), filled(1, 2 * PAGE)]))
        device.record().wait()
        device.release(memory)
        assert torch.equal(memory, filled(POISON))


@pytest.mark.parametrize("mode", ["chaos", "plain", "paced"])
def test_copies_arrive_whole_in_both_directions(mode: Mode) -> None:
    for seed in range(8):
        with opened(EmulatedDevice(MIB, seed, mode, copy_rate=1e8)) as device:
            memory, back = device.borrow(N, "ring"), filled(0)
            arrived = device.copy_in(filled(7), memory)
            device.wait_for(arrived)
            device.uses(memory)
            assert torch.equal(memory, filled(7))
            device.copy_out(memory, back, [device.record()]).wait()
            assert torch.equal(back, filled(7))


def test_until_a_copy_has_arrived_there_is_poison_mostly(monkeypatch: pytest.MonkeyPatch) -> None:
    """By some seeds a copy comes at once; by others it has not begun when it has been issued."""
    monkeypatch.setattr("tiered.device.copies._LATE_SECONDS", 60.0)
    seen = set()
    for seed in range(30):
        with opened(EmulatedDevice(MIB, seed)) as device:
            memory = device.borrow(N, "ring")
            memory.fill_(1)
            arrived = device.copy_in(filled(7), memory)
            seen.add(int(memory[0]))
            device.wait_for(arrived)  # holds it back no longer
    assert seen == {7, POISON}


def test_copies_of_a_stream_are_in_order_and_come_after_what_they_are_to_come_after() -> None:
    for seed in range(10):
        with opened(EmulatedDevice(MIB, seed)) as device:
            memory, back = device.borrow(N, "ring"), [filled(0) for _ in range(6)]
            last: Event | None = None
            for number, target in enumerate(back):
                after = [last] if last is not None else []
                arrived = device.copy_in(filled(number), memory, after)
                last = device.copy_out(memory, target, [arrived])
            assert last is not None
            last.wait()
            assert [int(target[-1]) for target in back] == list(range(6))


def test_memory_on_the_wrong_side_is_refused() -> None:
    with opened(EmulatedDevice(MIB)) as device:
        memory, other = device.borrow(N, "ring"), device.borrow(N, "kv")
        with pytest.raises(
            RuntimeError, match=r"copying to the device from .* the device's memory, expected the host's"
        ):
            device.copy_in(other, memory)
        with pytest.raises(RuntimeError, match=r"copying to the device to .* the host's memory, expected the device's"):
            device.copy_in(filled(1), filled(2))
        with pytest.raises(RuntimeError, match=r"copying from the device to .* the device's memory"):
            device.copy_out(memory, other)


def test_computing_without_a_wait_for_the_copy_is_a_race() -> None:
    with opened(EmulatedDevice(MIB)) as device:
        memory = device.borrow(N, "ring")
        device.copy_in(filled(1), memory)
        with pytest.raises(RaceError, match="reading from memory"):
            device.uses(memory)


def test_a_copy_that_does_not_wait_for_the_last_use_is_a_race() -> None:
    with opened(EmulatedDevice(MIB)) as device:
        memory = device.borrow(N, "ring")
        device.wait_for(device.copy_in(filled(1), memory))
        device.uses(memory)
        with pytest.raises(RaceError, match="writing to memory"):
            device.copy_in(filled(2), memory)


def test_having_seen_that_a_copy_is_done_counts_as_having_waited() -> None:
    with opened(EmulatedDevice(MIB)) as device:
        memory, source = device.borrow(N, "ring"), filled(1)
        arrived = device.copy_in(source, memory)
        while not arrived.is_done:
            time.sleep(0.001)
        device.host_writes(source)


class Failing(EmulatedDevice):
    def move(self, source: torch.Tensor, target: torch.Tensor) -> None:
        raise RuntimeError("the bus is broken")


def test_a_failed_copy_surfaces_wherever_it_is_waited_for() -> None:
    for seed in range(4):
        with opened(Failing(MIB, seed)) as device:
            arrived = device.copy_in(filled(1), device.borrow(N, "ring"))
            for wait in (arrived.wait, lambda event=arrived: device.wait_for(event)):
                with pytest.raises(RuntimeError, match="the bus is broken"):
                    wait()


def test_paced_copies_queue_behind_each_other_and_directions_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    # All are issued at one time, however late this thread comes to it.
    monkeypatch.setattr("tiered.device.copies.time", SimpleNamespace(perf_counter=lambda: 100.0, sleep=lambda _: None))
    with opened(EmulatedDevice(MIB, mode="paced", copy_rate=1e6)) as device:
        long, memory = device.borrow(500_000, "ring"), device.borrow(20_000, "ring")
        other = device.borrow(20_000, "kv")
        events = [device.copy_in(filled(1, 500_000), long), *(device.copy_in(filled(1, 20_000), memory) for _ in "23")]
        out = device.copy_out(other, filled(0, 20_000))
        for event in (*events, out):
            event.wait()
        done_at = [event.done_at for event in (*events, out) if isinstance(event, EmulatedEvent)]
        assert done_at == pytest.approx([100.5, 100.52, 100.54, 100.02])
        assert sum(event.seconds for event in events) == pytest.approx(0.54)


def test_paced_copies_take_as_long_as_the_bus_needs() -> None:
    with opened(EmulatedDevice(MIB, mode="paced", copy_rate=1e6)) as device:
        memory, begin = device.borrow(20_000, "ring"), time.perf_counter()
        device.copy_in(filled(1, 20_000), memory).wait()
        assert time.perf_counter() - begin >= 0.02
        # Who comes late to a copy waits for less of it.
        while device.stalled_seconds < 0.01:
            device.wait_for(device.copy_in(filled(1, 20_000), memory))


def test_paced_computing_takes_as_long_as_what_it_uses() -> None:
    with opened(EmulatedDevice(MIB, mode="paced", copy_rate=1e9, compute_rate=1e6)) as device:
        memory = device.borrow(30_000, "resident")
        begin = time.perf_counter()
        for _ in range(2):
            device.uses(memory)
        device.record().wait()
        assert time.perf_counter() - begin >= 0.06


def test_the_same_seed_holds_copies_back_alike() -> None:
    def kinds(seed: int) -> list[int]:
        with opened(EmulatedDevice(MIB, seed)) as device:
            schedule = device._schedule
            assert schedule is not None
            return [schedule.choose().steps for _ in range(50)]

    assert kinds(1) == kinds(1) != kinds(2)


def test_registered_memory_may_lie_elsewhere_later() -> None:
    with opened(EmulatedDevice(MIB)) as device:
        host = torch.zeros(4 * PAGE, dtype=torch.uint8)
        start = -host.data_ptr() % PAGE
        memory, page = device.borrow(PAGE, "ring"), host[start : start + PAGE]
        assert device.register(page.data_ptr(), PAGE) is None
        device.copy_in(page, memory).wait()
        device.unregister(page.data_ptr())


def test_an_emulated_device_is_opened_by_name_and_needs_to_know_its_memory() -> None:
    device = open_device("emulated", MIB)
    assert isinstance(device, EmulatedDevice)
    device.close()
    with pytest.raises(ConfigError, match="--vram"):
        open_device("emulated", None)
    with pytest.raises(ConfigError, match=r"'gpu7'.*cuda"):
        open_device("gpu7", MIB)
