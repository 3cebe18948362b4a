"""tiered simulate: shapes and stores play through on described machines; the trace, the picture, what is refused."""

import json
from pathlib import Path
from typing import Final

import pytest

from tests.commands import make_store, run_here
from tiered.cli.simulate import Mean
from tiered.plan.load import PassLoad
from tiered.plan.machines import load_hardware
from tiered.plan.play import SimulatedPass

MACHINE: Final = """
name = "a machine"
source = "made up"
ram = 17179869184
[disk]
read = 2e9
write = 1e9
[cpu]
cores = 8
memory = 5e10
flops = 1e12
"""
GPU: Final = """
[gpu]
name = "T4"
vram = 15_000_000_000
host_to_device = 1e9
device_to_host = 1e9
memory = 3e11
flops = 5e13
"""


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    path = tmp_path / "machine.toml"
    path.write_text(MACHINE, encoding="utf-8")
    return path


def test_a_known_shape_is_played_through(machine: Path, tmp_path: Path) -> None:
    trace, plot = tmp_path / "trace.json", tmp_path / "plot.png"
    words = ("simulate", "opt-6.7b", "--hardware", machine, "--ram", "2GiB")
    done = run_here(*words, "--trace", trace, "--plot", plot)
    assert done.code == 0, done.err
    assert "opt-6.7b int4: 1 sequence of 512 + 32 tokens, in 2 GiB of RAM" in done.out
    assert "bound     " in done.out and "waits     per pass: computing " in done.out
    events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    assert {event["args"]["name"] for event in events if event["ph"] == "M"} == {"disk", "compute", "wait"}
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_long_description_of_a_machine_is_wrapped(machine: Path) -> None:
    machine.write_text(MACHINE.replace("made up", "measured with much to say " * 10), encoding="utf-8")
    done = run_here("simulate", "opt-6.7b", "--hardware", machine, "--ram", "2GiB")
    assert done.code == 0, done.err
    begun = done.out[done.out.index("machine ") : done.out.index("plan ")].splitlines()
    assert len(begun) > 2 and max(map(len, begun)) <= 100


def test_passes_and_totals_are_numbers_for_programs(machine: Path) -> None:
    words = ("simulate", "qwen3-30b-a3b", "--hardware", machine, "--ram", "4GiB", "--passes", "2", "--json")
    done = run_here(*words)
    found = json.loads(done.out)
    assert [each["prompt_tokens"] for each in found["passes"]] == [512, 0]
    assert found["plan"]["experts_in_memory"] > 0 and found["passes"][1]["waits"]["experts"] > 0
    assert found["bottleneck"] == "disk" and found["seconds_per_pass"] >= found["bound_seconds_per_pass"]


def test_with_a_gpu_weights_pass_over_the_bus(machine: Path) -> None:
    machine.write_text(f"{MACHINE}{GPU}", encoding="utf-8")
    words = ("simulate", "opt-6.7b", "--hardware", machine, "--ram", "8GiB", "--tiers", "disk,cpu,gpu")
    done = run_here(*words, "--vram", "3GiB")
    assert done.code == 0, done.err
    assert "on the GPU" in done.out and "by the bus to the GPU" in done.out and "its GPU is idle" not in done.out
    found = json.loads(run_here(*words, "--vram", "3GiB", "--json").out)
    assert found["bottleneck"] == "bus" and found["bus_busy_share"] > 0.9
    copied = found["plan"]["device"]["copied_bytes_per_pass"]
    assert copied and found["seconds_per_pass"] == pytest.approx(copied / 1e9, rel=0.05)


def test_a_store_is_played_through_in_its_own_scheme(machine: Path, tmp_path: Path) -> None:
    store = make_store(tmp_path, "int8")
    done = run_here("simulate", store, "--hardware", machine, "--ram", "1GiB", "--prompt-len", "8", "--gen-len", "4")
    assert done.code == 0, done.err
    assert "int8: 1 sequence of 8 + 4 tokens" in done.out


def test_for_a_single_pass_nothing_is_read_ahead(machine: Path) -> None:
    done = run_here("simulate", "opt-6.7b", "--hardware", machine, "--ram", "2GiB", "--gen-len", "1")
    assert done.code == 0, done.err
    assert "the disk has nothing to read for " in done.out and "for memory" not in done.out


def test_rounding_takes_no_pass_below_its_bound() -> None:
    load = PassLoad((range(1, 2),), 1, 1, True)
    assert Mean([SimulatedPass(load, 0.0, 1.0 - 1e-9, 1.0, (), 0.5, 0)]).above_bound == 0.0


def test_what_cannot_be_is_refused_in_a_line(machine: Path, tmp_path: Path) -> None:
    for words, code, message in (
        (("--ram", "64GiB"), 2, "a machine has 16 GiB"),
        (("--ram", "5x"), 2, "--ram: size '5x'"),
        (("--ram", "100MiB"), 3, "The smallest budget that works is --ram"),
        (("--prompt-len", "3000"), 2, "opt-6.7b has positions for 2048"),
        (("--plot", tmp_path / "plot.gif"), 2, "expected a name that ends in .png or .svg"),
        (("--trace", tmp_path / "none/trace.json"), 2, "cannot be written"),
        (("--tiers", "disk,cpu,gpu"), 2, "a machine has no GPU; drop it, or name another --hardware"),
        (("--tiers", "gpu", "--decode-device", "cpu"), 2, "needs weights in memory; use --tiers disk,cpu,gpu"),
        (("--decode-device", "gpu"), 2, "--tiers disk,cpu has none; add --tiers disk,cpu,gpu"),
        (("--vram", "2GiB"), 2, "is for a GPU, and --tiers disk,cpu has none; add --tiers disk,cpu,gpu"),
    ):
        done = run_here("simulate", "opt-6.7b", "--hardware", machine, *words)
        assert (done.code, done.out) == (code, "") and message in done.err, done.err
        assert done.err.count("\n") == 1


def test_without_a_profile_quick_rates_are_taken_and_that_is_said(
    machine: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("tiered.bench.quick.quick_hardware", lambda *_: load_hardware(str(machine)))
    done = run_here("simulate", "opt-125m", "--ram", "1GiB")
    assert done.code == 0 and "a machine, made up" in done.out
    assert done.err == "tiered: no profile of this machine: measuring for seconds; 'tiered profile' is exact\n"


def test_prompts_on_the_gpu_and_the_rest_on_the_processor_are_played_drawn_and_traced(
    machine: Path, tmp_path: Path
) -> None:
    machine.write_text(f"{MACHINE}{GPU}", encoding="utf-8")
    trace, plot = tmp_path / "trace.json", tmp_path / "plot.png"
    words = (
        "simulate",
        "opt-6.7b",
        "--hardware",
        machine,
        "--ram",
        "3GiB",
        "--tiers",
        "disk,cpu,gpu",
        "--vram",
        "3GiB",
    )
    done = run_here(*words, "--decode-device", "cpu", "--trace", trace, "--plot", plot)
    assert done.code == 0, done.err
    assert "prompts on the GPU, all else on the processor" in done.out and "given back when no prompt waits" in done.out
    assert "bus" in done.out[done.out.index("prefill ") : done.out.index("decode ")] and "by the disk" in done.out
    events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    lanes = {event["args"]["name"] for event in events if event["ph"] == "M"}
    assert lanes == {"disk", "bus", "gpu", "gpu wait", "compute", "wait"}
    assert plot.read_bytes().startswith(b"\x89PNG")
    found = json.loads(run_here(*words, "--decode-device", "cpu", "--json").out)
    assert found["plan"]["device"]["computes"] == {"prompts": "gpu", "rest": "cpu"}
    first, *others = found["passes"]
    assert first["gpu_seconds"] > 0 and first["bus_seconds"] > 0 and not any(each["bus_seconds"] for each in others)
