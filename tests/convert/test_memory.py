"""A conversion takes its panels and little else, however large the layers are."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.commands import CHECKPOINT
from tests.convert.models import save_bin
from tests.warm import call_warm
from tiered.convert import ConvertOptions, convert_checkpoint
from tiered.convert.budget import peak_rss_bytes


def print_peaks(source: Path, out: Path, quant: str, compress: str, ram_bytes: int) -> None:
    """This process's peak before and after a conversion, and after another that has touched all the code."""
    convert_checkpoint(CHECKPOINT, out.with_name("first"), ConvertOptions(quant=quant))
    before = peak_rss_bytes()
    convert_checkpoint(source, out, ConvertOptions(quant=quant, compress=compress, ram_bytes=ram_bytes))
    print(before, peak_rss_bytes())


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A layer of 134 MB and 41 MB of embeddings and head, as safetensors and as torch files."""
    config = AutoConfig.for_model("llama", vocab_size=5000, hidden_size=2048, intermediate_size=8192)
    config.num_hidden_layers, config.num_attention_heads = 1, 16
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    folder = tmp_path_factory.mktemp("large")
    model.save_pretrained(folder / "safetensors")
    save_bin(folder / "bin", model)
    return {"safetensors": folder / "safetensors", "bin": folder / "bin"}


@pytest.mark.inputs("tiered/convert", "tiered/quant", "tiered/store")
@pytest.mark.parametrize(
    ("form", "quant", "compress"),
    [
        ("safetensors", "int4", "none"),
        ("safetensors", "none", "zstd"),
        ("bin", "int8", "none"),
        ("bin", "none", "none"),
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
