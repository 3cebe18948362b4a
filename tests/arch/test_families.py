"""The table against transformers' own list: whatever it can build as a causal language model is driven or refused."""

from pathlib import Path

import pytest
from transformers import DogeConfig, DogeForCausalLM, Lfm2Config, Lfm2ForCausalLM, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.quick import represented
from tests.tiny_configs import TINY, tiny_config
from tiered.arch import FAMILIES, build_skeleton, family_for
from tiered.arch.families import REFUSED, TEXT_HALVES
from tiered.convert import ConvertOptions
from tiered.convert.recipe import make_recipe
from tiered.errors import UnsupportedFamilyError


def test_every_causal_language_model_of_transformers_is_in_the_table_or_refused_for_a_reason() -> None:
    known = {*FAMILIES, *REFUSED, *TEXT_HALVES}
    missing = sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - known)
    assert not missing, "new in transformers: add a line to FAMILIES and to TINY, or a reason to REFUSED"
    assert not FAMILIES.keys() & REFUSED.keys() and not TEXT_HALVES.keys() & (FAMILIES.keys() | REFUSED.keys())


def test_the_readme_says_how_many_families_there_are() -> None:
    assert f"\n{len(FAMILIES)} decoder-only families" in (Path(__file__).parents[2] / "README.md").read_text()


def test_a_refused_family_is_told_why_and_any_other_what_there_is() -> None:
    for family, reason in REFUSED.items():
        with pytest.raises(UnsupportedFamilyError) as refused:
            family_for(family)
        assert str(refused.value) == f"model family {family!r} is not supported: {reason}"
    with pytest.raises(UnsupportedFamilyError, match=r"'nothing' is not supported: .*llama, .*qwen3,"):
        family_for("nothing")


@pytest.mark.parametrize("name", represented(TINY, ["llama", "gpt2", "falcon", "deepseek_v3", "jetmoe", "mamba2"]))
def test_nearly_all_weights_of_a_family_s_layers_are_quantized_or_said_not_to_be(name: str) -> None:
    skeleton = build_skeleton(tiny_config(name))
    recipe = make_recipe(skeleton, ConvertOptions(group_size=32))
    layers = [tensor for block in recipe.files if block.role == "layer" for tensor in block.tensors]
    quantized = sum(tensor.numel for tensor in layers if tensor.scheme is not None)
    told = sum(tensor.numel for tensor in layers if tensor.name in {*recipe.unquantized, *recipe.kept})
    assert quantized + told >= 0.95 * sum(tensor.numel for tensor in layers)
    # Experts of these have forms of their own. Another family here would be 16-bit though it need not be.
    assert not recipe.kept or name in ("dbrx", "jetmoe"), recipe.kept


@pytest.mark.parametrize("config", [Lfm2Config(num_hidden_layers=1), DogeConfig(num_hidden_layers=1)])
def test_what_an_older_transformers_computes_otherwise_is_refused_by_name(
    config: PretrainedConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(self: object, input_ids: object = None, past_key_values: object = None, **kwargs: object) -> None: ...

    for model in (Lfm2ForCausalLM, DogeForCausalLM):
        monkeypatch.setattr(model, "forward", forward)
    told = rf"'{config.model_type}': transformers .* install transformers 5\.24 or newer"
    with pytest.raises(UnsupportedFamilyError, match=told):
        build_skeleton(config)
