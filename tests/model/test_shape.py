"""The model in numbers is what the runtime plans with, so that 'tiered inspect' and a run agree."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest
import torch
from transformers import PreTrainedModel

from tests.helpers import TINY, Tiny, prompts_for
from tests.quick import represented
from tiered.arch import Skeleton, Work, build_skeleton, expert_stacks, load_config, work_of_layers
from tiered.convert import ConvertOptions, convert_checkpoint
from tiered.host import PROCESS
from tiered.model import model_shape
from tiered.options import compute_dtype
from tiered.plan import ModelShape, Plan, Workload, make_plan
from tiered.plan.shapes import STORE_SHAPE_NAME, read_store_shape
from tiered.prepare import measure_inputs
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
def test_plans_made_before_are_the_runtimes(store: Store, dtype: str, budget: int) -> None:
    workload, options = Workload(sequences=2, max_context=200, max_prompt=120), Options(ram=budget, dtype=dtype)
    model, machine, budgets = measure_inputs(store, options)
    with Runtime(store, workload, options) as runtime:
        planned = runtime.plan
    # The process itself may have grown in between.
    budgets = replace(budgets, baseline=planned.needs.baseline)
    assert make_plan(model, machine, workload, budgets) == planned
    assert Plan.from_json(json.loads(json.dumps(planned.to_json()))) == planned
    if "mixture" in store.manifest.source["name"]:
        assert model.widest == 2 * 128  # one expert's, not the stack's


def test_opening_a_store_keeps_its_shape_once_and_whatever_is_computed_in_uses_it(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_as(dtype: str) -> ModelShape:
        with Runtime(store, Workload(max_context=16), Options(ram=8 * GIB, dtype=dtype)) as runtime:
            return runtime.shape

    (store.path / STORE_SHAPE_NAME).unlink(missing_ok=True)
    counted: list[int] = []

    def count(skeleton: Skeleton) -> tuple[Work, Work]:
        counted.append(1)
        return work_of_layers(skeleton)

    monkeypatch.setattr("tiered.model.shape.work_of_layers", count)
    own = str(compute_dtype("auto", load_config(store.path))).removeprefix("torch.")
    other = "float32" if own == "bfloat16" else "bfloat16"
    # What a store keeps is in the dtype that it is computed in by default.
    open_as(other)
    assert not (store.path / STORE_SHAPE_NAME).exists() and len(counted) == 1
    shape = open_as(own)
    assert read_store_shape(store.path) == shape and len(counted) == 2
    open_as(other)
    assert open_as("auto") == shape and len(counted) == 2


def test_a_store_that_cannot_be_written_is_opened_all_the_same(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path, shape: ModelShape) -> None:
        raise PermissionError(13, "Permission denied", str(folder))

    (store.path / STORE_SHAPE_NAME).unlink(missing_ok=True)
    monkeypatch.setattr("tiered.prepare.write_store_shape", refuse)
    with Runtime(store, Workload(max_context=16), Options(ram=8 * GIB)):
        assert not (store.path / STORE_SHAPE_NAME).exists()


def test_measuring_takes_no_memory_and_reads_no_weights(store: Store) -> None:
    # More than whatever this process has ever taken.
    model, _, budgets = measure_inputs(store, Options(ram=8 * GIB))
    assert budgets.ram == 8 * GIB and budgets.baseline < 8 * GIB
    assert sum(model.tape.file_nbytes) == store.tape_nbytes
    assert PROCESS.planned_nbytes == 0


MIXTURES: Final = [n for n, fields in TINY.items() if not fields.keys().isdisjoint(("num_experts_per_tok", "moe_topk"))]


def chosen(model: PreTrainedModel, args: tuple[torch.Tensor, ...]) -> int:
    """Experts of a token, by what a stack of experts is called with. Llama 4's gets a row for every expert: of those
    that are not chosen it is zeros."""
    if len(args) > 1:
        return args[1].shape[-1]
    rows = args[0].unflatten(0, (-1, len(prompts_for("llama4_text")[0])))
    return int((rows != 0).any(-1).sum(0).max())


@pytest.mark.parametrize("name", represented(MIXTURES, ["qwen3_moe", "deepseek_v3", "llama4_text", "gpt_oss"]))
def test_the_experts_of_a_mixture_are_as_many_as_transformers_chooses_among(tiny: Tiny, name: str) -> None:
    store, seen = tiny.store(name), set[tuple[int, int]]()
    shape = model_shape(store, build_skeleton(load_config(store.path)), torch.float32)
    model = tiny.model(name)
    stacks = [module for module in model.modules() if expert_stacks(module) is not None]
    for stack in stacks:
        count = stack.get_parameter("down_proj").shape[0]
        stack.register_forward_pre_hook(lambda _, args, count=count: seen.add((count, chosen(model, args))))
    model(torch.tensor([prompts_for(name)[0]]))
    assert shape.experts is not None
    assert seen == {(shape.experts.count, shape.experts.chosen)}
    assert shape.experts.layers == len(stacks) > 0
    assert shape.experts.weights * shape.experts.count == sum(p.numel() for p in stacks[0].parameters() if p.ndim == 3)
    experts = shape.experts.total * shape.experts.file_nbytes
    assert sum(shape.experts.dense.file_nbytes) + experts == sum(shape.tape.file_nbytes)


def test_a_model_without_experts_has_none(tiny: Tiny) -> None:
    store = tiny.store("llama")
    assert model_shape(store, build_skeleton(load_config(store.path)), torch.float32).experts is None
