"""A footprint is what the runtime plans with, so that 'tiered inspect' and a run agree."""

import pytest

from tiered.arch import build_skeleton, load_config
from tiered.convert import ConvertOptions, convert_checkpoint
from tiered.model.needs import Footprint, InFlight
from tiered.runtime import Load, Options, Runtime
from tiered.store import Store
from tiered.units import GIB, MIB


@pytest.fixture(scope="module", params=["tiny-opt", "tiny-llama"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Store:
    path = tmp_path_factory.mktemp("needs") / "tiny.tiered"
    convert_checkpoint(request.param, path, ConvertOptions(synthetic=True))
    return Store.open(path)


@pytest.mark.parametrize("budget", [900 * MIB, 3 * GIB])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_needs_are_the_runtimes(store: Store, dtype: str, budget: int) -> None:
    load = Load(sequences=2, context=200, prompt=120)
    with Runtime(store, load, Options(ram=budget, dtype=dtype)) as runtime:
        planned, baseline, computed = runtime.plan.needs, runtime.baseline, runtime.dtype
    skeleton = build_skeleton(load_config(store.path), computed)
    footprint = Footprint.of(store, skeleton, computed, InFlight(2, 200, 120), baseline)
    assert footprint.needs(budget) == planned
