"""Workload files: those that ship with the package load, and what is wrong in one is refused by name."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tiered.bench.workload import DISK_BOUND, SPARE, Part, Setting, load_workload, parse_workload
from tiered.configs_path import config_dir
from tiered.errors import ConfigError

NAMES = sorted(path.stem for path in (config_dir() / "workloads").glob("*.toml"))
GOOD: dict[str, Any] = {"name": "a", "batch": 1, "prompt_tokens": 8, "new_tokens": 4}


def part(**changed: Any) -> dict[str, Any]:
    entry = {**GOOD, **changed}
    return {"part": [{key: value for key, value in entry.items() if value is not None}]}


def test_the_shipped_workloads_are_those_that_are_promised() -> None:
    assert {"flexgen-512-32", "flexgen-1024-32", "flexgen-256-32", "flexgen-128-128"} < set(NAMES)
    assert {"chat", "long-context", "opt-175b"} < set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_workload_loads_by_name_and_by_path(name: str) -> None:
    found = load_workload(name)
    assert found == load_workload(str(config_dir() / "workloads" / f"{name}.toml"))
    settings = [setting for one in found.parts for setting in one.settings()]
    assert settings and len(set(settings)) == len(settings)
    if name.startswith("flexgen-"):
        _, prompt, new = name.split("-")
        assert {(one.prompt_tokens, one.new_tokens) for one in settings} == {(int(prompt), int(new))}


def test_loading_needs_no_torch() -> None:
    code = "from tiered.bench.workload import load_workload; load_workload('chat')"
    code = f"import sys; {code}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_part_is_every_combination_of_its_values() -> None:
    (one,) = parse_workload(part(batch=[1, DISK_BOUND], memory=["1GiB", "2GiB"], kv_bits="8"), "w", "w").parts
    found = [(setting.memory, setting.batch, setting.kv_bits) for setting in one.settings()]
    assert found == [(memory, batch, "8") for memory in ("1GiB", "2GiB") for batch in (1, DISK_BOUND)]
    replaced = one.with_values({"batch": (3,), "threads": (1, 2)})
    assert {(setting.batch, setting.threads) for setting in replaced.settings()} == {(3, 1), (3, 2)}


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({**part(), "quants": "int4"}, "w: unknown 'quants'; known are shape, quant"),
        (part(promt_tokens=3), "w, part 1: unknown 'promt_tokens'"),
        (part(options=["--kv", "disk"]), "w, part 1: unknown 'options'"),
        (part(batch=0), 'w, part 1: batch = 0, expected a whole number from 1 to 65536, or "disk-bound"'),
        (part(batch=[1, 2.5]), "batch = 2.5"),
        (part(batch=True), "batch = True"),
        (part(batch=[]), "batch = [], expected at least one value"),
        (part(batch=[4, 4]), "batch has 4 more than once"),
        (part(batch="most"), "batch = 'most'"),
        (part(new_tokens=10**12), "new_tokens = 1000000000000"),
        (part(new_tokens=None), "w, part 1: has no 'new_tokens'"),
        (part(memory="much"), "w, part 1: memory: size 'much'"),
        (part(memory=4), "memory = 4, expected a size in quotes"),
        (part(memory="64MiB"), "memory 64MiB: expected more than 128MiB"),
        (part(memory="1GiB", ram="2GiB"), "w, part 1: ram 2GiB with memory 1GiB"),
        (part(kernels="fastest"), "kernels = 'fastest', expected one of auto, torch"),
        (part(name=""), "w, part 1: name = ''"),
        ({"part": [*part()["part"], *part()["part"]]}, "several parts are named 'a'"),
        ({"part": []}, "expected one or more tables [[part]]"),
        ({**part(), "quant": "int3"}, "quant = 'int3'"),
        ({**part(), "shape": 5}, "shape = 5"),
        ({**part(), "distinct_blocks": 0}, "distinct_blocks = 0"),
    ],
)
def test_what_is_wrong_is_refused_by_name(table: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_workload(table, "w", "w")
    assert said in str(raised.value)


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.toml").write_text("[[part")
    for named, said in (
        ("chatt", "there are chat, flexgen-1024-32"),
        (str(tmp_path / "none.toml"), "no such file"),
        (str(tmp_path / "broken.toml"), "expected TOML"),
        (f"{tmp_path}/", "a folder, expected a file"),
    ):
        with pytest.raises(ConfigError, match=said):
            load_workload(named)


def test_a_limit_leaves_room_beside_the_budget() -> None:
    assert Setting(memory="1GiB").budget == f"{1024 - (SPARE >> 20)}MiB"
    assert Setting(memory="1GiB", ram="800MiB").budget == "800MiB"
    assert Setting().budget is None
    assert list(Part().settings()) == [Setting()]
