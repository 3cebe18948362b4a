"""Memory that is given back and borrowed again."""

from collections.abc import Iterator

import pytest
import torch

from tiered.device import Lease
from tiered.device.copies import POISON
from tiered.device.emulated import EmulatedDevice
from tiered.errors import BudgetError
from tiered.units import PAGE


@pytest.fixture
def device() -> Iterator[EmulatedDevice]:
    device = EmulatedDevice(3 * PAGE)
    yield device
    device.close()


def test_it_is_borrowed_until_it_ends_and_ending_again_does_nothing(device: EmulatedDevice) -> None:
    lease = Lease(device, PAGE + 1, "slots")
    assert not lease.is_held and not device.in_use
    memory = lease.take()
    assert lease.is_held and memory.nbytes == PAGE + 1 and lease.take() is memory
    assert device.in_use == {"slots": 2 * PAGE}
    for _ in range(2):
        lease.end()
        assert not lease.is_held and not device.in_use


def test_what_is_taken_again_is_other_memory(device: EmulatedDevice) -> None:
    lease = Lease(device, PAGE, "slots")
    before = lease.take()
    before.fill_(1)
    lease.end()
    after = lease.take()
    assert after.data_ptr() != before.data_ptr() and bool((after == POISON).all())


def test_no_bytes_take_nothing(device: EmulatedDevice) -> None:
    lease = Lease(device, 0, "slots")
    assert torch.equal(lease.take(), torch.empty(0, dtype=torch.uint8))
    assert not lease.is_held and not device.in_use
    lease.end()


def test_taking_it_again_is_refused_where_others_have_the_memory_by_now(device: EmulatedDevice) -> None:
    lease, others = Lease(device, 2 * PAGE, "slots"), Lease(device, 2 * PAGE, "kv")
    lease.take()
    lease.end()
    others.take()
    with pytest.raises(BudgetError, match=r"slots: 8 KiB do not fit .* in use: kv 8 KiB"):
        lease.take()
    assert not lease.is_held
    others.end()
    assert lease.take().nbytes == 2 * PAGE
