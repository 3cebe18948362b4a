"""`tiered inspect`: its figures are those of the files and of the planner, and it reads no weights."""

import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import tiered.cli.inspect
from tests.commands import make_mixture, run_here
from tests.plan.plans import STREAMING
from tiered.cli.commands import inspect as command
from tiered.convert import ConvertOptions, convert_checkpoint
from tiered.errors import ConfigError, DeviceBudgetError, StoreError
from tiered.plan import Held, Needs, fit_units
from tiered.plan.placement import Tape
from tiered.prepare import measure_inputs
from tiered.store import Store
from tiered.units import MIB, parse_size

DOCS = Path(__file__).parents[1] / "data/models/opt-docs-8m"


@pytest.fixture(scope="module")
def docs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inspect") / "docs.tiered"
    convert_checkpoint(DOCS, path, ConvertOptions(quant="int4"))
    return path


def inspect(*arguments: str | Path) -> str:
    result = CliRunner().invoke(command, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def inspect_json(*arguments: str | Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(inspect(*arguments, "--json"))
    return found


def test_text_names_the_model_and_folds_equal_layers(docs: Path) -> None:
    text = inspect(docs)
    assert "opt, 8 layers" in text
    assert "layers int4-g64, embed int8-g64, head int8-g64" in text
    assert "folder opt-docs-8m" in text
    assert "synthetic" not in text
    assert text.count("layer-00") == 2
    assert re.search(r"layer-000 … layer-007 +8 x +448 KiB +2 +420 KiB ", text)
    assert "estimates" in text
    assert "disk at" not in text


def test_sizes_are_those_of_the_files(docs: Path) -> None:
    found = inspect_json(docs)
    sizes = {path.stem: path.stat().st_size for path in (docs / "blocks").iterdir()}
    assert found["disk_bytes"] == found["model_bytes"] == sum(sizes.values())
    assert found["bytes_per_pass"] == sum(unit.nbytes for units in Store.open(docs).dense_units for unit in units)
    assert found["bits_per_weight"] == pytest.approx(8 * sum(sizes.values()) / found["parameters"])
    # 8 layers, keys and values, 256 numbers each.
    assert found["kv_bytes_per_token"] == 8 * 2 * 256 * (4 if found["dtype"] == "float32" else 2)


@pytest.mark.parametrize("options", [(), ("--context", "512", "--sequences", "3"), ("--dtype", "float32")])
def test_budgets_are_the_planners(docs: Path, options: tuple[str, ...]) -> None:
    found = inspect_json(docs, "--disk-bandwidth", "2GB/s", *options)
    store = Store.open(docs)
    tape = Tape(
        tuple(unit.memory_nbytes for units in store.dense_units for unit in units),
        tuple(unit.nbytes for units in store.dense_units for unit in units),
        tuple(map(len, store.dense_units)),
    )
    assert found["budgets"][-1]["bytes_read_per_pass"] == 0
    for row in found["budgets"]:
        needs, budget = Needs(**row["needs"]), row["budget_bytes"]
        ways = [fit_units(tape, needs, budget, STREAMING, Held(layers, head=False)) for layers in (False, True)]
        reads = [tape.total - placement.resident_nbytes for placement in ways]  # nothing is compressed here
        assert row["bytes_read_per_pass"] in reads
        assert row["disk_seconds_per_pass"] == row["bytes_read_per_pass"] / 2e9


def test_a_synthetic_store_says_so(tmp_path: Path) -> None:
    path = tmp_path / "tiny.tiered"
    convert_checkpoint("tiny-opt", path, ConvertOptions(synthetic=True, distinct_blocks=1))
    text = inspect(path)
    assert "random weights, for benchmarks only; 1 distinct layer files" in text
    assert "layer-000 … layer-002    3 x" in text
    assert "on disk, where repeated layers are stored once" in text
    assert inspect_json(path)["distinct_blocks"] == 1


def test_a_mixture_says_what_its_experts_take_and_where_they_are_read_on_demand(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = Store.open(make_mixture())
    found, text = inspect_json(store.path), inspect(store.path)
    first, last = found["budgets"][0], found["budgets"][-1]
    nbytes = store.expert_units[0][0].nbytes
    assert [row["experts"] for row in found["blocks"] if row["role"] == "layer"] == [32]
    assert found["experts"]["nbytes"] == nbytes == 212 << 10
    assert (found["experts"]["layers"], found["experts"]["count"], found["experts"]["chosen"]) == (4, 32, 2)
    assert re.search(r"layer-000 … layer-003 +4 x +[\d.]+ MiB +32 experts of 212 KiB \+ 2 ", text)
    assert "32 of 212 KiB in each of 4 layers, 2 for a token" in text
    # One prompt decodes: two experts a layer, less those in memory, and dense units that are not.
    slots = first["experts_in_memory"]
    assert 2 <= slots < 32 and re.search(r"on demand, \d+ of 128 in memory", text)
    dense = sum(unit.nbytes for units in store.dense_units for unit in units) + slots * nbytes - first["resident_bytes"]
    assert first["bytes_read_per_pass"] == dense + int(4 * 2 * (1 - slots / 128) * nbytes)
    assert (last["experts_in_memory"], last["bytes_read_per_pass"]) == (None, 0)
    assert "with their layers" in text and "not taken apart" not in text

    def whole(*inputs: Any) -> Any:
        model, *others = measure_inputs(*inputs)
        return replace(model, experts=None), *others

    monkeypatch.setattr(tiered.cli.inspect, "measure_inputs", whole)
    assert "not taken apart: layers stream whole" in inspect(store.path)
    assert inspect_json(store.path)["experts"] is None


def test_no_weight_is_read(docs: Path, tmp_path: Path) -> None:
    whole = inspect_json(docs)
    copy = tmp_path / "docs.tiered"
    subprocess.run(["cp", "-r", docs, copy], check=True)
    for block in (copy / "blocks").iterdir():
        header = block.read_bytes()[:8]
        start = 8 + int.from_bytes(header, "little")
        with block.open("r+b") as file:
            file.seek(start)
            file.write(bytes(block.stat().st_size - start))
    assert inspect_json(copy)["blocks"] == whole["blocks"]


def test_what_cannot_be_is_refused(docs: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    for arguments, error, message in (
        ([docs, "--context", "100000"], ConfigError, "this model has positions for 2048"),
        ([docs, "--disk-bandwidth", "2GB/h"], ConfigError, "expected a size per second"),
        ([docs, "--dtype", "int3"], ConfigError, "expected auto, bfloat16 or float32"),
        ([docs, "--bus-bandwidth", "fast"], ConfigError, "size 'fast'"),
        ([docs, "--vram", "1GiB"], ConfigError, "--vram is for a GPU"),
        ([docs, "--dtype", "float16"], ConfigError, "auto, bfloat16 or float32"),
        ([docs, "--tiers", "disk,cpu,gpu"], ConfigError, "say for how much GPU memory to plan"),
        ([docs, "--tiers", "gpu", "--vram", "1MiB"], DeviceBudgetError, "--vram"),
        ([tmp_path], StoreError, "not a store"),
    ):
        result = runner.invoke(command, list(map(str, arguments)))
        assert isinstance(result.exception, error)
        assert message in str(result.exception)


def test_what_fits_beside_a_gpu_can_be_asked_without_one(docs: Path) -> None:
    words = ("--tiers", "disk,cpu,gpu", "--device", "emulated", "--bus-bandwidth", "1GB/s")
    with pytest.raises(DeviceBudgetError) as refused:
        CliRunner().invoke(command, [str(docs), *words, "--vram", "1MiB"], catch_exceptions=False)
    assert refused.value.smallest_bytes is not None
    vram = f"{refused.value.smallest_bytes // MIB + 1}MiB"
    found = inspect_json(docs, *words, "--vram", vram)
    assert found["vram_budget_bytes"] == parse_size(vram)
    for row in found["budgets"]:
        assert row["bytes_copied_per_pass"] + row["device_resident_bytes"] == found["bytes_per_pass"]
        assert row["bus_seconds_per_pass"] == row["bytes_copied_per_pass"] / 1e9
        assert sum(row["device_needs"].values()) < found["vram_budget_bytes"]
    assert found["budgets"][-1]["bytes_read_per_pass"] == 0
    all_there = inspect(docs, *words, "--vram", "8GiB")
    assert "on GPU" in all_there and "copied" in all_there and "of --vram 8GiB" in all_there
    assert inspect_json(docs, *words, "--vram", "8GiB")["budgets"][0]["bytes_copied_per_pass"] == 0


@pytest.mark.parametrize(
    "more",
    [
        (),
        pytest.param(("--decode-device", "cpu"), marks=pytest.mark.slow),
        pytest.param(("--resident-gpu", "1MiB"), marks=pytest.mark.slow),
    ],
)
def test_a_run_fits_the_gpu_memory_that_is_named_for_it(docs: Path, more: tuple[str, ...]) -> None:
    words: tuple[str, ...] = ("--tiers", "disk,cpu,gpu", "--device", "emulated", *more)
    with pytest.raises(DeviceBudgetError) as refused:
        CliRunner().invoke(command, [str(docs), *words, "--context", "8", "--vram", "1MiB"], catch_exceptions=False)
    assert refused.value.smallest_bytes is not None
    vram = ("--vram", f"{-(-refused.value.smallest_bytes // MIB)}MiB")
    assert inspect_json(docs, *words, *vram, "--context", "8")["budgets"][-1]["bytes_read_per_pass"] == 0
    asked = ("--prompt-tokens", "4", "-n", "4", "--ignore-eos", "--ram", "2GiB", "--no-measure")
    run: tuple[str | Path, ...] = ("generate", docs, *words, *asked)
    done = run_here(*run, *vram)
    assert done.code == 0, done.err
    # And what inspect refuses does not run.
    done = run_here(*run, "--vram", f"{refused.value.smallest_bytes // MIB - 1}MiB")
    assert done.code == 3 and "of GPU memory are too little" in done.err


def test_a_device_s_float16_is_as_large_as_bfloat16(docs: Path) -> None:
    words = ("--tiers", "disk,cpu,gpu", "--device", "emulated", "--vram", "1GiB", "--context", "64")
    found = inspect_json(docs, *words, "--dtype", "float16")
    assert found["dtype"] == "float16"
    assert found["kv_bytes_per_token"] == inspect_json(docs, *words, "--dtype", "bfloat16")["kv_bytes_per_token"]


def test_a_hybrid_says_when_it_copies(docs: Path) -> None:
    words = ("--tiers", "disk,cpu,gpu", "--device", "emulated", "--vram", "1GiB", "--decode-device", "cpu")
    assert "copied with prompts" in inspect(docs, *words)


def test_exit_code_of_a_missing_store() -> None:
    done = run_here("inspect", "no-such.tiered")
    assert done.code == 4
    assert "no such store" in done.err
