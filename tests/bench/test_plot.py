"""Pictures: intervals are put together rightly, and both forms can be drawn."""

import importlib.util
import json
from pathlib import Path

import pytest

from tests.bench.made_up import STORE, run
from tiered.bench.plot import check_can_draw, clip, draw, gaps, read_timeline, union
from tiered.bench.rows import rows
from tiered.errors import ConfigError

pytestmark = pytest.mark.inputs("tiered/bench")


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Two passes of one second from second 1 on; the disk reads before, and in half of the time."""
    spans = [("disk", "a", 0.0, 0.9), ("disk", "a", 1.0, 0.4), ("disk", "b", 1.2, 0.3), ("disk", "a", 2.0, 0.5)]
    spans += [("compute", "record", 1.0, 0.1), ("compute", "layer", 1.5, 0.5), ("wait", "layer", 1.1, 0.4)]
    spans += [("compute", "record", 2.0, 0.1), ("compute", "layer", 2.5, 0.5), ("wait", "layer", 2.1, 0.4)]
    events = [
        {"ph": "X", "cat": lane, "name": name, "ts": start * 1e6, "dur": seconds * 1e6}
        for lane, name, start, seconds in spans
    ]
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": [{"ph": "M", "name": "thread_name"}, *events]}))
    return path


def test_intervals() -> None:
    assert union([(3, 4), (0, 1), (0.5, 2)]) == [(0, 2), (3, 4)]
    assert union([(0, 1), (1.5, 2)], joined=0.5) == [(0, 2)]
    assert clip([(0, 2), (3, 4), (5, 6)], 1, 3.5) == [(1, 2), (3, 3.5)]
    assert gaps([(1, 2), (2, 3)], 0, 4) == [(0, 1), (3, 4)]


def test_a_timeline_begins_with_the_first_pass_and_says_who_waited(trace: Path) -> None:
    found = read_timeline(trace)
    assert found is not None and (found.passes, found.end) == ([0.0, 1.0], 2.0)
    assert found.share("reads", 0, 2) == pytest.approx(0.5)
    assert found.share("idle", 0, 2) == pytest.approx(0.5)
    assert found.share("computes", 0, 2) == pytest.approx(0.6)
    assert found.share("waits for the disk", 1, 2) == pytest.approx(0.4)


def test_without_a_pass_there_is_no_timeline(tmp_path: Path) -> None:
    (tmp_path / "trace.json").write_text('{"traceEvents": []}')
    assert read_timeline(tmp_path / "trace.json") is None


@pytest.mark.parametrize("form", ["png", "svg"])
def test_pictures_are_drawn_in_the_form_of_the_suffix(form: str, trace: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"picture.{form}"
    draw(rows([run()], {"none": STORE}), read_timeline(trace), "a title", path)
    begins = {"png": b"\x89PNG", "svg": b"<?xml"}[form]
    assert path.read_bytes().startswith(begins)


def test_what_cannot_be_drawn_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(ConfigError, match=r"ends in \.png or \.svg"):
        check_can_draw("--plot", Path("a.pdf"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs matplotlib"):
        check_can_draw("--report")
