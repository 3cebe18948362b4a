"""zstd only where the rule says that it pays, and always undone exactly."""

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.convert.models import TRAINED, expected_weights, read_store, save_model, store_digest, tiny_model
from tiered.convert import ConvertOptions, convert_checkpoint
from tiered.convert.compression import _HELD_NBYTES, Compression, read_bandwidth
from tiered.quant.zstd import FRAME_NBYTES, decompress_into
from tiered.store import BlockWriter, Store


def compressed_names(path: Path) -> set[str]:
    return {item.target.name for layout in Store.open(path).layouts.values() for item in layout.compressed}


def test_forced_zstd_shrinks_16_bit_layers_and_keeps_their_bits(tmp_path: Path) -> None:
    plain = convert_checkpoint(TRAINED, tmp_path / "plain", ConvertOptions(quant="none", compress="none"))
    small = convert_checkpoint(TRAINED, tmp_path / "small", ConvertOptions(quant="none", compress="zstd"))
    assert small.nbytes < 0.9 * plain.nbytes
    expected, found = read_store(tmp_path / "plain"), read_store(tmp_path / "small")
    assert set(found) == set(expected) and all(torch.equal(found[name], expected[name]) for name in expected)
    names = compressed_names(tmp_path / "small")
    assert any("fc1.weight" in name for name in names)
    assert not any("embed" in name for name in names)  # rows are read one by one
    assert not compressed_names(tmp_path / "plain")


def test_int4_codes_stay_raw(tmp_path: Path) -> None:
    convert_checkpoint(TRAINED, tmp_path / "out", ConvertOptions(compress="zstd"))
    assert compressed_names(tmp_path / "out") == set()


def test_incompressible_tensors_stay_raw(tmp_path: Path) -> None:
    model = tiny_model("opt")
    with torch.no_grad():
        for parameter in model.parameters():
            bits = torch.randint(-(2**31), 2**31, parameter.shape).to(torch.int32) & ~(1 << 30)  # finite floats
            parameter.copy_(bits.view(torch.float32))
    model.model.decoder.layers[0].fc1.weight.data.copy_(torch.ones(128, 64))
    source = save_model(tmp_path / "source", model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tiered.convert.compression._LEAST_VALUES", 1)
        convert_checkpoint(source, tmp_path / "out", ConvertOptions(quant="none", compress="zstd"))
    names = compressed_names(tmp_path / "out")
    assert "model.decoder.layers.0.fc1.weight" in names and "model.decoder.layers.1.fc1.weight" not in names
    found = read_store(tmp_path / "out")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected_weights(model).items())


@pytest.mark.parametrize(("bandwidth", "shrinks"), [(50e6, True), (3e9, False)])
def test_auto_follows_the_disk(
    bandwidth: float, shrinks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tiered.convert.compression.read_bandwidth", lambda *_: bandwidth)
    convert_checkpoint(TRAINED, tmp_path / "out", ConvertOptions(quant="none", compress="auto"))
    assert bool(compressed_names(tmp_path / "out")) == shrinks


@pytest.mark.slow
def test_a_resumed_conversion_keeps_the_first_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options, finish = ConvertOptions(quant="none", compress="auto"), BlockWriter.finish
    monkeypatch.setattr("tiered.convert.compression.read_bandwidth", lambda *_: 50e6)
    convert_checkpoint(TRAINED, tmp_path / "whole", options)

    def failing(self: BlockWriter) -> object:
        if self._path.name.startswith("layer-004"):
            raise KeyboardInterrupt
        return finish(self)

    with monkeypatch.context() as patch:
        patch.setattr(BlockWriter, "finish", failing)
        with pytest.raises(KeyboardInterrupt):
            convert_checkpoint(TRAINED, tmp_path / "out", options)
    monkeypatch.setattr("tiered.convert.compression.read_bandwidth", lambda *_: 9e9)
    convert_checkpoint(TRAINED, tmp_path / "out", options)
    assert store_digest(tmp_path / "out") == store_digest(tmp_path / "whole")


def test_the_probe_measures_and_leaves_nothing(tmp_path: Path) -> None:
    assert read_bandwidth(tmp_path) > 1e6
    assert list(tmp_path.iterdir()) == []


def test_a_hopeless_tensor_is_given_up_after_the_trial(tmp_path: Path) -> None:
    taken = 0

    def chunks() -> Iterator[memoryview]:
        nonlocal taken
        for _ in range(64):
            taken += 1
            yield memoryview(os.urandom(FRAME_NBYTES))

    assert Compression("zstd").attempt(chunks(), tmp_path) is None
    assert taken <= 5


@pytest.mark.slow
def test_frames_wait_in_memory_and_then_in_a_file_without_a_name(tmp_path: Path) -> None:
    data = bytes(random.Random(0).choices(range(16), k=12 * FRAME_NBYTES + 5))
    frames = Compression("zstd").attempt(iter([memoryview(data)]), tmp_path)
    assert frames is not None
    assert sum(frames.sizes) > _HELD_NBYTES
    payload = b"".join(frames.pieces)
    out = bytearray(len(data))
    decompress_into(payload, frames.sizes, FRAME_NBYTES, memoryview(out))
    assert out == data
    assert list(tmp_path.iterdir()) == []
