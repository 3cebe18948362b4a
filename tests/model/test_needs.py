"""A footprint is what the runtime plans with, so that 'tiered inspect' and a run agree."""

import dataclasses
from pathlib import Path

import pytest

from tiered.convert import ConvertOptions, convert_checkpoint
from tiered.errors import BudgetError
from tiered.model import Load
from tiered.plan import Tier
from tiered.runtime import Options, Runtime
from tiered.store import Store
from tiered.units import GIB

MIXTURE = """
name = "tiny-mixture"
[config]
model_type = "mixtral"
vocab_size = 300
hidden_size = 64
intermediate_size = 128
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
num_local_experts = 16
"""


@pytest.fixture(scope="module", params=["tiny-opt", "tiny-llama", "mixture"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Store:
    path = tmp_path_factory.mktemp("needs") / "tiny.tiered"
    shape: str | Path = request.param
    if shape == "mixture":
        shape = path.with_suffix(".toml")
        shape.write_text(MIXTURE)
    convert_checkpoint(shape, path, ConvertOptions(synthetic=True))
    return Store.open(path)


@pytest.mark.parametrize("budget", [8 * GIB, 16 * GIB])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_needs_are_the_runtimes(store: Store, dtype: str, budget: int) -> None:
    load = Load(sequences=2, context=200, prompt=120)
    refused = Runtime(store, load, Options(ram=1, dtype=dtype))
    with pytest.raises(BudgetError), refused:
        pass
    with Runtime(store, load, Options(ram=budget, dtype=dtype)) as runtime:
        planned = runtime.plan.needs
    # The process itself may have grown in between.
    footprint = dataclasses.replace(refused.footprint, baseline=planned.baseline)
    assert footprint.needs(budget) == planned
    if "mixture" in store.manifest.source["name"]:
        assert footprint.shape.widest == 2 * 128  # one expert's, not the stack's
    assert footprint.plan(budget, (Tier.DISK, Tier.CPU)) == runtime.plan
