"""Triton's kernels without a device: their numbers in Triton's interpreter, and that they compile for every GPU.

Both in processes of their own: whether kernels are interpreted is decided when they are defined. Only these see Triton,
which tools/setup puts beside the other packages: where it is importable torch imports it, which takes 80 MB of every
process.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest
import torch

from tests.commands import ROOT
from tiered.kernels import DeviceKernels
from tools.gpu_kernels import CAPABILITIES, Compiled, as_table

BESIDE: Final = Path(sys.prefix, "triton")
GENERATIONS: Final = (75, 80, 90, 100, 120)
"""The others of a generation have its instructions and registers, and no less memory per block than is asked for."""

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None and not BESIDE.is_dir(),
        reason="Triton is not installed: tools/setup does, on x86-64",
    ),
    pytest.mark.inputs("tiered/kernels", "tiered/quant", "tests/kernels", "tools/gpu_kernels.py"),
]


def program(folder: Path, *words: str, **variables: str) -> str:
    """What a program of Python writes, with Triton's cache in `folder`."""
    paths = os.pathsep.join(filter(None, (str(BESIDE), os.environ.get("PYTHONPATH"))))
    environment = {
        **os.environ,
        "PYTHONPATH": paths,
        "TRITON_CACHE_DIR": str(folder),
        "OMP_NUM_THREADS": "1",
        **variables,
    }
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_kernels_give_the_numbers_of_the_reference(tmp_path: Path) -> None:
    found = json.loads(program(tmp_path, "-m", "tests.kernels.triton_interpreted", TRITON_INTERPRET="1"))
    assert len(found) > 30
    assert {case: errors for case, errors in found.items() if not errors["found"] <= errors["allowed"]} == {}


def test_kernels_compile_for_every_generation_use_its_tensor_cores_and_spill_nothing(tmp_path: Path) -> None:
    assert set(GENERATIONS) <= set(CAPABILITIES)
    words = ("--groups", "64", "--capabilities", *map(str, GENERATIONS), "--json")
    made = [Compiled(**json.loads(line)) for line in program(tmp_path, "tools/gpu_kernels.py", *words).splitlines()]
    assert {item.capability for item in made} == set(GENERATIONS)
    assert [item for item in made if item.stack or not 0 < item.registers <= 255] == []
    assert max(item.shared for item in made) <= 99 << 10, "more than a block may have where it has least"
    for item in made:
        multiplies = item.kernel.startswith("linear") and item.capability >= 80
        assert bool(item.products) == multiplies, item
        assert item.dtype == ("bf16" if item.capability >= 80 else "fp16")
    # One row or many: the same instruction multiplies them.
    kinds = {(item.capability, item.scheme, item.products) for item in made if item.kernel.startswith("linear (")}
    assert len(kinds) == 2 * len(GENERATIONS[1:])


def test_one_binary_serves_any_number_of_rows(tmp_path: Path) -> None:
    binaries = json.loads(program(tmp_path, "-m", "tests.kernels.triton_launches"))
    assert len(binaries) == 20
    assert {kernel: made for kernel, made in binaries.items() if len(made) != 1} == {}


def test_the_table_has_a_column_for_every_capability_and_names_what_is_spilled() -> None:
    made = [Compiled("linear (64 x 16)", "int4-g64", "bf16", 80, 72, 0, 8192, "mma")]
    made += [Compiled("linear (64 x 16)", "int4-g64", "bf16", 90, 255, 104, 10240, "wgmma")]
    assert list(as_table(made, (75, 80, 90))) == [
        "| kernel (tile) | weights | 7.5 | 8.0 | 9.0 |",
        "|-|-|-|-|-|",
        "| linear (64 x 16) | int4-g64 | - | 72, 8 KiB mma | 255, 10 KiB, 104 B spilled wgmma |",
    ]


def test_the_interpreter_serves_only_who_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr("tiered.kernels.device_kernels.find_spec", lambda name: True)
    assert "TRITON_INTERPRET" in str(DeviceKernels(torch.device("cpu")).refusal)
