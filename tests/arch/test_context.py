"""The windows the cache goes by are those transformers' own attention has."""

from dataclasses import dataclass
from typing import Any, Final

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.tiny import randomize
from tests.tiny_configs import TINY, WINDOW, tiny_config
from tiered.arch import FAMILIES, layer_windows

TEXT: Final = 3 * WINDOW
# By what is written there, not by configurations: every process that collects tests would make them all.
SLIDING: Final = [
    name
    for name, fields in TINY.items()
    if "sliding_window" in fields and not name.startswith(("gemma4", "llama4", "laguna"))
]
"""All with a single layer that may have a window. Gemma 4's last layer has none, Llama 4 sees chunks, GPT-Neo has both,
and Laguna's layers have numbers of heads in a list: these are compared as wholes (tests/model)."""


def tokens_seen(config: Any) -> int:
    """How far back, itself included, the last token's logits of a one-layer model depend on the text."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomize(model)
    model.eval()
    text = torch.randint(3, 160, (TEXT,), generator=torch.Generator().manual_seed(3))
    # A copy of the text for every position, with another token there.
    changed = text.repeat(TEXT, 1)
    changed.diagonal()[:] = 3 + (text + 50) % 150
    with torch.inference_mode():
        expected = model(text[None], use_cache=False).logits[0, -1]
        found = model(changed, use_cache=False).logits[:, -1]
    depends = (found - expected).abs().amax(-1) > 1e-5
    return TEXT - int(depends.nonzero()[0])


def one_layer(name: str, kind: str) -> Any:
    """The family's model with a single layer of that type."""
    fields = {**tiny_config(name).to_dict(), "num_hidden_layers": 1, "max_window_layers": 0, "mlp_layer_types": None}
    if fields.get("layer_types"):
        fields["layer_types"] = [kind]
    return AutoConfig.for_model(**fields)


@pytest.mark.parametrize("name", SLIDING)
def test_a_layer_sees_as_many_tokens_as_its_window(name: str) -> None:
    config = one_layer(name, "sliding_attention")
    assert layer_windows(config) == (WINDOW,)
    assert tokens_seen(config) == WINDOW


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3_text", "cohere2"])
def test_a_layer_without_a_window_sees_all(name: str) -> None:
    config = one_layer(name, "full_attention")
    assert layer_windows(config) == (0,)
    assert tokens_seen(config) == TEXT


def test_kinds_of_layers_alternate_as_the_configuration_says() -> None:
    assert layer_windows(tiny_config("gemma3_text")) == (WINDOW, 0, WINDOW)
    assert layer_windows(tiny_config("mistral")) == (WINDOW,) * 3
    assert layer_windows(tiny_config("qwen2-sliding-yarn")) == (0, WINDOW, WINDOW)


def test_every_layer_of_every_family_has_an_answer() -> None:
    for name in TINY:
        config = tiny_config(name)
        assert len(layer_windows(config)) == config.num_hidden_layers


def test_families_with_attention_of_their_own_keep_every_token() -> None:
    for name in TINY:
        config = tiny_config(name)
        if FAMILIES[config.model_type].gathers:
            assert not any(layer_windows(config))


@dataclass
class Config:
    """The few fields that are looked at."""

    model_type: str = "qwen2"
    num_hidden_layers: int = 2
    sliding_window: int | None = 8
    use_sliding_window: bool = True
    layer_types: list[str] | None = None


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (Config(), (8, 8)),
        (Config(sliding_window=None), (0, 0)),
        (Config(use_sliding_window=False), (0, 0)),
        (Config(layer_types=["full_attention", "sliding_attention"]), (0, 8)),
        (Config(model_type="unknown"), (8, 8)),
    ],
)
def test_a_window_counts_only_where_it_is_used(config: Any, expected: tuple[int, int]) -> None:
    assert layer_windows(config) == expected
