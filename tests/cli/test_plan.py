"""`tiered plan`: a table within 100 columns or JSON, at once for what is known, and bad input in one line."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import CHECKPOINT, ROOT, make_store, run_here
from tiered.cli.commands import cli
from tiered.cli.run_request import DeviceRequest
from tiered.configs_path import config_dir
from tiered.options import Options
from tiered.plan import parse_tiers
from tiered.plan.machines import load_hardware
from tiered.units import GIB, MIB, parse_size

HERE = ("--hardware", "vm-small")


def test_the_table_fits_a_hundred_columns_and_ends_with_what_to_type() -> None:
    done = run_here("plan", "opt-175b", "--hardware", "t4-208gb", "--batch", "144")
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert max(len(line) for line in lines if "tiered generate" not in line) <= 100
    assert any(line.startswith("*  gpu ") for line in lines)
    assert "with a gpu: not tried on a GPU yet, only proven by emulation" in lines
    assert lines[-2].endswith("tiered convert opt-175b --quant int4")
    assert "--batch 144 " in lines[-1] and "--tiers disk,cpu,gpu --vram " in lines[-1]


def test_json_has_every_row_with_its_figures() -> None:
    done = run_here("plan", "opt-30b", "--hardware", "t4-208gb", "--ram", "16GiB", "--json")
    found = json.loads(done.out)
    seconds = [row["seconds"] for row in found["rows"]]
    assert seconds == sorted(seconds) and len(seconds) == 6
    (best,) = (row for row in found["rows"] if row["is_best"])
    assert best["command"].startswith("tiered generate opt-30b.tiered --ram 16384MiB")
    for row in found["rows"]:
        vram = sum(nbytes for name, nbytes in row["memory"].items() if name.startswith("vram"))
        assert vram <= found["ask"]["vram"] and sum(row["memory"].values()) - vram <= found["ask"]["ram"]


def test_every_row_has_a_command_that_asks_for_what_it_says() -> None:
    done = run_here("plan", "opt-30b", "--hardware", "t4-208gb", "--ram", "16GiB", "--vram", "8GiB", "--json")
    rows = json.loads(done.out)["rows"]
    assert {row["strategy"] for row in rows} == {"cpu", "gpu", "gpu+cpu"}
    for row in rows:
        words = shlex.split(row["command"])
        assert words[:2] == ["tiered", "generate"]
        asked = cli.commands["generate"].make_context("generate", words[2:]).params
        options = Options(
            tiers=parse_tiers(asked["tiers"]),
            kv=asked["kv"],
            vram=None if asked["vram"] is None else parse_size(asked["vram"]),
            prefill_device=asked["prefill_device"],
            decode_device=asked["decode_device"],
        )
        assert options.kv == row["kv_tier"]
        assert options.vram == (None if row["strategy"] == "cpu" else 8 * GIB)
        computes = {"cpu": ("cpu", "cpu"), "gpu": ("gpu", "gpu"), "gpu+cpu": ("gpu", "cpu")}
        assert options.computes == computes[row["strategy"]]


def test_what_stays_of_a_short_job_is_said_and_its_command_can_be_typed(tmp_path: Path) -> None:
    machine = tmp_path / "machine.toml"
    machine.write_text((config_dir() / "hardware/laptop-16gb.toml").read_text().replace("[cpu]", "[cpu]\ntouch = 1e8"))
    words = ("plan", "opt-1.3b", "--hardware", machine, "--ram", "3GiB", "--prompt-len", "4", "--gen-len", "3")
    found = json.loads(run_here(*words, "--json").out)
    less, whole = (row for row in found["rows"] if row["quant"] == "int4")
    assert (less["resident_share"], whole["resident_share"]) == (0, 1) and less["seconds"] < whole["seconds"]
    assert "0% of the weights stay in memory: for so few passes" in " ".join(run_here(*words).out.split())
    for row, tiers, resident in ((less, "disk,cpu", 0), (whole, "cpu", None)):
        typed = shlex.split(row["command"])[2:]
        asked = cli.commands["generate"].make_context("generate", typed).params
        request = DeviceRequest(tiers=asked["tiers"], resident_cpu=asked["resident_cpu"])
        options = Options(**request.device_options())
        assert (options.tiers, options.resident_cpu) == (parse_tiers(tiers), resident)


def test_a_known_model_needs_neither_torch_nor_transformers() -> None:
    code = "import sys; from tiered.cli.commands import cli; cli.main(standalone_mode=False); "
    code += "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, "plan", "opt-125m", *HERE], cwd=ROOT, check=False)
    assert done.returncode == 0


def test_a_store_is_planned_as_it_is_converted(tmp_path: Path) -> None:
    store = make_store(tmp_path, "int8")
    found = json.loads(run_here("plan", store, *HERE, "--json").out)
    assert {row["quant"] for row in found["rows"]} == {"int8"}
    assert str(store) in found["rows"][0]["command"]


def test_a_checkpoint_is_planned_by_its_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((CHECKPOINT / "config.json").read_bytes())
    found = json.loads(run_here("plan", tmp_path, *HERE, "--json").out)
    assert {row["quant"] for row in found["rows"]} == {"int4", "int8"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--ram", "-3GiB"], "--ram: size '-3GiB'"),
        (["--ram", "0"], "--ram: size '0'"),
        (["--ram", "9999GiB"], "--ram 9999GiB: "),
        (["--vram", "8GiB"], "has no GPU"),
        (["--batch", "0"], "--batch '0': expected auto"),
        (["--batch", "many"], "--batch 'many': expected auto"),
        (["--prompt-len", "0"], "--prompt-len"),
        (["--prompt-len", "3000"], "--prompt-len 3000 and --gen-len 32: opt-125m has positions for 2048"),
    ],
)
def test_options_that_make_no_sense_are_refused_by_name(words: list[str], said: str) -> None:
    done = run_here("plan", "opt-125m", *HERE, *words)
    assert done.code == 2
    assert said in done.err


def test_more_vram_than_there_is_is_refused() -> None:
    done = run_here("plan", "opt-125m", "--hardware", "t4-208gb", "--vram", "80GiB")
    assert done.code == 2 and "--vram 80GiB: " in done.err and "ask for less" in done.err


def test_what_does_not_fit_names_what_does() -> None:
    done = run_here("plan", "opt-13b", *HERE, "--ram", "1GiB", "--batch", "8")
    assert done.code == 3
    assert "the smallest that works is --ram" in done.err
    assert done.out == ""


def test_an_unknown_model_is_refused_with_the_known_ones() -> None:
    done = run_here("plan", "opt-5b", *HERE)
    assert done.code == 2
    assert "opt-66b" in done.err


@pytest.mark.parametrize(("machine", "gib", "has"), [("desktop-2025", 24, 24564), ("t4-208gb", 16, 15360)])
def test_a_card_is_asked_for_by_the_size_that_it_is_sold_as(machine: str, gib: int, has: int) -> None:
    # A driver has taken some of its memory, or what corrects errors.
    done = run_here("plan", "opt-125m", "--hardware", machine, "--vram", f"{gib}GiB", "--json")
    assert done.code == 0 and f"--vram {gib}GiB: " in done.err
    assert f"has {has} MiB; planning with all of it" in done.err
    gpu = load_hardware(machine).gpu
    assert gpu is not None and json.loads(done.out)["ask"]["vram"] == gpu.vram == has * MIB < gib * GIB
