"""Which units a block's tensors go into: whole weights, in order, small ones apart, none larger than it must be."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.convert.models import TRAINED
from tiered.arch import build_skeleton, text_config
from tiered.convert import ConvertOptions, convert_checkpoint
from tiered.convert.block import _joined, finished_block
from tiered.convert.blocks import RANGE_NBYTES, BlockRecipe, RangeRecipe, TensorRecipe
from tiered.convert.convert import Conversion
from tiered.convert.open import open_checkpoint
from tiered.convert.place import Folder
from tiered.convert.recipe import make_recipe
from tiered.quant import GroupScheme
from tiered.store import CHUNK_NBYTES, PAGE, Store

SCHEMES = (None, GroupScheme(4), GroupScheme(8))
EXPERT = {"gate_up_proj": (128, 64), "down_proj": (64, 64)}


def recipe(shapes: list[tuple[int, int, int]], small: int = 0) -> BlockRecipe:
    tensors = [
        TensorRecipe(f"x.t{i}.weight", (rows, 64 * groups), SCHEMES[kind], "small" if i < small else "dense")
        for i, (rows, groups, kind) in enumerate(shapes)
    ]
    return BlockRecipe("layer-000", "layer", "x.", tuple(tensors))


def half(tensor: TensorRecipe) -> torch.dtype:
    return torch.float16


@given(
    shapes=st.lists(
        st.tuples(st.integers(1, 1 << 13), st.integers(1, 100), st.integers(0, 2)), min_size=1, max_size=12
    ),
    small=st.integers(0, 4),
)
def test_units_hold_every_weight_once_in_order_and_merge_up_to_a_chunk(
    shapes: list[tuple[int, int, int]], small: int
) -> None:
    block = recipe(shapes, small)
    units = block.units(half)
    parts = [part for unit in units for part in unit.ranges]
    assert tuple(dict.fromkeys(part.whole for part in parts)) == block.tensors
    for tensor in block.tensors:
        of_it = [part for part in parts if part.whole == tensor]
        rows = tensor.matrix[0] if len(tensor.shape) > 1 else 1
        assert [row for part in of_it for row in part.rows] == list(range(rows))
        assert tensor.kind == "small" or all(part.nbytes(torch.float16) <= RANGE_NBYTES for part in of_it)
    assert [unit.kind for unit in units] == sorted((unit.kind for unit in units), reverse=True)
    assert len({unit.name for unit in units}) == len(units)
    for unit in units:
        assert unit.nbytes % PAGE == 0 and {part.whole.kind for part in unit.ranges} == {unit.kind}
        assert unit.kind == "small" or len(unit.ranges) == 1 or unit.nbytes <= CHUNK_NBYTES
    dense = [unit for unit in units if unit.kind == "dense"]
    for unit, following in pairwise(dense):
        together = sum(part.nbytes(torch.float16) for part in (*unit.ranges, following.ranges[0]))
        assert together > CHUNK_NBYTES


def test_a_large_weight_is_stored_in_ranges_of_its_rows_and_an_expert_with_all_its_matrices() -> None:
    step = RANGE_NBYTES // (1024 * torch.float16.itemsize)
    large = TensorRecipe("x.up.weight", (3 * step, 1024), None)
    stacks = [TensorRecipe(f"x.moe.{n}", (3, *shape), GroupScheme(4), "expert") for n, shape in EXPERT.items()]
    last = TensorRecipe("x.down.weight", (64, 64), None)
    units = BlockRecipe("layer-000", "layer", "x.", (large, *stacks, last)).units(half)
    assert [(unit.name, unit.kind) for unit in units] == [
        *((f"up#{number}", "dense") for number in range(3)),
        *((f"moe#{number}", "expert") for number in range(3)),
        ("down", "dense"),
    ]
    assert [(part.start, part.stop) for unit in units[:3] for part in unit.ranges] == [
        (0, step),
        (step, 2 * step),
        (2 * step, 3 * step),
    ]
    assert units[4].ranges == (RangeRecipe(stacks[0], 1, 128, 256), RangeRecipe(stacks[1], 1, 64, 128))
    assert [part.shape for part in units[4].ranges] == list(EXPERT.values())


@pytest.mark.parametrize(("rows", "columns", "scheme"), [(12288, 49152, None), (200, 1 << 20, GroupScheme(4))])
def test_no_range_is_larger_because_its_rows_are_rounded(rows: int, columns: int, scheme: GroupScheme | None) -> None:
    """Of a multiple of 64 rows each: 64 are a large part of a range here, or more than one."""
    ranges = TensorRecipe("x.down.weight", (rows, columns), scheme).ranges(torch.float16)
    assert all(part.nbytes(torch.float16) <= RANGE_NBYTES or len(part.rows) == 64 for part in ranges)
    assert {len(part.rows) % 64 for part in ranges[:-1]} == {0}
    assert [row for part in ranges for row in part.rows] == list(range(rows))


def test_a_dense_unit_is_called_by_its_first_weight_and_how_many_follow() -> None:
    units = recipe([(1, 1, 0), (1, 1, 0), (4096, 64, 1), (1, 1, 0)], small=1).units(half)
    assert [unit.name for unit in units] == ["small", "t1+2"]
    units = recipe([(1 << 13, 64, 1), (1 << 13, 64, 1), (1, 1, 0)]).units(half)
    assert [unit.name for unit in units] == ["t0", "t1", "t2"]


def test_a_store_has_the_units_of_its_recipes(tmp_path: Path) -> None:
    options = ConvertOptions(quant="int4")
    source, made = open_checkpoint(Folder(TRAINED), options, Conversion(tmp_path / "out", options, None))
    store = Store.open(convert_checkpoint(TRAINED, tmp_path / "out", options).store)
    for block in made.files:
        units = store.layouts[block.path].units
        expected = [(unit.name, unit.kind, unit.nbytes) for unit in block.units(source.dtype)]
        assert [(unit.name, unit.kind, unit.nbytes) for unit in units] == expected
        assert [list(unit.weights) for unit in units] == [
            [part.name for part in unit.ranges] for unit in block.units(source.dtype)
        ]
    layer = store.layout(store.blocks["layer-003"]).units
    assert [unit.name for unit in layer] == ["small", "self_attn.q_proj+5"]
    assert all(weight.scheme is None and len(weight.shape) == 1 for weight in layer[0].weights.values())


def layer_recipe(values: dict[str, Any]) -> BlockRecipe:
    made = make_recipe(build_skeleton(text_config(values)), ConvertOptions())
    return next(block for block in made.files if block.role == "layer")


def test_weights_follow_in_the_order_of_their_use() -> None:
    block = layer_recipe({"model_type": "opt", "hidden_size": 512, "ffn_dim": 2048, "num_attention_heads": 8})
    dense = [t.name.removeprefix(block.prefix) for t in block.tensors if t.kind == "dense"]
    assert dense[:4] == [f"self_attn.{name}_proj.weight" for name in ("q", "k", "v", "out")]
    assert dense[4:] == ["fc1.weight", "fc2.weight"]
    small = {t.name.removeprefix(block.prefix) for t in block.tensors if t.kind == "small"}
    assert "self_attn.q_proj.bias" in small and "final_layer_norm.weight" in small


def test_large_tensors_that_nothing_borrows_are_dense_and_come_first() -> None:
    # A router of 1 MiB and more is not lent: it comes before the weights that are.
    values = {"hidden_size": 4096, "num_attention_heads": 32, "num_hidden_layers": 1, "num_local_experts": 256}
    block = layer_recipe({"model_type": "mixtral", **values, "intermediate_size": 64})
    lent = [t.name.removeprefix(block.prefix) for t in block.tensors if t.kind != "small"]
    assert lent[0] == "mlp.gate.weight" and lent[-2:] == ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def test_a_finished_block_is_recognized_with_its_units_and_no_other(tmp_path: Path) -> None:
    for options in (ConvertOptions(quant="int8", compress="planes"), ConvertOptions(quant="none", compress="planes")):
        out = tmp_path / str(options.quant)
        _, made = open_checkpoint(Folder(TRAINED), options, Conversion(out, options, None))
        store = Store.open(convert_checkpoint(TRAINED, out, options).store)
        files = {file.path: file for file in store.manifest.files}
        layers = [block for block in made.files if block.role == "layer"]
        for block in made.files:
            assert finished_block(out, block) == files[block.path]
        turned = BlockRecipe(layers[0].name, "layer", layers[0].prefix, tuple(reversed(layers[0].tensors)))
        assert finished_block(out, turned) is None
        assert finished_block(out, BlockRecipe("layer-000", "layer", layers[1].prefix, layers[1].tensors)) is None


def test_pieces_are_joined_while_their_memory_is_theirs() -> None:
    """Readers put the next panel where an earlier one was."""
    memory = bytearray(4)

    def pieces() -> Iterator[memoryview]:
        for number in range(3):
            memory[:] = bytes([number] * 4)
            yield memoryview(memory)

    assert _joined(pieces(), torch.uint8, (3, 4)).tolist() == [[0] * 4, [1] * 4, [2] * 4]
    assert _joined(iter(()), torch.uint8, (3, 0)).shape == (3, 0)
