"""Recurrent states that a device computes with come there from their slots, and go back, and every wait is needed."""

from collections.abc import Iterator, Sequence
from typing import Final

import pytest
import torch

from tiered.cache import AwayStates, BundleStates, Outbox
from tiered.cache.state import StateRows, Trip
from tiered.device import Event, Lease
from tiered.device.clocks import RaceError
from tiered.device.emulated import EmulatedDevice
from tiered.plan.state import StateGroup, StatePart
from tiered.units import MIB, PAGE

ROWS: Final = 3
WIDE: Final = StateGroup(
    (0,), (StatePart("conv", 0, (4, 3), "bfloat16"), StatePart("recurrent", 0, (1200,), "float32"))
)
NARROW: Final = StateGroup((1,), (StatePart("recurrent", 0, (1000,), "float32"),))
GROUPS: Final = (WIDE, NARROW)
"""What each layer keeps: two pages, and one."""


class Setup:
    """Slots of five sequences in the host's memory, for each of two layers, and a device that computes with them."""

    def __init__(self, device: EmulatedDevice) -> None:
        self.device = device
        self.slots = [torch.zeros(5, group.nbytes, dtype=torch.uint8) for group in GROUPS]
        self.outbox = Outbox(Lease(device, PAGE, "kv"), torch.empty(PAGE, dtype=torch.uint8))
        self.away = AwayStates(self.outbox, Lease(device, ROWS * WIDE.nbytes, "states"), WIDE.nbytes)
        for layer in range(2):
            for slot in range(5):
                self.recurrent(layer, slot).fill_(10.0 * slot + layer)

    def recurrent(self, layer: int, slot: int) -> torch.Tensor:
        part, offset = GROUPS[layer].parts[-1], GROUPS[layer].offsets[-1]
        return StateRows(self.slots[layer], [slot], GROUPS[layer]).view(part, offset)[slot]

    def bundle(
        self, slots: Sequence[int], fresh: Sequence[int] = (), row: int = 0, is_there: bool = False, stays: bool = False
    ) -> BundleStates:
        def find(layer: int) -> StateRows:
            return StateRows(self.slots[layer], slots, GROUPS[layer])

        trip = Trip(self.away, range(row, row + len(slots)), is_there, stays)
        return BundleStates(find, len(slots), 1, fresh, trip)

    def compute(self, bundle: BundleStates, layer: int, dtype: torch.dtype = torch.bfloat16) -> None:
        """A mixer that adds 1 to what it keeps."""
        bundle.begin(dtype)
        bundle.get_recurrent_state(layer).add_(1.0)
        if layer == 0:
            conv = bundle.get_conv_state(layer)
            assert conv.dtype == dtype
            conv.add_(1.0)
        bundle.settle()


@pytest.fixture(params=range(3))
def setup(request: pytest.FixtureRequest) -> Iterator[Setup]:
    device = EmulatedDevice(MIB, seed=request.param)
    yield Setup(device)
    device.close()


@pytest.mark.parametrize("slots", [(1, 2, 3), (4, 0), (2,), (1, 2, 0)])
def test_states_come_to_the_device_and_go_back_to_their_slots(setup: Setup, slots: tuple[int, ...]) -> None:
    for layer in range(2):
        setup.compute(setup.bundle(slots, fresh=[0]), layer)
        setup.outbox.flush()
        for slot in range(5):
            before = 10.0 * slot + layer
            expected = 1.0 if slot == slots[0] else before + 1.0 if slot in slots else before
            assert (setup.recurrent(layer, slot) == expected).all(), (layer, slot)


def test_what_several_micro_batches_share_stays_between_them(setup: Setup) -> None:
    parts = [
        setup.bundle([2], stays=True),
        setup.bundle([2], is_there=True, stays=True),
        setup.bundle([2], is_there=True),
    ]
    for layer in range(2):
        for part in parts:
            setup.compute(part, layer)
        setup.outbox.flush()
        assert (setup.recurrent(layer, 2) == 20.0 + layer + 3).all()


def test_states_in_16_bits_are_lent_in_the_16_bits_of_whoever_computes(setup: Setup) -> None:
    for _ in range(2):
        setup.compute(setup.bundle([3, 1]), 0, torch.float16)
        setup.outbox.flush()
    kept = StateRows(setup.slots[0], [3, 1], WIDE).view(WIDE.parts[0], 0)
    assert kept.dtype == torch.bfloat16 and (kept[[3, 1]] == 2.0).all()
    assert (setup.recurrent(0, 3) == 32.0).all()


def test_rows_that_a_failed_pass_has_used_are_used_again_behind_that(setup: Setup) -> None:
    left = setup.bundle([1, 2])
    left.begin(torch.bfloat16)
    left.get_recurrent_state(0).add_(1.0)
    setup.outbox.drop()
    setup.compute(setup.bundle([3, 4], fresh=[1]), 0)
    setup.outbox.flush()
    assert [float(setup.recurrent(0, slot)[0]) for slot in range(5)] == [0.0, 10.0, 20.0, 31.0, 1.0]


def test_memory_that_was_given_back_is_borrowed_for_the_next_states(setup: Setup) -> None:
    for expected in (31.0, 32.0):
        setup.compute(setup.bundle([3, 1]), 0)
        setup.outbox.flush()
        for each in (setup.outbox, setup.away):
            each.rest()
        assert not setup.device.held_nbytes
        assert (setup.recurrent(0, 3) == expected).all()


class NoWait(EmulatedDevice):
    """Computing does not wait for copies."""

    def wait_for(self, event: Event) -> None:
        pass


def test_computing_must_wait_for_states_on_their_way_in_and_for_those_on_their_way_out() -> None:
    for fresh in ((), (0,)):
        device = NoWait(MIB)
        setup = Setup(device)
        with pytest.raises(
            RaceError, match=r"^computing \(computing\), writing .* behind copying (to|from) the device"
        ):
            for slot in range(2):
                setup.compute(setup.bundle([slot], fresh), 0)
        device.close()


def test_copies_must_wait_for_what_is_computed(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    early = setup.device.record()
    monkeypatch.setattr(setup.device, "record", lambda: early)
    with pytest.raises(RaceError, match=r"^copying from the device .* behind computing"):
        setup.compute(setup.bundle([1]), 0)


def test_a_row_is_used_again_only_when_what_was_there_has_been_sent(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    early = setup.device.record()
    monkeypatch.setattr(AwayStates, "_unused", lambda away, row: early)
    with pytest.raises(RaceError, match=r"^copying to the device .* behind (computing|copying from the device)"):
        for slot in range(2):
            setup.compute(setup.bundle([slot]), 0)


def test_slots_are_the_host_s_again_when_the_outbox_has_been_flushed(setup: Setup) -> None:
    setup.compute(setup.bundle([1]), 0)
    with pytest.raises(RaceError, match=r"^writing memory of the host .* behind copying"):
        setup.device.host_writes(setup.slots[0])


def test_slots_are_the_host_s_again_after_a_pass_that_failed(setup: Setup) -> None:
    setup.compute(setup.bundle([1]), 0)
    left = setup.bundle([2])
    left.begin(torch.bfloat16)
    left.get_recurrent_state(0)
    setup.outbox.drop()
    setup.device.host_writes(setup.slots[0])
