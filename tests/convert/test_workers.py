"""Threads and the native kernel change the speed of quantizing, never its result."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tiered.convert.workers import Quantizers, one_torch_thread
from tiered.errors import CheckpointError
from tiered.quant import GroupScheme, quantize


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])  # which the native kernel takes, and does not
@pytest.mark.parametrize("room_nbytes", [0, 1 << 20])
def test_many_threads_quantize_at_once(kernels: str, dtype: torch.dtype, room_nbytes: int) -> None:
    weights, scheme, quantizers = torch.randn(20, 64, 128).to(dtype), GroupScheme(4), Quantizers(kernels)
    rooms = torch.zeros(20, room_nbytes, dtype=torch.uint8)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda w, room: quantizers.quantize(w, scheme, "mse", "w", room), weights, rooms))
    quantizers.close()
    for weight, room, codes in zip(weights, rooms, found, strict=True):
        for part, expected in zip(codes, quantize(weight, scheme), strict=True):
            assert torch.equal(part, expected)
        is_native = kernels == "auto" and dtype != torch.float64
        assert (codes.q.data_ptr() == room.data_ptr()) == (is_native and room_nbytes > 0)


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_an_error_leaves_the_kernels_for_the_next(kernels: str) -> None:
    quantizers = Quantizers(kernels)
    with pytest.raises(CheckpointError, match="w: expected finite weights"):
        quantizers.quantize(torch.full((4, 64), torch.nan), GroupScheme(4), "mse", "w")
    assert len(quantizers.quantize(torch.ones(4, 64), GroupScheme(4), "mse", "w").q) == 4
    quantizers.close()
    quantizers.close()


def test_torch_keeps_its_threads() -> None:
    before = 2
    torch.set_num_threads(before)
    with one_torch_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
