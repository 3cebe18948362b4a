"""Kills a job or a conversion at random moments until it is done, and compares the result with an uninterrupted run.

    python tools/job_loop.py STORE [--sequences 200] [--kills N] [--seed 0] [--folder DIR] [-- OPTION ...]
    python tools/job_loop.py --convert CHECKPOINT [--kills 50] [--seed 0] [--folder DIR] [-- OPTION ...]

Options after "--" are those of `tiered batch` or `tiered convert`. Half of the moments are anywhere in a run; the
others come shortly after it has added some results, or finished some blocks. A job is killed until it ends by itself. A
conversion is begun anew in another folder each time that it ends, until it has been killed so many times in all.
`--compress planes` is passed on unless another is: auto measures the disk, and may decide otherwise each time.

Exit code 0: every request has exactly one result, equal to that of the uninterrupted run; every store is the same bytes
as that of the uninterrupted conversion, and no other file is left in its folder.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, Protocol

ROOT: Final = Path(__file__).parent.parent
_EARLY_SECONDS: Final = 10.0
_MOST_NEW_RESULTS: Final = 8
_CONVERSION_KILLS: Final = 50
_POLL_SECONDS: Final = 0.002
_WORDS: Final = ("the", "function", "module", "returns", "a", "list", "of", "values", "when", "called", "with", "is")


class Process(Protocol):
    """A process that runs a command; as `subprocess.Popen`."""

    def poll(self) -> int | None: ...

    def wait(self) -> int: ...

    def send_signal(self, number: int, /) -> None: ...


Start = Callable[[IO[bytes]], Process]
"""Begins a process, which writes its standard error to the file."""


@dataclass(frozen=True)
class Loop:
    """How a job was brought to its end."""

    kills: int
    with_results: int
    """Kills that came after the process had added some results, or blocks."""
    seconds: float


def write_requests(path: Path, sequences: int, seed: int = 0) -> None:
    """Write requests for so many sequences: greedy and sampled, of all lengths, some with several choices."""
    chance = random.Random(seed)
    lines: list[str] = []
    left = sequences
    while left:
        body: dict[str, Any] = {
            "prompt": " ".join(chance.choices(_WORDS, k=chance.randrange(1, 60))),
            "max_tokens": chance.randrange(1, 40),
        }
        kinds: list[dict[str, Any]] = [{}, {"temperature": 0}, {"n": min(left, 3)}, {"logprobs": 2}, {"seed": 7}]
        body |= chance.choice(kinds) | chance.choice([{}, {"stop": ["\n"]}, {"top_p": 0.9}])
        line = {"custom_id": f"request-{len(lines)}", "method": "POST", "url": "/v1/completions", "body": body}
        lines.append(json.dumps(line) + "\n")
        left -= body.get("n", 1)
    path.write_text("".join(lines), encoding="utf-8")


def run_once(command: Sequence[str | Path]) -> None:
    """Run `command` to its end; raises RuntimeError, with what it said, where it fails."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=_environment(), check=False)
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: {done.stderr}")


def starting(command: Sequence[str | Path]) -> Start:
    """Begins `command` in an interpreter of its own."""
    words = list(map(str, command))
    return lambda told: subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=told, env=_environment())


def kill_until_done(
    start: Start, results: Path, chance: random.Random, kills: int | None, seconds: float = _EARLY_SECONDS
) -> Loop:
    """`start` a job again and again, killing it at a random moment each time, until it ends by itself.

    Half of the moments lie in its first `seconds`. After `kills` times it is left alone. Raises RuntimeError where it
    fails.
    """

    def begin() -> Callable[[], int]:
        size = _size(results)
        return lambda: _lines_after(results, size)

    return _kill_until_done(start, begin, chance, kills, seconds, lambda: False)


def convert_until_done(
    command: Sequence[str | Path], store: Path, chance: random.Random, kills: int | None, seconds: float
) -> Loop:
    """As `kill_until_done`, for a conversion into `store` that takes some `seconds` undisturbed."""

    def begin() -> Callable[[], int]:
        blocks = len(_blocks(store))
        return lambda: len(_blocks(store)) - blocks

    # Killed just before its process ends, a conversion is done, and the same command would refuse to do it again.
    manifest, progress = store / "manifest.json", store / "conversion.json"
    return _kill_until_done(
        starting(command), begin, chance, kills, seconds, lambda: manifest.exists() and not progress.exists()
    )


def _kill_until_done(
    start: Start,
    begin: Callable[[], Callable[[], int]],
    chance: random.Random,
    kills: int | None,
    early_seconds: float,
    is_done: Callable[[], bool],
) -> Loop:
    """`begin` is called when a process begins; it returns a function that counts what the process has added so far."""
    started, killed, with_results = time.monotonic(), 0, 0
    while True:
        with tempfile.NamedTemporaryFile() as told:
            process = start(told)
            added = begin()
            if kills is None or killed < kills:
                _wait_for_a_moment(process, added, chance, early_seconds)
                process.send_signal(signal.SIGKILL)
            code = process.wait()
            if code == 0:
                return Loop(killed, with_results, time.monotonic() - started)
            if code != -signal.SIGKILL:
                raise RuntimeError(f"exit code {code}: {Path(told.name).read_text(encoding='utf-8')}")
        killed += 1
        with_results += added() > 0
        if is_done():
            return Loop(killed, with_results, time.monotonic() - started)


def differences(results: Path, expected: Path) -> list[str]:
    """What is wrong with `results`; `expected` is of the same job, uninterrupted, and may differ in `created`."""
    found, wanted = _by_line(results), _by_line(expected)
    said = [f"{line}: {len(records)} results" for line, records in found.items() if len(records) != 1]
    said += [f"{line}: no result" for line in wanted.keys() - found.keys()]
    said += [f"{line}: another result" for line, records in found.items() if records[0] != wanted.get(line, [None])[0]]
    return said


def store_differences(store: Path, expected: Path) -> list[str]:
    """What is wrong with `store`; `expected` is of the same conversion, uninterrupted."""
    found, wanted = (
        {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
        for folder in (store, expected)
    )
    said = [f"{name}: left over" for name in found.keys() - wanted.keys()]
    said += [f"{name}: missing" for name in wanted.keys() - found.keys()]
    return said + [f"{name}: other bytes" for name in found.keys() & wanted.keys() if found[name] != wanted[name]]


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a store, or with --convert a checkpoint")
    parser.add_argument("--convert", action="store_true", help="kill conversions instead of jobs")
    parser.add_argument("--sequences", type=int, default=200)
    parser.add_argument("--kills", type=int, help="at most; otherwise until it ends by itself")
    parser.add_argument("--seed", type=int, default=0, help="of the requests and the moments")
    parser.add_argument("--folder", type=Path, help="where the files go, to be looked at [default: temporary]")
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    arguments, options = parser.parse_args(words[:end]), words[end + 1 :]
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        said = (_convert if arguments.convert else _batch)(arguments, options, folder)
    print("".join(f"{line}\n" for line in said), end="")
    return 1 if said else 0


def _batch(arguments: argparse.Namespace, options: list[str], folder: Path) -> list[str]:
    requests, whole, killed = (folder / f"{name}.jsonl" for name in ("requests", "whole", "killed"))
    write_requests(requests, arguments.sequences, arguments.seed)
    command = [sys.executable, "-m", "tiered", "batch", arguments.source, "-i", requests, *options]
    run_once([*command, "-o", whole])
    chance = random.Random(arguments.seed)
    loop = kill_until_done(starting([*command, "-o", killed]), killed, chance, arguments.kills)
    said = differences(killed, whole)
    print(
        f"{arguments.sequences} sequences, killed {loop.kills} times, {loop.with_results} of them while results "
        f"were written, in {loop.seconds:.0f} s: {len(said)} differences"
    )
    return said


def _convert(arguments: argparse.Namespace, options: list[str], folder: Path) -> list[str]:
    if "--compress" not in options:
        options = [*options, "--compress", "planes"]
    command = [sys.executable, "-m", "tiered", "convert", arguments.source.absolute(), *options]
    begin = time.monotonic()
    run_once([*command, "-o", folder / "whole"])
    seconds, wanted = time.monotonic() - begin, arguments.kills or _CONVERSION_KILLS
    chance, loops, said = random.Random(arguments.seed), list[Loop](), list[str]()
    while (left := wanted - sum(loop.kills for loop in loops)) > 0:
        store = folder / f"killed-{len(loops)}"
        loops.append(convert_until_done([*command, "-o", store], store, chance, left, seconds))
        said += [f"{store.name}: {line}" for line in store_differences(store, folder / "whole")]
        shutil.rmtree(store)
    print(
        f"{len(loops)} conversions, killed {sum(loop.kills for loop in loops)} times, "
        f"{sum(loop.with_results for loop in loops)} of them after some blocks, "
        f"in {sum(loop.seconds for loop in loops):.0f} s: {len(said)} differences"
    )
    return said


def _wait_for_a_moment(process: Process, added: Callable[[], int], chance: random.Random, early_seconds: float) -> None:
    # Never so late that the job may have ended by itself.
    wanted = chance.randrange(1, _MOST_NEW_RESULTS)
    early = time.monotonic() + chance.uniform(0, early_seconds) if chance.random() < 0.5 else None
    while process.poll() is None and added() < wanted:
        if early is not None and time.monotonic() >= early:
            return
        time.sleep(_POLL_SECONDS)
    time.sleep(chance.uniform(0, 0.05))


def _blocks(store: Path) -> list[Path]:
    return list((store / "blocks").glob("*.safetensors"))


def _lines_after(results: Path, offset: int) -> int:
    if _size(results) <= offset:
        return 0
    with results.open("rb") as file:
        file.seek(offset)
        return file.read().count(b"\n")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _by_line(results: Path) -> dict[str, list[dict[str, Any]]]:
    """Results by their id, without when the job was begun."""
    found: dict[str, list[dict[str, Any]]] = {}
    for raw in results.read_bytes().splitlines():
        record = json.loads(raw)
        record["response"]["body"].pop("created", None)
        found.setdefault(record["id"], []).append(record)
    return found


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


if __name__ == "__main__":
    sys.exit(main())
