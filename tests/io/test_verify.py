"""Checksums on the way in: when a chunk is tested, and what a bad one is called."""

import pytest

from tiered.errors import StoreError
from tiered.io import ChunkVerifier, VerifyPolicy
from tiered.store import CHUNK_NBYTES, FileInfo, hash_chunk
from tiered.trace import Tracer

GOOD = memoryview(bytes(range(256)) * 16)
BAD = memoryview(bytes(GOOD[:-1]) + b"\0")
FILE = FileInfo("blocks/layer-000.safetensors", CHUNK_NBYTES + 4096, ("0" * 16, hash_chunk(GOOD)))
OTHER = FileInfo("blocks/layer-001.safetensors", CHUNK_NBYTES + 4096, FILE.checksums)


def verifier(policy: VerifyPolicy, trace: Tracer | None = None) -> ChunkVerifier:
    return ChunkVerifier(policy, trace or Tracer())


def test_first_tests_each_chunk_of_each_file_until_it_was_good() -> None:
    checker = verifier(VerifyPolicy.FIRST)
    assert checker.wants(FILE, 0) and checker.wants(FILE, 1)
    checker.check(FILE, 1, GOOD)
    assert checker.wants(FILE, 0) and not checker.wants(FILE, 1)
    assert checker.wants(OTHER, 1)


def test_a_bad_chunk_is_tested_again() -> None:
    checker = verifier(VerifyPolicy.FIRST)
    with pytest.raises(StoreError):
        checker.check(FILE, 1, BAD)
    assert checker.wants(FILE, 1)


def test_always_tests_again_and_never_never() -> None:
    for policy, expected in ((VerifyPolicy.ALWAYS, True), (VerifyPolicy.NEVER, False)):
        checker = verifier(policy)
        assert checker.wants(FILE, 1) is expected
        checker.check(FILE, 1, GOOD)
        assert checker.wants(FILE, 1) is expected


def test_a_bad_chunk_is_named_with_both_checksums_and_the_remedy() -> None:
    with pytest.raises(StoreError) as caught:
        verifier(VerifyPolicy.ALWAYS).check(FILE, 1, BAD)
    message = str(caught.value)
    assert message.startswith("blocks/layer-000.safetensors: chunk 1 (bytes 16,777,216 to 16,781,312) is corrupt")
    assert f"expected xxh3 {hash_chunk(GOOD)}, found {hash_chunk(BAD)}" in message
    assert "'tiered verify'" in message


def test_the_cost_shows_in_the_trace() -> None:
    trace = Tracer()
    verifier(VerifyPolicy.FIRST, trace).check(FILE, 1, GOOD)
    assert (trace.total("verify").spans, trace.total("verify").nbytes) == (1, GOOD.nbytes)
