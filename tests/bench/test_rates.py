"""The processor's measured times, and what is read out of them."""

import time
from types import SimpleNamespace

import pytest
import torch

from tiered.bench import rates
from tiered.bench.rates import measure_attention, measure_compute, measure_prefill_attention, measure_quantizing
from tiered.kernels import AttentionCall, Kernels
from tiered.plan import ComputeRate, KVShape
from tiered.plan.kv import block_nbytes
from tiered.quant import GroupScheme


@pytest.fixture(autouse=True)
def short_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "_SECONDS", 0.02)
    # One thread computes, this one: what other programs take of the processor is not counted.
    monkeypatch.setattr(rates, "time", SimpleNamespace(perf_counter=time.thread_time))


RATE = ComputeRate((1, 4, 16), (1.0, 2.0, 6.0))


def test_measured_numbers_of_rows_give_what_was_measured() -> None:
    assert [RATE.seconds(rows, 10) for rows in RATE.rows] == [10.0, 20.0, 60.0]


def test_between_them_time_is_interpolated_and_beyond_them_it_grows_with_the_rows() -> None:
    assert RATE.seconds(10, 1) == pytest.approx(4.0)
    assert RATE.seconds(64, 1) == pytest.approx(24.0)


@pytest.mark.parametrize("scheme", [GroupScheme(4), GroupScheme(8), None])
def test_more_rows_take_longer_in_all_but_less_each(scheme: GroupScheme | None) -> None:
    with Kernels(1) as kernels:
        if kernels.level is None:
            pytest.skip(str(kernels.refusal))
        rate = measure_compute(kernels, scheme, 1024, torch.bfloat16, counts=(1, 64))
    one, many = rate.seconds(1, 10**6), rate.seconds(64, 10**6)
    assert 0 < one < many < 64 * one


@pytest.mark.parametrize(("bits", "sequences"), [(16, 1), (8, 3), (4, 3)])
def test_attention_takes_time_for_every_token_in_whatever_bits(
    bits: int, sequences: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape, calls = KVShape(2, 64, 64, "bfloat16"), list[AttentionCall]()
    with Kernels(1) as kernels:
        attend = kernels.attention

        def noted(call: AttentionCall) -> torch.Tensor:
            calls.append(call)
            return attend(call)

        monkeypatch.setattr(kernels, "attention", noted)
        assert 0 < measure_attention(kernels, 8, shape, bits, sequences, 1 << 20) < 1e-3
    call = calls[0]
    block = block_nbytes(shape, bits)
    assert call.keys.table.memory.nbytes == sequences * ((1 << 20) // block // sequences) * block
    assert call.query.shape == (sequences, 1, 8, 64) and call.keys.format.bits == call.values.format.bits == bits
    assert call.count.tolist() == [call.keys.table.offsets.shape[1] * 64] * sequences
    assert call.keys.table.offsets.unique().numel() * block == call.keys.table.memory.nbytes


@pytest.mark.parametrize("value_dim", [64, 0])
def test_quantizing_takes_time_for_every_token(value_dim: int) -> None:
    assert 0 < measure_quantizing(KVShape(2, 64, value_dim, "bfloat16")) < 1e-2


def test_a_prompt_attends_at_a_speed() -> None:
    with Kernels(1) as kernels:
        assert 1e7 < measure_prefill_attention(kernels, 2, 2, 64, torch.bfloat16, tokens=64) < 1e14
