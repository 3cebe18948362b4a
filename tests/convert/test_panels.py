"""Panels come in order whatever the threads do, in a few memories that are used again."""

import time
from collections.abc import Callable
from itertools import chain
from queue import SimpleQueue
from threading import Event

import pytest
import torch

from tiered.convert.panels import Makers, Panels, rooms_nbytes
from tiered.errors import CheckpointError
from tiered.units import PAGE


@pytest.fixture(params=[1, 2, 8])
def workers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr("tiered.convert.workers.worker_count", lambda: request.param)
    return int(request.param)


def numbered(
    first: int, count: int, nbytes: int, before: Callable[[int], None] = lambda _: None
) -> Panels[torch.Tensor]:
    """Panels that are full of the numbers `first`, `first` + 1 and so on."""

    def make(number: int, room: torch.Tensor) -> torch.Tensor:
        assert room.numel() >= nbytes
        before(first + number)
        return room[:nbytes].fill_(first + number)

    return Panels(count, make, nbytes)


def test_what_is_made_comes_in_order_and_stays_until_the_next_is_asked_for(workers: int) -> None:
    # Every third is late.
    line = [
        numbered(10 * each, each + 2, 100 * each + 1, lambda n: time.sleep(0.003 * (n % 3 == 0))) for each in range(5)
    ]
    makers, places = Makers(), set()
    for each, made in enumerate(makers.line(line)):
        for number, panel in enumerate(made):
            time.sleep(0.001)  # the others go on meanwhile
            assert panel.tolist() == [10 * each + number] * (100 * each + 1)
            places.add(panel.data_ptr())
    makers.close()
    # A room that is too small for what comes is given back.
    assert len(places) <= 5 * rooms_nbytes(1)
    assert workers < rooms_nbytes(1) <= workers + 4


def test_memory_is_used_again(workers: int) -> None:
    makers = Makers()
    places = {panel.data_ptr() for made in makers.line([numbered(0, 40, 8), numbered(0, 40, 8)]) for panel in made}
    makers.close()
    assert len(places) <= rooms_nbytes(1)


def test_towards_the_end_of_one_the_first_of_the_next_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiered.convert.workers.worker_count", lambda: 2)
    begun = SimpleQueue[int]()
    makers = Makers()
    one, other = makers.line([numbered(0, 2, 8, begun.put), numbered(2, 9, 8, begun.put)])
    next(one)
    assert sorted(begun.get(timeout=5) for _ in range(rooms_nbytes(1))) == list(range(4))
    time.sleep(0.05)
    assert begun.empty()
    assert [int(panel[0]) for panel in chain(one, other)] == list(range(1, 11))
    makers.close()


def test_each_is_handed_on_with_memory_of_its_own() -> None:
    doubled = numbered(3, 4, 5).then(lambda panel, room: torch.add(panel, panel, out=room[:5]), 5)
    assert doubled.nbytes == PAGE + 5
    makers = Makers()
    (made,) = makers.line([doubled])
    assert [panel.tolist() for panel in made] == [[2 * n] * 5 for n in range(3, 7)]
    assert [panel.tolist() for panel in doubled] == [[2 * n] * 5 for n in range(3, 7)]  # without threads too
    makers.close()


def test_an_error_reaches_whoever_asks_for_what_is_missing_and_torch_keeps_its_threads(workers: int) -> None:
    def refuse(number: int) -> None:
        assert torch.get_num_threads() == 1
        if number == 3:
            raise CheckpointError("the fourth")

    before = 2
    torch.set_num_threads(before)
    makers = Makers()
    (made,) = makers.line([numbered(0, 9, 8, refuse)])
    assert [int(next(made)[0]) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(CheckpointError, match="the fourth"):
        next(made)
    makers.close()
    makers.close()
    assert torch.get_num_threads() == before


def test_closing_waits_for_what_has_begun(workers: int) -> None:
    begun, ended = Event(), Event()

    def slow(_: int) -> None:
        begun.set()
        time.sleep(0.05)
        ended.set()

    makers = Makers()
    (made,) = makers.line([numbered(0, 2, 8, slow)])
    next(made)
    makers.close()
    assert begun.is_set() and ended.is_set()
