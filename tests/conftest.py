"""What tests of different modules share."""

from collections.abc import Iterator

import pytest
import torch

from tests.helpers import Tiny
from tiered.units import MIB


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tiny]:
    """Tiny models of every family, made when first asked for."""
    threads = torch.get_num_threads()
    # They are so small that a second thread only costs time.
    torch.set_num_threads(1)
    yield Tiny(tmp_path_factory.mktemp("tiny"))
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def steady_baseline() -> None:
    """Raise this process's peak, which every plan begins with, above what a module's tests will reach.

    The blocks of tiny models are smaller than the noise in the size of a process that imports and compares.
    """
    torch.ones(512 * MIB, dtype=torch.uint8)
