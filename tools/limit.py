"""Run a command inside a memory cgroup, where exceeding the limit kills it, and report what it used.

    python tools/limit.py --memory 1GiB [--json FILE] [--read-rate 400MB --disk-of FOLDER] -- COMMAND ARGUMENT...
    python tools/limit.py --check

In: a command. Out: its own exit status (128 + N when signal N ended it), and a report on standard error
and in FILE. Where memory cannot be limited it says why for each way and exits with 125 before the command runs.
`--read-rate` needs the blkio controller of cgroup v1. The work is done by tiered/bench/limit.py. Called by tests and
tools/demo.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from tiered.bench.cgroup import limiter, throttled
from tiered.bench.limit import held_signals, run
from tiered.errors import ConfigError, TieredError
from tiered.units import parse_size


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    own, command = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    options = parser().parse_args(own)
    try:
        with held_signals():
            if options.check:
                with limiter(None) as found:
                    say(f"memory can be limited: {found.method}")
                return 0
            if not command or options.memory is None:
                raise ConfigError("expected --memory SIZE and, after --, a command; see --help")
            with throttled(options.read_rate, options.disk_of) as prefix:
                words = [*prefix, *command]
                report = run(words, parse_size(options.memory), or_unlimited=options.or_unlimited, say=say)
    except TieredError as error:
        say(str(error))
        return error.exit_code
    for line in report.lines():
        say(line)
    if options.json is not None:
        options.json.write_text(json.dumps(dataclasses.asdict(report), indent=2) + "\n", encoding="utf-8")
    return report.exit_code


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="limit.py",
        usage="limit.py --memory SIZE [OPTION...] -- COMMAND ARGUMENT... | --check",
        description="Run a command in a memory cgroup and report what it used.",
    )
    result.add_argument("--memory", metavar="SIZE", help="limit of memory and page cache, such as 1GiB; no swap")
    result.add_argument("--json", metavar="FILE", type=Path, help="also write the report here")
    result.add_argument("--read-rate", metavar="SIZE", help="read at most so many bytes per second, such as 400MB")
    result.add_argument("--disk-of", metavar="FOLDER", type=Path, help="from the disk that holds this folder")
    result.add_argument("--or-unlimited", action="store_true", help="run even where memory cannot be limited")
    result.add_argument("--check", action="store_true", help="only say which method works (0) or why none (125)")
    return result


def say(text: str) -> None:
    """Lines on standard error that name this program."""
    for line in text.splitlines():
        print(f"limit: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
