"""A conversion that fits the disk is not refused, one that does not is refused before anything is written.

In memory it takes its panels and little else, however large the layers are.
"""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests.convert.models import TRAINED, save_bin, store_digest
from tests.warm import call_warm
from tiered.convert import ConvertOptions, compression, convert_checkpoint
from tiered.convert.compression import PROBE_NAME
from tiered.errors import DiskFullError
from tiered.proc import process_peak_rss_bytes
from tiered.units import MIB
from tools.opt_forms import write_form


def print_peaks(source: Path, out: Path, quant: str, compress: str, ram_bytes: int) -> None:
    """This process's peak before and after a conversion, and after another that has touched all the code."""
    convert_checkpoint(TRAINED, out.with_name("first"), ConvertOptions(quant=quant))
    before = process_peak_rss_bytes()
    convert_checkpoint(source, out, ConvertOptions(quant=quant, compress=compress, ram_bytes=ram_bytes))
    print(before, process_peak_rss_bytes())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """An empty file system of 24 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={24 * MIB}", "tiered-test", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount here")
    if done.returncode:
        pytest.skip(f"no file system can be mounted: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def occupy(disk: Path, leave_nbytes: int) -> None:
    """Fill `disk` but for so many bytes."""
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    (disk / "other").write_bytes(bytes(free - leave_nbytes))


def stored_nbytes(store: Path) -> int:
    return sum(path.stat().st_size for path in store.rglob("*") if path.is_file())


def test_a_store_fits_where_there_is_room_for_it_and_no_probe(small_disk: Path, tmp_path: Path) -> None:
    options = ConvertOptions(quant="none")  # 16-bit weights are candidates for compression: the disk is probed
    convert_checkpoint(TRAINED, tmp_path / "whole", ConvertOptions(quant="none", compress="none"))
    nbytes = stored_nbytes(tmp_path / "whole")
    assert nbytes < 16 * MIB
    occupy(small_disk, nbytes + 6 * MIB)
    convert_checkpoint(TRAINED, small_disk / "out", options)
    assert not (small_disk / "out" / PROBE_NAME).exists()


def test_half_a_block_that_a_kill_left_is_no_obstacle(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, options = small_disk / "out", ConvertOptions(compress="none")
    convert_checkpoint(TRAINED, tmp_path / "whole", options)
    nbytes = stored_nbytes(tmp_path / "whole")

    def stop(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(TRAINED, out, options, stop)
    (out / "blocks" / "layer-003.safetensors.part").write_bytes(bytes(6 * MIB))
    here = stored_nbytes(out)
    occupy(small_disk, nbytes + 6 * MIB - here)
    convert_checkpoint(TRAINED, out, options)
    assert store_digest(out) == store_digest(tmp_path / "whole")


def test_too_little_room_is_found_before_anything_is_written(small_disk: Path, tmp_path: Path) -> None:
    convert_checkpoint(TRAINED, tmp_path / "whole")
    occupy(small_disk, stored_nbytes(tmp_path / "whole") - MIB)
    with pytest.raises(DiskFullError, match="choose a folder on another disk"):
        convert_checkpoint(TRAINED, small_disk / "out")
    assert not (small_disk / "out").exists()


def test_what_lies_beside_the_blocks_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr("tiered.convert.convert.check_space", lambda _, needed, *rest: asked.append(needed))
    options = ConvertOptions(compress="none")
    convert_checkpoint(TRAINED, tmp_path / "out", options)
    assert asked[0] > stored_nbytes(tmp_path / "out") - 16_000  # less conversion.json and manifest
    assert asked[0] < stored_nbytes(tmp_path / "out") + MIB


def test_the_probe_takes_no_more_than_the_store_will(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    timed = compression._timed_read

    def watched(path: Path) -> float:
        sizes.append(path.stat().st_size)
        return timed(path)

    monkeypatch.setattr(compression, "_timed_read", watched)
    convert_checkpoint(TRAINED, tmp_path / "out", ConvertOptions(quant="none"))
    (nbytes,) = sizes
    assert MIB < nbytes <= stored_nbytes(tmp_path / "out") + MIB


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A layer of 134 MB and 41 MB of embeddings and head, as safetensors and as torch files; one of 101 MB in the files
    of metaseq."""
    config = AutoConfig.for_model("llama", vocab_size=5000, hidden_size=2048, intermediate_size=8192)
    config.num_hidden_layers, config.num_attention_heads = 1, 16
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    folder = tmp_path_factory.mktemp("large")
    model.save_pretrained(folder / "safetensors")
    save_bin(folder / "bin", model)
    config = AutoConfig.for_model("opt", vocab_size=5000, hidden_size=2048, ffn_dim=8192, word_embed_proj_dim=2048)
    config.num_hidden_layers, config.num_attention_heads = 1, 16
    state = AutoModelForCausalLM.from_config(config, dtype=torch.float16).state_dict()
    for number, tensor in enumerate(state.values()):
        tensor += number / 100  # parts of norms and biases of nothing but ones and zeros would be the same
    config.save_pretrained(write_form("raw", folder / "raw", state, parts=2, shards=3))
    return {form: folder / form for form in ("safetensors", "bin", "raw")}


@pytest.mark.inputs("tiered/convert", "tiered/quant", "tiered/store")
@pytest.mark.parametrize(
    ("form", "quant", "compress"),
    [
        ("safetensors", "int4", "none"),
        ("safetensors", "none", "planes"),
        ("bin", "int8", "none"),
        ("bin", "none", "none"),
        ("raw", "int4", "none"),
    ],
)
def test_the_peak_is_at_most_one_layer_and_within_the_budget(
    form: str, quant: str, compress: str, large: dict[str, Path], tmp_path: Path
) -> None:
    budget = 720 << 20
    done = call_warm(tmp_path, print_peaks, large[form], tmp_path / "out", quant, compress, budget)
    assert done.code == 0, done.err
    before, peak = map(int, done.out.split())
    assert peak < budget
    print(f"grew by {(peak - before) >> 20} MiB to {peak >> 20} MiB")
    assert peak - before < 160 << 20, f"grew by {(peak - before) >> 20} MiB"  # the layer and small change


def random_codes(weight: torch.Tensor, method: str) -> dict[str, torch.Tensor]:
    """The tensors of a weight [out, in] as `method` has them, with any codes."""
    out, in_ = weight.shape
    if method == "fp8":
        scale = torch.ones(out // 128, in_ // 128)
        return {"weight": weight.to(torch.float8_e4m3fn), "weight_scale_inv": scale}
    shape = (in_ // 8, out) if method.startswith("gptq") else (in_, out // 8)
    words = torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32)
    zeros = torch.full((in_ // 128, out // 8), 0x77777777, dtype=torch.int32)
    parts = {"qweight": words, "qzeros": zeros, "scales": torch.full((in_ // 128, out), 0.01, dtype=torch.float16)}
    if method == "gptq act-order":
        parts["g_idx"] = torch.randperm(in_, dtype=torch.int32) // 128
    return parts


@pytest.fixture(scope="module")
def plain_growth(large: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> int:
    """By how many bytes a conversion of the source in 16 bits makes the process grow."""
    folder = tmp_path_factory.mktemp("plain")
    done = call_warm(folder, print_peaks, large["safetensors"], folder / "out", "int4", "none", 720 * MIB)
    assert done.code == 0, done.err
    before, peak = map(int, done.out.split())
    return peak - before


@pytest.mark.inputs("tiered/convert", "tiered/kernels", "tiered/quant", "tiered/store")
@pytest.mark.parametrize(
    ("method", "quant"), [("gptq", "int4"), ("gptq act-order", "int4"), ("awq", "int4"), ("fp8", "int8")]
)
def test_a_quantized_source_takes_hardly_more_memory_than_one_in_16_bits(
    method: str, quant: str, large: dict[str, Path], plain_growth: int, tmp_path: Path
) -> None:
    """Whether its codes are kept, turned on the way, or made numbers and quantized anew."""
    source = tmp_path / "source"
    source.mkdir()
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(large["safetensors"] / "model.safetensors").items():
        module = name.removesuffix(".weight")
        parts = random_codes(tensor, method) if module.endswith("_proj") else {"weight": tensor}
        tensors |= {f"{module}.{part}": value for part, value in parts.items()}
    save_file(tensors, source / "model.safetensors")
    config = json.loads((large["safetensors"] / "config.json").read_text())
    (source / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": method.split()[0]}})
    )
    done = call_warm(tmp_path, print_peaks, source, tmp_path / "out", quant, "none", 720 * MIB)
    assert done.code == 0, done.err
    before, peak = map(int, done.out.split())
    grew = f"grew by {(peak - before) / MIB:.1f} MiB, from 16 bits by {plain_growth / MIB:.1f} MiB"
    print(grew)
    assert peak - before <= plain_growth + 16 * MIB, grew
