"""Options: what contradicts itself is named before anything is opened, and phases and dtypes follow from the rest."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from transformers import PretrainedConfig

from tiered.errors import ConfigError
from tiered.options import Options, compute_dtype
from tiered.plan import Tier
from tiered.units import GIB

THREE, LOADED, ALONE = (Tier.DISK, Tier.CPU, Tier.GPU), (Tier.CPU, Tier.GPU), (Tier.GPU,)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ram": True}, "ram True: expected a whole number above 0"),
        ({"tiers": THREE, "vram": True}, "vram True: expected a number of bytes above 0"),
        ({"tiers": THREE, "resident_cpu": False}, "resident-cpu False: expected a number of bytes"),
        ({"vram": GIB}, "--vram is for a GPU, and --tiers disk,cpu has none; add --tiers disk,cpu,gpu"),
        ({"device": "emulated"}, "--device is for a GPU"),
        ({"resident_gpu": 0}, "--resident-gpu is for a GPU"),
        ({"tiers": (Tier.CPU,), "resident_cpu": GIB}, "--resident-cpu: --tiers cpu reads nothing again"),
        ({"prefill_device": "gpu"}, "--prefill-device gpu is for a GPU"),
        ({"decode_device": "gpu"}, "--decode-device gpu is for a GPU"),
        ({"kv": "gpu"}, "--kv gpu is for a GPU"),
        ({"fallback": "cpu"}, "--fallback is for a GPU"),
        ({"kv": "vram"}, "expected auto, gpu, cpu or disk"),
        ({"tiers": THREE, "vram": 0}, "vram 0: expected a number of bytes above 0"),
        ({"tiers": THREE, "resident_gpu": -1}, "resident-gpu -1: expected a number of bytes"),
        ({"tiers": THREE, "device": "cuda:"}, "device 'cuda:': expected auto, cuda, cuda:1"),
        ({"tiers": THREE, "device": "rocm"}, "device 'rocm'"),
        ({"tiers": THREE, "decode_device": "tpu"}, "decode-device 'tpu': expected auto, cpu or gpu"),
        ({"tiers": THREE, "fallback": "disk"}, "fallback 'disk': expected cpu, or none"),
        ({"tiers": THREE, "device": "emulated"}, "say how much with --vram"),
        ({"tiers": THREE, "prefill_device": "cpu", "decode_device": "cpu"}, "nothing is left for the GPU"),
        ({"tiers": THREE, "prefill_device": "cpu"}, "prompts are what a GPU is quickest at"),
        ({"tiers": ALONE, "decode_device": "cpu"}, "needs weights in memory; use --tiers disk,cpu,gpu"),
        ({"tiers": THREE, "decode_device": "cpu", "kv": "gpu"}, "the cache is where decoding is"),
        ({"tiers": THREE, "decode_device": "cpu", "resident_gpu": GIB}, "pass through"),
        ({"tiers": THREE, "decode_device": "cpu", "dtype": "float16"}, "the processor has no arithmetic for it"),
        ({"tiers": ALONE, "resident_gpu": GIB}, "--tiers gpu keeps all weights on the GPU"),
        ({"tiers": LOADED, "resident_cpu": GIB}, "--tiers cpu,gpu reads nothing again, so all weights stay"),
    ],
)
def test_options_that_contradict_each_other_are_explained(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Options(**fields)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("fields", "choices"),
    [
        ({}, []),
        ({"tiers": THREE}, ["gpu gpu", "gpu cpu", "cpu cpu"]),
        ({"tiers": LOADED}, ["gpu gpu", "gpu cpu", "cpu cpu"]),
        ({"tiers": ALONE}, ["gpu gpu"]),
        ({"tiers": THREE, "decode_device": "cpu"}, ["gpu cpu", "cpu cpu"]),
        ({"tiers": THREE, "prefill_device": "gpu"}, ["gpu gpu", "gpu cpu"]),
        ({"tiers": THREE, "prefill_device": "gpu", "decode_device": "cpu"}, []),
        ({"tiers": THREE, "kv": "gpu"}, ["gpu gpu"]),
        ({"tiers": THREE, "resident_gpu": GIB}, ["gpu gpu"]),
        ({"tiers": THREE, "resident_cpu": GIB}, ["gpu gpu", "gpu cpu", "cpu cpu"]),
        ({"tiers": THREE, "dtype": "float16"}, ["gpu gpu"]),
    ],
)
def test_auto_may_stand_for_whatever_the_other_options_allow(fields: dict[str, Any], choices: list[str]) -> None:
    options = Options(**fields)
    assert [" ".join(phases) for phases in options.phase_choices] == choices
    for phases in options.phase_choices:
        chosen = options.with_phases(phases)
        assert chosen.computes == phases and chosen.has_device == ("gpu" in phases) and not chosen.phase_choices


def test_phases_are_the_gpu_s_where_there_is_one() -> None:
    assert Options().computes == ("cpu", "cpu") and Options().device_name is None
    assert Options(tiers=THREE).computes == ("gpu", "gpu")
    assert Options(tiers=THREE, decode_device="cpu").computes == ("gpu", "cpu")
    assert Options(tiers=LOADED, prefill_device="gpu", decode_device="gpu").has_device


@pytest.mark.parametrize(
    ("device", "name"), [(None, "cuda"), ("auto", "cuda"), ("cuda:1", "cuda:1"), ("emulated", "emulated")]
)
def test_the_device_is_the_first_cuda_device_unless_another_is_named(device: str | None, name: str) -> None:
    assert Options(tiers=ALONE, device=device, vram=GIB).device_name == name


@pytest.mark.parametrize("tiers", [THREE, LOADED, ALONE])
def test_without_the_device_the_processor_does_the_same(tiers: tuple[Tier, ...]) -> None:
    asked = Options(ram=GIB, tiers=tiers, vram=GIB, device="cuda:1", kv="gpu", dtype="float16", fallback="cpu")
    left = asked.without_device()
    assert not left.has_device and left.computes == ("cpu", "cpu") and left.ram == GIB
    assert left.tiers == ((Tier.CPU,) if tiers == LOADED else (Tier.DISK, Tier.CPU))
    assert (left.kv, left.dtype) == ("auto", "auto")


def config(dtype: torch.dtype | None) -> PretrainedConfig:
    return cast(PretrainedConfig, SimpleNamespace(dtype=dtype))


@pytest.mark.parametrize(
    ("name", "stored", "fields", "expected"),
    [
        ("auto", torch.float32, {}, torch.float32),
        ("auto", None, {"on_device": True}, torch.float32),
        ("auto", torch.bfloat16, {}, torch.bfloat16),
        ("auto", torch.float16, {}, torch.bfloat16),
        ("auto", torch.bfloat16, {"on_device": True}, torch.bfloat16),
        ("float16", torch.bfloat16, {"on_device": True}, torch.float16),
        ("float32", torch.bfloat16, {"on_device": True}, torch.float32),
    ],
)
def test_the_dtype_follows_from_the_checkpoint_or_is_as_asked_for(
    name: str, stored: torch.dtype | None, fields: dict[str, Any], expected: torch.dtype
) -> None:
    assert compute_dtype(name, config(stored), **fields) is expected


def test_float16_is_for_devices() -> None:
    with pytest.raises(ConfigError, match="expected auto, bfloat16 or float32"):
        compute_dtype("float16", config(torch.bfloat16))
    with pytest.raises(ConfigError, match="expected auto, bfloat16, float32 or float16"):
        compute_dtype("int8", config(torch.bfloat16), on_device=True)
