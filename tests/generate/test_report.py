"""The report: figures that add up, a bound that cannot flatter, words that say what was the bottleneck."""

import json
from dataclasses import replace
from typing import Any

import pytest

from tests.plan.plans import plan_of
from tiered.generate import DeviceFigures, Figures, Generation, Surroundings, make_report
from tiered.generate.costs import PassCost
from tiered.model import Pass
from tiered.plan import DeviceNeeds, DevicePlan, ExpertCachePlan, Needs, Placement, Plan, full_ring
from tiered.stream import NO_EXPERTS, ExpertUse
from tiered.units import MIB

SIZES = [100 * MIB] * 10
NEEDS = Needs(baseline=300 * MIB, outer=10 * MIB, kv=20 * MIB, workspace=30 * MIB)
RAW = 1e9


def plan(blocks: float = 5.0) -> Plan:
    """A plan whose budget leaves room for this many blocks."""
    return plan_of(SIZES, NEEDS, NEEDS.total + int(blocks * 100 * MIB))


def cost(
    rows: int,
    seconds: float,
    compute: float,
    prompt_tokens: int = 0,
    nbytes: int = 700 * MIB,
    experts: ExpertUse = NO_EXPERTS,
) -> PassCost:
    pass_ = Pass((), seconds, compute, seconds - compute, (0.001, 0.003, 0.002), experts)
    return PassCost(pass_, seconds, prompt_tokens, rows, nbytes, 0, 0.025)


def generation(
    decodes: int = 4,
    rows: int = 2,
    seconds: float = 1.0,
    compute: float = 0.2,
    nbytes: int = 700 * MIB,
    experts: ExpertUse = NO_EXPERTS,
) -> Generation:
    passes = [cost(rows, 3.0, 2.0, prompt_tokens=60, experts=experts)]
    passes += [cost(rows, seconds, compute, nbytes=nbytes, experts=experts) for _ in range(decodes)]
    made = Generation(first_token_seconds=3.2, sequences=rows, prompt_tokens=60)
    for one in passes:
        made.add(one)
    return made


def with_experts(used: Plan) -> Plan:
    """The same with a cache of 20 experts of 5 MiB, for which the budget has room."""
    return replace(used, budget=used.budget + 100 * MIB, experts=ExpertCachePlan(20, 5 * MIB))


def around(used: Plan, streamed_file_bytes: int = 700 * MIB, **changes: Any) -> Surroundings:
    fields: dict[str, Any] = {
        "raw_disk_bandwidth": RAW,
        "raw_disk_best_look": RAW,
        "bytes_read": 3800 * MIB,
        "bytes_read_kernel": 3900 * MIB,
        "bytes_written": 0,
        "kv_bytes_read": 0,
        "kv_bytes_written": 0,
        "kv_bits": 16,
        "kv_on_disk": False,
        "disk_wait_seconds": 0.1,
        "peak_rss_bytes": 700 * MIB,
        "ram_budget_bytes": used.budget,
        "tape_bytes": sum(SIZES),
        "resident_bytes": used.placement.resident_nbytes,
        "missing_overlap_bytes": used.missing_overlap_nbytes,
        "holds_less": used.holds_less,
        "read_mode": "O_DIRECT",
        "kernels": "avx512, invariant, 2 threads",
        "synthetic": False,
    }
    return Surroundings(used, streamed_file_bytes, Figures(**{**fields, **changes}), experts=640)


def test_figures_add_up() -> None:
    report = make_report(generation(), around(plan()))
    assert (report.prompt_tokens, report.generated_tokens, report.passes) == (60, 10, 5)
    assert (report.prefill_seconds, report.first_token_seconds) == (3.0, 3.2)
    assert report.prefill_tokens_per_second == 20.0
    assert report.prefill_compute_seconds == 2.0
    # One pass, before which nothing is in memory: it reads all, or computes for longer.
    assert report.prefill_bound_seconds == max(1000 * MIB / RAW, 2.0)
    assert report.prefill_bound_share == report.prefill_bound_seconds / 3.0
    assert report.tokens_per_second == 8 / 4.0
    assert report.seconds_per_pass == 1.0
    assert report.compute_seconds_per_pass == pytest.approx(0.2)
    assert report.bytes_read_per_token == 380 * MIB
    assert report.disk_bandwidth == 700 * MIB
    assert report.block_overhead_seconds == 0.002
    assert report.tape_bytes == 1000 * MIB
    assert report.ram_budget_bytes == plan().budget


def test_the_bound_counts_all_that_the_budget_leaves_as_resident() -> None:
    used = plan(5.0)
    report = make_report(generation(), around(used))
    streamed = sum(SIZES) - used.bound_resident_nbytes
    assert used.bound_resident_nbytes == 500 * MIB - full_ring([[nbytes] for nbytes in SIZES])
    assert report.bound_seconds_per_pass == pytest.approx(streamed / RAW)
    assert report.bound_share == pytest.approx(streamed / RAW / 1.0)
    assert report.bottleneck == "disk"


def test_memory_that_the_plan_could_not_use_counts_too() -> None:
    # Half a block is left over: the plan cannot use it, a better program might.
    used = plan(5.5)
    assert used.placement.nbytes <= 500 * MIB
    report = make_report(generation(), around(used))
    assert report.bound_seconds_per_pass == pytest.approx((1000 - 350) * MIB / RAW)


def test_a_pass_that_computes_longer_than_it_reads_is_no_evidence_for_the_disk() -> None:
    report = make_report(generation(seconds=2.0, compute=1.5), around(plan()))
    assert (report.bottleneck, report.bound_seconds_per_pass) == ("compute", 1.5)
    assert report.bound_share == 0.75
    assert any("compute-bound: no evidence for the disk" in line for line in report.lines())


def test_where_all_is_resident_memory_is_the_bottleneck() -> None:
    report = make_report(generation(), around(plan(20.0), raw_disk_bandwidth=None))
    assert report.bottleneck == "memory"
    assert report.bound_seconds_per_pass == pytest.approx(0.2)
    assert report.resident_bytes == report.tape_bytes
    assert any("all weights in memory" in line for line in report.lines())


def test_without_a_decode_pass_there_is_nothing_to_divide_by() -> None:
    report = make_report(generation(decodes=0), around(plan()))
    for name in ("tokens_per_second", "seconds_per_pass", "disk_bandwidth", "bound_share", "bottleneck"):
        assert getattr(report, name) is None
    assert report.lines()


def test_without_a_raw_measurement_there_is_no_share() -> None:
    report = make_report(generation(), around(plan(), raw_disk_bandwidth=None))
    assert (report.bound_seconds_per_pass, report.bound_share, report.bottleneck) == (None, None, None)
    assert not any("measured raw" in line for line in report.lines())


def test_nothing_generated_is_a_report_too() -> None:
    report = make_report(Generation(), around(plan(), bytes_read=0))
    assert (report.passes, report.bytes_read_per_token, report.prefill_seconds) == (0, 0, 0)
    assert report.lines()


def test_lines_say_what_people_look_for() -> None:
    text = "\n".join(make_report(generation(), around(plan())).lines())
    assert "60 tokens in 3.0 s, first token after 3.2 s" in text
    assert "2 tokens/s, 1.0 s per pass" in text
    assert "3.71 GiB read (0.398 GB per token), 0 B written, O_DIRECT" in text
    assert "0.73 GB/s while decoding, 73% of the 1.00 GB/s measured raw" in text
    assert "compute waited 3.2 s for the disk, the disk 100 ms for compute" in text
    assert "peak 700 MiB of 860 MiB; 300 MiB of 1000 MiB weights resident" in text
    assert "OVER BUDGET" not in text and "synthetic" not in text


def test_a_peak_over_the_budget_is_said_out_loud() -> None:
    report = make_report(generation(), around(plan(), peak_rss_bytes=900 * MIB))
    assert any("OVER BUDGET" in line for line in report.lines())


def test_synthetic_weights_are_said_out_loud() -> None:
    report = make_report(generation(), around(plan(), synthetic=True))
    assert "synthetic" in report.lines()[0]


def test_bytes_written_that_nobody_counted_are_not_zero() -> None:
    report = make_report(generation(), around(plan(), bytes_written=None))
    assert not any("0 B written" in line for line in report.lines())
    assert any("written unknown" in line for line in report.lines())


def test_a_report_is_json_with_every_figure() -> None:
    report = make_report(generation(), around(plan()))
    value = json.loads(json.dumps(report.to_json()))
    expected = {
        *("prefill_seconds", "decode_seconds", "tokens_per_second", "seconds_per_pass", "passes"),
        *("bytes_read", "bytes_written", "disk_bandwidth", "raw_disk_bandwidth", "bound_share"),
        *("compute_wait_seconds", "disk_wait_seconds", "peak_rss_bytes", "ram_budget_bytes"),
    }
    assert expected <= value.keys()
    assert value == report.to_json()


def test_the_bound_of_compressed_blocks_counts_what_is_read() -> None:
    plain = make_report(generation(), around(plan()))
    halved = make_report(generation(), around(plan(), tape_bytes=sum(SIZES) // 2))
    assert plain.bound_seconds_per_pass is not None and halved.bound_seconds_per_pass is not None
    assert halved.bound_seconds_per_pass == pytest.approx(plain.bound_seconds_per_pass / 2, rel=0.01)
    assert halved.tape_bytes == sum(SIZES) // 2


def test_what_the_ring_held_before_is_no_credit() -> None:
    # Two passes that found 200 MiB in the ring read less than they used; the bound is that much lower.
    few = generation(decodes=2, nbytes=600 * MIB)
    whole, lower = make_report(generation(decodes=2), around(plan())), make_report(few, around(plan()))
    assert whole.bound_share is not None and lower.bound_share is not None
    assert lower.bound_share == pytest.approx(whole.bound_share * 1200 / 1400)


def test_a_ring_of_one_block_is_named_with_what_it_lacks() -> None:
    # One block is 100 MiB: half a block is missing to read one while the other computes.
    report = make_report(generation(), around(plan(1.5)))
    assert report.missing_overlap_bytes == 50 * MIB
    assert any("took turns: with 50 MiB more" in line for line in report.lines())
    for blocks in (2.0, 5.5, 20.0):
        report = make_report(generation(), around(plan(blocks)))
        assert report.missing_overlap_bytes == 0
        assert not any("took turns" in line for line in report.lines())


def on_device(resident: int, device: DevicePlan | None = None, **changes: Any) -> Surroundings:
    """A run in which a device held `resident` blocks, and memory the others."""
    used = plan(10.0)
    held = DevicePlan(
        2000 * MIB,
        DeviceNeeds(1000 * MIB, 0, 0, 800 * MIB - resident * 100 * MIB),
        Placement(frozenset(range(resident)), resident * 100 * MIB, 200 * MIB),
    )
    there = replace(
        used.placement, resident=frozenset(range(resident, 10)), resident_nbytes=(10 - resident) * 100 * MIB
    )
    used = replace(used, device=device or held, placement=there, prefill_device="gpu", decode_device="gpu")
    figures = DeviceFigures(
        name="cuda:0",
        description="Tesla T4, 14.6 GiB, compute capability 7.5",
        kernels="triton, invariant",
        prefill_device="gpu",
        decode_device="gpu",
        vram_budget_bytes=2000 * MIB,
        vram_peak_bytes=1900 * MIB,
        resident_bytes=resident * 100 * MIB,
        kv_on_device=True,
        raw_bus_bandwidth=1e9,
    )
    return around(used, 0, **{"device": figures, **changes})


def copied(nbytes: int, seconds: float = 1.0) -> Generation:
    """Four decode passes that copied so much each, and waited half of their time for it."""
    made = Generation(first_token_seconds=3.2, sequences=1, prompt_tokens=60)
    for _ in range(4):
        pass_ = Pass((), seconds, seconds / 4, seconds * 3 / 4, (0.001,))
        made.add(PassCost(pass_, seconds, 0, 1, 0, 0, 0.0, nbytes, seconds / 2))
    return made


def test_where_a_device_computes_copies_may_be_the_bound() -> None:
    report = make_report(copied(800 * MIB), on_device(2))
    assert report.bottleneck == "bus"
    assert report.bound_seconds_per_pass == pytest.approx(800 * MIB / 1e9)
    assert report.device is not None and report.device.bytes_copied_per_pass == 800 * MIB
    text = "\n".join(report.lines())
    assert "84% of it reached (bound by copies to the GPU)" in text
    assert "gpu       cuda:0: Tesla T4, 14.6 GiB, compute capability 7.5; triton, invariant" in text
    assert "peak 1.86 GiB of 1.95 GiB; 200 MiB of weights resident, and the KV cache" in text
    assert "bus       800 MiB copied per pass, 0.84 GB/s while decoding, 84% of the 1.00 GB/s measured raw" in text
    assert "compute waited 1.0 s for the disk and 2.0 s for copies to the GPU" in text
    assert report.to_json()["device"]["raw_bus_bandwidth"] == 1e9


def test_memory_of_the_device_that_the_plan_could_not_use_counts_for_the_bound() -> None:
    whole = make_report(copied(800 * MIB), on_device(2))
    roomy = on_device(2, DevicePlan(1500 * MIB, DeviceNeeds(0, 0, 0, 900 * MIB), Placement(frozenset((0, 1)), 0, 0)))
    better = make_report(copied(800 * MIB), roomy)
    assert whole.bound_seconds_per_pass == pytest.approx(800 * MIB / 1e9)
    assert better.bound_seconds_per_pass == pytest.approx(600 * MIB / 1e9)


def test_without_a_raw_measurement_of_the_bus_there_is_no_share_of_it() -> None:
    around_ = on_device(2)
    assert around_.figures.device is not None
    unknown = replace(around_.figures, device=replace(around_.figures.device, raw_bus_bandwidth=None))
    report = make_report(copied(800 * MIB), replace(around_, figures=unknown))
    assert report.bottleneck == "memory"
    assert any(line.endswith("copied per pass, 0.84 GB/s while decoding") for line in report.lines())


def test_where_the_processor_decodes_what_is_copied_meanwhile_is_not_blamed() -> None:
    around_ = on_device(2)
    assert around_.figures.device is not None
    figures = replace(around_.figures, device=replace(around_.figures.device, decode_device="cpu"))
    hybrid = replace(around_, plan=replace(around_.plan, decode_device="cpu"), figures=figures)
    report = make_report(copied(28 * 1024), hybrid)
    assert report.bottleneck == "memory" and report.bound_seconds_per_pass == report.compute_seconds_per_pass
    assert not any(line.startswith(("bus", "waits")) for line in report.lines())


def test_an_emulated_device_says_what_its_peak_counts() -> None:
    around_ = on_device(2)
    assert around_.figures.device is not None
    figures = replace(around_.figures, device=replace(around_.figures.device, emulated_bytes=2000 * MIB))
    text = "\n".join(make_report(copied(MIB), replace(around_, figures=figures)).lines())
    assert "peak 1.86 GiB of 1.95 GiB (slots, weights and the KV cache); 200 MiB of weights resident" in text


def test_the_disk_is_named_only_where_something_is_read() -> None:
    # The raw disk is measured where something streams from it.
    around_ = on_device(2, raw_disk_bandwidth=None)
    for seconds, what in ((1.0, "bound by copies to the GPU"), (10.0, "compute-bound")):
        report = make_report(copied(800 * MIB, seconds), around_)
        text = "\n".join(report.lines())
        assert f"({what})" in text and "for the disk" not in text and text.count("measured raw") == 1
        assert f"compute waited {2 * seconds:.1f} s for copies to the GPU\n" in text


def test_a_device_over_its_budget_pageable_copies_a_hybrid_and_a_fallback_are_said_out_loud() -> None:
    around_ = on_device(2, fallback="no CUDA device")
    assert around_.figures.device is not None
    device = replace(around_.figures.device, vram_peak_bytes=3000 * MIB, unregistered="refused", decode_device="cpu")
    text = "\n".join(
        make_report(copied(MIB), replace(around_, figures=replace(around_.figures, device=device))).lines()
    )
    assert "peak 2.93 GiB of 1.95 GiB, OVER BUDGET" in text
    assert "copies were staged, as memory could not be pinned: refused" in text
    assert "prompts were computed on it, and the rest by the processor" in text
    assert "fallback  the processor computed, as the GPU could not: no CUDA device" in text


USE = ExpertUse(hits=30, misses=50, nbytes=250 * MIB, compute_seconds=0.1)
"""Of one pass."""


def test_experts_that_are_chosen_are_told_apart_from_what_is_read_ahead() -> None:
    report = make_report(generation(nbytes=950 * MIB, experts=USE), around(with_experts(plan())))
    experts = report.experts
    assert experts is not None and (experts.held, experts.total) == (20, 640)
    # Of the four decode passes, as all figures of experts are.
    assert (experts.hits, experts.misses, experts.hit_rate) == (120, 200, 30 / 80)
    assert (experts.bytes_per_pass, experts.dense_bytes_per_pass) == (250 * MIB, 700 * MIB)
    assert (experts.bytes_per_token, experts.dense_bytes_per_token) == (125 * MIB, 350 * MIB)
    assert experts.compute_seconds_per_pass == pytest.approx(0.1)
    lines = report.lines()
    assert "experts   20 of 640 in memory, where 38% of those chosen were" in lines
    assert "read: 250 MiB of experts and 700 MiB of dense weights per pass (0.131 and 0.367 GB per token)" in lines[5]
    assert any("300 MiB of 1000 MiB dense weights resident" in line for line in lines)
    assert report.to_json()["experts"]["hits"] == 120
    assert make_report(generation(), around(plan())).to_json()["experts"] is None


def test_nothing_but_experts_computes_while_experts_are_read() -> None:
    ahead, chosen = (sum(SIZES) - plan().bound_resident_nbytes) / RAW, USE.nbytes / RAW
    for compute, in_experts, bound, bottleneck in (
        # The disk is always busy; it waits for what routers choose by; experts take longer to compute than to read.
        (0.3, 0.1, ahead + chosen, "disk"),
        (0.95, 0.1, 0.85 + chosen, "disk"),
        (1.2, 0.4, 1.2, "compute"),
    ):
        use = replace(USE, compute_seconds=in_experts)
        made = generation(seconds=2.0, compute=compute, nbytes=950 * MIB, experts=use)
        report = make_report(made, around(with_experts(plan())))
        assert report.bound_seconds_per_pass == pytest.approx(bound)
        assert report.bottleneck == bottleneck
        assert any(f"possible here with these reads of experts, {bound / 2:.0%} of it" in s for s in report.lines())


def test_experts_alone_keep_a_run_from_being_one_in_memory() -> None:
    # All dense units are resident.
    used, made = with_experts(plan(20.0)), generation(nbytes=250 * MIB, experts=USE)
    report = make_report(made, around(used, streamed_file_bytes=0))
    assert report.bottleneck == "disk"
    assert report.bound_seconds_per_pass == pytest.approx(0.2 - 0.1 + USE.nbytes / RAW)


def test_what_no_pass_has_chosen_is_a_report_too() -> None:
    report = make_report(Generation(), around(with_experts(plan())))
    assert report.experts is not None and report.experts.hit_rate is report.experts.bytes_per_token is None
    assert "experts   20 of 640 in memory" in report.lines()
