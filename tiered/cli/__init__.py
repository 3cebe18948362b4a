"""The `tiered` command: runs what was typed, and turns errors into messages and exit codes.

`commands.py` says what can be typed; a command's own module is imported when it runs.
"""

import io
import logging
import os
import sys
import traceback
from pathlib import Path
from typing import Final, NoReturn

import click

from tiered.cli.commands import cli
from tiered.cli.lines import in_one_line, say
from tiered.errors import InterruptedRun, TieredError, named
from tiered.process import end_streams, no_more_interrupts, open_streams

__all__ = ["cli", "main"]

_INTERRUPTED: Final = InterruptedRun.exit_code


def main() -> NoReturn:
    """Entry point: run the command, turn errors into messages and exit codes (0 done, 1 failed, 2 bad usage,
    3 does not fit the budget, 4 store or input corrupt, 130 interrupted)."""
    # Set before torch and transformers are imported.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    open_streams()
    messages = logging.StreamHandler()
    messages.addFilter(_concerns_the_user)
    logging.basicConfig(format="tiered: %(message)s", level=logging.WARNING, handlers=[messages])
    try:
        status = end_streams(_run())
    except KeyboardInterrupt:
        status = _INTERRUPTED
    no_more_interrupts(status)
    sys.exit(status)


def _concerns_the_user(record: logging.LogRecord) -> bool:
    """Our own warnings and everybody's errors; other libraries warn those who call them."""
    return record.name.partition(".")[0] == "tiered" or record.levelno >= logging.ERROR


def _run() -> int:
    """The exit code of the command, whose errors have been shown."""
    try:
        code = cli.main(standalone_mode=False)
        return code if isinstance(code, int) else 0
    except TieredError as error:
        say(str(error) if error.exit_code != _INTERRUPTED else "interrupted")
        return error.exit_code
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.ClickException as error:
        shown = io.StringIO()
        error.show(shown)
        for line in shown.getvalue().removesuffix("\n").split("\n"):
            click.echo(in_one_line(line), err=True)
        return error.exit_code
    except (KeyboardInterrupt, click.Abort) as error:
        # click takes every EOFError, wherever it was raised, for a user's wish to abort.
        if isinstance(error.__cause__, EOFError):
            return _fault(error.__cause__)
        say("interrupted")
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone, as `head` does: nothing to say, and nowhere to say it.
        return 1
    except OSError as error:
        where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
        say(f"{where}{error.strerror or error}")
        return 1
    except SystemExit as ended:
        # click raises this where standard output is a pipe that nobody reads any more.
        return ended.code if isinstance(ended.code, int) else 1
    except Exception as error:
        return _fault(error)


def _fault(error: BaseException) -> int:
    """Show an unforeseen error in one line, as all others are; returns the exit code."""
    if os.environ.get("TIERED_TRACEBACK"):
        traceback.print_exception(error)
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(place.filename).name}:{place.lineno}"
    say(
        f"internal error: {named(error)} ({where}); this is a fault of tiered, please "
        "report it (TIERED_TRACEBACK=1 shows where it comes from)"
    )
    return 1
