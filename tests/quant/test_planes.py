"""Frames of 16-bit floats: every bit comes back, natively and by numpy; damage is a StoreError and nothing worse."""

import os
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tiered.errors import StoreError
from tiered.kernels import decode_planes, encode_planes, load_library
from tiered.quant.planes import FRAME_NBYTES, HEADER_NBYTES, decode_frame, encode_frame

DTYPES = [torch.bfloat16, torch.float16]
Bytes = NDArray[np.uint8]
Decode = Callable[[Bytes, Bytes, torch.dtype], None]


def native(frame: Bytes, out: Bytes, dtype: torch.dtype) -> None:
    # A copy that ends where the frame does: what sanitizers and the heap's guards would see.
    decode_planes(bytearray(frame.tobytes()), [len(frame)], len(out), out.data, dtype, "w")  # type: ignore[arg-type]


DECODERS: list[Decode] = [decode_frame, native]


def bytes_of(tensor: torch.Tensor) -> Bytes:
    return tensor.view(torch.uint8).numpy()


def assert_round_trip(values: Bytes, dtype: torch.dtype) -> int:
    """Both encoders make the same frame, and both decoders the values of it, which is followed by a gap as well."""
    frame = encode_frame(values, dtype)
    assert np.array_equal(frame, np.frombuffer(encode_planes(values.data, dtype), np.uint8))
    for decode in DECODERS:
        for found in (frame, np.pad(frame, (0, 100))):
            out = np.full_like(values, 0xA5)
            decode(found, out, dtype)
            assert np.array_equal(out, values)
    assert len(frame) <= len(values) + HEADER_NBYTES
    return len(frame)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_pattern_comes_back_as_it_was(dtype: torch.dtype) -> None:
    every = np.arange(1 << 16, dtype=np.uint16)
    assert assert_round_trip(every.view(np.uint8), dtype) == every.nbytes + HEADER_NBYTES  # as they are
    # Among so many ordinary weights that all of them are escapes, or nearly.
    weights = bytes_of((torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype))
    mixed = np.concatenate([weights.view(np.uint16), every])
    np.random.default_rng(0).shuffle(mixed)
    assert assert_round_trip(mixed.view(np.uint8), dtype) < 0.95 * mixed.nbytes


@pytest.mark.parametrize(("dtype", "ratio"), [(torch.bfloat16, 0.68), (torch.float16, 0.87)])
def test_weights_shrink(dtype: torch.dtype, ratio: float) -> None:
    for std in (0.01, 0.02, 0.05):
        values = bytes_of((torch.randn(FRAME_NBYTES // 2, generator=torch.Generator().manual_seed(1)) * std).to(dtype))
        assert assert_round_trip(values, dtype) < ratio * len(values)


@pytest.mark.parametrize("dtype", DTYPES)
@given(count=st.integers(1, 300), seed=st.integers(0, 1000), spread=st.sampled_from([0.0, 1.0, 20.0]))
def test_tails_of_any_length_come_back(dtype: torch.dtype, count: int, seed: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, generator=generator) * torch.exp2(spread * torch.randn(count, generator=generator))
    assert_round_trip(bytes_of(values.to(dtype)), dtype)


def test_frames_that_lie_end_to_end_are_decoded_in_one_call() -> None:
    values = bytes_of(torch.randn(1000).bfloat16())
    frames = [encode_planes(values[start : start + 600].data, torch.bfloat16) for start in range(0, 2000, 600)]
    out = np.zeros_like(values)
    joined, sizes = memoryview(b"".join(frames)), list(map(len, frames))
    for library in (load_library(), "not built"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tiered.kernels.planes.load_library", lambda library=library: library)
            decode_planes(joined, sizes, 600, out.data, torch.bfloat16, "w")
        assert np.array_equal(out, values)
        out[:] = 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_damage_is_an_error_or_other_values_and_the_same_either_way(dtype: torch.dtype) -> None:
    chance = np.random.default_rng(0)
    values = bytes_of((torch.randn(500, generator=torch.Generator().manual_seed(2)) * 0.02).to(dtype))
    frame, refused = encode_frame(values, dtype), 0
    assert len(frame) < len(values)
    for trial in range(600):
        damaged = frame.copy()
        if trial % 3 == 0:
            damaged = damaged[: chance.integers(0, len(frame))]
        elif trial % 3 == 1:
            damaged[chance.integers(0, len(frame))] ^= 1 << chance.integers(0, 8)
        else:
            damaged[16 : 16 + 12] = np.frombuffer(os.urandom(12), np.uint8) & [255, 1, 1, 1] * 3
        found = []
        for decode in DECODERS:
            out = np.zeros_like(values)
            try:
                decode(damaged, out, dtype)
                found.append(out.tobytes())
            except StoreError as error:
                assert "a damaged frame of exponents" in str(error)
                found.append(b"")
        assert found[0] == found[1]
        refused += not found[0]
    assert refused > 300


@pytest.mark.parametrize("decode", DECODERS)
def test_claims_beyond_the_frame_are_refused_before_anything_is_taken(decode: Decode) -> None:
    frame = encode_frame(bytes_of(torch.randn(256).half()), torch.float16)
    for numbers in ([1, 0xFFFFFFFF, 0], [1, 0, 0xFFFFFFFF], [2, 0, 0], [0, 0, 0]):
        damaged = frame.copy()
        damaged[16:28] = np.array(numbers, "<u4").view(np.uint8)
        with pytest.raises(StoreError):
            decode(damaged[: 256 + 32], np.zeros(512, np.uint8), torch.float16)
