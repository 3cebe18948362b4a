"""Writes an OPT model in each of the forms that its weights are held in, with their names, padding and pickled classes.

    python -m tools.opt_forms CHECKPOINT OUT --form raw|resharded|singleton|numpy [--parts 2] [--shards 3] [--legacy]

CHECKPOINT is a Hugging Face folder. What it has of heads, activation and tokens is not in OUT, as it is in none of the
forms. The model is held in memory.
"""

import argparse
import sys
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

FORMS = ("raw", "resharded", "singleton", "numpy")
State = Mapping[str, torch.Tensor]


def write_form(
    form: str, folder: Path, state: State, *, parts: int = 1, shards: int = 1, legacy: bool = False, **names: str
) -> Path:
    """Write `state`, the tensors of a model by Hugging Face's names, into the new folder `folder`.

    `parts` and `shards` are for the forms that have them, `legacy` is torch's format of old; `names` may have another
    `series` than the usual one.
    """
    folder.mkdir(parents=True)
    tensors = dict(metaseq_names(state))
    if form == "numpy":
        for name, tensor in {**tensors, "lm_head.weight": tensors["decoder.embed_tokens.weight"]}.items():
            with (folder / name).open("wb") as file:
                np.save(file, tensor.numpy())
        return folder
    parts = 1 if form == "singleton" else parts
    series = names.get("series", {"raw": "checkpoint_last", "resharded": "reshard", "singleton": "restored"}[form])
    for part in range(parts):
        mine = OrderedDict(part_tensors(tensors, part, parts))
        path = folder / (f"{series}.pt" if form == "singleton" else f"{series}-model_part-{part}.pt")
        if form != "raw":
            mine["decoder.embed_positions._float_tensor"] = torch.zeros(1)
            mine["decoder.output_projection.weight"] = mine["decoder.embed_tokens.weight"]
            save_checkpoint({"model": mine}, path, legacy)
            continue
        modules = flattened(mine)
        for shard in range(shards):
            save_checkpoint(fsdp_shard(modules, shard, shards), path.with_name(f"{path.stem}-shard{shard}.pt"), legacy)
    return folder


def metaseq_names(state: State) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of `state`, those by Hugging Face's names, under metaseq's."""
    for name, tensor in state.items():
        if name == "lm_head.weight":
            continue
        name = name.removeprefix("model.").replace("decoder.final_layer_norm", "decoder.layer_norm")
        yield name.replace("project_in.", "project_in_dim.").replace("project_out.", "project_out_dim."), tensor


def part_rules(names: Iterable[str]) -> Iterator[tuple[str, tuple[str, ...], int | None]]:
    """What a model-parallel part holds of the tensors `names`: each of its tensors, those that it has one below the
    other (queries, keys and values are fused), and the dimension along which the parts share them, None where every
    part has all."""
    for name in names:
        if ".k_proj." in name or ".v_proj." in name:
            continue
        if ".q_proj." in name:
            yield name.replace("q_proj", "qkv_proj"), tuple(name.replace("q_proj", f"{x}_proj") for x in "kvq"), 0
        elif "embed_tokens" in name or ".fc1." in name:
            yield name, (name,), 0
        elif name.endswith((".out_proj.weight", ".fc2.weight")):
            yield name, (name,), 1
        else:
            yield name, (name,), None


def part_tensors(tensors: State, part: int, parts: int) -> Iterator[tuple[str, torch.Tensor]]:
    """What model-parallel part `part` of `parts` holds."""
    yield "decoder.version", torch.tensor([3.0])
    for name, sources, dim in part_rules(tensors):
        whole = [tensors[source] for source in sources]
        mine = whole if dim is None else [tensor.chunk(parts, dim)[part].contiguous() for tensor in whole]
        yield name, torch.cat(mine) if len(mine) > 1 else mine[0]


def flattened(part: State) -> dict[str, tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """For each module that FSDP wraps, its parameters, and all of them in one vector."""
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in part.items():
        path = ".".join(name.split(".")[:3]) if name.startswith("decoder.layers.") else ""
        if name != "decoder.version":
            modules.setdefault(path, {})[name.removeprefix(f"{path}.")] = tensor
    return {path: (own, torch.cat([tensor.reshape(-1) for tensor in own.values()])) for path, own in modules.items()}


def fsdp_shard(
    modules: Mapping[str, tuple[dict[str, torch.Tensor], torch.Tensor]], shard: int, shards: int
) -> dict[str, Any]:
    """Shard `shard` of `shards` of a part, as fairscale's FSDP cuts it: a slice of each module's vector."""
    model = OrderedDict({"decoder.version": torch.tensor([3.0])})
    metadata = []
    for path, (tensors, vector) in modules.items():
        numel = -(-vector.numel() // shards)
        mine = vector[shard * numel : (shard + 1) * numel]
        padding = numel - mine.numel()
        model[".".join(filter(None, (path, "flat_param_0")))] = torch.cat([mine, mine.new_zeros(padding)])
        names, shapes = list(tensors), [tensor.shape for tensor in tensors.values()]
        params = {"names": names, "shapes": shapes, "numels": [prod(shape) for shape in shapes], "padding": padding}
        module = {"fsdp_path": path, "params": {"flat_param_0": params}}
        metadata.append({**module, "no_broadcast_optim_state": False, "shared_param_info": []})
    return {
        "model": model,
        "shard_metadata": {"param_metadata": metadata, "buffer_names": ["decoder.version"]},
        "optimizer_history": [{"optimizer_name": "FP16Optimizer", "num_updates": 143000}],
        "last_optimizer_state": None,
    }


def save_checkpoint(checkpoint: dict[str, Any], path: Path, legacy: bool) -> None:
    """Save `checkpoint` with what the training program leaves beside the tensors."""
    with _foreign_classes() as (dict_config, meter):
        config = dict_config()
        config.__dict__ = {
            "_content": {"model": {"arch": "transformer_lm_megatron"}},
            "_metadata": meter(),
            "_parent": config,
        }
        beside = {
            "cfg": config,
            "args": Namespace(arch="transformer_lm_megatron", fp16=True),
            "extra_state": {"metrics": [("train", {"loss": meter()})], "epoch": 1},
        }
        torch.save({**beside, **checkpoint}, path, _use_new_zipfile_serialization=not legacy)


@contextmanager
def _foreign_classes() -> Iterator[tuple[type, type]]:
    """Classes of packages that are not installed here, as long as they are pickled."""
    names = {"omegaconf.dictconfig": "DictConfig", "metaseq.logging.meters": "AverageMeter"}
    modules = {name: ModuleType(name) for path in names for name in _with_parents(path)}
    for module, name in names.items():
        setattr(modules[module], name, type(name, (), {"__module__": module}))
    sys.modules.update(modules)
    try:
        config, meter = (getattr(modules[module], name) for module, name in names.items())
        yield config, meter
    finally:
        for name in modules:
            del sys.modules[name]


def _with_parents(module: str) -> Iterator[str]:
    parts = module.split(".")
    return (".".join(parts[: number + 1]) for number in range(len(parts)))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.opt_forms", description="An OPT model in another form.")
    parser.add_argument("checkpoint", type=Path, help="a Hugging Face folder")
    parser.add_argument("out", type=Path, help="the folder to write")
    parser.add_argument("--form", choices=FORMS, required=True)
    parser.add_argument("--parts", type=int, default=1, help="model-parallel parts")
    parser.add_argument("--shards", type=int, default=1, help="FSDP shards of each part")
    parser.add_argument("--legacy", action="store_true", help="torch's format before 1.6")
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.checkpoint, dtype="auto", local_files_only=True)
    counts = {"parts": options.parts, "shards": options.shards}
    write_form(options.form, options.out, model.state_dict(), legacy=options.legacy, **counts)


if __name__ == "__main__":
    main()
