"""Threads and the native kernel change the speed of quantizing, never its result."""

import pytest
import torch

from tiered.convert.workers import Quantizers, one_torch_thread
from tiered.errors import CheckpointError
from tiered.quant import GroupScheme, quantize


@pytest.mark.parametrize("rows", [1, 2, 7, 64])
@pytest.mark.parametrize("workers", [1, 3, 8])
@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])  # which the native kernel takes, and does not
def test_slices_put_together_are_the_whole(
    rows: int, workers: int, kernels: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tiered.convert.workers.worker_count", lambda: workers)
    weight, scheme, pool = torch.randn(rows, 128).to(dtype), GroupScheme(4), Quantizers(kernels)
    parts = list(pool.quantize(weight, scheme, "mse", "w"))
    pool.close()
    whole = quantize(weight, scheme)
    for part, expected in zip(zip(*parts, strict=True), whole, strict=True):
        assert torch.equal(torch.cat(part), expected)


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_an_error_in_a_worker_reaches_the_caller_and_torch_keeps_its_threads(kernels: str) -> None:
    before = 2
    torch.set_num_threads(before)
    pool = Quantizers(kernels)
    with pytest.raises(CheckpointError, match="w: expected finite weights"):
        list(pool.quantize(torch.full((4, 64), torch.nan), GroupScheme(4), "mse", "w"))
    pool.close()
    pool.close()
    assert torch.get_num_threads() == before
    with one_torch_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
