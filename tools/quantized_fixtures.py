"""Writes tests/data/quantized.safetensors: small weights as the libraries that publish quantized checkpoints keep them.

    pip install --target LIBRARIES --no-deps compressed-tensors==0.20.0 bitsandbytes==0.50.2
    unzip auto_gptq-0.7.1-*.whl autoawq-0.2.7.post3-*.whl -d LIBRARIES     (their __init__ want more; it is not run)
    PYTHONPATH=LIBRARIES python tools/quantized_fixtures.py [OUTPUT]

Each format's tensors are called FORMAT.X for X as in a checkpoint. The metadata `formats` is JSON: for each format the
library, what it says in config.json, the shape, and the sha256 of the float32 weight that this library dequantizes to.
All formats keep the same weight, [64, 128].
"""

import hashlib
import importlib
import json
import sys
import types
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

OUTPUT: Final = Path(__file__).parents[1] / "tests" / "data" / "quantized.safetensors"
OUT: Final = 64
IN: Final = 128
Made = tuple[dict[str, Tensor], Tensor, str, dict[str, Any]]
"""Tensors, what the library dequantizes them to, the library, what config.json says."""


def main() -> int:
    """Command line."""
    output = Path(sys.argv[1]) if len(sys.argv) > 1 else OUTPUT
    torch.manual_seed(11)
    weight = torch.randn(OUT, IN) * 0.08
    made = {
        "gptq": gptq(weight, 32),
        "gptq-symmetric": gptq(weight, IN, symmetric=True),
        "gptq-act-order": gptq(weight, 32, act_order=True),
        "gptq-8bit": gptq(weight, 64, bits=8),
        "awq": awq(weight, 64),
        "ct-int4": compressed(weight, "pack_quantized", num_bits=4, group=32, symmetric=False),
        "ct-int4-channel": compressed(weight, "pack_quantized", num_bits=4, symmetric=True),
        "ct-int8": compressed(weight, "naive_quantized", num_bits=8, symmetric=True),
        "ct-fp8": compressed(weight, "naive_quantized", num_bits=8, symmetric=True, kind="float"),
        "ct-nvfp4": compressed(weight, "nvfp4", num_bits=4, group=16, symmetric=True, kind="float"),
        "ct-mxfp4": compressed(weight, "mxfp4", num_bits=4, group=32, symmetric=True, kind="float"),
        "bnb-nf4": bitsandbytes_4bit(weight, "nf4", nested=False),
        "bnb-nf4-nested": bitsandbytes_4bit(weight, "nf4", nested=True),
        "bnb-fp4": bitsandbytes_4bit(weight, "fp4", nested=True),
        "bnb-int8": bitsandbytes_int8(weight),
    }
    tensors: dict[str, Tensor] = {}
    formats: dict[str, Any] = {}
    for name, (parts, values, library, config) in made.items():
        tensors |= {f"{name}.{part}": tensor.detach().contiguous().clone() for part, tensor in parts.items()}
        digest = hashlib.sha256(values.float().contiguous().numpy().tobytes()).hexdigest()
        formats[name] = {"library": library, "config": config, "shape": [OUT, IN], "sha256": digest}
        error = float((values.float() - weight).norm() / weight.norm())
        sys.stdout.write(f"{name}: {library}, {error:.2%} from the weight\n")
        assert error < 0.2
    save_file(tensors, output, metadata={"formats": json.dumps(formats, sort_keys=True)})
    return 0


def ranges(weight: Tensor, group: int, bits: int, *, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scales, fp16 values, and zeros [out, groups]."""
    groups, most = weight.view(OUT, -1, group), 2**bits - 1
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    scale = ((high - low) / most).half().float()
    return scale, torch.full_like(scale, (most + 1) / 2) if symmetric else (-low / scale).round()


def gptq(weight: Tensor, group: int, *, bits: int = 4, symmetric: bool = False, act_order: bool = False) -> Made:
    """auto-gptq's layer for any order of columns; its forward multiplies by what it dequantizes."""
    module = bare("auto_gptq", "auto_gptq.nn_modules.qlinear.qlinear_cuda")
    order = torch.randperm(IN) if act_order else torch.arange(IN)
    scale, zero = ranges(weight[:, order], group, bits, symmetric=symmetric)
    groups = torch.empty(IN, dtype=torch.int32)
    groups[order] = (torch.arange(IN) // group).int()
    layer = module.QuantLinear(bits, group, IN, OUT, False, weight_dtype=torch.float32)
    linear = nn.Linear(IN, OUT, bias=False)
    steps, zeros = scale[:, groups], zero[:, groups]
    linear.weight.data = ((weight / steps).round() + zeros).clamp(0, 2**bits - 1).sub(zeros) * steps  # packing does not
    layer.pack(linear, scale, zero, groups)
    layer.g_idx = groups
    values = layer(torch.eye(IN)).t()
    parts = {name: getattr(layer, name) for name in ("qweight", "qzeros", "scales", "g_idx")}
    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": act_order}
    return {**parts, "scales": layer.scales.half()}, values, "auto-gptq 0.7.1", config


def awq(weight: Tensor, group: int) -> Made:
    """autoawq's GEMM version."""
    gemm = bare("awq", "awq.modules.linear.gemm")
    scale, zero = ranges(weight, group, 4, symmetric=False)
    linear = nn.Linear(IN, OUT, bias=False)
    linear.weight.data = weight.clone()
    layer = gemm.WQLinear_GEMM.from_linear(linear, 4, group, False, scale.t(), zero.t())
    values = gemm.dequantize_gemm(layer.qweight, layer.qzeros, layer.scales.float(), 4, group).t()
    parts = {name: getattr(layer, name) for name in ("qweight", "qzeros", "scales")}
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True}
    return parts, values, "autoawq 0.2.7.post3", config


def compressed(
    weight: Tensor, compressor: str, *, num_bits: int, symmetric: bool, kind: str = "int", group: int | None = None
) -> Made:
    """compressed-tensors: a compressor, and its own way back, with scales in float32."""
    quantization = importlib.import_module("compressed_tensors.quantization")
    helpers = importlib.import_module("compressed_tensors.quantization.utils")
    found = importlib.import_module(f"compressed_tensors.compressors.{compressor}.base")
    name = {
        "pack_quantized": "PackedQuantizationCompressor",
        "naive_quantized": "NaiveQuantizationCompressor",
        "nvfp4": "NVFP4PackedCompressor",
        "mxfp4": "MXFP4PackedCompressor",
    }[compressor]
    strategy = "tensor_group" if compressor == "nvfp4" else "channel" if group is None else "group"
    given = {"num_bits": num_bits, "type": kind, "symmetric": symmetric, "strategy": strategy, "group_size": group}
    if compressor == "mxfp4":
        given["scale_dtype"] = torch.uint8
    arguments = quantization.QuantizationArgs(**given)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=arguments)
    groups = weight.view(OUT, -1, group or IN)
    low, high = groups.amin(-1), groups.amax(-1)
    state: dict[str, Tensor] = {"weight": weight.clone()}
    whole = {}
    if compressor == "nvfp4":
        # A power of two, so that to divide by it is to multiply by its inverse, as ModelOpt does.
        whole = {"global_scale": torch.tensor([2.0**11])}
        state["weight_global_scale"] = whole["global_scale"]
    scale, zero = helpers.calculate_qparams(low, high, arguments, **whole)
    if compressor == "pack_quantized":
        scale = scale.bfloat16().float()
    state["weight_scale"], state["weight_zero_point"] = scale, zero
    cls = getattr(found, name)
    parts = cls.compress(state, scheme)
    values = cls.decompress({key: part.clone() for key, part in parts.items()}, scheme)["weight"]
    if compressor == "pack_quantized":
        parts["weight_scale"] = parts["weight_scale"].bfloat16()
    shown = {**given, "scale_dtype": None}
    config = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": shown}}}
    return parts, values, "compressed-tensors 0.20.0", config


def bitsandbytes_4bit(weight: Tensor, kind: str, *, nested: bool) -> Made:
    """bitsandbytes' 4 bits in blocks of 64, their scales perhaps in 8 bits."""
    functional = importlib.import_module("bitsandbytes.functional")
    codes, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=nested, quant_type=kind)
    values = functional.dequantize_4bit(codes, state)
    parts = {"weight": codes, **{f"weight.{name}": part for name, part in state.as_dict(packed=True).items()}}
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
    return parts, values, "bitsandbytes 0.50.2", config


def bitsandbytes_int8(weight: Tensor) -> Made:
    """bitsandbytes' LLM.int8, rows whole."""
    functional = importlib.import_module("bitsandbytes.functional")
    codes, largest, _ = functional.int8_vectorwise_quant(weight.half())
    values = functional.int8_vectorwise_dequant(codes, largest)
    parts = {"weight": codes, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return parts, values, "bitsandbytes 0.50.2", {"quant_method": "bitsandbytes", "load_in_8bit": True}


def bare(package: str, module: str) -> types.ModuleType:
    """A module of a package whose `__init__` files are not run."""
    places = [Path(folder) / package for folder in sys.path if (Path(folder) / package).is_dir()]
    names = module.split(".")[:-1]
    for depth in range(1, len(names) + 1):
        parent = types.ModuleType(".".join(names[:depth]))
        parent.__path__ = [str(places[0].joinpath(*names[1:depth]))]
        sys.modules.setdefault(parent.__name__, parent)
    return importlib.import_module(module)


if __name__ == "__main__":
    sys.exit(main())
