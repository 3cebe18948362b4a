"""The order in which a pass uses weights: recorded for every family, with nothing computed and the graph as it was."""

from typing import Any

import pytest
import torch

from tests.quick import represented
from tests.tiny_configs import TINY, tiny_config
from tiered.arch import Skeleton, build_skeleton, order_of_use, text_config
from tiered.arch.order import Work, record_pass

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
SHARED = ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj", "mlp.shared_expert.down_proj")


def lent(skeleton: Skeleton) -> list[str]:
    """The weights of the layers that linear layers and stacks of experts borrow, in the graph's order."""
    layers = (block for block in skeleton.blocks() if block.role == "layer")
    return [parameter.name for block in layers for parameter in block.parameters if parameter.is_linear]


def layer_order(name: str, layer: int) -> tuple[str, ...]:
    skeleton = build_skeleton(tiny_config(name))
    prefix = f"{skeleton.family.layers}.{layer}."
    order = record_pass(skeleton).order
    return tuple(n.removeprefix(prefix).removesuffix(".weight") for n in order if n.startswith(prefix))


@pytest.mark.parametrize("name", represented(TINY, ["opt", "bloom", "mpt", "gemma2", "qwen3_moe", "glm4_moe"]))
def test_every_lent_weight_of_every_family_is_used_and_layers_follow_each_other(name: str) -> None:
    skeleton = build_skeleton(tiny_config(name))
    before = {key: (id(value), value.is_meta) for key, value in skeleton.model.named_parameters()}
    blocks = list(skeleton.blocks())
    order = record_pass(skeleton).order
    of_layers = [weight for weight in order if weight.startswith(f"{skeleton.family.layers}.")]
    assert sorted(of_layers) == sorted(lent(skeleton))
    depths = [int(weight.removeprefix(f"{skeleton.family.layers}.").split(".")[0]) for weight in of_layers]
    assert depths == sorted(depths)
    # The graph is what it was: no stand-in is left, and no parameter has a value.
    assert list(skeleton.blocks()) == blocks
    assert {key: (id(value), value.is_meta) for key, value in skeleton.model.named_parameters()} == before


@pytest.mark.parametrize(
    ("name", "layer", "order"),
    [
        ("llama", 1, (*ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")),
        # The graph has k before q, and o before qkv.
        ("opt", 0, (*ATTENTION[:3], "self_attn.out_proj", "fc1", "fc2")),
        ("phi3", 2, ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")),
        ("mixtral", 0, (*ATTENTION, *EXPERTS)),
        # A dense layer first, mixtures after it; the shared expert is computed before the others.
        ("qwen2_moe", 0, (*ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")),
        ("qwen2_moe", 1, (*ATTENTION, *SHARED, *EXPERTS, "mlp.shared_expert_gate")),
    ],
)
def test_weights_come_in_the_order_of_their_use(name: str, layer: int, order: tuple[str, ...]) -> None:
    assert layer_order(name, layer) == order


def test_what_cannot_be_run_keeps_the_order_of_its_graph() -> None:
    # Two tokens have no positions in a model that is made for one.
    config = text_config({**tiny_config("gptj").to_dict(), "n_positions": 1})
    skeleton = build_skeleton(config)
    with pytest.raises(IndexError):
        record_pass(skeleton)
    assert list(order_of_use(skeleton)) == lent(skeleton)
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())


def works(name: str) -> tuple[Work, Work]:
    skeleton = build_skeleton(tiny_config(name))
    record, layers = record_pass(skeleton), len(skeleton.layers)
    return Work(record.layers.operations // layers, record.layers.elements // layers), record.expert


def test_what_layers_do_beside_products_is_counted_by_operation_and_by_number_written() -> None:
    hidden, inner = (getattr(tiny_config("opt"), name) for name in ("hidden_size", "ffn_dim"))
    opt, llama = works("opt")[0], works("llama")[0]
    # Six linear layers, two norms, the scaling of queries, attention, two residual sums, ReLU. A norm writes its mean
    # and deviation, attention a number for each head.
    assert opt.operations - 6 in range(7, 9)
    assert 6 * hidden + inner <= opt.elements <= 7 * hidden + inner + 16
    # Seven linear layers, RMS norms of several operations each, rotary embeddings, a gate.
    assert llama.operations > 2 * opt.operations and llama.elements > 2 * 6 * hidden


def test_what_experts_do_is_counted_apart() -> None:
    (layers, expert), config = works("qwen3_moe"), tiny_config("qwen3_moe")
    # Rows are picked, weighted and added; SiLU of the gate, times the other half.
    assert expert == Work(8, 3 * config.hidden_size + 2 * config.moe_intermediate_size)
    assert works("llama")[1] == Work() and layers.operations > 0


OPT: dict[str, Any] = {"hidden_size": 12288, "ffn_dim": 49152, "num_attention_heads": 96, "num_hidden_layers": 4}
FALCON: dict[str, Any] = {"hidden_size": 14848, "num_attention_heads": 232, "num_kv_heads": 8, "num_hidden_layers": 4}


@pytest.mark.parametrize(
    ("values", "lent_weights"),
    [({"model_type": "opt", **OPT}, 24), ({"model_type": "falcon", **FALCON, "new_decoder_architecture": True}, 16)],
    ids=["OPT-175B", "Falcon-180B"],
)
def test_a_model_of_any_size_is_recorded_without_its_memory(values: dict[str, Any], lent_weights: int) -> None:
    """A layer of these has 7 and 9 GB in float32."""
    skeleton = build_skeleton(text_config(values))
    with torch.profiler.profile(profile_memory=True) as profile:
        order = record_pass(skeleton).order
    assert len(order) == lent_weights
    assert sum(max(event.self_cpu_memory_usage, 0) for event in profile.events()) < 100 << 20
