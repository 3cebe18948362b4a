"""Every error `tiered` raises on purpose, and the exit code that goes with it.

TieredError                 1   something failed while running
├── ReadError               1   the operating system could not read (EIO, a vanished file)
├── DiskFullError           1   no space left while writing
├── NotSupportedError       1   the facade refuses an operation that offloaded weights cannot honour
├── ModelError              1   the model's logits for a sequence are NaN or infinite
├── ConfigError             2   bad usage: an option, a combination, an unknown name
│   └── UnsupportedFamilyError  2   a model family the engine cannot drive
├── BudgetError             3   no plan fits the budget
│   └── DeviceBudgetError   3   that of the device's memory
├── CorruptError            4   stored bytes are not what they should be
│   ├── StoreError          4   a tiered store: truncated, damaged, foreign, half-converted
│   └── CheckpointError     4   a source checkpoint: truncated, damaged, lacking tensors
└── InterruptedRun        130   cancelled by the user

Messages name the file or key, what was expected, what was found, and what to do next.
Only `cli/` turns these into terminal output.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

_LONGEST_REASON: Final = 200
"""Characters of a foreign error's message that are repeated."""
SHOWN: Final = 5
"""Names that an error lists."""


class TieredError(Exception):
    """Base of all errors raised on purpose; `exit_code` is what the command line returns."""

    exit_code = 1


class ReadError(TieredError):
    """The operating system failed a read; the bytes on disk may be fine."""


class DiskFullError(TieredError):
    """A write failed for lack of space; what was finished before is kept."""


class NotSupportedError(TieredError):
    """An operation that makes no sense for weights that are not in memory."""


class ModelError(TieredError):
    """The model's logits for a sequence are NaN or infinite."""


class ConfigError(TieredError):
    """Bad usage: a value, a combination of options, an unknown name."""

    exit_code = 2


class UnsupportedFamilyError(ConfigError):
    """A model family that the engine cannot drive."""


class BudgetError(TieredError):
    """No plan fits the memory budget.

    `smallest_bytes` is the smallest budget that would, where one is known.
    """

    exit_code = 3

    def __init__(self, message: str, smallest_bytes: int | None = None) -> None:
        super().__init__(message)
        self.smallest_bytes = smallest_bytes


class DeviceBudgetError(BudgetError):
    """No plan fits the budget of the device's memory; `smallest_bytes` are of that."""


class CorruptError(TieredError):
    """Stored bytes are not what they should be."""

    exit_code = 4


class StoreError(CorruptError):
    """A store that is truncated, damaged, foreign or half-converted."""


class CheckpointError(CorruptError):
    """A source checkpoint that is truncated, damaged or lacks tensors."""


class InterruptedRun(TieredError):
    """The user cancelled the run."""

    exit_code = 130


_OF_ALL: Final = (
    *(KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError, OSError),
    *(ReadError, DiskFullError, InterruptedRun),
)
"""Errors that concern the whole run, not only the sequence that was being worked on."""


def error_of_one(error: BaseException) -> TieredError | None:
    """`error`, raised while one sequence of several was worked on, as an error of that sequence.

    None where it concerns all of them: an interruption, a lack of memory, a disk that fails.
    """
    if isinstance(error, _OF_ALL):
        return None
    if isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error):
        return None  # torch's way to say MemoryError
    if isinstance(error, TieredError):
        return error
    # Whatever a tokenizer or a template raises.
    made = TieredError(named(error))
    made.__cause__ = error
    return made


@contextmanager
def contained(on_error: Callable[[TieredError], None]) -> Iterator[None]:
    """Work on one sequence of several: an error of that sequence is given to `on_error`, any other is raised.

    The error's traceback is dropped: its frames would keep their variables in memory as long as the error is kept.
    """
    try:
        yield
    except BaseException as error:
        # Panics of tokenizers do not even derive from Exception.
        found = error_of_one(error)
        if found is None:
            raise
        error.__traceback__ = found.__traceback__ = None
        on_error(found)


def shortened(error: BaseException) -> str:
    """What a foreign error says, in one line that fits a message and is never empty. It begins with the kind of error
    where the text alone would not be understood."""
    return named(error) if isinstance(error, KeyError | AttributeError) else _one_line(error)


def cut(text: str, most: int) -> str:
    """`text`, or as much of its beginning as makes a message `most` characters longer."""
    return text if len(text) <= most else text[: most - 3] + "..."


def some(names: Sequence[str], count: int = 0) -> str:
    """The first few of `names`, and how many more of `count` (or of `names`, whichever are more) there are."""
    more = max(count, len(names)) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more:,} more" if more > 0 else "")


def named(error: BaseException) -> str:
    """The kind of a foreign error, and what it says, in one line that fits a message."""
    return f"{type(error).__name__}: {_one_line(error)}"


def _one_line(error: BaseException) -> str:
    # A lone surrogate could not be printed.
    text = " ".join(str(error).split()).encode("utf-8", "backslashreplace").decode("utf-8") or type(error).__name__
    return cut(text, _LONGEST_REASON)
