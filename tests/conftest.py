"""What tests of different modules share."""

from collections.abc import Iterator

import pytest
import torch

from tests.helpers import Tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tiny]:
    """Tiny models of every family, made when first asked for."""
    threads = torch.get_num_threads()
    # They are so small that a second thread only costs time.
    torch.set_num_threads(1)
    yield Tiny(tmp_path_factory.mktemp("tiny"))
    torch.set_num_threads(threads)
