"""The `tiered` command. Each subcommand is one file, imported only when it is asked for: torch takes seconds."""

import importlib
import io
import logging
import os
import sys
import traceback
from pathlib import Path
from typing import Final, NoReturn

import click

from tiered.cli.failures import in_one_line, say
from tiered.errors import InterruptedRun, TieredError, named
from tiered.process import end_streams, ignore_interrupts, open_streams

_INTERRUPTED: Final = InterruptedRun.exit_code

COMMANDS: Final = {
    "convert": "Convert a checkpoint into a store of quantized blocks.",
    "generate": "Generate text from a store, in less memory than it takes.",
    "batch": "Answer a file of requests; killed and started again at will.",
    "score": "Score texts: perplexity and a log-probability per token.",
    "inspect": "Show what a store holds and what fits in which budget.",
    "verify": "Test every checksum of a store, at disk speed.",
    "doctor": "Show what this machine can do, what is switched off, and why.",
}


class _Commands(click.Group):
    """A group whose commands are modules of `tiered.cli`, each with a `command`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(f"tiered.cli.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # Without importing them: `tiered --help` answers at once.
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="tiered", message="tiered %(version)s")
def cli() -> None:
    """Run language models that do not fit in memory, at the speed of the disk.

    \b
    tiered convert facebook/opt-6.7b        once: download, quantize, write opt-6.7b.tiered
    tiered generate opt-6.7b.tiered -p Hi   as often as you like, in as little as a few GiB
    """


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
    ignore_interrupts()
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
        # click takes an EOFError, wherever it was raised, for a user's.
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
        # click ends so where standard output is a pipe that nobody reads any more.
        return ended.code if isinstance(ended.code, int) else 1
    except Exception as error:
        return _fault(error)


def _fault(error: BaseException) -> int:
    """The exit code for an error that nobody has foreseen; it is shown in one line, as all others are."""
    if os.environ.get("TIERED_TRACEBACK"):
        traceback.print_exception(error)
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(place.filename).name}:{place.lineno}"
    say(
        f"internal error: {named(error)} ({where}); this is a fault of tiered, please "
        "report it (TIERED_TRACEBACK=1 shows where it comes from)"
    )
    return 1
