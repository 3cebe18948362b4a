"""A store as a model of transformers: its forward is one pass over the store, all else is transformers' own.

In: a runtime that is open while the model is used. Out: a `PreTrainedModel` with `GenerationMixin`; what a model in
memory could do, and this one cannot, raises NotSupportedError. `api.py` gives it to users.
"""

import functools
from typing import Any, Final, NoReturn, Self, TypeVar

import torch
from transformers import DynamicCache, GenerationConfig, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import ModelOutput

from tiered.errors import BudgetError, ConfigError, NotSupportedError
from tiered.model import (
    CACHE_NAMES,
    ForwardBatch,
    cache_name,
    check_padding,
    check_token_ids,
    fits_one_pass,
    keep_positions,
    past_tokens,
    slice_mask,
)
from tiered.runtime import Runtime
from tiered.units import format_size

_CACHE_NAME: Final = cache_name(GenerationMixin.prepare_inputs_for_generation) or CACHE_NAMES[0]
"""The name by which this version of transformers passes caches to a model, and takes them from its results."""
T = TypeVar("T")
_OF_GENERATE: Final = frozenset(("tokenizer", "assistant_tokenizer", "assistant_model"))
"""Arguments of `generate` that are not inputs of a model."""


class OffloadedModel(PreTrainedModel, GenerationMixin):
    """A causal language model without parameters of its own: each forward streams them."""

    config_class = PretrainedConfig
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: PretrainedConfig, runtime: Runtime, generation_config: GenerationConfig) -> None:
        super().__init__(config)
        self._runtime = runtime
        self.generation_config = generation_config
        super().train(False)

    @property
    def device(self) -> torch.device:
        """Where inputs go and logits come from."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """What activations are computed in; weights on disk may be quantized."""
        return self._runtime.dtype

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Weights in the store, none of which can be trained."""
        if only_trainable:
            return 0
        store = self._runtime.store
        # A tied head is the embedding's file once more.
        blocks = [b for b in store.blocks.values() if not (b.role == "head" and store.manifest.tied)]
        counted = (b for b in blocks if not (exclude_embeddings and b.role == "embed"))
        return sum(store.layout(block).weight_count for block in counted)

    @property
    def _is_stateful(self) -> bool:  # type: ignore[override]
        """transformers asks before it drafts tokens that it may take back: a recurrent state cannot be."""
        return self._runtime.plan.cache.state is not None

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """transformers' own generate. Raises BudgetError if more is asked for than `load` has set memory aside for.

        A cache may be passed as `cache` or as `past_key_values`, whatever transformers' version calls it. Calls of
        several threads wait for each other.
        """
        ids = inputs if inputs is not None else kwargs.get("input_ids")
        config = generation_config or self.generation_config
        asked = {**config.to_dict(), **kwargs}
        if asked.get("assistant_early_exit") is not None:
            raise NotSupportedError(
                "generate(assistant_early_exit=...): streamed layers all pass; use assistant_model="
            )
        if isinstance(ids, torch.Tensor):
            prompt, new_tokens, longest = ids.shape[1], asked.get("max_new_tokens"), kwargs.get("max_length")
            # A checkpoint's own `max_length` is no request: most completions end long before.
            tokens = max(prompt, int(longest or 0) - 1) if new_tokens is None else prompt + int(new_tokens) - 1
            copies = max(asked.get("num_beams") or 1, asked.get("num_return_sequences") or 1)
            self._check_room(ids.shape[0] * copies, tokens)
        if (cache := _only_cache(*(kwargs.pop(name, None) for name in CACHE_NAMES))) is not None:
            kwargs[_CACHE_NAME] = cache
        with self._runtime.turn(), self._runtime.computing():
            output = super().generate(inputs, generation_config, *args, **kwargs)
        return _by_both_names(output)

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        # transformers' decoding loops pass on arguments of `generate` itself, as most forwards ignore unknown names.
        kept = {name: value for name, value in kwargs.items() if name not in _OF_GENERATE}
        prepared: dict[str, Any] = super().prepare_inputs_for_generation(*args, **kept)
        return prepared

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits after `input_ids` [rows, tokens], as transformers defines it, in one pass over the store.

        The cache may be given, and is returned, by both of its names: `cache` and the older `past_key_values`.

        Raises BudgetError where the KV cache would outgrow what `load` planned for, NotSupportedError for what
        offloaded weights cannot give (gradients, attention maps, hidden states).
        """
        self._refuse(input_ids, kwargs)
        assert input_ids is not None
        cache = _only_cache(cache, past_key_values)
        if cache is None:
            cache = DynamicCache(config=self.config)
        check_token_ids(input_ids, self._runtime.store.vocab_size)
        with self._runtime.turn():
            logits = self._passes(ForwardBatch(input_ids, cache, attention_mask, position_ids, logits_to_keep))
        output = CausalLMOutputWithPast(logits=logits)
        setattr(output, _CACHE_NAME, cache if use_cache is not False else None)
        return _by_both_names(output)

    def _passes(self, batch: ForwardBatch) -> torch.Tensor:
        """Logits [rows, kept, vocab] of `batch`, in as many passes as it takes."""
        rows, tokens = batch.input_ids.shape
        past = past_tokens(batch)
        self._check_room(rows, past + tokens)
        self._check_whole(rows, tokens, past)
        self._check_logits(rows, tokens, batch.logits_to_keep)
        seats = self._runtime.engine.seats
        is_one = fits_one_pass(batch, self._runtime.plan.micro_batch_rows, seats)
        parts = [batch] if is_one else self._split(batch)
        logits = [self._runtime.forward([part]).logits[0] for part in parts]
        # With several parts each pass has returned logits of all its positions: those to keep are chosen here.
        return logits[0] if len(parts) == 1 else keep_positions(torch.cat(logits, dim=1), batch.logits_to_keep)

    def _split(self, batch: ForwardBatch) -> list[ForwardBatch]:
        """A prompt too long for one micro-batch, with a cache that one pass cannot fill in several: several passes."""
        rows, tokens = batch.input_ids.shape
        past = past_tokens(batch)
        step = max(1, self._runtime.plan.micro_batch_rows // rows)
        # Two parts have the bits of the whole where they meet on a line of the grid.
        step = self._runtime.plan.grid.share(step, tokens) or step
        parts, cuts = [], [(start, min(start + step, tokens)) for start in range(0, tokens, step)]
        check_padding(batch, cuts)
        for start, stop in cuts:
            mask = slice_mask(batch.attention_mask, past, start, stop)
            positions = None if batch.position_ids is None else batch.position_ids[:, start:stop]
            parts.append(ForwardBatch(batch.input_ids[:, start:stop], batch.cache, mask, positions, 0))
        return parts

    def _check_room(self, rows: int, tokens: int) -> None:
        plan = self._runtime.plan
        # Fewer sequences may not be longer: the memory for masks and scores is planned for this context.
        if rows > plan.batch_size or tokens > plan.max_context:
            raise BudgetError(
                f"{rows} sequences of {tokens} tokens: memory was set aside for {plan.batch_size} of "
                f"{plan.max_context}; pass context= and sequences= to tiered.load (beams count as sequences)"
            )

    def _check_whole(self, rows: int, tokens: int, past: int) -> None:
        """Raises NotSupportedError where a prompt would be computed in parts, and the family's code cannot."""
        plan = self._runtime.plan
        if tokens > 1 and not plan.grid.tokens and (past or rows * tokens > plan.micro_batch_rows):
            raise NotSupportedError(
                f"{rows} x {tokens} tokens behind {past} others: the recurrent layers of model family "
                f"{self.config.model_type!r} compute prompts whole, {plan.micro_batch_rows} tokens together at most; "
                "pass fewer rows, or a larger ram= to tiered.load, and later tokens one by one"
            )

    def _check_logits(self, rows: int, tokens: int, logits_to_keep: int | torch.Tensor) -> None:
        """Raises BudgetError for logits beyond the budget: those of every position are the largest thing returned."""
        kept = min(tokens, logits_to_keep or tokens) if isinstance(logits_to_keep, int) else len(logits_to_keep)
        vocab, reserve = self._runtime.store.vocab_size, self._runtime.plan.returned_logits_nbytes
        # Twice: in parts, and put together.
        nbytes = 2 * rows * kept * vocab * self.dtype.itemsize
        if kept > 1 and nbytes > reserve:
            raise BudgetError(
                f"logits of {kept} positions of {rows} sequences over {vocab} tokens take {format_size(nbytes)}, the "
                f"budget leaves {format_size(reserve)}; pass logits_to_keep=, or a larger ram= to tiered.load"
            )

    def _refuse(self, input_ids: torch.Tensor | None, kwargs: dict[str, Any]) -> None:
        """Refuse what cannot be honoured, rather than ignore it."""
        if input_ids is None:
            raise NotSupportedError("forward without input_ids: embeddings are read from disk by token id")
        for name, value in kwargs.items():
            if name == "return_dict" or value is None or value is False:
                continue
            raise NotSupportedError(f"forward({name}=...): not available from a model whose weights are streamed")

    # What a model in memory could do, and this one cannot.

    def to(self, *args: Any, **kwargs: Any) -> NoReturn:  # type: ignore[override]
        raise NotSupportedError(
            "to(): the weights are not in memory; choose tiers and dtype in tiered.load(tiers=..., dtype=...)"
        )

    def cuda(self, *args: Any, **kwargs: Any) -> NoReturn:  # type: ignore[override]
        self.to()

    def cpu(self) -> NoReturn:
        self.to()

    def float(self, *args: Any) -> NoReturn:
        self.to()

    def double(self, *args: Any) -> NoReturn:
        self.to()

    def type(self, *args: Any) -> NoReturn:
        self.to()

    def half(self, *args: Any) -> NoReturn:
        self.to()

    def bfloat16(self, *args: Any) -> NoReturn:
        self.to()

    def state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotSupportedError(
            "state_dict(): the weights do not fit in memory; the store's block files are safetensors and can be "
            f"opened one at a time: {self._runtime.store.path / 'blocks'}"
        )

    def load_state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotSupportedError("load_state_dict(): a store is read-only; convert the other checkpoint instead")

    def save_pretrained(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotSupportedError(
            f"save_pretrained(): the weights are not in memory; copy the store itself: {self._runtime.store.path}"
        )

    def push_to_hub(self, *args: Any, **kwargs: Any) -> NoReturn:  # type: ignore[override]
        self.save_pretrained()

    def train(self, mode: bool = True) -> Self:
        """Only evaluation: `train(False)`, as `eval()` calls it, is the one mode there is."""
        if mode:
            raise NotSupportedError("train(): streamed, quantized weights have no gradients")
        super().train(False)
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        if requires_grad:
            self.train()
        return self

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotSupportedError("resize_token_embeddings(): a store is read-only; resize before converting")

    def get_input_embeddings(self) -> NoReturn:
        raise NotSupportedError("get_input_embeddings(): embedding rows are read from disk as they are needed")


def _only_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """The cache that was passed by one of its names; raises ConfigError where two were."""
    if cache is not None and past_key_values is not None:
        raise ConfigError("cache and past_key_values are two names of one argument: pass one of them")
    return cache if cache is not None else past_key_values


def _by_both_names(output: T) -> T:
    """`output`, with its cache also as `cache` where transformers names it `past_key_values` only."""
    new, old = CACHE_NAMES
    if isinstance(output, ModelOutput) and not hasattr(output, new):
        setattr(output, new, getattr(output, old))
    return output
