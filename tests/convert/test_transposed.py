"""Weights that a checkpoint holds transposed: a store has them as [out, in], whatever is read at a time."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.convert.models import expected_weights, read_store, save_bin, save_model
from tests.quick import ONE_FORM
from tests.tiny import Tiny
from tests.tiny_configs import tiny_config
from tiered.arch import build_skeleton
from tiered.convert import ConvertOptions, convert_checkpoint
from tiered.convert.safetensors_reader import SafetensorsReader
from tiered.convert.transposed import transposed_panels

pytestmark = ONE_FORM


@pytest.mark.parametrize("panel_nbytes", [1, 40, 1 << 20])
@pytest.mark.parametrize("shape", [(5, 7), (3, 5, 7)])
def test_rows_of_the_transposed_are_columns_of_what_is_read(
    shape: tuple[int, ...], panel_nbytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tiered.convert.source.PANEL_NBYTES", panel_nbytes)
    tensor = torch.randn(shape)
    path = tmp_path / "model.safetensors"
    save_file({"w": tensor}, path)
    reader, expected = SafetensorsReader(), tensor.mT.flatten(end_dim=-2)
    for rows in (None, range(len(expected)), range(1, 4), range(len(expected) - 7, len(expected)), range(2, 2)):
        panels = [panel.clone() for panel in transposed_panels(reader, path, "w", rows)]
        assert torch.equal(torch.cat([torch.empty(0, 5), *panels]), expected if rows is None else expected[list(rows)])
    reader.close()


@pytest.mark.parametrize("name", ["gpt2", "gpt_oss"])
def test_a_store_has_out_rows_whichever_format_it_comes_from(name: str, tiny: Tiny, tmp_path: Path) -> None:
    model = tiny.model(name)
    transposed = {p.name for b in build_skeleton(tiny_config(name)).blocks() for p in b.parameters if p.is_transposed}
    assert transposed
    expected = {n: t.mT if n in transposed else t for n, t in expected_weights(model).items()}
    for save in (save_model, save_bin):
        source = save(tmp_path / save.__name__, model)
        convert_checkpoint(source, tmp_path / f"{save.__name__}.tiered", ConvertOptions(quant="none"))
        found = read_store(tmp_path / f"{save.__name__}.tiered")
        assert all(torch.equal(found[n], tensor) for n, tensor in expected.items())
