"""Spans: totals always, the spans themselves only where a trace is asked for, a file that Perfetto opens."""

import json
import threading
from pathlib import Path

import pytest

from tiered.trace import LaneTotal, Tracer


def test_totals_add_up_per_lane() -> None:
    trace = Tracer()
    trace.record("disk", "a", 1.0, 0.5, 100)
    trace.record("disk", "b", 1.2, 0.25, 10)
    trace.record("compute", "a", 2.0, 3.0)
    assert trace.total("disk") == LaneTotal(2, 0.75, 110)
    assert trace.total("compute") == LaneTotal(1, 3.0, 0)
    assert trace.total("verify") == LaneTotal()


def test_a_total_is_a_copy() -> None:
    trace = Tracer()
    trace.total("disk").nbytes = 5
    assert trace.total("disk").nbytes == 0


def test_spans_are_kept_only_where_asked_for() -> None:
    for keep in (False, True):
        trace = Tracer(keep)
        with trace.span("disk", "layer-000", 4096):
            pass
        assert [(s.lane, s.name, s.nbytes) for s in trace.spans] == ([("disk", "layer-000", 4096)] if keep else [])


def test_a_body_that_raises_is_recorded_too() -> None:
    trace = Tracer(keep_spans=True)
    with pytest.raises(OSError, match="gone"), trace.span("disk", "layer-000"):
        raise OSError("gone")
    assert trace.total("disk").spans == len(trace.spans) == 1


def test_threads_record_side_by_side() -> None:
    trace = Tracer(keep_spans=True)

    def work() -> None:
        for _ in range(200):
            trace.record("disk", "x", 0.0, 1.0, 1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert trace.total("disk") == LaneTotal(800, 800.0, 800)
    assert len(trace.spans) == 800


def test_the_file_has_a_named_track_per_lane_and_thread(tmp_path: Path) -> None:
    trace = Tracer(keep_spans=True)
    trace.record("disk", "layer-000", 10.0, 0.5, 4096)
    trace.record("compute", "layer-000", 10.5, 0.25)
    other = threading.Thread(target=lambda: trace.record("disk", "layer-001", 10.25, 0.5, 8192))
    other.start()
    other.join()
    trace.write(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    tracks = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
    assert sorted(tracks.values()) == ["compute", "disk", "disk"]
    spans = {(tracks[e["tid"]], e["name"]): e for e in events if e["ph"] == "X"}
    assert spans["disk", "layer-000"]["ts"] == 0
    assert spans["disk", "layer-001"]["ts"] == pytest.approx(0.25e6)
    assert spans["compute", "layer-000"]["dur"] == pytest.approx(0.25e6)
    assert spans["disk", "layer-001"]["args"] == {"nbytes": 8192}


def test_a_trace_of_nothing_is_a_file_too(tmp_path: Path) -> None:
    Tracer().write(tmp_path / "trace.json")
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"] == []
