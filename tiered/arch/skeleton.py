"""A model's graph without its weights: built by transformers on the meta device, and cut into blocks.

In: a Hugging Face configuration. Out: the causal LM with meta parameters and real buffers, and the list of tensors
that each block (embed, outer, every layer, head) must hold. `convert/` uses it to know what a checkpoint has to
contain, `model/` to run it.
"""

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import Final

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from tiered.arch.config import REMEDY
from tiered.arch.families import Family, IdTable, family_for
from tiered.arch.modules import lent_weights, linear_size
from tiered.arch.unfilled import meta_unfilled
from tiered.errors import CheckpointError, ConfigError, TieredError, UnsupportedFamilyError, shortened
from tiered.units import GIB, format_size

_MOST_TABLES_NBYTES: Final = GIB
"""Most bytes of buffers that a graph makes for itself (masks, rotary frequencies): they stay in memory."""
_MOST_TENSOR_NBYTES: Final = 1 << 40
"""Most bytes of one parameter; a stack of all experts of a layer is one."""


@dataclass(frozen=True)
class ParameterInfo:
    """One tensor a block holds: its full Hugging Face name and its shape in a store."""

    name: str
    shape: tuple[int, ...]
    is_linear: bool
    """A linear layer multiplies by it, [out, in]; or it is a stack [experts, out, in] of such weights."""
    is_transposed: bool = False
    """The model's own is [in, out], or [experts, in, out], and so is that of a checkpoint as transformers saves it."""

    @property
    def numel(self) -> int:
        return int(torch.Size(self.shape).numel())


@dataclass(frozen=True)
class BlockTensors:
    """The tensors of one block. `prefix` is stripped from names when the block is bound to its module."""

    name: str
    role: str
    """"embed" (token embedding), "outer" (position tables, projections, final norms), "table" (chosen by ids, as the
    embedding is), "layer" or "head"."""
    prefix: str
    parameters: tuple[ParameterInfo, ...]


@dataclass(frozen=True)
class Skeleton:
    """The causal LM on the meta device and where its parts are."""

    model: PreTrainedModel
    config: PretrainedConfig
    family: Family
    embed_name: str
    """Full name of the token embedding's weight."""
    head_name: str
    """Full name of the output projection's weight; where `tied`, `embed_name` names the same tensor."""
    tied: bool

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers, in order."""
        layers = self.model.get_submodule(self.family.layers)
        assert isinstance(layers, nn.ModuleList)
        return layers

    @property
    def embedding(self) -> nn.Embedding:
        """The token embedding's module."""
        module = self.model.get_input_embeddings()
        assert isinstance(module, nn.Embedding)
        return module

    @cached_property
    def tables(self) -> dict[str, IdTable]:
        """The tables beside the embedding that this model has, by the name of their block."""
        modules = dict(self.model.named_modules())
        found = (table for table in self.family.tables if isinstance(modules.get(table.module), nn.Embedding))
        return {f"table-{number:03d}": table for number, table in enumerate(found)}

    def look_up(self, table: IdTable, rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """What the model's own code makes of `index` [rows, tokens], with `rows` [n, width] as the table."""
        module = self.model.get_submodule(table.module)
        own = module._parameters["weight"]
        # Bypasses nn.Module's checks: it is no nn.Parameter.
        module._parameters["weight"] = rows  # type: ignore[assignment]
        try:
            found: torch.Tensor = attrgetter(table.look_up)(self.model)(index)
        finally:
            module._parameters["weight"] = own
        return found

    def table_zeros(self, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
        """Arguments for a forward over embeddings like `hidden` [rows, tokens, ...] that needs no table's values."""
        index = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
        found = {}
        for table in self.tables.values():
            module = self.model.get_submodule(table.module)
            assert isinstance(module, nn.Embedding)
            found[table.argument] = self.look_up(table, hidden.new_zeros(1, module.embedding_dim), index)
        return found

    def blocks(self) -> Iterator[BlockTensors]:
        """embed, outer, tables, every layer, and head where it is not tied to embed; in that order."""
        head = self.head_name.removesuffix("weight")
        tables = {f"{table.module}.weight": name for name, table in self.tables.items()}
        layer_prefixes = [f"{self.family.layers}.{i}." for i in range(len(self.layers))]
        lent = _lent_weights(self.model)
        by_prefix: dict[str, list[ParameterInfo]] = {prefix: [] for prefix in layer_prefixes}
        outer: list[ParameterInfo] = []
        heads: list[ParameterInfo] = []
        found: list[BlockTensors] = []
        for name, tensor in _stored_tensors(self.model):
            shape, is_transposed = tuple(tensor.shape), lent.get(name, False)
            if is_transposed:
                shape = (*shape[:-2], shape[-1], shape[-2])
            info = ParameterInfo(name, shape, name in lent, is_transposed)
            if name == self.embed_name:
                yield BlockTensors("embed", "embed", name.removesuffix("weight"), (info,))
            elif name in tables:
                found.append(BlockTensors(tables[name], "table", name.removesuffix("weight"), (info,)))
            elif name.startswith(self.family.layers + "."):
                index = int(name[len(self.family.layers) + 1 :].split(".", 1)[0])
                by_prefix[layer_prefixes[index]].append(info)
            elif name.startswith(head):
                # A tied head's weight is the embedding's; a bias of it, if any, stays in memory.
                (outer if self.tied else heads).append(info)
            else:
                outer.append(info)
        yield BlockTensors("outer", "outer", "", tuple(p for p in outer if p.name != self.head_name))
        yield from found
        for index, prefix in enumerate(layer_prefixes):
            yield BlockTensors(f"layer-{index:03d}", "layer", prefix, tuple(by_prefix[prefix]))
        if not self.tied:
            yield BlockTensors("head", "head", head, tuple(heads))


def _lent_weights(model: nn.Module) -> dict[str, bool]:
    """Full names of the weights that modules of `model` borrow, and whether theirs are transposed."""
    return {
        f"{name}.{attribute}": is_transposed
        for name, module in model.named_modules()
        for attribute, is_transposed in lent_weights(module).items()
    }


def _stored_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and persistent buffers: what a checkpoint holds. Tied parameters come under each of their names."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    yield from parameters.items()
    for name in model.state_dict(keep_vars=True):
        if name not in parameters:
            yield name, model.get_buffer(name)


def build_skeleton(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> Skeleton:
    """The model of `config` with parameters on the meta device and real buffers, ready for evaluation.

    Buffers must be real: rotary frequencies are in no checkpoint, and a meta buffer gives garbage without an error.
    Raises CheckpointError where transformers cannot build it or its buffers would not fit anywhere, and
    UnsupportedFamilyError where the graph is not what the family's table entry says.
    """
    family = family_for(config.model_type)
    if getattr(config, "use_bidirectional_attention", None) in (True, "all"):
        raise UnsupportedFamilyError(
            f"{config.name_or_path or 'model shape'}: attention sees later tokens, too (use_bidirectional_attention is "
            f"{config.use_bidirectional_attention!r}), so it cannot generate; expected a model that sees earlier ones"
        )
    # Linear layers are called, where some families would multiply by a weight that is elsewhere.
    config._is_quantized = True
    if getattr(config, "output_router_logits", False):
        config.output_router_logits = False  # for a loss in training, of logits that nobody notes here
    with _naming(config):
        _check_probabilities(config)
        _check_sizes(config)
        with init_empty_weights(include_buffers=False), meta_unfilled():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    model.eval().requires_grad_(False)
    if family.needs_recent and "cache" not in inspect.signature(model.forward).parameters:
        raise UnsupportedFamilyError(
            f"model family {config.model_type!r}: transformers {transformers.__version__} computes it in another way "
            "than tiered expects; install transformers 5.24 or newer within tiered's range"
        )
    _keep_in_float32(model)
    try:
        layers = model.get_submodule(family.layers)
    except AttributeError:
        layers = None
    embed, head = model.get_input_embeddings(), model.get_output_embeddings()
    is_plain_head = isinstance(head, nn.Linear) and linear_size(head) is not None
    if not isinstance(layers, nn.ModuleList) or not isinstance(embed, nn.Embedding) or not is_plain_head:
        raise UnsupportedFamilyError(
            f"model family {config.model_type!r}: this version of transformers lays it out differently from what "
            f"tiered expects (layers at {family.layers!r}, an nn.Embedding, an nn.Linear head); "
            "install a version of transformers within tiered's range"
        )
    names = {id(module): name for name, module in model.named_modules()}
    skeleton = Skeleton(
        model=model,
        config=config,
        family=family,
        embed_name=f"{names[id(embed)]}.weight",
        head_name=f"{names[id(head)]}.weight",
        tied=bool(config.tie_word_embeddings),
    )
    for table in skeleton.tables.values():
        module = model.get_submodule(table.module)
        assert isinstance(module, nn.Embedding)
        # It matters in training only, and torch would demand that it is among the few rows that are looked up.
        module.padding_idx = None
        if module.num_embeddings < embed.num_embeddings:
            raise CheckpointError(
                f"{config.name_or_path or 'model shape'}: {table.module} has {module.num_embeddings:,} rows for "
                f"{embed.num_embeddings:,} tokens, expected one for each; {REMEDY}"
            )
    return skeleton


def _check_probabilities(config: PretrainedConfig) -> None:
    """Raises ValueError for a dropout that is no probability: torch would refuse it in the middle of a pass."""
    for name, value in vars(config).items():
        if "drop" in name and type(value) in (int, float) and not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}, expected a probability from 0 to 1")


def _check_sizes(config: PretrainedConfig) -> None:
    """Raises ValueError where the graph's tensors would be larger than any real model's, or have no elements.

    Found out by building it once with everything on the meta device, which takes a moment and no memory: for the real
    graph buffers are filled, and address space is taken for each parameter before it becomes a meta tensor.
    """
    with torch.device("meta"), meta_unfilled():
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    nbytes = sum(buffer.nbytes for buffer in model.buffers())
    if nbytes > _MOST_TABLES_NBYTES:
        most, largest = max((buffer.nbytes, name) for name, buffer in model.named_buffers())
        raise ValueError(
            f"its tables would take {format_size(nbytes)} of memory ({largest} alone {format_size(most)}), "
            f"expected at most {format_size(_MOST_TABLES_NBYTES)}"
        )
    empty = [name for name, parameter in model.named_parameters() if not parameter.numel()]
    if empty:
        raise ValueError(f"{empty[0]} would have no elements: one of its sizes is 0")
    most, largest = max((parameter.nbytes, name) for name, parameter in model.named_parameters())
    if most > _MOST_TENSOR_NBYTES:
        raise ValueError(
            f"{largest} would take {format_size(most)}, expected at most {format_size(_MOST_TENSOR_NBYTES)}"
        )


@contextmanager
def _naming(config: PretrainedConfig) -> Iterator[None]:
    """Turn whatever building a graph raises into an error that names the configuration."""
    try:
        yield
    except (TieredError, MemoryError):
        raise
    except Exception as error:
        reason = f"transformers cannot build the {config.model_type} model that it describes: {shortened(error)}"
        if not config.name_or_path:
            raise ConfigError(f"model shape: {reason}") from error
        raise CheckpointError(f"{Path(config.name_or_path) / 'config.json'}: {reason}; {REMEDY}") from error


def _keep_in_float32(model: PreTrainedModel) -> None:
    """Make those tensors float32 that transformers loads as float32 whatever the model's dtype (routers' biases)."""
    patterns = sorted(model._keep_in_fp32_modules_strict or ())
    for name, tensor in _stored_tensors(model):
        if any(re.search(pattern.replace("*", ".*"), name) for pattern in patterns):
            tensor.data = tensor.data.float()
