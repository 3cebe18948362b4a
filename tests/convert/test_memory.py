"""A conversion takes its panels and little else, however large the layers are."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.convert.models import save_bin

CHILD = """
import sys
from pathlib import Path
from tiered.convert import ConvertOptions, convert_checkpoint
from tiered.proc import process_peak_rss_bytes
convert_checkpoint({warm!r}, Path(sys.argv[2] + "-warm"), ConvertOptions(quant=sys.argv[3]))
before = process_peak_rss_bytes()
options = ConvertOptions(quant=sys.argv[3], compress=sys.argv[4], ram_bytes=int(sys.argv[5]))
convert_checkpoint(sys.argv[1], Path(sys.argv[2]), options)
print(before, process_peak_rss_bytes())
"""
TRAINED = str(Path(__file__).parents[1] / "data" / "models" / "opt-docs-8m")


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


@pytest.mark.slow
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
    code = CHILD.format(warm=TRAINED)
    command = [sys.executable, "-c", code, str(large[form]), str(tmp_path / "out"), quant, compress, str(budget)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    before, peak = map(int, done.stdout.split())
    assert peak < budget
    print(f"grew by {(peak - before) >> 20} MiB to {peak >> 20} MiB")
    assert peak - before < 160 << 20, f"grew by {(peak - before) >> 20} MiB"  # the layer and small change
