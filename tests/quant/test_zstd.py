"""zstd: round trips, determinism, what damage looks like, and when compressing pays."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiered.errors import ConfigError, StoreError
from tiered.quant import compress, decompress_frame, decompress_into, pays

SKEWED = np.random.default_rng(0).binomial(20, 0.5, 10_000).astype(np.uint8).tobytes()


@given(data=st.binary(max_size=500), frame_nbytes=st.integers(1, 600))
def test_round_trip(data: bytes, frame_nbytes: int) -> None:
    compressed = compress(data, frame_nbytes)
    assert len(compressed.frames) == -(-len(data) // frame_nbytes)
    assert sum(compressed.frames) == len(compressed.payload)
    assert compress(data, frame_nbytes) == compressed
    out = bytearray(len(data))
    decompress_into(compressed.payload, compressed.frames, frame_nbytes, memoryview(out))
    assert out == data


def test_skewed_bytes_shrink_and_arrays_are_taken_as_bytes() -> None:
    compressed = compress(np.frombuffer(SKEWED, np.uint16).data)
    assert compressed == compress(SKEWED)
    assert compressed.nbytes == len(SKEWED)
    assert compressed.ratio < 0.6


def test_each_frame_decodes_alone() -> None:
    compressed = compress(SKEWED, 4096)
    offset = sum(compressed.frames[:2])
    out = bytearray(len(SKEWED) - 8192)
    decompress_frame(compressed.payload[offset:], memoryview(out), name="last")
    assert out == SKEWED[8192:]


def test_no_flipped_bit_goes_unnoticed() -> None:
    compressed = compress(SKEWED[:400])
    out = bytearray(400)
    for bit in range(len(compressed.payload) * 8):
        damaged = bytearray(compressed.payload)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            decompress_into(damaged, compressed.frames, compressed.frame_nbytes, memoryview(out), name="fc1.q")
        except StoreError as error:
            assert str(error).startswith("fc1.q: ")
        else:
            assert out == SKEWED[:400]  # a bit that zstd reserves or ignores


def test_truncated_and_extended_payloads_are_refused() -> None:
    compressed = compress(SKEWED, 4096)
    out = memoryview(bytearray(len(SKEWED)))
    for payload in (compressed.payload[:-1], compressed.payload + b"\0", b""):
        with pytest.raises(StoreError, match=r"fc1\.q: expected 3 zstd frames"):
            decompress_into(payload, compressed.frames, 4096, out, name="fc1.q")
    with pytest.raises(StoreError, match="damaged zstd frame"):
        decompress_frame(compressed.payload[: compressed.frames[0] - 1], out[:4096])
    with pytest.raises(StoreError, match="damaged zstd frame"):
        decompress_frame(compressed.payload, out[:4096])
    with pytest.raises(StoreError, match="damaged zstd frame"):
        decompress_frame(b"", out[:4096])


def test_a_frame_of_another_size_is_refused_before_it_is_decoded() -> None:
    compressed = compress(SKEWED)
    with pytest.raises(StoreError, match=r"expected a zstd frame of 16 bytes, found one of 10,000"):
        decompress_frame(compressed.payload, memoryview(bytearray(16)))


def test_frames_must_have_a_size() -> None:
    with pytest.raises(ConfigError, match="frame of 0 bytes"):
        compress(SKEWED, 0)


def test_compressing_pays_only_where_the_disk_is_slower_than_the_cores() -> None:
    assert pays(0.66, 0.2e9, cores=2)
    assert not pays(0.66, 2e9, cores=2)
    assert pays(0.66, 2e9, cores=8)
    assert not pays(0.94, 1e6, cores=64)  # group int4, on any disk
    assert not pays(0.66, 0.2e9, cores=2, decode_bytes_per_second=0.1e9)
