"""Shapes of models as JSON: those that ship with the package, and the one that a store keeps beside its blocks.

In: JSON. Out: a `ModelShape`, without torch or a graph. `tiered/shapes.py` makes them, in a second or more each; a plan
is to be answered before that. A run of equal blocks, and of equal units in a block, is written once with a count.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, fields
from itertools import groupby
from pathlib import Path
from typing import Any, Final

from tiered.errors import CorruptError, StoreError
from tiered.files import MOST_JSON_NBYTES, read_whole
from tiered.plan.inputs import ExpertShape, ModelShape
from tiered.plan.kv import group_from_json
from tiered.plan.placement import Tape
from tiered.plan.state import StateShape

QUANTS: Final = ("int4", "int8", "none")
SHAPES_NAME: Final = "shapes.json"
"""In configs/models: for each name what `shape_to_json` gives for each of QUANTS, and the `digest` of its toml file."""
STORE_SHAPE_NAME: Final = "shape.json"
"""In a store's folder."""
_POSITIONS: Final = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")
"""What families call the number of positions that they are made for. BLOOM's seq_length is none: it goes beyond."""
_VERSION: Final = 5
"""Of what the numbers of a shape mean: shapes that stores keep from before are made anew."""


def shape_to_json(shape: ModelShape) -> dict[str, Any]:
    """`shape` as plain dictionaries, lists and numbers."""
    experts = shape.experts
    found = {field.name: getattr(shape, field.name) for field in fields(shape)}
    found |= {"tape": _tape_to_json(shape.tape), "groups": [asdict(group) for group in shape.groups]}
    found["state"] = None if shape.state is None else asdict(shape.state)
    if experts is not None:
        found["experts"] = vars(experts) | {"dense": _tape_to_json(experts.dense)}
    return found


def shape_from_json(value: dict[str, Any]) -> ModelShape:
    """The shape that `shape_to_json` wrote; raises KeyError, TypeError or ValueError where `value` is no such."""
    found = dict(value)
    found |= {"tape": _tape_from_json(found["tape"]), "groups": tuple(map(group_from_json, found["groups"]))}
    state = found.get("state")  # configs/models has shapes from before there were any
    found["state"] = None if state is None else StateShape.from_json(state)
    if found["experts"] is not None:
        dense = _tape_from_json(found["experts"]["dense"])
        found["experts"] = ExpertShape(**{**found["experts"], "dense": dense})
    return ModelShape(**found)


def known_shapes(models: Path, name: str) -> dict[str, ModelShape] | None:
    """The shapes of the model `name` by quantization, from the folder configs/models; None where it has none."""
    found = json.loads((models / SHAPES_NAME).read_bytes()).get(name)
    return None if found is None else {quant: shape_from_json(found[quant]) for quant in QUANTS}


def positions_of(config: Mapping[str, Any]) -> int | None:
    """Tokens of a sequence that a model with this configuration is made for; None where it names no limit."""
    return next((found for name in _POSITIONS if type(found := config.get(name)) is int and found > 0), None)


def read_store_shape(folder: Path) -> ModelShape | None:
    """The shape that the store at `folder` keeps; None where it keeps none, or has changed since."""
    try:
        found = json.loads(read_whole(folder / STORE_SHAPE_NAME, StoreError, MOST_JSON_NBYTES))
        return shape_from_json(found["shape"]) if found["of"] == _identity(folder) else None
    except (CorruptError, OSError, AttributeError, KeyError, TypeError, ValueError, RecursionError):
        return None


def write_store_shape(folder: Path, shape: ModelShape) -> None:
    """Keep `shape` with the store at `folder`: all of it, or nothing. Raises OSError where that cannot be written."""
    # A name of its own: others may open the same store at the same time.
    part = folder / f"{STORE_SHAPE_NAME}-{os.getpid()}"
    try:
        part.write_text(json.dumps({"of": _identity(folder), "shape": shape_to_json(shape)}, separators=(",", ":")))
        part.replace(folder / STORE_SHAPE_NAME)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def _identity(folder: Path) -> list[Any]:
    """What tells whether a store is the one that a shape was made of."""
    return [_VERSION, *(digest(folder / name) for name in ("manifest.json", "config.json"))]


def digest(path: Path) -> str:
    """What tells whether the file at `path` has changed since."""
    return hashlib.blake2b(read_whole(path, StoreError), digest_size=16).hexdigest()


def _tape_to_json(tape: Tape) -> list[Any]:
    """[times, [[times, nbytes, file_nbytes], ...]] for each run of equal blocks."""
    units = list(zip(tape.nbytes, tape.file_nbytes, strict=True))
    blocks = ([[len(list(run)), *unit] for unit, run in groupby(units[n] for n in block)] for block in tape.blocks)
    return [[len(list(run)), block] for block, run in groupby(blocks)]


def _tape_from_json(runs: list[Any]) -> Tape:
    blocks = [block for times, block in runs for _ in range(times)]
    units = [(nbytes, file_nbytes) for block in blocks for times, nbytes, file_nbytes in block for _ in range(times)]
    counts = tuple(sum(times for times, _, _ in block) for block in blocks)
    return Tape(tuple(nbytes for nbytes, _ in units), tuple(file for _, file in units), counts)
