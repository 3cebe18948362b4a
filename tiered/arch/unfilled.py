"""Building a graph without filling its parameters: on the meta device they hold nothing, but torch takes as long over
filling them as over real ones, which was more than half of what a graph takes.

In: nothing. Out: a context in which functions of `torch.nn.init` leave tensors on the meta device as they are. All
others, the graph's buffers too, are filled as ever. `skeleton.py` builds in it.
"""

import functools
import threading
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch.nn import init
from transformers import initialization

_FILLING: Final = (
    *("uniform_", "normal_", "trunc_normal_", "constant_", "ones_", "zeros_", "kaiming_uniform_", "kaiming_normal_"),
    *("xavier_uniform_", "xavier_normal_"),
)


_LOCK: Final = threading.Lock()


@contextmanager
def meta_unfilled() -> Iterator[None]:
    """Until the context ends, for the whole process: to other threads, too, a tensor on the meta device is the same
    filled or not. Where another thread builds in it already, this one builds as ever, as neither may put back what the
    other one has put there."""
    if not _LOCK.acquire(blocking=False):
        yield
        return
    # transformers has taken torch's functions into a table of its own.
    tables: tuple[MutableMapping[str, Any], ...] = (vars(init), getattr(initialization, "TORCH_INIT_FUNCTIONS", {}))
    before = [(table, name, table[name]) for table in tables for name in _FILLING if name in table]
    try:
        for table, name, fill in before:
            table[name] = _of_real(fill)
        yield
    finally:
        for table, name, fill in before:
            table[name] = fill
        _LOCK.release()


def _of_real(fill: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(fill)
    def filled(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return tensor if tensor.is_meta else fill(tensor, *args, **kwargs)

    return filled
