"""Spans on lanes: who was busy when. Totals are always kept; the spans themselves only where a trace is asked for.

Lanes: "disk" (one span per stretch that a thread reads, a chunk mostly), "verify", "decode", "bus" (one per copy to a
device), "compute" (one per block and group of micro-batches, or per stretch between two waits in it), "wait" (compute
waiting for a unit, by block and unit). The file written is Chrome's trace-event JSON, which ui.perfetto.dev opens.
"""

import json
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tiered.files import errors_of


@dataclass
class LaneTotal:
    """What one lane did so far; seconds of concurrent spans add up."""

    spans: int = 0
    seconds: float = 0.0
    nbytes: int = 0


@dataclass(frozen=True)
class Span:
    """One piece of work. Times are of `time.perf_counter`, in seconds."""

    lane: str
    name: str
    start: float
    seconds: float
    nbytes: int
    thread: int


class Tracer:
    """Collects spans from any thread."""

    def __init__(self, keep_spans: bool = False) -> None:
        self._keep = keep_spans
        self._spans: list[Span] = []
        self._totals: defaultdict[str, LaneTotal] = defaultdict(LaneTotal)
        self._lock = threading.Lock()

    @contextmanager
    def span(self, lane: str, name: str, nbytes: int = 0) -> Iterator[None]:
        """Time the body. A body that raises is still recorded: a failed read took its time too."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.record(lane, name, start, time.perf_counter() - start, nbytes)

    def record(self, lane: str, name: str, start: float, seconds: float, nbytes: int = 0) -> None:
        """Add a span that has been timed elsewhere."""
        with self._lock:
            total = self._totals[lane]
            total.spans += 1
            total.seconds += seconds
            total.nbytes += nbytes
            if self._keep:
                self._spans.append(Span(lane, name, start, seconds, nbytes, threading.get_ident()))

    def total(self, lane: str) -> LaneTotal:
        """A copy of the totals of `lane`."""
        with self._lock:
            total = self._totals[lane]
            return LaneTotal(total.spans, total.seconds, total.nbytes)

    @property
    def spans(self) -> list[Span]:
        """The spans kept so far, in the order they ended."""
        with self._lock:
            return list(self._spans)

    def write(self, path: Path) -> None:
        """Write the kept spans for Perfetto: one track per lane and thread."""
        spans = self.spans
        origin = min((span.start for span in spans), default=0.0)
        tracks: dict[tuple[str, int], int] = {}
        events: list[dict[str, object]] = []
        for span in spans:
            key = (span.lane, span.thread)
            if key not in tracks:
                tracks[key] = len(tracks) + 1
                events.append(
                    {
                        "ph": "M",
                        "name": "thread_name",
                        "pid": 1,
                        "tid": tracks[key],
                        "args": {"name": span.lane},
                    }
                )
            events.append(
                {
                    "ph": "X",
                    "name": span.name,
                    "cat": span.lane,
                    "pid": 1,
                    "tid": tracks[key],
                    "ts": (span.start - origin) * 1e6,
                    "dur": span.seconds * 1e6,
                    "args": {"nbytes": span.nbytes},
                }
            )
        with errors_of(path):
            path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
