"""Tiny random models of every family, their stores, and what transformers makes of prompts with them.

`Tiny` makes them, each once; the `tiny` fixture holds one for the whole session.
"""

from functools import cache, partial
from pathlib import Path
from typing import Final

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.answers import STEPS, Answers, cached_answers, reference_answers
from tests.shared import made_once
from tests.store.make import load_unit
from tests.tiny_configs import STEPWISE, TINY, tiny_config
from tiered.arch import FAMILIES
from tiered.arch.modules import lent_weights
from tiered.convert import ConvertOptions, convert_checkpoint
from tiered.quant import QuantizedWeight
from tiered.store import Store

PROMPT_LENGTHS: Final = (21, 13)


class Tiny:
    """Makes the tiny models, their stores and their reference answers, each when first asked for."""

    def __init__(self) -> None:
        # Per instance, so that nothing outlives the session's folder.
        self.checkpoint = cache(self._checkpoint)
        self.store = cache(self._store)
        self.reference = cache(self._reference)

    def model(self, name: str, quant: str = "none") -> PreTrainedModel:
        """The model as transformers loads it, in float32; `quant` gives it the weights of that store instead."""
        # Before version 5.21 transformers took "sdpa" for families that cap scores, which it knows nothing of.
        attention = "eager" if "attn_logit_softcapping" in TINY.get(name, {}) else None
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            self.checkpoint(name), dtype=torch.float32, attn_implementation=attention
        )
        if quant != "none":
            load_stored_weights(model, self.store(name, quant))
        return model

    def _checkpoint(self, name: str) -> Path:
        def make(folder: Path) -> None:
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(tiny_config(name), dtype=torch.float32)
            randomize(model)
            model.generation_config.eos_token_id = None
            model.save_pretrained(folder)

        return made_once(f"tiny-{name}", make)

    def _store(self, name: str, quant: str = "none") -> Store:
        def make(folder: Path) -> None:
            convert_checkpoint(self.checkpoint(name), folder, ConvertOptions(quant=quant, compress="none"))

        return Store.open(made_once(f"tiny-{name}-{quant}.tiered", make))

    def _reference(self, name: str, quant: str = "none", steps: int = STEPS) -> Answers:
        if name not in STEPWISE:
            return reference_answers(self.model(name, quant), prompts_for(name), steps)
        make_model = partial(self.model, name, quant)
        found = [cached_answers(make_model, prompt, steps) for prompt in prompts_for(name)]
        return Answers(tuple(each.tokens[0] for each in found), tuple(each.logits[0] for each in found))


def randomize(model: PreTrainedModel) -> None:
    """Make every parameter unlike every other, so that a swapped, dropped or unscaled one shows in the logits."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
            else:
                parameter.add_(0.2 * noise)
        stored = model.state_dict()
        for name, buffer in model.named_buffers():
            if name in stored and buffer.is_floating_point():
                buffer.add_(0.2 * torch.randn(buffer.shape, generator=generator))


def load_stored_weights(model: PreTrainedModel, store: Store) -> None:
    """Overwrite the parameters of `model` with those of `store`, dequantized, by reading its files whole."""
    state = model.state_dict()
    for name, module in model.named_modules():
        for attribute, is_transposed in lent_weights(module).items():
            if is_transposed:
                state[f"{name}.{attribute}"] = state[f"{name}.{attribute}"].mT
    with torch.no_grad():
        for block in store.manifest.blocks:
            for unit in store.layout(block).units:
                memory = load_unit(store.path, unit)
                for weight in unit.weights.values():
                    value = weight.view(memory)
                    if isinstance(value, QuantizedWeight):
                        value = value.rows(0, value.shape[0], torch.float32)
                    target = state[weight.whole_name]
                    if weight.whole is not None:  # an expert
                        target = target[int(weight.name.partition("#")[2])]
                    target.copy_(value.view_as(target))


def prompts_for(name: str) -> list[list[int]]:
    """Two random prompts of different length, the same ones for every model."""
    vocab = tiny_config(name).vocab_size
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(3, vocab, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS]


def few_rows(name: str) -> int:
    """Tokens of a micro-batch that is smaller than the prompts of tiny model `name`, if its family allows any."""
    config = tiny_config(name)
    scan = FAMILIES[config.model_type].scan
    return 6 if scan is None else max(6, scan.grid_of(config).cell(max(PROMPT_LENGTHS)))
