"""Which way wins, and what published systems should reach: the pure parts."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from tiered.plan.machines import load_hardware
from tiered.plan.strategies import BOTH, CPU, GPU
from tools import published, which_way, which_way_plot
from tools.published import IN_RAM, ON_DISK, ON_GPU, OPT_175B, Policy

T4 = load_hardware("t4-208gb")
WEIGHTS = 12 * 96 * 12288**2


def test_a_system_that_reads_all_weights_takes_the_disks_time_in_every_pass() -> None:
    took = published.simulate(Policy(1, 1, ON_DISK, ON_GPU), OPT_175B, T4, 512, 33)
    assert took.decode == pytest.approx(32 * 2 * WEIGHTS / T4.disk.read)


def test_without_overlap_lanes_add_up() -> None:
    policy = Policy(1, 1, ON_DISK, ON_GPU)
    apart = published.simulate(replace(policy, overlap=False), OPT_175B, T4, 512, 33)
    assert T4.gpu is not None
    whole = 2 * WEIGHTS / T4.disk.read + 2 * WEIGHTS / T4.gpu.host_to_device + 2 * WEIGHTS / T4.gpu.memory
    assert apart.decode == pytest.approx(32 * whole, rel=0.01)


def test_micro_batches_share_weights_and_wait_for_each_other() -> None:
    one, four = (published.simulate(Policy(8, n, ON_DISK, ON_GPU), OPT_175B, T4, 512, 32) for n in (1, 4))
    assert one.decode < four.decode < 4 * one.decode


def test_a_cpu_decodes_at_the_speed_of_its_memory() -> None:
    took = published.simulate(Policy(1, 1, IN_RAM, IN_RAM, 8, computes="cpu"), OPT_175B, T4, 1, 3)
    assert took.decode == pytest.approx(2 * WEIGHTS / T4.cpu.memory, rel=0.01)


def test_the_table_explains_every_prediction_that_is_far_off() -> None:
    lines = list(which_way.table())
    assert len(lines) > 30 and not any("nan" in line or "inf" in line for line in lines)


def test_a_break_even_is_found_where_the_ratio_passes_one() -> None:
    assert which_way.break_even(lambda factor: factor / 3) == pytest.approx(3, rel=0.04)
    assert which_way.break_even(lambda factor: 2.0) == 0
    assert which_way.break_even(lambda factor: 0.5) == math.inf
    assert which_way.break_even(lambda factor: None) is None


def test_a_cpu_is_scaled_in_all_its_rates() -> None:
    fast = which_way.scaled(T4, 4).cpu
    assert fast.memory == 4 * T4.cpu.memory and fast.prefill_attention == 4 * T4.cpu.prefill_attention
    before, after = (cpu.linear_rate("int4-g64", "invariant").seconds(8, 10**9) for cpu in (T4.cpu, fast))
    assert after == pytest.approx(before / 4)


def test_the_hybrid_wins_the_load_of_the_discussion_and_a_short_prompt_needs_no_gpu() -> None:
    shapes = which_way.shapes_of("opt-175b")
    rows = which_way.ways(shapes, T4, 512, 32, 8)
    assert rows.keys() == {CPU, BOTH, GPU}
    cell = which_way.Cell.of(rows)
    assert cell.winner == BOTH and cell.lead > 1
    short = which_way.Cell.of(which_way.ways(shapes, T4, 32, 32, 1))
    assert short.winner == CPU  # as quick as the hybrid, within 2 %
    assert which_way.Cell.of({}).winner is None


def test_a_server_gets_the_papers_gpu_and_nothing_else() -> None:
    added = which_way.machine("epyc-7742+t4")
    assert added.gpu == T4.gpu and added.cpu == load_hardware("epyc-7742").cpu


def test_colours_fade_to_white() -> None:
    assert which_way_plot.blend("#102030", 1) == "#102030" and which_way_plot.blend("#102030", 0) == "#ffffff"


def test_what_cannot_be_drawn_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for words, said in ((["maps"], "picture"), (["speed", str(tmp_path / "p.png"), "--model", "no-such"], "no-such")):
        with pytest.raises(SystemExit):
            which_way.main(words)
        assert said in capsys.readouterr().err
