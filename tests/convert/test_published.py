"""Each published format of quantized weights, against what the library that wrote it dequantizes to."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tiered.convert.formats import Group
from tiered.convert.index import WeightIndex
from tiered.convert.place import Folder, LocalFiles
from tiered.convert.quantized_reader import quantized_index
from tiered.convert.safetensors_reader import SafetensorsReader
from tiered.convert.source import StoredTensor
from tiered.convert.torch_reader import TorchReader
from tiered.errors import CheckpointError
from tiered.quant import dequantize, pack_int4
from tiered.quant.published import Packing, published_codes

LIBRARIES: Final = Path(__file__).parents[1] / "data" / "quantized.safetensors"
Tensors = dict[str, torch.Tensor]

with safe_open(LIBRARIES, "pt") as _opened:
    FORMATS: Final[Mapping[str, Any]] = json.loads(_opened.metadata()["formats"])

KEPT: Final = {
    "gptq": "int4-g32",
    "gptq-symmetric": "int4-g128",
    "gptq-act-order": None,
    "gptq-8bit": "int8-g64",
    "awq": "int4-g64",
    "ct-int4": "int4-g32",
    "ct-int4-channel": "int4-g128",
    "ct-int8": "int8-g128",
    "ct-fp8": None,
    "ct-nvfp4": None,
    "ct-mxfp4": "mxfp4-g32",
    "bnb-nf4": "nf4-g64",
    "bnb-nf4-nested": "nf4-g64",
    "bnb-fp4": None,
    "bnb-int8": "int8-g128",
}
"""The scheme that holds the codes of each format."""


def parts_of(name: str) -> Tensors:
    """The tensors of a format, by their names in a checkpoint after that of the module."""
    return {
        key.removeprefix(f"{name}."): tensor
        for key, tensor in load_file(LIBRARIES).items()
        if key.startswith(f"{name}.")
    }


def opened(folder: Path, tensors: Tensors, config: Mapping[str, Any]) -> tuple[WeightIndex, Path]:
    """The index of a checkpoint with these tensors, and its file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.safetensors"
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
    files, reader = LocalFiles(Folder(folder)), SafetensorsReader()
    index = WeightIndex(reader, (path.name,), dict.fromkeys(reader.tensors(path), path.name))
    return quantized_index(index, files, config), path


def read(index: WeightIndex, path: Path, name: str = "x.weight", rows: range | None = None) -> torch.Tensor:
    """The numbers of a weight."""
    # A panel's memory is the next one's, where a single processor makes them.
    return torch.cat([panel.clone() for panel in index.reader.panels(path, name, rows)])


def codes(index: WeightIndex, path: Path, stored: StoredTensor, rows: range | None = None) -> torch.Tensor:
    """The numbers that the codes of x.weight stand for once a store has them."""
    assert stored.scheme is not None
    scheme = stored.scheme
    panels = list(index.reader.packed(path, "x.weight", rows))
    return torch.cat([dequantize(q, scale.to(scheme.scale_dtype), zero, scheme) for q, scale, zero in panels])


@pytest.mark.parametrize("name", FORMATS)
def test_a_library_and_the_reader_dequantize_to_the_same_bits(name: str, tmp_path: Path) -> None:
    given = FORMATS[name]
    tensors = {f"x.{part}": tensor for part, tensor in parts_of(name).items()}
    index, path = opened(tmp_path, {**tensors, "y.weight": torch.ones(3, 4)}, given["config"])
    assert sorted(index.file_of) == ["x.weight", "y.weight"]
    known = index.reader.tensors(path)
    stored = known["x.weight"]
    assert stored.shape == tuple(given["shape"]) and stored.method is not None
    assert (stored.scheme.name if stored.scheme else None) == KEPT[name]
    values = read(index, path)
    if name == "bnb-int8":  # bitsandbytes rounds twice
        library = tensors["x.weight"].float() * tensors["x.SCB"].view(-1, 1) / 127
        torch.testing.assert_close(values, library, rtol=1e-6, atol=0.0)
    else:
        assert hashlib.sha256(values.numpy().tobytes()).hexdigest() == given["sha256"]
    rows = range(9, 42)  # within words of several rows
    assert torch.equal(read(index, path, rows=rows), values[9:42])
    if stored.scheme is not None:
        kept = codes(index, path, stored)
        # Scales of float32 are rounded to those of the scheme, which the conversion reports.
        rounding = 2**-11 if name in ("ct-int8", "bnb-int8") else 0.0
        torch.testing.assert_close(kept, values, rtol=rounding, atol=0.0)
        assert torch.equal(codes(index, path, stored, rows), kept[9:42])
    assert known["y.weight"].method is None and torch.equal(read(index, path, "y.weight"), torch.ones(3, 4))
    index.reader.close()


def test_scales_of_fp8_are_for_blocks_as_the_configuration_says_for_rows_or_for_all(tmp_path: Path) -> None:
    """Of 200 rows two blocks of 128 have scales: the last one is cut, not all are made smaller."""
    torch.manual_seed(3)
    weight = torch.randn(200, 192).to(torch.float8_e4m3fn)
    blocks, config = torch.rand(2, 2) + 0.5, {"weight_block_size": [128, 128]}
    exponents = torch.randint(120, 130, (200, 6), dtype=torch.uint8)
    stack, of_stack = torch.randn(3, 200, 192).to(torch.float8_e4m3fn), torch.rand(3, 2, 2)
    tensors = {
        "a.weight": weight,
        "a.weight_scale_inv": blocks,
        "b.weight": weight,
        "b.weight_scale": torch.rand(200, 1),
        "b.input_scale": torch.ones(1),
        "c.weight": weight,
        "c.weight_scale": torch.tensor(0.25),
        "d.weight": weight,
        "d.weight_scale": exponents,
        "experts.up_proj": stack,
        "experts.up_proj_scale_inv": of_stack,
    }
    index, path = opened(tmp_path, tensors, config)
    assert sorted(index.file_of) == ["a.weight", "b.weight", "c.weight", "d.weight", "experts.up_proj"]
    assert {stored.method for stored in index.reader.tensors(path).values()} == {"fp8"}
    whole = [torch.kron(each, torch.ones(128, 128))[:200, :192] for each in (blocks, *of_stack)]
    expected = {
        "a.weight": weight.float() * whole[0],
        "b.weight": weight.float() * tensors["b.weight_scale"],
        "c.weight": weight.float() * 0.25,
        "d.weight": weight.float() * torch.exp2(exponents.float() - 127).repeat_interleave(32, 1),
        "experts.up_proj": torch.cat([each.float() * scale for each, scale in zip(stack, whole[1:], strict=True)]),
    }
    for name, values in expected.items():
        assert torch.equal(read(index, path, name), values), name
        assert torch.equal(read(index, path, name, range(120, 190)), values[120:190]), name
    assert torch.equal(read(index, path, "experts.up_proj", range(190, 410)), expected["experts.up_proj"][190:410])
    index.reader.close()


def test_scales_of_blocks_are_not_taken_for_those_of_as_many_rows(tmp_path: Path) -> None:
    """There may be as many scales as rows: DeepSeek V3's output projection has 128 blocks in each row. And a stack may
    have its scales of rows in a vector for each matrix."""
    torch.manual_seed(5)
    weight, blocks = torch.randn(200, 128 * 100).to(torch.float8_e4m3fn), torch.rand(2, 100)
    stack, rows = torch.randn(2, 3, 64).to(torch.float8_e4m3fn), torch.rand(2, 3)
    tensors = {
        "a.weight": weight,
        "a.weight_scale_inv": blocks,
        "b.up_proj": stack,
        "b.up_proj_scale": rows,
    }
    index, path = opened(tmp_path, tensors, {})
    expected = weight.float() * blocks.repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)
    assert torch.equal(read(index, path, "a.weight", range(120, 200)), expected[120:])
    assert torch.equal(read(index, path, "b.up_proj"), (stack.float() * rows.unsqueeze(-1)).flatten(0, 1))
    assert torch.equal(
        read(index, path, "b.up_proj", range(2, 5)), (stack.float() * rows.unsqueeze(-1)).view(6, 64)[2:5]
    )
    index.reader.close()


CHANGED: Final[Mapping[str, tuple[str, str, Callable[[torch.Tensor], torch.Tensor]]]] = {
    "words of 16 bits": ("gptq", "qweight", lambda part: part.to(torch.int16)),
    "scales of whole numbers": ("gptq", "scales", lambda part: part.to(torch.int32)),
    "scales for fewer rows": ("ct-int8", "weight_scale", lambda part: part.view(1, -1)),
    "zeros that are not packed": ("ct-int4", "weight_zero_point", lambda part: torch.zeros(64, 4, dtype=torch.int8)),
    "zeros for fewer groups": ("ct-int4", "weight_zero_point", lambda part: part[:, :2]),
}
"""Tensors that are not what their format has: the format, the part, what it is instead."""


@pytest.mark.parametrize("case", CHANGED)
def test_tensors_that_do_not_fit_each_other_are_one_error_and_nothing_beyond_them_is_read(
    case: str, tmp_path: Path
) -> None:
    name, part, change = CHANGED[case]
    parts = parts_of(name)
    given = {f"x.{key}": change(tensor) if key == part else tensor for key, tensor in parts.items()}
    index, path = opened(tmp_path, {**given, "z.weight": torch.ones(4096)}, FORMATS[name]["config"])
    with pytest.raises(CheckpointError, match="are not what their format has"):
        index.reader.tensors(path)["x.weight"]
        read(index, path)
    index.reader.close()


def test_experts_in_mxfp4_are_those_that_transformers_unpacks(tmp_path: Path) -> None:
    torch.manual_seed(4)
    blocks = torch.randint(0, 256, (2, 24, 4, 16), dtype=torch.uint8)
    scales = torch.randint(110, 130, (2, 24, 4), dtype=torch.uint8)
    tensors = {"experts.down_proj_blocks": blocks, "experts.down_proj_scales": scales}
    index, path = opened(tmp_path, tensors, {})
    stored = index.reader.tensors(path)["experts.down_proj"]
    assert (stored.shape, stored.scheme and stored.scheme.name) == ((2, 24, 128), "mxfp4-g32")
    # transformers' are [experts, in, out].
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).transpose(1, 2).reshape(48, 128)
    assert torch.equal(read(index, path, "experts.down_proj"), expected)
    assert torch.equal(read(index, path, "experts.down_proj", range(20, 31)), expected[20:31])
    index.reader.close()


def test_nvfp4_of_modelopt_is_multiplied_where_that_of_compressed_tensors_is_divided(tmp_path: Path) -> None:
    parts = parts_of("ct-nvfp4")
    tensors = {
        "x.weight": parts["weight_packed"],
        "x.weight_scale": parts["weight_scale"],
        "x.weight_scale_2": 1 / parts["weight_global_scale"][0],
        "x.input_scale": torch.tensor(1.0),
    }
    index, path = opened(tmp_path, tensors, {"quant_method": "modelopt"})
    assert list(index.file_of) == ["x.weight"]
    digest = hashlib.sha256(read(index, path).numpy().tobytes()).hexdigest()
    assert digest == FORMATS["ct-nvfp4"]["sha256"]
    index.reader.close()


@pytest.mark.parametrize("name", ["gptq", "gptq-symmetric"])
def test_zeros_of_gptq_are_told_by_the_weights_not_by_the_configuration(name: str, tmp_path: Path) -> None:
    """As they are in version 2, one less in version 1; what the configuration says may be out of date."""
    parts, digest = parts_of(name), FORMATS[name]["sha256"]
    later = {**parts, "qzeros": parts["qzeros"] + 0x11111111}  # no zero is 15
    found = {}
    for version, tensors in (("gptq", parts), ("gptq_v2", later)):
        for said in ("gptq", "gptq_v2"):
            given = {f"x.{part}": tensor for part, tensor in tensors.items()}
            index, path = opened(tmp_path / version / said, given, {"checkpoint_format": said})
            try:
                values = read(index, path)
                found[version, said] = hashlib.sha256(values.numpy().tobytes()).hexdigest() == digest
            except CheckpointError as error:
                found[version, said] = "weights have a mean of zero where they are stored" in str(error)
                assert name == "gptq" and version != said
            index.reader.close()
    assert all(found.values()) and len(found) == 4


@pytest.mark.parametrize("packing", ["columns", "rows"])
def test_codes_in_2_bits_are_put_in_order_in_the_memory_that_is_given(packing: Packing) -> None:
    rows, in_ = 700, 384  # some rows at a time, which 700 is no multiple of
    shape = (in_ // 16, rows) if packing == "columns" else (rows, in_ // 16)
    words = torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32)
    scale, out = torch.ones(690, 3), torch.zeros(rows * in_ // 2, dtype=torch.uint8)
    for group_size in (2, 128):
        expected = pack_int4(published_codes(words, packing, 2), group_size)
        found = Group(words, packing, 2, scale, scale, skipped=8).in_groups(group_size, out)
        assert torch.equal(found, expected[8:698])
        assert found.data_ptr() == out[8 * in_ // 2 :].data_ptr()


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_a_step_that_a_zero_is_off_is_seen_in_few_bits(bits: int, version: str, tmp_path: Path) -> None:
    """In 8 bits it is a fiftieth of the weights' deviation, by which their mean may be off."""
    weight = torch.randn(64, 32, 128, generator=torch.Generator().manual_seed(8))
    low, most = weight.amin(-1, keepdim=True), (1 << bits) - 1
    scale = (weight.amax(-1, keepdim=True) - low) / most
    zero = (-low / scale).round().clamp(1, most)
    q = ((weight / scale).round() + zero).clamp(0, most).flatten(1)
    tensors = {
        "x.qweight": words_of(q.t(), bits).contiguous(),
        "x.qzeros": words_of((zero.squeeze(-1) - int(version == "gptq")).contiguous(), bits).t().contiguous(),
        "x.scales": scale.squeeze(-1).t().half().contiguous(),
    }
    for said in ("gptq", "gptq_v2"):
        index, path = opened(tmp_path / said, tensors, {"checkpoint_format": said})
        if said == version:
            values = read(index, path)
            torch.testing.assert_close(
                values,
                (
                    (q - zero.squeeze(-1).repeat_interleave(128, 1))
                    * scale.half().float().squeeze(-1).repeat_interleave(128, 1)
                ),
            )
        else:
            with pytest.raises(CheckpointError, match="weights have a mean of zero where they are stored"):
                read(index, path)
        index.reader.close()


def words_of(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Words of 32 bits of the codes along the first dimension, the first in the lowest bits."""
    per = 32 // bits
    parts = codes.to(torch.int64).view(-1, per, codes.shape[1])
    words = sum(parts[:, i] << (bits * i) for i in range(per))
    assert isinstance(words, torch.Tensor)
    return words.to(torch.int32)


def test_files_of_torch_are_read_alike(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({f"x.{part}": tensor for part, tensor in parts_of("gptq").items()}, path)
    reader = TorchReader()
    index = WeightIndex(reader, (path.name,), dict.fromkeys(reader.tensors(path), path.name))
    index = quantized_index(index, LocalFiles(Folder(tmp_path)), {})
    digest = hashlib.sha256(read(index, path).numpy().tobytes()).hexdigest()
    assert digest == FORMATS["gptq"]["sha256"]
    index.reader.close()


def test_parts_in_several_files_are_one_weight(tmp_path: Path) -> None:
    parts = {f"x.{part}": tensor for part, tensor in parts_of("gptq").items()}
    first = {"x.qweight": parts.pop("x.qweight")}
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    for name, tensors in zip(names, (first, parts), strict=True):
        save_file(tensors, tmp_path / name)
    files, reader = LocalFiles(Folder(tmp_path)), SafetensorsReader()
    file_of = {tensor: name for name in names for tensor in reader.tensors(tmp_path / name)}
    index = quantized_index(WeightIndex(reader, names, file_of), files, {})
    assert index.file_of == {"x.weight": names[0]} and index.files_of("x.weight") == frozenset(names)
    digest = hashlib.sha256(read(index, tmp_path / names[0]).numpy().tobytes()).hexdigest()
    assert digest == FORMATS["gptq"]["sha256"] and list(index.reader.tensors(tmp_path / names[1])) == []
    index.reader.close()


@pytest.mark.parametrize("name", [name for name in FORMATS if not name.endswith(("int8", "gptq-act-order"))])
def test_the_configuration_says_what_the_tensors_say_before_they_are_here(name: str, tmp_path: Path) -> None:
    """Of a checkpoint on the hub, whose files come while it is converted."""
    given = {f"x.{part}": tensor for part, tensor in parts_of(name).items()}
    index, _ = opened(tmp_path, given, FORMATS[name]["config"])
    scheme = index.declared["x.weight"].scheme
    assert (scheme and scheme.name) == KEPT[name]
