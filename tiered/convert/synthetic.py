"""Random weights of a known shape as a source: written packed, at disk speed, with no checkpoint at all.

Scaled so that a hidden state keeps its size at every depth: weights of standard deviation 1/sqrt(in), and what is
added to the residual stream smaller by sqrt(2 * layers).
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from math import sqrt
from typing import Any, Final

import torch
import xxhash
from transformers import GenerationConfig, PretrainedConfig

from tiered.arch import Skeleton, text_config
from tiered.convert.options import ConvertOptions
from tiered.convert.recipe import BlockRecipe, TensorRecipe
from tiered.convert.resolve import Shape
from tiered.convert.source import Packed
from tiered.convert.stand_in import BOS_ID, EOS_ID, LEAST_VOCAB, PAD_ID, tokenizer_files
from tiered.convert.workers import one_torch_thread
from tiered.errors import ConfigError, shortened
from tiered.quant import GroupScheme, SyntheticPool
from tiered.units import MIB

_DTYPE: Final = torch.bfloat16
_SMALL_STD: Final = 0.02
_POOL_NBYTES: Final = 32 * MIB
_LEAST_POOL_NBYTES: Final = 1 * MIB
_VERSION: Final = 1  # of how weights are drawn; part of the fingerprint
_WRITES_TO_RESIDUAL: Final = re.compile(r"\.(o_proj|out_proj|down_proj|fc2|c_proj|dense|dense_4h_to_h)(\.weight)?$")


def shape_config(shape: Shape) -> PretrainedConfig:
    """The configuration of `shape` with the stand-in tokenizer's special tokens; raises ConfigError."""
    try:
        config = text_config(shape.config)
    except ConfigError:
        raise
    except Exception as error:
        # Each family checks and computes with its fields in code of its own, which raises what it likes.
        raise ConfigError(
            f"{shape.name}: transformers cannot make a configuration of [config]: {shortened(error)}"
        ) from None
    if config.vocab_size < LEAST_VOCAB:
        raise ConfigError(
            f"{shape.name}: vocab_size {config.vocab_size}; the byte-level stand-in tokenizer needs {LEAST_VOCAB}"
        )
    config.bos_token_id, config.eos_token_id, config.pad_token_id = BOS_ID, EOS_ID, PAD_ID
    return config


class Synthetic:
    """A `WeightSource` that draws instead of reading."""

    synthetic = True
    warnings: tuple[str, ...] = ()

    def __init__(self, shape: Shape, skeleton: Skeleton, options: ConvertOptions) -> None:
        config = skeleton.config
        config.dtype = _DTYPE  # building the skeleton has put its own there
        config.architectures = [type(skeleton.model).__name__]
        self._layers = len(skeleton.layers)
        self._linear = {p.name for block in skeleton.blocks() for p in block.parameters if p.is_linear}
        largest = max(p.numel for block in skeleton.blocks() for p in block.parameters)
        self._pool_nbytes = min(_POOL_NBYTES, max(_LEAST_POOL_NBYTES, largest))
        self._pools: dict[GroupScheme, SyntheticPool] = {}
        self._seed = options.seed
        self._files = _model_files(config)
        fingerprint = xxhash.xxh3_128(json.dumps([_VERSION, self._seed]).encode() + self._files["config.json"])
        self._identity = {
            "kind": "synthetic",
            "name": shape.name,
            "revision": None,
            "fingerprint": fingerprint.hexdigest(),
        }

    @property
    def identity(self) -> Mapping[str, Any]:
        return self._identity

    def extra_files(self) -> Mapping[str, Callable[[], bytes]]:
        return {name: partial(bytes, content) for name, content in self._files.items()}

    def files_of(self, block: BlockRecipe) -> frozenset[str]:
        return frozenset()

    def check(self, block: BlockRecipe) -> None:
        """What is drawn has the shape it should have."""

    def fetch(self, block: BlockRecipe) -> None:
        """Nothing to fetch."""

    def fetch_nbytes(self, blocks: Iterable[BlockRecipe]) -> tuple[int, ...]:
        return ()

    def open_block(self, block: BlockRecipe) -> None:
        """Nothing to open."""

    def dtype(self, tensor: TensorRecipe) -> torch.dtype:
        return _DTYPE

    def plain(self, tensor: TensorRecipe) -> Iterator[memoryview]:
        mean, std = self._distribution(tensor)
        pool = self._pool(GroupScheme(8))  # the scheme of a pool does not matter to its plain values
        return pool.normal_chunks(tensor.numel, _DTYPE, std, tensor.name, mean=mean)

    def packed(self, tensor: TensorRecipe) -> Packed:
        assert tensor.scheme is not None
        pool = self._pool(tensor.scheme)
        out, in_ = tensor.matrix
        _, std = self._distribution(tensor)
        return Packed(
            pool.q_chunks(out, in_, tensor.name),
            pool.scale_chunks(out, in_, tensor.name, std),
            pool.zero_chunks(out, in_, tensor.name),
        )

    def release(self, files: frozenset[str]) -> None:
        """Nothing to release."""

    def working_nbytes(self) -> int:
        # Two pools at most, int4 and int8, each with as many bytes of plain values, scales and zeros, and what is made
        # of them when they are drawn.
        return 5 * self._pool_nbytes

    def close(self) -> None:
        self._pools.clear()

    def _distribution(self, tensor: TensorRecipe) -> tuple[float, float]:
        """(mean, standard deviation) of a tensor's values."""
        if tensor.name in self._linear:
            std = 1 / sqrt(tensor.shape[-1])
            return 0.0, std / sqrt(2 * self._layers) if _WRITES_TO_RESIDUAL.search(tensor.name) else std
        if len(tensor.shape) == 1:
            return 1.0 if tensor.name.endswith(".weight") else 0.0, _SMALL_STD
        return 0.0, 1 / sqrt(tensor.shape[-1])  # token and position embeddings

    def _pool(self, scheme: GroupScheme) -> SyntheticPool:
        if scheme not in self._pools:
            with one_torch_thread():
                self._pools[scheme] = SyntheticPool(scheme, self._seed, nbytes=self._pool_nbytes)
        return self._pools[scheme]


def _model_files(config: PretrainedConfig) -> dict[str, bytes]:
    generation = GenerationConfig.from_model_config(config)
    return {
        "config.json": config.to_json_string().encode(),
        "generation_config.json": generation.to_json_string(ignore_metadata=True).encode(),
        **tokenizer_files(int(getattr(config, "max_position_embeddings", None) or 2048)),
    }
