"""Exponents are coded only where the rule says that it pays, and every bit comes back."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.convert.models import TRAINED, expected_weights, read_store, save_model, store_digest, tiny_model
from tiered.convert import ConvertOptions, convert_checkpoint
from tiered.convert.compression import Compression, decode_bandwidth, in_pieces, read_bandwidth
from tiered.kernels import load_library
from tiered.quant.planes import FRAME_NBYTES
from tiered.store import BlockWriter, Store


def compressed_names(path: Path) -> set[str]:
    return {item.target.name for layout in Store.open(path).layouts.values() for item in layout.compressed}


@pytest.mark.parametrize("is_native", [True, False])
def test_16_bit_layers_shrink_by_a_third_and_keep_their_bits(
    is_native: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_native:
        monkeypatch.setattr("tiered.kernels.planes.load_library", lambda: "not built")
    elif isinstance(load_library(), str):
        pytest.skip("the native library was not built")
    plain = convert_checkpoint(TRAINED, tmp_path / "plain", ConvertOptions(quant="none", compress="none"))
    small = convert_checkpoint(TRAINED, tmp_path / "small", ConvertOptions(quant="none", compress="planes"))
    assert small.nbytes < 0.8 * plain.nbytes  # the embedding stays as it is
    layouts = Store.open(tmp_path / "small").layouts.values()
    items = [item for layout in layouts for item in layout.compressed]
    assert sum(i.source.nbytes for i in items) < 0.69 * sum(i.target.nbytes for i in items)
    expected, found = read_store(tmp_path / "plain"), read_store(tmp_path / "small")
    assert set(found) == set(expected) and all(torch.equal(found[name], expected[name]) for name in expected)
    names = compressed_names(tmp_path / "small")
    assert any("fc1.weight" in name for name in names)
    assert not any("embed" in name for name in names)  # rows are read one by one
    assert not compressed_names(tmp_path / "plain")


@pytest.mark.parametrize("quant", ["int4", "int8"])
def test_quantized_codes_stay_as_they_are(quant: str, tmp_path: Path) -> None:
    convert_checkpoint(TRAINED, tmp_path / "out", ConvertOptions(quant=quant, compress="planes"))
    assert compressed_names(tmp_path / "out") == set()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_does_not_shrink_stays_as_it_is(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("opt", dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randint(-(2**15), 2**15, parameter.shape, dtype=torch.int16).view(dtype))
            parameter.nan_to_num_(1.0, 1.0, 1.0)
    layers = model.model.decoder.layers
    layers[0].fc1.weight.data.normal_(std=0.02)
    source = save_model(tmp_path / "source", model)
    monkeypatch.setattr("tiered.convert.compression._LEAST_VALUES", 1)
    convert_checkpoint(source, tmp_path / "out", ConvertOptions(quant="none", compress="planes"))
    names = compressed_names(tmp_path / "out")
    assert "model.decoder.layers.0.fc1.weight" in names and "model.decoder.layers.1.fc1.weight" not in names
    found = read_store(tmp_path / "out")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected_weights(model).items())


@pytest.mark.parametrize(
    ("disk", "decode", "pays"), [(0.4e9, 8e9, True), (2.7e9, 8e9, False), (0.4e9, 0.1e9, False), (0.02e9, 0.1e9, True)]
)
def test_auto_compares_the_reading_it_saves_with_the_decoding_it_costs(
    disk: float, decode: float, pays: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})
    monkeypatch.setattr("tiered.convert.compression.read_bandwidth", lambda *_: disk)
    monkeypatch.setattr("tiered.convert.compression.decode_bandwidth", lambda *_: decode)
    convert_checkpoint(TRAINED, tmp_path / "out", ConvertOptions(quant="none", compress="auto"))
    assert bool(compressed_names(tmp_path / "out")) == pays


def test_nothing_is_measured_where_nothing_can_shrink(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiered.convert.compression.read_bandwidth", lambda *_: pytest.fail("measured"))
    convert_checkpoint(TRAINED, tmp_path / "out", ConvertOptions(quant="int4", compress="auto"))


@pytest.mark.slow
def test_a_resumed_conversion_keeps_the_first_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options, finish = ConvertOptions(quant="none", compress="auto"), BlockWriter.finish
    monkeypatch.setattr("tiered.convert.compression.read_bandwidth", lambda *_: 1e3)
    convert_checkpoint(TRAINED, tmp_path / "whole", options)
    assert compressed_names(tmp_path / "whole")

    def failing(self: BlockWriter) -> object:
        if self._path.name.startswith("layer-004"):
            raise KeyboardInterrupt
        return finish(self)

    with monkeypatch.context() as patch:
        patch.setattr(BlockWriter, "finish", failing)
        with pytest.raises(KeyboardInterrupt):
            convert_checkpoint(TRAINED, tmp_path / "out", options)
    monkeypatch.setattr("tiered.convert.compression.read_bandwidth", lambda *_: 1e12)
    resumed = convert_checkpoint(TRAINED, tmp_path / "out", options)
    assert resumed.resumed_blocks > 3
    assert store_digest(tmp_path / "out") == store_digest(tmp_path / "whole")


def test_the_probes_measure_and_leave_nothing(tmp_path: Path) -> None:
    assert read_bandwidth(tmp_path) > 0
    assert list(tmp_path.iterdir()) == []
    assert decode_bandwidth(torch.bfloat16) > 0


def test_a_hopeless_tensor_is_given_up_after_the_trial_and_read_once(tmp_path: Path) -> None:
    noise = [os.urandom(FRAME_NBYTES + 2) for _ in range(40)]
    taken = 0

    def chunks() -> Iterator[memoryview]:
        nonlocal taken
        for piece in noise:
            taken += 1
            yield memoryview(piece)

    is_coded, pieces = Compression("planes").attempt(chunks(), torch.bfloat16)
    assert not is_coded and taken <= 17
    assert b"".join(pieces) == b"".join(noise)


def test_pieces_are_cut_anew() -> None:
    data = os.urandom(1000)
    cut = in_pieces((memoryview(data)[start : start + 7] for start in range(0, 1000, 7)), 300)
    assert [bytes(piece) for piece in cut] == [data[start : start + 300] for start in range(0, 1000, 300)]
