"""What is decided before anything is read holds for what is written."""

from pathlib import Path

import pytest

from tests.convert.models import TRAINED
from tiered.convert import ConvertOptions, convert_checkpoint
from tiered.convert.convert import Conversion
from tiered.convert.open import open_checkpoint
from tiered.convert.place import Folder


@pytest.mark.parametrize("quant", ["int4", "int8", "none"])
def test_without_zstd_blocks_are_as_large_as_their_recipes_say(quant: str, tmp_path: Path) -> None:
    options = ConvertOptions(quant=quant, compress="none")
    source, recipe = open_checkpoint(Folder(TRAINED), options, Conversion(tmp_path / "out", options, None))
    result = convert_checkpoint(TRAINED, tmp_path / "out", options)
    sizes = {block.path: (result.store / block.path).stat().st_size for block in recipe.files}
    assert sizes == {block.path: block.nbytes(source.dtype) for block in recipe.files}
    assert result.weights == recipe.weights and result.unquantized == recipe.unquantized
