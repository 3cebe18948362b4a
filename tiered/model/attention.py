"""Attention by the kernels, as one more implementation in transformers' registry.

In: what a module's forward hands to its attention function: queries, keys and values as the cache returned them, a
mask, and arguments of the family. Out: [batch, queries, heads, head_dim]. The host registers it for as long as it is
open; a runtime sets its name on the skeleton. What the native kernel does not take goes to transformers' own functions.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from tiered.cache import PagedKeys, PagedRead
from tiered.errors import ConfigError
from tiered.kernels import AttentionCall, LayerKernels, contiguous_pages
from tiered.model.latent import Latents

Output = tuple[torch.Tensor, torch.Tensor | None]

_HARMLESS: Final = frozenset(
    (
        *("sliding_window", "position_ids", "cache_position", "use_cache", "output_attentions", "return_dict"),
        *("output_hidden_states", "is_causal", "softcap", "logits_to_keep", "num_items_in_batch"),
        *("output_router_logits", "s_aux", "cache", "past_key_values"),
    )
)
"""Arguments that may be given: the mask holds what they say already, or the code below reads them."""


@dataclass(frozen=True)
class PackedMask:
    """Takes a mask's place where sequences lie side by side: what a query sees follows from positions."""

    window: int
    """Tokens that a query sees, itself included; 0: all before it."""


class KernelAttention:
    """An attention function for transformers' registry, under a name of its own.

    Masks are those of transformers' "sdpa": None, booleans (true where a query sees a key), or numbers that are added
    to scores. Keys of a packed micro-batch (`PagedKeys`) come with a `PackedMask`. `host`: the processor's kernels,
    where `kernels` are a device's. Queries that are to follow their pages to the host's memory do, and what they see
    comes back.
    """

    def __init__(self, kernels: LayerKernels, host: LayerKernels | None = None) -> None:
        self._kernels, self._host = kernels, host or kernels
        self.name = f"tiered-{id(self):x}"
        self._is_packing = False
        self._biases: WeakIdKeyDictionary = WeakIdKeyDictionary()
        """Float32 copies of masks of numbers, by mask: every layer of a pass is given the same mask."""

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
        """query [batch, heads, queries, head_dim], key and value [batch, kv_heads, slots, head_dim].

        Returns [batch, queries, heads, head_dim], and None in place of attention weights. Raises ConfigError where
        nothing here takes the arguments.
        """
        if isinstance(key, PagedKeys):
            reads = self._reads(key, attention_mask, dropout, kwargs)
            return self._over_pages(query, key.shape[1], reads, scaling, kwargs), None
        latents = Latents.taken(module)
        if latents is not None:
            reads = self._reads(latents.keys, attention_mask, dropout, kwargs)
            scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
            attend = partial(self._over_pages, kv_heads=1, reads=reads, scaling=scaling, kwargs=kwargs)
            return latents.attend(query, self._kernels, attend), None
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

    def make_mask(self, *args: Any, **kwargs: Any) -> Any:
        """The registry's mask function: the mask of "sdpa", or inside `packing` a `PackedMask` with the window."""
        if self._is_packing:
            return PackedMask(kwargs.get("local_size") or 0)
        return sdpa_mask(*args, **kwargs)

    @contextmanager
    def packing(self) -> Iterator[None]:
        """Masks that are made in this context are for packed micro-batches."""
        self._is_packing = True
        try:
            yield
        finally:
            self._is_packing = False

    def _reads(self, key: PagedKeys, mask: Any, dropout: float, kwargs: dict[str, Any]) -> list[PagedRead]:
        """What `key` stands for, sequence by sequence."""
        unknown = sorted(name for name, item in kwargs.items() if item is not None and name not in _HARMLESS)
        if unknown or dropout or not isinstance(mask, PackedMask):
            raise ConfigError(f"attention over pages: takes no {unknown or 'dropout, nor masks of its own'}")
        reads = key.kv.reads(key.layer)
        for read in reads:
            if read.window != mask.window:
                raise ConfigError(
                    f"layer {key.layer}: the cache keeps a window of {read.window} tokens, attention asks for "
                    f"{mask.window}; list the family in tiered/arch/families.py as one with attention of its own"
                )
        return reads

    def _over_pages(
        self,
        query: torch.Tensor,
        kv_heads: int,
        reads: Sequence[PagedRead],
        scaling: float | None,
        kwargs: dict[str, Any],
    ) -> torch.Tensor:
        """[1, tokens, heads, head_dim] of query [1, heads, tokens, head_dim], sequence by sequence."""
        outputs = []
        for read in reads:
            sequences = len(read.count)
            # [sequences, queries, heads, head_dim]
            queries = query[0, :, read.start : read.stop].unflatten(1, (sequences, -1)).permute(1, 2, 0, 3)
            kernels, sinks = self._kernels, kwargs.get("s_aux")
            if read.away is not None:
                kernels, queries = self._host, queries.to("cpu", read.away)
                sinks = None if sinks is None else sinks.cpu()
            keys, values = read.pages()
            call = AttentionCall(
                query=queries,
                kv_heads=kv_heads,
                keys=keys,
                values=values,
                first=read.first,
                count=read.count,
                scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
                window=read.window,
                softcap=kwargs.get("softcap") or 0.0,
                sinks=sinks,
            )
            output = kernels.attention(call).flatten(0, 1)
            outputs.append(output if read.away is None else output.to(query.device, query.dtype))
        return (torch.cat(outputs) if len(outputs) > 1 else outputs[0])[None]

    def _serves(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        dropout: float,
        causal: bool,
    ) -> bool:
        """Whether the native kernel can compute this, with the same meaning as transformers' "sdpa"."""
        if not self._kernels.serves_attention(query) or key.dtype != query.dtype or value.dtype != query.dtype:
            return False
        fits = key.shape == value.shape and key.shape[0] == query.shape[0] and query.shape[1] % key.shape[1] == 0
        if not fits or key.stride(-1) != 1 or value.stride(-1) != 1 or dropout:
            return False
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value)):
            return False
        if mask is None:
            # With more slots than queries "sdpa" takes a missing mask to mean an empty static cache.
            return not causal or query.shape[2] in (1, key.shape[2])
        # A mask of booleans must be the same for all heads.
        return mask.ndim == 4 and mask.shape[-1] == key.shape[2] and (mask.dtype != torch.bool or mask.shape[1] == 1)

    def _mask(self, mask: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """`mask` as booleans of what is seen, or as float32 numbers to be added; the other one is None."""
        if mask is None or mask.dtype == torch.bool:
            return mask, None
        if mask.is_inference():  # it has no version that would tell of changes, so no copy is kept
            return None, mask.float()
        version, bias = self._biases.get(mask, (None, None))
        if version != mask._version:
            bias = mask.float().contiguous()
            self._biases[mask] = (mask._version, bias)
        return None, bias


@contextmanager
def registered_attention(kernels: LayerKernels, host: LayerKernels | None = None) -> Iterator[KernelAttention]:
    """`KernelAttention`, which transformers' modules find under its name for as long as the context lasts."""
    attention = KernelAttention(kernels, host)
    AttentionInterface.register(attention.name, attention)
    # Without an entry here, models are handed no mask at all.
    AttentionMaskInterface.register(attention.name, attention.make_mask)
    try:
        yield attention
    finally:
        # No public method removes an entry from the mappings that `register` fills; masks are looked up only in these.
        del AttentionInterface._global_mapping[attention.name], AttentionMaskInterface._global_mapping[attention.name]


def use_attention(model: PreTrainedModel, name: str) -> None:
    """Let `model` compute with the registered attention `name`, if its family uses the registry at all."""
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
    """A mask of "sdpa" as numbers to be added to scores, which is what eager attention expects."""
    queries, slots = query.shape[2], key.shape[2]
    if mask is None:
        if not causal or queries == 1:
            return None
        # As in "sdpa": where there are more slots than queries, the queries are at the first slots.
        mask = torch.ones(queries, slots, dtype=torch.bool, device=query.device).tril()[None, None]
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill(
        ~mask, torch.finfo(query.dtype).min
    )
