"""Random weights of a known shape as a source: made in packed form, at disk speed, without a checkpoint.

They are scaled so that a hidden state keeps its magnitude at every depth: their standard deviation is 1/sqrt(in),
divided by sqrt(2 * layers) where the product is added to the residual stream. A tokenizer of one token for each byte
stands in for the model's own, so that any prompt passes through.
"""

import json
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import sqrt
from pathlib import Path
from typing import Any, Final, Self

import torch
import xxhash
from transformers import GenerationConfig, PretrainedConfig

from tiered.arch import Skeleton, text_config
from tiered.convert.blocks import BlockRecipe, RangeRecipe, TensorRecipe
from tiered.convert.recipe import ConvertOptions
from tiered.convert.source import Fetching, Packed
from tiered.convert.taken import Taken
from tiered.convert.workers import one_torch_thread
from tiered.errors import ConfigError, CorruptError, shortened
from tiered.files import MOST_JSON_NBYTES, read_whole
from tiered.quant import GroupScheme, Scheme, SyntheticPool
from tiered.units import MIB

_DTYPE: Final = torch.bfloat16
_SMALL_STD: Final = 0.02
_POOL_NBYTES: Final = 32 * MIB
_LEAST_POOL_NBYTES: Final = 1 * MIB
BYTE_TOKENS: Final = 256
BOS_ID: Final = 256
EOS_ID: Final = 257
PAD_ID: Final = 258
_LEAST_VOCAB: Final = 259
_SPECIAL: Final = {"bos_token": ("<s>", BOS_ID), "eos_token": ("</s>", EOS_ID), "pad_token": ("<pad>", PAD_ID)}
_VERSION: Final = 1  # of how weights are drawn; part of the fingerprint
_WRITES_TO_RESIDUAL: Final = re.compile(r"\.(o_proj|out_proj|down_proj|fc2|c_proj|dense|dense_4h_to_h)(\.weight)?$")


@dataclass(frozen=True)
class ShapeFile:
    """The shape of a model, as a toml file has it."""

    name: str
    config: dict[str, Any]
    hub_id: str | None

    @classmethod
    def read(cls, path: Path) -> Self:
        """The shape in the toml file `path`; raises ConfigError."""
        try:
            value = tomllib.loads(read_whole(path, CorruptError, MOST_JSON_NBYTES).decode("utf-8"))
            return cls(str(value.get("name", path.stem)), dict(value["config"]), value.get("hub_id"))
        except (CorruptError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise ConfigError(f"{path}: expected a toml file with a table [config] ({error!r})") from None


def shape_config(shape: ShapeFile) -> PretrainedConfig:
    """The configuration of `shape` with the stand-in tokenizer's special tokens; raises ConfigError."""
    try:
        config = text_config(shape.config)
    except ConfigError:
        raise
    except Exception as error:
        # Each family has code of its own that checks its fields and computes with them; it may raise anything.
        raise ConfigError(
            f"{shape.name}: transformers cannot make a configuration of [config]: {shortened(error)}"
        ) from None
    if config.vocab_size < _LEAST_VOCAB:
        raise ConfigError(
            f"{shape.name}: vocab_size {config.vocab_size}; the byte-level stand-in tokenizer needs {_LEAST_VOCAB}"
        )
    config.bos_token_id, config.eos_token_id, config.pad_token_id = BOS_ID, EOS_ID, PAD_ID
    return config


class Synthetic:
    """A `WeightSource` that draws random weights instead of reading them."""

    warnings: tuple[str, ...] = ()
    taken: tuple[Taken, ...] = ()

    def __init__(self, shape: ShapeFile, skeleton: Skeleton, options: ConvertOptions) -> None:
        config = skeleton.config
        config.dtype = _DTYPE  # building the skeleton has set another
        config.architectures = [type(skeleton.model).__name__]
        self._layers = len(skeleton.layers)
        self._linear = {p.name for block in skeleton.blocks() for p in block.parameters if p.is_linear}
        largest = max(p.numel for block in skeleton.blocks() for p in block.parameters)
        self._pool_nbytes = min(_POOL_NBYTES, max(_LEAST_POOL_NBYTES, largest))
        self._pools: dict[Scheme, SyntheticPool] = {}
        self._seed = options.seed
        self._files = _model_files(config)
        fingerprint = xxhash.xxh3_128(json.dumps([_VERSION, self._seed]).encode() + self._files["config.json"])
        self.identity: Mapping[str, Any] = {
            "kind": "synthetic",
            "name": shape.name,
            "revision": None,
            "fingerprint": fingerprint.hexdigest(),
        }

    @property
    def working_nbytes(self) -> int:
        """Bytes of memory that drawing takes at most: two pools, int4 and int8, each with its codes, as many bytes of
        plain values, scales and zeros; and the values that are made from them for a tensor."""
        return 5 * self._pool_nbytes

    def extra_files(self) -> Mapping[str, Callable[[], bytes]]:
        return {name: partial(bytes, content) for name, content in self._files.items()}

    def room_nbytes(self, blocks: Sequence[BlockRecipe]) -> Mapping[Path, int]:
        return {}

    @contextmanager
    def opened(self, blocks: Sequence[BlockRecipe], fetching: Fetching) -> Iterator[Sequence[BlockRecipe]]:
        yield blocks

    def dtype(self, tensor: TensorRecipe) -> torch.dtype:
        return _DTYPE

    def plain(self, part: RangeRecipe) -> Iterator[memoryview]:
        tensor = part.whole
        mean, std = self._distribution(tensor)
        pool = self._pool(GroupScheme(8))  # the scheme of a pool does not matter to its plain values
        values = None
        if part.number is not None:
            _, in_ = tensor.matrix
            values = range(part.start * in_, part.stop * in_)
        return pool.normal_pieces(tensor.numel, _DTYPE, std, tensor.name, mean=mean, part=values)

    def packed(self, part: RangeRecipe) -> Packed:
        tensor, scheme = part.whole, part.whole.scheme
        assert scheme is not None
        pool = self._pool(scheme)
        _, in_ = tensor.matrix
        _, std = self._distribution(tensor)
        # The values of a row do not depend on how rows are stored.
        return Packed(
            pool.q_pieces(part.rows, in_, tensor.name),
            pool.scale_pieces(part.rows, in_, tensor.name, std),
            pool.zero_pieces(part.rows, in_, tensor.name),
        )

    def _distribution(self, tensor: TensorRecipe) -> tuple[float, float]:
        """(mean, standard deviation) of a tensor's values."""
        if tensor.name in self._linear:
            std = 1 / sqrt(tensor.shape[-1])
            return 0.0, std / sqrt(2 * self._layers) if _WRITES_TO_RESIDUAL.search(tensor.name) else std
        if len(tensor.shape) == 1:
            return 1.0 if tensor.name.endswith(".weight") else 0.0, _SMALL_STD
        return 0.0, 1 / sqrt(tensor.shape[-1])  # token and position embeddings

    def _pool(self, scheme: Scheme) -> SyntheticPool:
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


def tokenizer_files(max_length: int) -> dict[str, bytes]:
    """tokenizer.json and tokenizer_config.json, as transformers loads them. Token i < 256 is byte i."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocab = {char: byte for byte, char in enumerate(_byte_characters())}
    vocab |= {text: index for text, index in _SPECIAL.values()}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text, _ in _SPECIAL.values()])
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_length}
    config |= {key: text for key, (text, _) in _SPECIAL.items()}
    return {
        "tokenizer.json": (tokenizer.to_str(pretty=True) + "\n").encode(),
        "tokenizer_config.json": (json.dumps(config, indent=1) + "\n").encode(),
    }


def _byte_characters() -> list[str]:
    """The printable character that byte-level tokenizers write for each byte: itself, or one from 256 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    characters, substitutes = [], 0
    for byte in range(BYTE_TOKENS):
        if byte in printable:
            characters.append(chr(byte))
        else:
            characters.append(chr(256 + substitutes))
            substitutes += 1
    return characters
