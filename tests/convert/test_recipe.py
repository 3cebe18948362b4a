"""What is decided before anything is read holds for what is written."""

from pathlib import Path
from typing import Final

import pytest
import torch

from tests.convert.models import TRAINED, save_model, tiny_model
from tiered.convert import ConvertOptions, convert_checkpoint
from tiered.convert.convert import Conversion
from tiered.convert.open import open_checkpoint
from tiered.convert.place import Folder
from tiered.convert.source import StoredTensor
from tiered.quant import Scheme
from tiered.store import Store
from tiered.stream import EmbeddingRows


@pytest.mark.parametrize("quant", ["int4", "int8", "none"])
def test_without_zstd_blocks_are_as_large_as_their_recipes_say(quant: str, tmp_path: Path) -> None:
    options = ConvertOptions(quant=quant, compress="none")
    source, recipe = open_checkpoint(Folder(TRAINED), options, Conversion(tmp_path / "out", options, None))
    result = convert_checkpoint(TRAINED, tmp_path / "out", options)
    sizes = {block.path: (result.store / block.path).stat().st_size for block in recipe.files}
    assert sizes == {block.path: block.nbytes(source.dtype) for block in recipe.files}
    assert result.weights == recipe.weights and result.unquantized == recipe.unquantized


@pytest.mark.parametrize(
    ("tied", "quant", "expected"),
    [(False, "int4", ["rows"]), (True, "int4", ["q", "scale", "zero"]), (False, "none", [""])],
)
def test_an_embedding_that_is_not_the_head_too_has_its_scales_in_its_rows(
    tied: bool, quant: str, expected: list[str], tmp_path: Path
) -> None:
    """So nothing of it is resident, and its plan counts nothing."""
    source = save_model(tmp_path / "source", tiny_model("llama", tied=tied))
    store = Store.open(convert_checkpoint(source, tmp_path / "out", ConvertOptions(quant=quant)).store)
    (weight,) = store.layout(store.blocks["embed"]).weights.values()
    assert sorted(weight.parts) == expected
    assert (EmbeddingRows.side_nbytes(weight) > 0) == ("scale" in expected)


CHOICES: Final = (
    # --quant, what the source holds, block -> in the store
    ("keep", "int4-g128", "layer", "int4-g128"),
    ("keep", "int8-g32", "head", "int8-g32"),
    ("keep", "fp8", "layer", "int8-g64"),
    ("keep", None, "layer", None),
    ("int4", "int4-g128", "layer", "int4-g128"),
    ("int4", "int8-g32", "layer", "int4-g64"),
    ("int4", "int8-g32", "head", "int8-g32"),
    ("int4", "fp8", "layer", "int4-g64"),
    ("int4", None, "embed", "int8-g64"),
    ("int8", "mxfp4-g32", "layer", "mxfp4-g32"),
    ("int8", None, "layer", "int8-g64"),
    ("keep", "int4-g32", "embed", "int4-g32"),
    ("keep", "mxfp4-g32", "embed", "mxfp4-g32"),
    ("none", "int4-g128", "layer", None),
)


@pytest.mark.parametrize(("quant", "held", "role", "expected"), CHOICES)
def test_what_is_quantized_in_no_more_bits_is_kept(
    quant: str, held: str | None, role: str, expected: str | None
) -> None:
    scheme = None if held in (None, "fp8") else Scheme.parse(str(held))
    stored = None if held is None else StoredTensor(torch.float32, (64, 128), "a method", scheme)
    found = ConvertOptions(quant=quant).scheme_of(role, stored)
    assert (found and found.name) == expected
