"""transformers' models on the kernels' attention: the same answers, for every way a family calls it."""

from collections.abc import Iterator
from typing import Any, Final

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask, sliding_window_causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tiered.errors import ConfigError
from tiered.kernels import AttentionCall, Kernels
from tiered.model.attention import KernelAttention, registered_attention, use_attention
from tiered.model.record import cache_name

_SIZES: Final[dict[str, Any]] = {
    "vocab_size": 99,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
_GROUPED: Final[dict[str, Any]] = {**_SIZES, "intermediate_size": 96, "num_key_value_heads": 2, "head_dim": 16}
MODELS: Final[dict[str, dict[str, Any]]] = {
    "llama": _GROUPED,
    "qwen3": _GROUPED,
    "mistral": {**_GROUPED, "sliding_window": 7},
    "gemma2": {**_GROUPED, "sliding_window": 8, "attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 16},
    "granite_swa": {**_GROUPED, "sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"]},
    "opt": {**_SIZES, "ffn_dim": 96, "word_embed_proj_dim": 64},
}


class CountingKernels(Kernels):
    """Kernels that remember what they were asked for."""

    def __init__(self, threads: int, name: str = "auto") -> None:
        super().__init__(threads, name=name)
        self.calls: list[AttentionCall] = []

    def attention(self, call: AttentionCall) -> torch.Tensor:
        self.calls.append(call)
        return super().attention(call)


@pytest.fixture
def kernels() -> Iterator[CountingKernels]:
    with CountingKernels(2) as made:
        if made.refusal is not None:
            pytest.skip(made.refusal)
        yield made


def make_model(name: str, dtype: torch.dtype) -> PreTrainedModel:
    torch.manual_seed(1)
    config = AutoConfig.for_model(name, **MODELS[name])
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        # Values of the size that trained models have: fresh ones attend to everything alike.
        nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.15)
    model.to(dtype)  # type: ignore[arg-type]  # transformers' stubs lose the overloads
    return model


def logits_of(model: PreTrainedModel) -> torch.Tensor:
    """Three texts of 40 tokens at most, padded at the left: two calls with many tokens, then one with one."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 99, (3, 40), generator=generator)
    mask = torch.ones(3, 40, dtype=torch.int64)
    mask[0, :11], mask[1, :3] = 0, 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache, parts = DynamicCache(), []
    with torch.no_grad():
        for start, stop in ((0, 20), (20, 39), (39, 40)):
            output = model(
                ids[:, start:stop],
                attention_mask=mask[:, :stop],
                position_ids=positions[:, start:stop],
                use_cache=True,
                **{str(cache_name(model.forward)): cache},
            )
            parts.append(output.logits)
    return torch.cat(parts, dim=1)[mask.bool()]


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_models_answer_as_exactly_as_with_transformers_attention(name: str, kernels: CountingKernels) -> None:
    model = make_model(name, torch.bfloat16)
    usual = logits_of(model)
    with registered_attention(kernels) as registered:
        use_attention(model, registered.name)
        found = logits_of(model)
    exact = logits_of(make_model(name, torch.bfloat16).float())
    assert len(kernels.calls) == 6, "two layers, three calls"
    assert error(found, exact) < max(1.2 * error(usual, exact), 1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_float32_models_answer_exactly_as_before(name: str, kernels: CountingKernels) -> None:
    model = make_model(name, torch.float32)
    usual = logits_of(model)
    with registered_attention(kernels) as registered:
        use_attention(model, registered.name)
        assert torch.equal(logits_of(model), usual)
    assert not kernels.calls


def test_without_the_native_library_everything_goes_to_transformers() -> None:
    model = make_model("llama", torch.bfloat16)
    usual = logits_of(model)
    with CountingKernels(2, name="torch") as kernels, registered_attention(kernels) as registered:
        use_attention(model, registered.name)
        assert torch.equal(logits_of(model), usual)
        assert not kernels.calls


def test_families_with_their_own_attention_are_left_alone(kernels: CountingKernels) -> None:
    config = AutoConfig.for_model("bloom", vocab_size=99, hidden_size=64, n_layer=1, n_head=4)
    model = AutoModelForCausalLM.from_config(config)
    before = model.config._attn_implementation
    with registered_attention(kernels) as registered:
        use_attention(model, registered.name)
    assert model.config._attn_implementation == before


def test_a_registration_ends_with_its_context(kernels: CountingKernels) -> None:
    with registered_attention(kernels) as one, registered_attention(kernels) as other:
        assert one != other
        assert one.name in ALL_ATTENTION_FUNCTIONS and other.name in ALL_MASK_ATTENTION_FUNCTIONS
    for name in (one.name, other.name):
        assert name not in ALL_ATTENTION_FUNCTIONS and name not in ALL_MASK_ATTENTION_FUNCTIONS


# Below, the function itself.


class Module(nn.Module):
    """What attention functions ask of a module."""

    is_causal = True
    num_key_value_groups = 2


def eager_attention_forward(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    """Stands for that of a family, which is found in the module's own file."""
    return torch.full((1,), float(kwargs["unheard_of"])), None


def states(batch: int, length: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values [batch, heads, length, 64]."""
    generator = torch.Generator().manual_seed(seed)
    made = (torch.randn(batch, heads, length, 64, generator=generator).bfloat16() for heads in (4, 2, 2))
    query, key, value = made
    return query, key, value


def masked(batch: int, queries: int, slots: int, padding: list[int], window: int | None = None) -> torch.Tensor | None:
    """The mask transformers makes for the last queries of texts that begin after `padding` slots."""
    present = torch.arange(slots) >= torch.tensor(padding)[:, None]
    rule: dict[str, Any] = {} if window is None else {"mask_function": sliding_window_causal_mask_function(window)}
    made: torch.Tensor | None = sdpa_mask(
        batch, queries, slots, slots - queries, attention_mask=present, local_size=window, **rule
    )
    return made


@torch.no_grad()
@pytest.mark.parametrize("window", [None, 30])
def test_a_text_has_the_same_bits_alone_in_a_batch_in_parts_and_as_steps(
    kernels: CountingKernels, window: int | None
) -> None:
    attention, length = KernelAttention(kernels), 150
    query, key, value = states(1, length)
    whole, _ = attention(Module(), query, key, value, masked(1, length, length, [0], window))
    for step in (1, 13, 64):
        for start in range(0, length, step):
            stop = min(length, start + step)
            mask = masked(1, stop - start, stop, [0], window)
            part, _ = attention(Module(), query[:, :, start:stop], key[:, :, :stop], value[:, :, :stop], mask)
            assert torch.equal(part, whole[:, start:stop])
    others = states(2, length + 21, seed=1)
    batch = [
        torch.cat([other[:1], nn.functional.pad(state, (0, 0, 21, 0)), other[1:]])
        for state, other in zip((query, key, value), others, strict=True)
    ]
    mask = masked(3, length + 21, length + 21, [0, 21, 5], window)
    together, _ = attention(Module(), batch[0], batch[1], batch[2], mask)
    assert torch.equal(together[1, 21:], whole[0])
    assert all(call.query.dtype == torch.bfloat16 for call in kernels.calls)


@torch.no_grad()
def test_a_mask_of_numbers_gives_the_bits_of_one_of_booleans(kernels: CountingKernels) -> None:
    attention = KernelAttention(kernels)
    query, key, value = states(2, 70)
    seen = masked(2, 70, 70, [0, 9])
    assert seen is not None
    added = torch.zeros(seen.shape, dtype=torch.bfloat16).masked_fill(~seen, torch.finfo(torch.bfloat16).min)
    expected, _ = attention(Module(), query, key, value, seen)
    for _ in range(2):
        assert torch.equal(attention(Module(), query, key, value, added)[0], expected)
    assert kernels.calls[-1].bias is kernels.calls[-2].bias, "converted once for all layers"
    added[1] = 0
    assert not torch.equal(attention(Module(), query, key, value, added)[0], expected), "but not after a change"


@torch.no_grad()
def test_no_mask_before_more_slots_than_queries_means_what_it_does_to_transformers(kernels: CountingKernels) -> None:
    query, key, value = states(1, 40)
    arguments = (Module(), query[:, :, :5], key, value, None)
    expected, _ = sdpa_attention_forward(*arguments)
    assert torch.equal(KernelAttention(kernels)(*arguments)[0], expected)
    assert not kernels.calls


@torch.no_grad()
@pytest.mark.parametrize(
    ("mask", "dropout"), [(None, 0.5), (torch.rand(1, 4, 40, 40) < 0.5, 0.0)], ids=["dropout", "a mask per head"]
)
def test_what_the_kernel_does_not_do_goes_to_transformers(
    kernels: CountingKernels, mask: torch.Tensor | None, dropout: float
) -> None:
    query, key, value = states(1, 40)
    torch.manual_seed(0)
    expected, _ = sdpa_attention_forward(Module(), query, key, value, mask, dropout)
    torch.manual_seed(0)
    assert torch.equal(KernelAttention(kernels)(Module(), query, key, value, mask, dropout)[0], expected)
    assert not kernels.calls


def test_training_goes_to_transformers(kernels: CountingKernels) -> None:
    query, key, value = states(1, 40)
    found, _ = KernelAttention(kernels)(Module(), query.requires_grad_(), key, value, None)
    assert found.requires_grad and not kernels.calls


@torch.no_grad()
def test_an_argument_that_nobody_knows_goes_to_the_familys_own_function(kernels: CountingKernels) -> None:
    query, key, value = states(1, 40)
    found, _ = KernelAttention(kernels)(Module(), query, key, value, None, unheard_of=3.0)
    assert found.item() == 3.0
    with pytest.raises(ConfigError, match="unheard_of"):
        KernelAttention(kernels)(nn.Identity(), query, key, value, None, unheard_of=3.0)
    KernelAttention(kernels)(Module(), query, key, value, None, unheard_of=None)
    assert len(kernels.calls) == 1
