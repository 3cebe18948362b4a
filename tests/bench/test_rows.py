"""Rows: figures of runs are put together as the reports say, with mean and sd."""

from typing import Any

import pytest

from tests.bench.made_up import STORE, report, run
from tiered.bench.output import rate, table
from tiered.bench.rows import common, measure, rows, varied
from tiered.bench.workload import Setting


def test_prefill_decode_and_both_come_from_the_same_report() -> None:
    found = {row.test: row for row in rows([run()], {"none": STORE})}
    assert list(found) == ["pp100", "tg10", "pp100+tg10"]
    reading, writing, both = found.values()
    assert reading.tokens_per_second == pytest.approx(100 / 2)
    assert writing.tokens_per_second == pytest.approx(9 / 3)
    assert both.tokens_per_second == pytest.approx(110 / 5)
    # 8 GB in all, 6 of them in 3 s of decoding.
    assert reading.disk_bandwidth == pytest.approx(1e9)
    assert writing.disk_bandwidth == pytest.approx(2e9)
    assert writing.bytes_per_token == pytest.approx(6e9 / 9)
    assert writing.share_of_disk == pytest.approx(2e9 / 2.5e9)
    assert writing.share_of_bound == pytest.approx(0.9) and writing.bound == pytest.approx(3 / 0.9)
    assert both.share_of_bound == pytest.approx((1.5 + 2.7) / 5)
    assert {row.predicted for row in found.values()} == {None}
    assert writing.peak_rss_bytes == 700 << 20
    assert (writing.backend, writing.threads) == ("avx512 invariant", 2)


def test_several_runs_have_a_mean_and_a_deviation() -> None:
    slower = report(prefill_seconds=4.0)
    row = rows([run(), run(seed=2, report=slower)], {"none": STORE})[0]
    assert row.runs == 2
    assert row.tokens_per_second == pytest.approx((50 + 25) / 2)
    assert row.sd == pytest.approx(25 / 2**0.5)


def test_a_prediction_is_shown_where_reports_have_one() -> None:
    found = rows([run(report=report(predicted_prefill_seconds=4.0, predicted_seconds_per_pass=0.25))], {"none": STORE})
    # Nine tokens in nine passes of 0.25 s, after 100 in 4 s.
    assert [row.predicted for row in found] == [pytest.approx(rate) for rate in (25, 4, 110 / 6.25)]
    assert "predicted t/s" in table(found)[0]
    assert "predicted t/s" not in table(rows([run()], {"none": STORE}))[0]
    only = rows([run(report=report(predicted_seconds_per_pass=0.25))], {"none": STORE})
    assert [row.predicted for row in only] == [None, pytest.approx(4), None]


def test_failed_runs_and_phases_that_did_not_happen_have_no_row() -> None:
    assert rows([run(report=None)], {"none": STORE}) == []
    one = report(decode_seconds=0.0, tokens_per_second=None, disk_bandwidth=None)
    assert [row.phase for row in rows([run(report=one)], {"none": STORE})] == ["prefill"]
    nothing: dict[str, Any] = report(bound_seconds_per_pass=None, raw_disk_bandwidth=None, prefill_bound_seconds=None)
    found = measure(nothing, "both")
    assert found is not None and (found.bound_seconds, found.raw) == (None, None)


def test_settings_that_differ_have_columns_and_those_that_do_not_are_told_once() -> None:
    settings = [Setting(ram="1GiB", kv="disk"), Setting(ram="2GiB", kv="disk")]
    assert (varied(settings), common(settings)) == (["ram"], {"kv": "disk"})
    titles, cells = table(rows([run(setting) for setting in settings], {"none": STORE}))
    assert [line[titles.index("ram")] for line in cells] == ["1GiB"] * 3 + ["2GiB"] * 3
    assert "kv" not in titles


def test_rates_have_as_many_decimals_as_tell_something() -> None:
    assert [rate(1234.5, None), rate(12.34, 0.1), rate(0.01234, 0.00021)] == ["1234", "12.3 ± 0.1", "0.0123 ± 0.0002"]
