"""Interrupts at every place at which the interpreter looks whether a signal has come, one after the other.

`Moments` follows a call, notes the places in given files, and at a chosen one does what SIGINT would do there.
"""

import dis
import functools
import itertools
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

Moment = tuple[CodeType, int]
"""A function, and the offset of an instruction in it."""
LOOKS = ("RESUME", "CALL", "CALL_KW", "CALL_FUNCTION_EX", "JUMP_BACKWARD")
"""Instructions after which the interpreter looks whether a signal has come."""


@functools.cache
def after_looks(code: CodeType) -> frozenset[int]:
    """Offsets of the instructions before which a KeyboardInterrupt may be raised: not those that other handlers of
    exceptions are for than for the instruction that looks, which is the one that raises."""
    bytecode: Any = dis.Bytecode(code)

    def handler(offset: int) -> int | None:
        return next((entry.target for entry in bytecode.exception_entries if entry.start <= offset < entry.end), None)

    return frozenset(
        after.offset
        for look, after in itertools.pairwise(bytecode)
        if look.opname in LOOKS and handler(look.offset) == handler(after.offset)
    )


@dataclass
class Moments:
    """Notes every place in `files` (parts of their paths) at which this thread could be interrupted, and interrupts it
    at `chosen`."""

    files: Sequence[str]
    chosen: Moment | None = None
    seen: dict[Moment, None] = field(default_factory=dict)
    is_over: bool = False

    def trace(self, call: Callable[[], object]) -> None:
        """Call, and note, or interrupt."""
        sys.settrace(self._on_call)
        try:
            call()
        finally:
            sys.settrace(None)

    def interrupting(self, calls: Callable[[], Callable[[], object]], every: int = 1) -> Iterator[tuple[Moment, bool]]:
        """Interrupt a call of each that `calls` makes, at another place that has been seen, or at `every` so manyth one
        of them: which, and whether the call has come there; it has raised KeyboardInterrupt then."""
        for moment in list(self.seen)[::every]:
            yield moment, Moments(self.files, moment)._interrupts(calls())

    def _interrupts(self, call: Callable[[], object]) -> bool:
        try:
            self.trace(call)
        except KeyboardInterrupt:
            return True
        assert not self.is_over, f"{named(self.chosen)}: nothing was raised"
        return False

    def _on_call(self, frame: FrameType, event: str, argument: Any) -> Any:
        # Room in the cache that a program has not got yet, or does not give back, is the program's affair.
        is_ours = frame.f_code.co_name not in ("reserve", "release")
        if not is_ours or not any(part in frame.f_code.co_filename for part in self.files):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self._on_instruction

    def _on_instruction(self, frame: FrameType, event: str, argument: Any) -> Any:
        moment = frame.f_code, frame.f_lasti
        if event == "opcode" and frame.f_lasti in after_looks(frame.f_code) and not self.is_over:
            self.seen[moment] = None
            if moment == self.chosen:
                self.is_over = True
                handler = signal.getsignal(signal.SIGINT)
                assert callable(handler)
                handler(signal.SIGINT, frame)
        return self._on_instruction


def named(moment: Moment | None) -> str:
    """A moment, for people."""
    assert moment is not None
    code, offset = moment
    return f"{Path(code.co_filename).name}: {code.co_qualname} at {offset}"
