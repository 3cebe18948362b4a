"""How tests wait for what threads, tasks and processes do: as long as the machine makes it last.

A time of which a test supposes that something has happened by then is too short somewhere, some day. So what must have
happened is waited for, and a sleep only gives what must not happen its chance.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Final

SECONDS: Final = 60.0
"""Longer than anything here takes, on a machine that is busy with other work too: a wait that reaches it hangs."""
_LOOK_SECONDS: Final = 0.001
_TURNS: Final = 50


def wait_until(is_so: Callable[[], object]) -> None:
    """Wait until `is_so` returns something true; what never comes fails."""
    deadline = time.monotonic() + SECONDS
    while not is_so():
        assert time.monotonic() < deadline, f"not so after {SECONDS:g} seconds"
        time.sleep(_LOOK_SECONDS)


async def until(is_so: Callable[[], object]) -> None:
    """As `wait_until`, while the event loop goes on."""
    await asyncio.to_thread(wait_until, is_so)


async def turns_of_the_loop() -> None:
    """Let tasks that have been begun or cancelled come as far as they come without waiting for anything else.

    In a sleep the loop may turn only once, if the process comes to it late.
    """
    for _ in range(_TURNS):
        await asyncio.sleep(0)
