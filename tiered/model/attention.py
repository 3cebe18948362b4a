"""Attention of transformers' modules by the kernels: one more implementation for its registry.

In: what a module's forward hands to its attention function: queries, keys and values as the cache returned them, a
mask, and arguments of the family. Out: [batch, queries, heads, head_dim]. The runtime registers it for as long as it
lives, and sets its name on the skeleton. What the native kernel does not take goes to transformers' own functions.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from tiered.errors import ConfigError
from tiered.kernels import AttentionCall, Kernels, contiguous_pages

Output = tuple[torch.Tensor, torch.Tensor | None]

_HARMLESS: Final = frozenset(
    (
        *("sliding_window", "position_ids", "cache_position", "use_cache", "output_attentions", "return_dict"),
        *("output_hidden_states", "is_causal", "softcap", "logits_to_keep", "past_key_values", "num_items_in_batch"),
        *("output_router_logits", "s_aux"),
    )
)
"""Arguments that change nothing here, because the mask holds them already, or that are looked at below."""


class KernelAttention:
    """An attention function in transformers' sense, for one runtime.

    Masks are those of its "sdpa": none, or booleans, true where a query sees a key; also numbers to be added.
    """

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels
        self._biases: WeakIdKeyDictionary = WeakIdKeyDictionary()
        """Masks of numbers, in float32: every layer of a pass is handed the same one."""

    def __call__(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> Output:
        """query [batch, heads, queries, head_dim], key and value [batch, kv_heads, slots, head_dim]."""
        unknown = any(item is not None for name, item in kwargs.items() if name not in _HARMLESS)
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        if unknown or not self._serves(query, key, value, attention_mask, dropout, causal):
            return _transformers(module, unknown, query, key, value, attention_mask, dropout, scaling, kwargs)
        sequences, _, q_len, head_dim = query.shape
        slots = key.shape[2]
        seen, bias = self._mask(attention_mask)
        call = AttentionCall(
            query=query.transpose(1, 2),
            kv_heads=key.shape[1],
            keys=contiguous_pages(key),
            values=contiguous_pages(value),
            first=torch.zeros(sequences, dtype=torch.int64),
            count=torch.full((sequences,), slots),
            scaling=head_dim**-0.5 if scaling is None else scaling,
            causal=attention_mask is None and q_len > 1 and bool(causal),
            softcap=kwargs.get("softcap") or 0.0,
            mask=None if seen is None else seen[:, 0],
            bias=bias,
            sinks=kwargs.get("s_aux"),
        )
        return self._kernels.attention(call), None

    def _serves(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        dropout: float,
        causal: bool,
    ) -> bool:
        """Whether the native kernel can compute this, and transformers' "sdpa" means the same by it."""
        if not self._kernels.serves_attention(query) or key.dtype != query.dtype or value.dtype != query.dtype:
            return False
        fits = key.shape == value.shape and key.shape[0] == query.shape[0] and query.shape[1] % key.shape[1] == 0
        if not fits or key.stride(-1) != 1 or value.stride(-1) != 1 or dropout:
            return False
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value)):
            return False
        if mask is None:
            # With more slots than queries "sdpa" takes the mask's absence for an empty static cache.
            return not causal or query.shape[2] in (1, key.shape[2])
        # One mask for all heads, unless it is numbers.
        return mask.ndim == 4 and mask.shape[-1] == key.shape[2] and (mask.dtype != torch.bool or mask.shape[1] == 1)

    def _mask(self, mask: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """`mask` as what is seen, or as what is added."""
        if mask is None or mask.dtype == torch.bool:
            return mask, None
        if mask.is_inference():  # it does not say whether it has been written to
            return None, mask.float()
        version, bias = self._biases.get(mask, (None, None))
        if version != mask._version:
            bias = mask.float().contiguous()
            self._biases[mask] = (mask._version, bias)
        return None, bias


@contextmanager
def registered_attention(kernels: Kernels) -> Iterator[str]:
    """A name under which transformers' modules find attention by `kernels`, for as long as the context lasts."""
    attention = KernelAttention(kernels)
    name = f"tiered-{id(attention):x}"
    AttentionInterface.register(name, attention)
    # Without an entry here, models are handed no mask at all.
    AttentionMaskInterface.register(name, sdpa_mask)
    try:
        yield name
    finally:
        # There is no public way back out of what `register` fills, and only that is asked for masks.
        del AttentionInterface._global_mapping[name], AttentionMaskInterface._global_mapping[name]


def use_attention(model: PreTrainedModel, name: str) -> None:
    """Let `model` compute with the registered attention `name`, if its family asks the registry at all."""
    if model._can_set_attn_implementation():
        model.set_attn_implementation(name)


def _transformers(
    module: nn.Module,
    unknown: bool,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    scaling: float | None,
    kwargs: dict[str, Any],
) -> Output:
    """What transformers would have computed."""
    if not unknown and kwargs.get("softcap") is None and kwargs.get("s_aux") is None:
        result: Output = sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return result
    # "sdpa" refuses a cap, and ignores sinks and what it does not know. The family's own function knows its arguments.
    eager: Callable[..., Output] | None = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is None:
        raise ConfigError(f"{type(module).__name__}: no attention takes its arguments {sorted(kwargs)}")
    added = _added(mask, query, key, kwargs.get("is_causal", getattr(module, "is_causal", True)))
    return eager(module, query, key, value, added, dropout=dropout, scaling=scaling, **kwargs)


def _added(mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor, causal: bool) -> torch.Tensor | None:
    """A mask of "sdpa" as numbers to be added, which eager attention takes it for."""
    queries, slots = query.shape[2], key.shape[2]
    if mask is None:
        if not causal or queries == 1:
            return None
        # As "sdpa" has it: where there are more slots than queries, these are the first of them.
        mask = torch.ones(queries, slots, dtype=torch.bool).tril()[None, None]
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
