"""The `tiered` command. Each subcommand is one file, imported only when it is asked for: torch takes seconds."""

import importlib
import logging
import os
import sys
from typing import Final, NoReturn

import click

from tiered.errors import TieredError

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
    messages = logging.StreamHandler()
    messages.addFilter(_concerns_the_user)
    logging.basicConfig(format="tiered: %(message)s", level=logging.WARNING, handlers=[messages])
    try:
        code = cli.main(standalone_mode=False)
        status = code if isinstance(code, int) else 0
    except TieredError as error:
        _say(f"tiered: {error}" if error.exit_code != 130 else "tiered: interrupted")
        status = error.exit_code
    except click.exceptions.Exit as error:
        status = error.exit_code
    except click.ClickException as error:
        error.show()
        status = error.exit_code
    except (KeyboardInterrupt, click.Abort):
        _say("tiered: interrupted")
        status = 130
    except BrokenPipeError:
        # The reader of our output has gone, as `head` does: nothing to say, and nowhere to say it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename is not None else ""
        _say(f"tiered: {where}{error.strerror or error}")
        status = 1
    sys.exit(status)


def _concerns_the_user(record: logging.LogRecord) -> bool:
    """Our own warnings and everybody's errors; other libraries warn those who call them."""
    return record.name.partition(".")[0] == "tiered" or record.levelno >= logging.ERROR


def _say(text: str) -> None:
    click.echo(text, err=True)
