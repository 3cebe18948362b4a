"""Lent experts compute what transformers' own do, and routers' biases keep the precision they are loaded in."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from tests.model.loans import GivenLoan
from tests.tiny import Tiny
from tests.tiny_configs import tiny_config
from tiered.arch import build_skeleton, expert_stacks
from tiered.errors import StoreError
from tiered.kernels import Kernels
from tiered.model import BoundModel, check_match
from tiered.model.bind import _offload
from tiered.model.desk import Desk
from tiered.model.experts import InputScaledMixture, OffloadedExperts
from tiered.quant import GroupScheme, QuantizedWeight, quantize
from tiered.stream import AnyWeight

TOKENS, HIDDEN = 7, 64


def make_experts() -> MixtralExperts:
    config = tiny_config("mixtral")
    config._experts_implementation = "eager"
    experts = MixtralExperts(config).requires_grad_(False)
    generator = torch.Generator().manual_seed(3)
    for stack in experts.parameters():
        stack.copy_(torch.randn(stack.shape, generator=generator) / 8)
    return experts


def test_lent_stacks_give_what_eager_experts_give() -> None:
    experts = make_experts()
    form = expert_stacks(experts)
    assert form is not None
    generator = torch.Generator().manual_seed(4)
    hidden, weights = torch.randn(TOKENS, HIDDEN, generator=generator), torch.rand(TOKENS, 2, generator=generator)
    # Expert 2 gets no token; the number of experts stands for a choice that is masked out.
    chosen = torch.tensor([[0, 1], [1, 3], [3, 0], [4, 1], [0, 3], [1, 4], [3, 1]])
    stacks: dict[str, AnyWeight | list[AnyWeight]] = {
        f"mlp.{name}": list(stack.detach()) for name, stack in experts.named_parameters()
    }
    offloaded = OffloadedExperts(experts, form, Kernels(1, name="torch"), Desk(GivenLoan(stacks)), "mlp")
    torch.testing.assert_close(offloaded(hidden, chosen, weights), experts(hidden, chosen, weights))

    scheme = GroupScheme(8)
    rows = experts.gate_up_proj.flatten(0, 1)
    packed = QuantizedWeight(quantize(rows, scheme), scheme)
    count, each = experts.gate_up_proj.shape[:2]
    matrices: list[AnyWeight] = [packed.part(k * each, (k + 1) * each) for k in range(count)]
    offloaded = OffloadedExperts(
        experts, form, Kernels(1, name="torch"), Desk(GivenLoan({**stacks, "mlp.gate_up_proj": matrices})), "mlp"
    )
    experts.gate_up_proj.copy_(packed.rows(0, rows.shape[0], torch.float32).view_as(experts.gate_up_proj))
    torch.testing.assert_close(offloaded(hidden, chosen, weights), experts(hidden, chosen, weights))


def test_experts_without_a_gate_and_with_biases_give_what_eager_ones_give() -> None:
    config = tiny_config("gpt_oss")
    config._experts_implementation = "eager"
    oss = GptOssExperts(config)
    plain = tiny_config("mixtral")
    plain._experts_implementation, plain.n_routed_experts, plain.moe_intermediate_size = "eager", 4, 96
    plain.moe_latent_size, plain.mlp_hidden_act = None, "relu2"
    generator = torch.Generator().manual_seed(4)
    hidden, weights = torch.randn(TOKENS, HIDDEN, generator=generator), torch.rand(TOKENS, 2, generator=generator)
    chosen = torch.tensor([[0, 1], [1, 3], [3, 0], [2, 1], [0, 3], [1, 2], [3, 1]])
    for experts in (oss, NemotronHExperts(plain)):
        for stack in experts.requires_grad_(False).parameters():
            stack.copy_(torch.randn(stack.shape, generator=generator) / 8)
        form = expert_stacks(experts)
        assert form is not None
        stacks: dict[str, AnyWeight | list[AnyWeight]] = {
            f"mlp.{name}": list(experts.get_parameter(name).mT if form.is_transposed else experts.get_parameter(name))
            for name in form.weights
        }
        offloaded = OffloadedExperts(experts, form, Kernels(1, name="torch"), Desk(GivenLoan(stacks)), "mlp")
        torch.testing.assert_close(offloaded(hidden, chosen, weights), experts(hidden, chosen, weights))


def test_a_mixture_that_scales_what_experts_are_given_gives_what_transformers_gives() -> None:
    config = AutoConfig.for_model(
        "llama4_text", hidden_size=HIDDEN, intermediate_size=32, num_local_experts=4, num_experts_per_tok=2
    )
    generator = torch.Generator().manual_seed(4)
    layer = nn.Module()
    layer.feed_forward = Llama4TextMoe(config).requires_grad_(False)
    for parameter in layer.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
    hidden = torch.randn(2, TOKENS, HIDDEN, generator=generator)
    expected = layer.feed_forward(hidden)
    weights: dict[str, AnyWeight | list[AnyWeight]] = {
        name: list(own.mT) if own.ndim == 3 else own for name, own in layer.named_parameters()
    }
    _offload(layer, Kernels(1, name="torch"), Desk(GivenLoan(weights)), "")
    assert isinstance(layer.feed_forward, InputScaledMixture)
    for found, wanted in zip(layer.feed_forward(hidden), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_stacks_are_borrowed_and_what_transformers_keeps_in_float32_stays_so() -> None:
    skeleton = build_skeleton(tiny_config("dots1"), torch.bfloat16)
    (block,) = [block for block in skeleton.blocks() if block.name == "layer-001"]
    model = BoundModel(skeleton, torch.bfloat16, Kernels(1, name="torch"))
    weights: dict[str, AnyWeight | list[AnyWeight]] = {
        p.name.removeprefix(block.prefix): list(zeros) if "experts." in p.name else zeros
        for p in block.parameters
        for zeros in [torch.zeros(p.shape)]
    }
    assert {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"} <= weights.keys()
    with model.lend(model.layers[1], GivenLoan(weights)) as lent:
        assert [type(module) for module in lent.modules()].count(OffloadedExperts) == 1
        gate = lent.get_submodule("mlp.gate")
        assert gate.e_score_correction_bias.dtype == torch.float32
        # Routers' weights too, since version 5.24.
        kept = "gate.weight" in (skeleton.model._keep_in_fp32_modules_strict or ())
        assert gate.weight.dtype == (torch.float32 if kept else torch.bfloat16)


def test_a_configuration_that_was_trained_with_gives_the_same_model() -> None:
    config = tiny_config("mixtral")
    config.output_router_logits = True
    skeleton = build_skeleton(config)
    # transformers would compute a loss of the routers' logits, which no pass here notes.
    assert not skeleton.model.config.output_router_logits
    assert [p.name for b in skeleton.blocks() for p in b.parameters] == [
        p.name for b in build_skeleton(tiny_config("mixtral")).blocks() for p in b.parameters
    ]


def test_a_store_with_whole_stacks_is_refused_where_experts_are_borrowed_one_by_one(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tiny.store("mixtral")
    with monkeypatch.context() as patch:
        # As older versions of transformers have them.
        patch.setattr("tiered.arch.modules.expert_stacks", lambda module: None)
        skeleton = build_skeleton(tiny_config("mixtral"))
        with pytest.raises(
            StoreError, match=r"mlp\.experts\..* another version of transformers.* convert the model again"
        ):
            check_match(store, skeleton)
    check_match(store, build_skeleton(tiny_config("mixtral")))
