"""Hidden states that wait in the host's memory come back whole, in time, and every wait for them is needed."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch

from tiered.device import Event, Lease
from tiered.device.clocks import RaceError
from tiered.device.emulated import EmulatedDevice
from tiered.errors import BudgetError
from tiered.model import WaitingRoom
from tiered.plan import WaitingPlan
from tiered.trace import Tracer
from tiered.units import MIB

ROWS, WIDTH, LAYERS = 5, 6, 3


@contextmanager
def waiting(device: EmulatedDevice, tokens: int) -> Iterator[WaitingRoom]:
    """A room for `tokens` tokens in micro-batches of `ROWS`; all of the device's memory is given back."""
    plan = WaitingPlan(tokens, ROWS, WIDTH * 4)
    slots = Lease(device, plan.device_nbytes, "hidden states")
    try:
        room = WaitingRoom(slots, torch.empty(plan.host_nbytes, dtype=torch.uint8), plan.token_nbytes, Tracer())
        yield room
        room.close()
        slots.end()
        assert not device.in_use
    finally:
        device.close()


def states_of(sizes: Sequence[int]) -> list[torch.Tensor]:
    return [torch.arange(float(size * WIDTH)).view(1, size, WIDTH) + 100 * n for n, size in enumerate(sizes)]


def passed(room: WaitingRoom, sizes: Sequence[int], stop: int = LAYERS * 100) -> list[torch.Tensor]:
    """A pass, in which a layer doubles what it is given and adds one; `stop`: after so many turns it is given up."""
    room.begin(len(sizes), LAYERS)
    places = [room.add(states) for states in states_of(sizes)]
    for number, place in enumerate(places * LAYERS):
        if number == stop:
            room.drop()
            return []
        place.put(place.take() * 2 + 1)
    return [place.settled().clone() for place in places]


def right(sizes: Sequence[int]) -> list[torch.Tensor]:
    return [states * 2**LAYERS + 2**LAYERS - 1 for states in states_of(sizes)]


@pytest.mark.parametrize("sizes", [[3], [5, 5, 2], [5, 5, 5, 5], [1, 5, 2, 4, 5], [5] * 9])
def test_each_layer_is_given_what_the_one_before_has_made(sizes: Sequence[int]) -> None:
    for seed in range(4):
        with waiting(EmulatedDevice(MIB, seed), sum(sizes)) as room:
            for _ in range(2):
                assert all(map(torch.equal, passed(room, sizes), right(sizes)))
            crossed = 0 if len(sizes) <= 3 else LAYERS * sum(sizes) * WIDTH * 4
            assert room.nbytes == 2 * crossed


@pytest.mark.parametrize("stop", range(1, 13))
def test_a_pass_that_was_given_up_leaves_the_next_one_alone(stop: int) -> None:
    sizes = [5, 3, 5, 1]
    with waiting(EmulatedDevice(MIB, stop), sum(sizes)) as room:
        passed(room, sizes, stop)
        assert all(map(torch.equal, passed(room, sizes), right(sizes)))


def test_more_than_was_planned_for_is_refused() -> None:
    with waiting(EmulatedDevice(MIB), 12) as room:
        with pytest.raises(BudgetError, match=r"960 bytes of hidden states, behind 144 of .* planned for 256 and 288"):
            passed(room, [6, 40])
        with pytest.raises(BudgetError, match=r"120 bytes of hidden states, behind 240 of .*--vram"):
            passed(room, [5, 5, 5])
        room.drop()


@pytest.mark.parametrize("sizes", [[3], [5] * 4])
def test_layers_may_return_wider_numbers_than_the_first_is_given(sizes: Sequence[int]) -> None:
    """As those of Mamba 2 do, which add to the residual in float32."""
    with waiting(EmulatedDevice(MIB), sum(sizes)) as room:
        room.begin(len(sizes), LAYERS)
        places = [room.add(states.bfloat16()) for states in states_of(sizes)]
        for place in places * LAYERS:
            place.put(place.take().float() + 1e-3)
        expected = [states.bfloat16().float() for states in states_of(sizes)]
        for _ in range(LAYERS):
            expected = [states + 1e-3 for states in expected]
        assert all(torch.equal(place.settled(), states) for place, states in zip(places, expected, strict=True))


def test_numbers_that_are_wider_than_planned_are_refused() -> None:
    with waiting(EmulatedDevice(MIB), 3) as room:
        room.begin(1, LAYERS)
        place = room.add(states_of([3])[0])
        with pytest.raises(BudgetError, match=r"torch.float64 take 144 bytes, planned for 72"):
            place.put(place.take().double())


class NoWait(EmulatedDevice):
    """Computing does not wait for copies."""

    def wait_for(self, event: Event) -> None:
        pass


class Eager(EmulatedDevice):
    """Copies do not wait for anything."""

    def copy_in(self, source: torch.Tensor, target: torch.Tensor, after: Sequence[Event] = ()) -> Event:
        return super().copy_in(source, target)


class Hasty(EmulatedDevice):
    def copy_out(self, source: torch.Tensor, target: torch.Tensor, after: Sequence[Event] = ()) -> Event:
        return super().copy_out(source, target)


@pytest.mark.parametrize("kind", [NoWait, Eager, Hasty])
def test_each_wait_is_needed(kind: Callable[[int, int], EmulatedDevice]) -> None:
    for seed in range(3):
        with pytest.raises(RaceError), waiting(kind(MIB, seed), 45) as room:
            passed(room, [5] * 9)
