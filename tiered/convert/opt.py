"""OPT as it was given out, without a config.json: tensors under metaseq's names, split among model-parallel parts.

In: a folder's files, which `metaseq.py` or `numpy_folder.py` reads. Out: each tensor of Hugging Face's OPT, gathered
from pieces of all parts, and the configuration that Hugging Face's checkpoint of that size has. How metaseq splits:

    embed_tokens, fc1, q_proj, k_proj, v_proj     rows: each part has some of them
    qkv_proj                                      the same, and within a part k, v and q, one below the other
    out_proj.weight, fc2.weight                   columns
    all others                                    every part has all of it; the first one's is taken
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import filterfalse, islice
from typing import Any, Final

from tiered.configs_path import config_dir
from tiered.convert.gather import Gathered, GatheredReader, Region
from tiered.convert.index import WeightIndex
from tiered.convert.metaseq import find_series, read_series
from tiered.convert.numpy_folder import EMBEDDING, read_numpy
from tiered.convert.place import WeightFiles
from tiered.convert.synthetic import ShapeFile
from tiered.errors import SHOWN, CheckpointError, ConfigError, some

_ROWS: Final = re.compile(r"(embed_tokens|output_projection|lm_head|qkv_proj|[qkv]_proj|fc1)\.(weight|bias)")
_COLUMNS: Final = re.compile(r"(out_proj|fc2)\.weight")
_ORDER: Final = "kvq"
"""How queries, keys and values follow each other in a fused projection."""
_RENAMED: Final = {
    "decoder.layer_norm.": "decoder.final_layer_norm.",
    "decoder.project_in_dim.": "decoder.project_in.",
    "decoder.project_out_dim.": "decoder.project_out.",
    "decoder.output_projection.": "lm_head.",
}
_STATELESS: Final = re.compile(r"\.(version|_float_tensor)$")
"""What metaseq's modules keep beside their parameters."""
_LAYER: Final = re.compile(r"decoder\.layers\.(\d{1,6})\.(.+)")
_IDENTIFYING: Final = (
    *("hidden_size", "num_hidden_layers", "ffn_dim", "intermediate_size", "num_attention_heads"),
    *("num_key_value_heads", "word_embed_proj_dim", "do_layer_norm_before"),
)
"""Fields in which models of one family differ. How many tokens there are depends on how the vocabulary was padded."""


@dataclass(frozen=True)
class Opt:
    """An OPT checkpoint: where its tensors are, and what of its configuration they tell."""

    index: WeightIndex
    fields: Mapping[str, Any]


def read_opt(files: WeightFiles, only: str | None) -> Opt | None:
    """The checkpoint among `files`, or the one of them that its file `only` belongs to; None where there is none.

    Raises CheckpointError where files are missing, extra, doubled or damaged.
    """
    series = find_series(files, only)
    if series is not None:
        names, parts = sorted(series.files.values()), read_series(files, series)
    elif EMBEDDING in files.names:
        parts = [read_numpy(files)]
        names = sorted(parts[0])
    else:
        return None
    _check_layers(files.name, parts)
    tensors = dict(_gather(files.name, parts))
    # Every tensor is in many files: as far as the order of blocks and what is read first go, in one.
    index = WeightIndex(GatheredReader(tensors), tuple(names), dict.fromkeys(tensors, names[0]))
    return Opt(index, _fields(files.name, tensors))


def opt_config(where: str, opt: Opt, shape: ShapeFile | None) -> dict[str, Any]:
    """The configuration of the checkpoint `where`, as Hugging Face's of that size has it. How many heads there are, no
    tensor tells: `shape` does, or where it is None the OPT of this size."""
    if shape is None:
        found = [read for read in _known_shapes() if not _differences(read, opt.fields)]
        if len(found) != 1:
            sizes = ", ".join(f"{name} {value}" for name, value in opt.fields.items() if name in _IDENTIFYING)
            raise ConfigError(
                f"{where}: no OPT of the sizes that its tensors have ({sizes}): are files missing? How many attention "
                "heads another model has, they do not tell: pass a toml file of its shape, 'tiered convert SHAPE.toml "
                "--from PATH' (such as configs/models/opt-125m.toml), or put its config.json into the folder"
            )
        shape = found[0]
    check_shape(where, shape, opt.fields)
    return {
        "activation_dropout": 0.0,
        "activation_function": shape.config.get("activation_function", "relu"),
        "architectures": ["OPTForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 2,
        "dropout": 0.1,
        "eos_token_id": 2,
        "init_std": 0.02,
        "layerdrop": 0.0,
        "model_type": "opt",
        "num_attention_heads": shape.config["num_attention_heads"],
        "pad_token_id": 1,
        "prefix": "</s>",
        "use_cache": True,
        **opt.fields,
    }


def opt_files(config: Mapping[str, Any]) -> dict[str, bytes]:
    """config.json and generation_config.json of a model with this configuration."""
    tokens = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    files = {"config.json": config, "generation_config.json": {"_from_model_config": True, **tokens}}
    return {name: f"{json.dumps(value, indent=2, sort_keys=True)}\n".encode() for name, value in files.items()}


def check_shape(where: str, shape: ShapeFile, found: Mapping[str, Any]) -> None:
    """Raise ConfigError where the checkpoint `where`, with the configuration `found`, is not of `shape`."""
    differences = _differences(shape, found)
    if differences:
        raise ConfigError(
            f"{where}: its weights are not those of {shape.name}: {'; '.join(differences)}; pass all files of the "
            "model, or the name of the one that these are of"
        )


def _differences(shape: ShapeFile, found: Mapping[str, Any]) -> list[str]:
    wanted = {name: shape.config[name] for name in _IDENTIFYING if name in shape.config and name in found}
    return [f"{name} is {found[name]}, expected {value}" for name, value in wanted.items() if found[name] != value]


def _known_shapes() -> Iterator[ShapeFile]:
    shapes = (ShapeFile.read(path) for path in sorted((config_dir() / "models").glob("*.toml")))
    return (shape for shape in shapes if shape.config.get("model_type") == "opt")


def _check_layers(where: str, parts: Sequence[Mapping[str, Region]]) -> None:
    """Raise CheckpointError where a layer lacks what another one has, or a part what another one has."""
    for number, part in enumerate(parts):
        different = sorted(parts[0].keys() ^ part.keys())
        if different:
            raise CheckpointError(
                f"{where}: parts 0 and {number} hold different tensors: {some(different)} is only in one of them; "
                "download the files of both again"
            )
    layers: dict[int, set[str]] = defaultdict(set)
    for name in parts[0]:
        if match := _LAYER.fullmatch(name):
            layers[int(match[1])].add(match[2])
    every = sorted(set().union(*layers.values()))
    missing = (
        f"decoder.layers.{number}.{name}"
        for number in range(max(layers, default=-1) + 1)
        for name in every
        if name not in layers.get(number, ())
    )
    found = list(islice(missing, SHOWN + 1))
    if found:
        raise CheckpointError(f"{where}: lacks {some(found)}, which other layers have; download what is missing")


def _gather(where: str, parts: Sequence[Mapping[str, Region]]) -> Iterator[tuple[str, Gathered]]:
    """Each tensor by Hugging Face's name, and the pieces of the parts that it is made of."""
    for name in filterfalse(_STATELESS.search, parts[0]):
        regions = [part[name] for part in parts]
        shape = regions[0].shape
        odd = [number for number, part in enumerate(regions) if (part.shape, part.dtype) != (shape, regions[0].dtype)]
        is_matrix = name.endswith(".weight")
        if odd:
            raise CheckpointError(
                f"{where}: {name} is {list(regions[odd[0]].shape)} of {regions[odd[0]].dtype} in part {odd[0]}, "
                f"expected {list(shape)} of {regions[0].dtype} as in part 0; download the files of both again"
            )
        if (_ROWS.search(name) or _COLUMNS.search(name)) and len(shape) != 1 + is_matrix:
            raise CheckpointError(f"{where}: {name} is {list(shape)}, expected a {'matrix' if is_matrix else 'vector'}")
        if ".qkv_proj." in name:
            third, rest = divmod(shape[0], len(_ORDER))
            if rest:
                raise CheckpointError(f"{where}: {name} is {list(shape)}, expected as many keys, values and queries")
            for number, letter in enumerate(_ORDER):
                thirds = [region.rows(number * third, (number + 1) * third) for region in regions]
                yield _renamed(name.replace("qkv_proj", f"{letter}_proj")), Gathered.of(thirds)
        elif _ROWS.search(name):
            yield _renamed(name), Gathered.of(regions)
        elif _COLUMNS.search(name):
            yield _renamed(name), Gathered.of(regions, side_by_side=True)
        else:
            yield _renamed(name), Gathered.of(regions[:1])


def _renamed(name: str) -> str:
    """Hugging Face's name for metaseq's `name`."""
    for old, new in _RENAMED.items():
        name = new + name.removeprefix(old) if name.startswith(old) else name
    return f"model.{name}" if name.startswith("decoder.") else name


def _fields(where: str, tensors: Mapping[str, Gathered]) -> dict[str, Any]:
    """What tensors tell of the configuration."""
    wanted = ("embed_tokens", "embed_positions", "layers.0.fc1")
    shapes = []
    for name in wanted:
        found = tensors.get(f"model.decoder.{name}.weight")
        if found is None or len(found.stored.shape) != 2:
            raise CheckpointError(
                f"{where}: lacks decoder.{name}.weight, expected the tensors of an OPT model by metaseq's names; it "
                f"has {some(sorted(tensors))}"
            )
        shapes.append(found.stored.shape)
    (tokens, embedded), (positions, _), (ffn, hidden) = shapes
    layers = {int(match[1]) for name in tensors if (match := _LAYER.fullmatch(name.removeprefix("model.")))}
    return {
        "do_layer_norm_before": "model.decoder.final_layer_norm.weight" in tensors,
        "ffn_dim": ffn,
        "hidden_size": hidden,
        "max_position_embeddings": positions - 2,
        "num_hidden_layers": len(layers),
        "torch_dtype": str(tensors["model.decoder.embed_tokens.weight"].stored.dtype).removeprefix("torch."),
        "vocab_size": tokens,
        "word_embed_proj_dim": embedded,
    }
