"""The clock and its servers: time shared equally, first come first served, and what makes way goes on later."""

import pytest

from tiered.plan.lanes import Clock, Event, Process, Server


def finish(clock: Clock) -> list[tuple[str, float, float, int]]:
    clock.run(lambda: False)
    return [(e.name, round(e.start, 6), round(e.seconds, 6), e.nbytes) for e in clock.events]


def test_a_queue_is_served_in_order_at_the_rate_of_each() -> None:
    clock = Clock()
    disk = Server(clock, "disk")
    first = disk.move("a", "one", "layer", 100, 50.0)
    disk.move("a", "two", "layer", 100, 100.0)
    assert not first.is_done and disk.move("a", "nothing", "layer", 0, 1.0).is_done
    assert finish(clock) == [("one", 0.0, 2.0, 100), ("two", 2.0, 1.0, 100)]
    assert first.is_done and (disk.busy_seconds, disk.nbytes) == (pytest.approx(3.0), pytest.approx(200))


def test_queues_share_the_time() -> None:
    clock = Clock()
    disk = Server(clock, "disk")
    disk.move("a", "long", "layer", 300, 100.0)
    disk.move("b", "short", "kv", 100, 100.0)
    assert finish(clock) == [("short", 0.0, 2.0, 100), ("long", 0.0, 4.0, 300)]


def test_what_makes_way_is_two_stretches() -> None:
    clock = Clock()
    disk = Server(clock, "disk", {"ahead": "urgent"})
    disk.move("ahead", "unit", "layer", 300, 100.0)

    def ask() -> Process:
        yield 1.0
        read = disk.move("urgent", "expert", "experts", 50, 100.0)
        yield lambda: read.is_done
        clock.events.append(Event("compute", "expert", "experts", clock.now, 0.0))

    clock.start(ask())
    assert finish(clock) == [
        ("unit", 0.0, 1.0, 100),
        ("expert", 1.0, 0.5, 50),
        ("expert", 1.5, 0.0, 0),
        ("unit", 1.5, 2.0, 200),
    ]
