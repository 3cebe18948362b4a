"""What is decided before anything is read holds for what is written."""

from pathlib import Path
from typing import Final

import pytest
import torch

from tests.convert.models import TRAINED
from tiered.convert import ConvertOptions, convert_checkpoint
from tiered.convert.convert import Conversion
from tiered.convert.open import open_checkpoint
from tiered.convert.place import Folder
from tiered.convert.source import StoredTensor
from tiered.quant import Scheme


@pytest.mark.parametrize("quant", ["int4", "int8", "none"])
def test_without_zstd_blocks_are_as_large_as_their_recipes_say(quant: str, tmp_path: Path) -> None:
    options = ConvertOptions(quant=quant, compress="none")
    source, recipe = open_checkpoint(Folder(TRAINED), options, Conversion(tmp_path / "out", options, None))
    result = convert_checkpoint(TRAINED, tmp_path / "out", options)
    sizes = {block.path: (result.store / block.path).stat().st_size for block in recipe.files}
    assert sizes == {block.path: block.nbytes(source.dtype) for block in recipe.files}
    assert result.weights == recipe.weights and result.unquantized == recipe.unquantized


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
