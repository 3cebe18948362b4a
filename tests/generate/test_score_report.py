"""The report of a scoring: figures that add up and a bound that cannot flatter."""

import json

import pytest

from tests.generate.test_report import USE, around, on_device, with_experts
from tests.plan.plans import plan_of
from tiered.generate import Generation, make_score_report
from tiered.generate.costs import PassCost
from tiered.generate.score import Scoring, Tally
from tiered.model import Pass
from tiered.plan import Needs, Plan
from tiered.plan.predict import Phase, Prediction
from tiered.units import MIB

SIZES = [100 * MIB] * 10
NEEDS = Needs(baseline=300 * MIB, outer=10 * MIB, kv=20 * MIB, workspace=30 * MIB)
RAW = 1000 * MIB


def plan(blocks: float = 5.0) -> Plan:
    """A plan whose budget leaves room for this many blocks."""
    return plan_of(SIZES, NEEDS, NEEDS.total + int(blocks * 100 * MIB))


def scoring(passes: int = 3, seconds: float = 2.0, compute: float = 0.5) -> Scoring:
    made = Scoring(Tally(1000, 3000.0), Generation(sequences=10, prompt_tokens=1400))
    for _ in range(passes):
        pass_ = Pass((), seconds, compute, seconds - compute, ())
        made.costs.add(PassCost(pass_, seconds, 1400 // passes, 0, 800 * MIB, 0, 0.1 / passes))
    return made


def test_the_first_pass_reads_everything_and_later_ones_what_does_not_fit() -> None:
    # Of ten blocks five fit beside what a run needs: three stay, two pass through.
    report = make_score_report(scoring(passes=3), around(plan(5.0), raw_disk_bandwidth=RAW))
    assert report.bound_seconds == pytest.approx((1000 + 2 * 700) / 1000)
    assert report.bound_share == pytest.approx(2.4 / 6)
    assert report.bottleneck == "disk"
    once = make_score_report(scoring(passes=1), around(plan(5.0), raw_disk_bandwidth=RAW))
    assert once.bound_seconds == pytest.approx(1.0)


def test_compute_that_takes_longer_than_the_disk_is_the_bound() -> None:
    report = make_score_report(scoring(passes=3, compute=1.9), around(plan(5.0), raw_disk_bandwidth=RAW))
    assert report.bottleneck == "compute"
    assert report.bound_seconds == pytest.approx(5.7)
    assert any("compute-bound: no evidence for the disk" in line for line in report.lines())


def test_a_cache_on_disk_counts_for_the_bound_and_is_named() -> None:
    report = make_score_report(
        scoring(passes=3),
        around(plan(5.0), raw_disk_bandwidth=RAW, kv_bytes_read=300 * MIB, kv_bytes_written=300 * MIB),
    )
    assert report.bound_seconds == pytest.approx(3.0)
    assert report.disk_bandwidth == pytest.approx((3 * 800 + 600) * MIB / 6)
    assert any(line.startswith("kv cache  300 MiB read, 300 MiB written") for line in report.lines())


def test_with_all_weights_in_memory_there_is_nothing_to_say_about_the_disk() -> None:
    report = make_score_report(scoring(), around(plan(20.0), raw_disk_bandwidth=None))
    assert (report.bottleneck, report.bound_seconds, report.bound_share) == ("memory", None, None)
    assert not any(line.startswith(("bound", "waits")) for line in report.lines())


def test_copies_to_a_device_may_be_the_bound() -> None:
    made = Scoring(Tally(1000, 3000.0), Generation(sequences=10, prompt_tokens=1400))
    for nbytes in (1000 * MIB, 800 * MIB, 800 * MIB):
        pass_ = Pass((), 1.0, 0.2, 0.8, ())
        made.costs.add(PassCost(pass_, 1.0, 400, 0, 0, 0, 0.0, nbytes, 0.7))
    report = make_score_report(made, on_device(2, raw_disk_bandwidth=10e9))
    # What stays was copied once, before it was needed: the bound counts what each pass must copy.
    assert report.bottleneck == "bus" and report.bound_seconds == pytest.approx(3 * 800 * MIB / 1e9)
    text = "\n".join(report.lines())
    assert "(bound by copies to the GPU)" in text
    assert "compute waited 300 ms for the disk and 2.1 s for copies to the GPU" in text
    assert report.device is not None and report.device.bytes_copied_per_pass == 800 * MIB


def test_what_stays_on_a_device_is_copied_once_and_not_per_pass() -> None:
    made = Scoring(Tally(1000, 3000.0), Generation(sequences=10, prompt_tokens=1400))
    made.costs.add(PassCost(Pass((), 1.0, 0.2, 0.8, ()), 1.0, 400, 0, 1000 * MIB, 0, 0.0, 1000 * MIB, 0.7))
    around_ = on_device(10)
    report = make_score_report(made, around_)
    assert report.device is not None and report.device.bytes_copied_per_pass == 0
    assert not any(line.startswith("bus") for line in report.lines())


def test_the_disk_is_not_named_where_only_the_bus_streams() -> None:
    made = Scoring(Tally(1000, 3000.0), Generation(sequences=10, prompt_tokens=1400))
    for nbytes in (1000 * MIB, 800 * MIB):
        made.costs.add(PassCost(Pass((), 1.0, 0.2, 0.8, ()), 1.0, 400, 0, 0, 0, 0.0, nbytes, 0.7))
    assert (
        "waits     compute waited 1.4 s for copies to the GPU"
        in make_score_report(made, on_device(2, raw_disk_bandwidth=None)).lines()
    )


def test_figures_are_those_of_the_run() -> None:
    report = make_score_report(scoring(passes=4), around(plan()))
    assert (report.scored_tokens, report.input_tokens, report.windows, report.passes) == (1000, 1400, 10, 4)
    assert report.tokens_per_second == pytest.approx(1000 / 8)
    assert report.seconds_per_pass == pytest.approx(2.0)
    assert report.compute_seconds_per_pass == pytest.approx(0.5)
    assert json.loads(json.dumps(report.to_json()))["ram_budget_bytes"] == plan().budget


def test_what_was_predicted_stands_beside_what_was_measured() -> None:
    expected = Prediction(1400, 0, Phase(3, seconds=6.6), Phase(), {})
    report = make_score_report(scoring(passes=3), around(plan(5.0), raw_disk_bandwidth=RAW), expected)
    assert report.predicted_seconds == 6.6 and report.predicted_seconds_per_pass == pytest.approx(2.2)
    assert "predicted 6.6 s, 2.2 s per pass, by this machine's rates" in report.lines()
    alone = make_score_report(scoring(passes=3), around(plan(5.0)))
    assert alone.predicted_seconds is None and not any(line.startswith("predicted") for line in alone.lines())


def test_a_peak_above_the_budget_and_synthetic_weights_are_not_passed_over() -> None:
    report = make_score_report(scoring(), around(plan(), peak_rss_bytes=9000 * MIB, synthetic=True))
    assert "OVER BUDGET" in report.lines()[-1]
    assert "not a language model" in report.lines()[0]


def test_overlapping_windows_tell_how_much_is_computed_again() -> None:
    assert any("400 more computed as context" in line for line in make_score_report(scoring(), around(plan())).lines())


def test_experts_that_windows_chose_count_for_the_bound() -> None:
    made, used = scoring(passes=3), with_experts(plan(5.0))
    alone = make_score_report(made, around(used, raw_disk_bandwidth=RAW))
    made.costs.prefill.experts = USE
    report = make_score_report(made, around(used, raw_disk_bandwidth=RAW))
    assert alone.bound_seconds is not None
    assert report.bound_seconds == pytest.approx(alone.bound_seconds + 0.25)
    assert report.experts is not None
    assert report.experts.bytes_per_pass * 3 == USE.nbytes
    assert report.experts.bytes_per_token == USE.nbytes / 1000
    assert any("possible here with these reads of experts" in line for line in report.lines())
