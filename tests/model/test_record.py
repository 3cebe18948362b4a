"""Recording passes the cache by the name that a model's class takes, and makes sure that its layers get it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.cache_utils import Cache, DynamicCache

from tests.tiny_configs import tiny_config
from tiered.arch import Skeleton, build_skeleton
from tiered.errors import UnsupportedFamilyError
from tiered.model import Recorder, cache_name
from tiered.model.record import Recording


def by_new_name(cache: Cache | None = None, **kwargs: Any) -> None: ...


def by_old_name(past_key_values: Cache | None = None, **kwargs: Any) -> None: ...


def swallowing(**kwargs: Any) -> None: ...


def test_the_name_of_a_cache_is_read_from_the_signature() -> None:
    assert cache_name(by_new_name) == "cache"
    assert cache_name(by_old_name) == "past_key_values"
    assert cache_name(swallowing) is None


def skeleton_with(forward: Callable[[Callable[..., Any], dict[str, Any]], Any], like: Callable[..., Any]) -> Skeleton:
    """A Llama whose forward has the signature of `like`, and does what `forward` does with its own and arguments."""
    skeleton = build_skeleton(tiny_config("llama"))
    original = skeleton.model.forward

    def replaced(**kwargs: Any) -> Any:
        return forward(original, kwargs)

    replaced.__wrapped__ = like  # type: ignore[attr-defined]
    skeleton.model.forward = replaced
    return skeleton


def record(skeleton: Skeleton, cache: Cache) -> Recording:
    embeddings = torch.zeros(1, 2, skeleton.config.hidden_size)
    return Recorder(skeleton).record(cache=cache, inputs_embeds=embeddings, attention_mask=None, use_cache=True)


@pytest.mark.parametrize(("name", "like"), [("cache", by_new_name), ("past_key_values", by_old_name)])
def test_every_layer_gets_the_cache_by_whatever_name_the_class_takes(name: str, like: Callable[..., Any]) -> None:
    def renaming(original: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        own = cache_name(original)
        assert own is not None
        return original(**{own if key == name else key: value for key, value in kwargs.items()})

    cache = DynamicCache()
    recording = record(skeleton_with(renaming, like), cache)
    assert len(recording.calls) == 3
    assert all(any(value is cache for value in call.kwargs.values()) for call in recording.calls)


def test_a_class_that_names_no_cache_is_refused() -> None:
    with pytest.raises(UnsupportedFamilyError, match=r"'llama'.*takes no cache by any name"):
        Recorder(skeleton_with(lambda original, kwargs: original(**kwargs), swallowing))


def test_a_model_that_computes_with_a_cache_of_its_own_is_refused() -> None:
    def dropping(original: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        del kwargs["cache"]
        return original(**kwargs)

    with pytest.raises(UnsupportedFamilyError, match=r"'llama'.*hands layer 0 another cache than it was given"):
        record(skeleton_with(dropping, by_new_name), DynamicCache())


@pytest.mark.parametrize("takes_element", [False, True])
def test_a_base_model_may_take_what_its_layers_return_or_element_0_of_it(takes_element: bool) -> None:
    skeleton = build_skeleton(tiny_config("llama"))
    recorder = Recorder(skeleton)
    hidden = torch.randn(1, 2, skeleton.config.hidden_size)
    output = recorder.on_layer(0, hidden, (), {})
    taken = output[0] if takes_element else output
    assert taken.shape == hidden.shape
    assert torch.equal(taken + 0, hidden)
    assert type(taken[:, -1:]) is torch.Tensor
    assert torch.equal(taken[:, -1:], hidden[:, -1:])
