"""The benchmark of the kernels, on a layer so small that only the output's structure means anything."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest
import torch

from tiered.kernels import Kernels
from tools import bench_kernels
from tools import kernel_race as race

TOOL: Final = Path(bench_kernels.__file__)
TINY: Final = ("--shapes", "128x256", "--rows", "1,3", "--seconds", "0.01", "--read-size", "8", "--cache", "0")


def run(*words: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(TOOL.parent.parent), "OMP_WAIT_POLICY": "passive", **variables}
    command = [sys.executable, str(TOOL), *TINY, *map(str, words)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True)


@pytest.mark.inputs("tools/bench_kernels.py", "tiered/bench", "tiered/kernels")
def test_tables_checks_figures_and_plot_agree(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figures, picture = tmp_path / "figures.json", tmp_path / "roofline.svg"
    printed = run("--json", figures, "--plot", picture).stdout
    found: dict[str, Any] = json.loads(figures.read_text(encoding="utf-8"))
    assert [row["rows"] for row in found["rows"]] == [1, 3]
    assert found["read_bandwidth"] == max(row["read_bandwidth"] for row in found["rows"])
    for row in found["rows"]:
        assert row["packed_nbytes"] == 128 * 256 * 35 // 64
        assert {*bench_kernels.TORCH} < set(row["seconds"])
        for name, seconds in row["seconds"].items():
            assert row["flops"][name] == pytest.approx(2 * row["rows"] * 128 * 256 / seconds)
    tables = [line.split("|")[1:-1] for line in printed.splitlines() if line.startswith(("| 1 |", "| 3 |"))]
    ours = [name for name in found["rows"][0]["seconds"] if name not in bench_kernels.TORCH]
    assert len(tables) == 2 * len(ours)
    for table, name, row in zip(tables, [name for name in ours for _ in "13"], [0, 1] * len(ours), strict=True):
        seconds = found["rows"][row]["seconds"]
        assert float(table[1]) == pytest.approx(seconds[name] * 1e3, abs=0.01)
        ratios = [seconds[other] / seconds[name] for other in bench_kernels.TORCH]
        assert [float(cell) for cell in table[6::2]] == pytest.approx(ratios, abs=0.01)
    assert printed.count("PASS") + printed.count("FAIL") == len(found["checks"])
    assert all(check["passed"] for check in found["checks"] if "error" in check["text"])
    assert "</svg>" in picture.read_text(encoding="utf-8")


@pytest.mark.inputs("tools/bench_kernels.py", "tiered/bench", "tiered/kernels")
def test_without_matplotlib_the_tables_are_printed_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "matplotlib.py").write_text("raise ImportError\n", encoding="utf-8")
    paths = f"{tmp_path}:{TOOL.parent.parent}"
    done = run("--plot", tmp_path / "none.png", "--kernels", "torch", "--modes", "invariant", PYTHONPATH=paths)
    assert "| 3 |" in done.stdout
    assert done.stderr.count("matplotlib is not installed") == 1


def test_contestants_compute_the_same_product() -> None:
    weight = race.random_weight(64, 256)
    inputs = race.Inputs(5, 256)
    with Kernels(1) as kernels:
        made = race.our_contestants({"ours": kernels}, weight, 0) + race.torch_contestants(weight, 0)
        results = {contestant.name: contestant.call(inputs) for contestant in made}
    expected = inputs.bf16.double() @ weight.rows(0, 64, torch.float32).double().T
    for name in ("ours", race.TORCH_INT4, race.TORCH_BF16):
        assert (results[name].double() - expected).norm() / expected.norm() < 6e-3, name
    int8 = next(contestant for contestant in made if contestant.name == race.TORCH_INT8).copies[0][0]
    assert torch.equal(results[race.TORCH_INT8], (inputs.int8.int() @ int8.int().T))


def test_copies_exceed_the_cache() -> None:
    weight = race.random_weight(64, 256)
    with Kernels(1) as kernels:
        (ours,) = race.our_contestants({"ours": kernels}, weight, 100_000)
    assert len(ours.copies) * race.LayerShape("", 64, 256).packed_nbytes >= 150_000
    assert len({copy.codes.q.data_ptr() for copy in ours.copies}) == len(ours.copies)
    for copy in ours.copies:
        assert all(torch.equal(a, b) for a, b in zip(copy.codes, weight.codes, strict=True))


def test_what_must_hold_is_checked_against_the_rows() -> None:
    shape = race.LayerShape("OPT-175B", *bench_kernels.CHECKED)
    at_half = {"ours": shape.packed_nbytes / 10e9}
    rows = [bench_kernels.Row(shape, 1, at_half, 20e9)]
    rows += [bench_kernels.Row(shape, 64, {"ours": 1.0, race.TORCH_INT4: 9.5, race.TORCH_BF16: 2.2}, 20e9)]
    found = {str(check): check.passed for check in bench_kernels.speed_checks(rows, "ours", 20e9)}
    assert list(found.values()) == [True, True, False]
    assert next(iter(found)) == "PASS  ours, M=1: packed bytes, of RAM read bandwidth: 0.5, at least 0.5"
    assert not list(bench_kernels.speed_checks(rows, "another", 20e9))
