"""The summary of a store agrees with its files."""

from pathlib import Path

import pytest

from tests.convert.models import save_model, tiny_model
from tiered.arch import build_skeleton, load_config
from tiered.convert import ConvertOptions, convert_checkpoint
from tiered.store import Store
from tiered.store.summary import summarize

PLAIN = ConvertOptions(quant="none")
DOCS = Path(__file__).parents[1] / "data/models/opt-docs-8m"


@pytest.fixture(scope="module")
def docs(tmp_path_factory: pytest.TempPathFactory) -> Store:
    path = tmp_path_factory.mktemp("summary") / "docs.tiered"
    convert_checkpoint(DOCS, path, ConvertOptions(quant="int4"))
    return Store.open(path)


def not_in_a_pass(store: Store) -> int:
    """Bytes of the tape's files that a pass does not read: headers, and small tensors, which stay in memory."""
    small = [unit.nbytes for block in store.tape for unit in store.layout(block).units if unit.kind == "small"]
    return sum(block.file.header_nbytes for block in store.tape) + sum(small)


def test_sizes_are_those_of_the_files(docs: Store) -> None:
    summary = summarize(docs)
    sizes = {block.name: docs.file_path(block).stat().st_size for block in docs.manifest.blocks}
    assert summary.disk_nbytes == sum(path.stat().st_size for path in (docs.path / "blocks").iterdir())
    assert summary.model_nbytes == summary.disk_nbytes
    assert summary.tape_nbytes == sum(sizes[name] for name in docs.manifest.tape) - not_in_a_pass(docs)
    for row in summary.rows:
        assert row.smallest_nbytes == row.largest_nbytes == sizes[row.first] == sizes[row.last]
        assert row.nbytes == row.count * sizes[row.first]


def test_parameters_are_those_of_the_model(docs: Store) -> None:
    model = build_skeleton(load_config(docs.path)).model
    model.tie_weights()
    assert summarize(docs).parameters == sum(p.numel() for p in model.parameters())


def test_equal_layers_are_one_row(docs: Store) -> None:
    (layers,) = (row for row in summarize(docs).rows if row.role == "layer")
    assert (layers.first, layers.last, layers.count) == ("layer-000", "layer-007", 8)
    assert layers.formats[0][0] == "int4-g64"
    assert sum(count for _, count in layers.formats) == layers.weights
    assert 4.375 < layers.bits_per_weight < 5
    units = docs.layout(docs.blocks["layer-000"]).units
    assert (layers.units, layers.largest_unit_nbytes) == (len(units), max(unit.nbytes for unit in units)) != (1, 0)


def test_a_tied_head_is_counted_once(docs: Store) -> None:
    head = summarize(docs).rows[-1]
    assert head.role == "head" and head.shared


def test_repeated_layers_count_each_but_lie_on_disk_once(tmp_path: Path) -> None:
    convert_checkpoint("tiny-opt", tmp_path / "all", ConvertOptions(synthetic=True))
    convert_checkpoint("tiny-opt", tmp_path / "one", ConvertOptions(synthetic=True, distinct_blocks=1))
    every, one = (summarize(Store.open(tmp_path / name)) for name in ("all", "one"))
    assert (every.parameters, every.model_nbytes, every.tape_nbytes) == (
        one.parameters,
        one.model_nbytes,
        one.tape_nbytes,
    )
    assert one.disk_nbytes < every.disk_nbytes == every.model_nbytes


def test_compressed_weights_are_marked(tmp_path: Path) -> None:
    convert_checkpoint(DOCS, tmp_path / "planes", ConvertOptions(quant="none", compress="planes"))
    store = Store.open(tmp_path / "planes")
    summary = summarize(store)
    (layers,) = (row for row in summary.rows if row.role == "layer")
    assert layers.formats[0][0].endswith("+planes")
    assert layers.smallest_nbytes < layers.largest_nbytes < layers.nbytes
    tape = sum(row.nbytes for row in summary.rows if row.role in ("layer", "head"))
    assert summary.tape_nbytes == tape - not_in_a_pass(store)


def test_experts_that_are_not_quantized_are_told_like_other_weights(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    convert_checkpoint(save_model(tmp_path / "source", model), tmp_path / "out", PLAIN)
    summary = summarize(Store.open(tmp_path / "out"))
    expected = (("F32", sum(p.numel() for p in model.model.layers[0].parameters())),)
    assert [row.formats for row in summary.rows if row.role == "layer"] == [expected]
