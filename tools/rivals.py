"""Runs one model, from one checkpoint, through `tiered` and other systems in turns, each in the same limit of memory.

    python -m tools.rivals setup --work DIR [--only hf llama.cpp airllm] [--sites FOLDER]
    python -m tools.rivals run CHECKPOINT --work DIR --memory 2GiB [--batch 1 8 32] [--prompt 128] [--new 16] [-r 3]
        [--only llama.cpp]

`setup` makes an environment in DIR for each system and installs it there; llama.cpp is compiled from its sources. What
cannot be installed is left out of `run`'s table with the reason, and so is what does not run. `run` converts the
checkpoint (OPT or Llama, of 16 bits, whose matrices have rows of a multiple of 64) for those that want it, once, and
prints Markdown: medians of rounds in which all systems take turns with the same random prompts, page cache dropped;
`tiered` is always among them, and `--only` names the others. Each run is added to DIR/runs.jsonl when it ends, and is
not run again unless checkpoint, code or a package changed, or the reason why it failed may pass, such as a full disk.
`tools/made_checkpoint.py` and `tools/inflate.py` make checkpoints. Figures come from tools/rival_driver.py.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, Final

import tiered
from tiered.bench import limit
from tiered.bench.facts import machine_facts
from tiered.bench.runs import TIERED, StoppedError, Way, drop_pages, run_once
from tiered.bench.workload import Setting
from tiered.errors import BudgetError, TieredError, named
from tiered.plan import cpu_count
from tiered.units import format_size, parse_size

DRIVER: Final = Path(__file__).with_name("rival_driver.py")
OURS: Final = "tiered"
_REASON: Final = "refusal"
"""In a system's environment: the file that says why it is not there."""
_KILLED: Final = 137
COLUMNS: Final = ("system", "version", "weights", "batch", "prefill s", "decode t/s", "all t/s", "GB read", "peak RSS")


class UnableError(TieredError):
    """What is asked is more than a system does, now and whenever it is asked again."""


@dataclass(frozen=True)
class Rival:
    """Another system."""

    name: str
    packages: tuple[str, ...]
    """What is installed for it, as pip spells it."""
    weights: str
    """In what it keeps them."""
    form: str | None = None
    """The type of matrices in the GGUF file that it reads; None: it reads the checkpoint."""


RIVALS: Final = (
    Rival("hf", ("torch", "transformers", "accelerate"), "16 bits"),
    Rival("llama.cpp", ("llama-cpp-python", "gguf", "numpy"), "Q4_0", "Q4_0"),
    Rival("airllm", ("torch", "transformers", "airllm"), "16 bits"),
)


@dataclass(frozen=True)
class Figures:
    """Of one run."""

    version: str
    prefill_seconds: float
    decode_seconds: float
    bytes_read: int
    peak_bytes: int
    """The most memory that the process held; pages of mapped files are among it."""


@dataclass(frozen=True)
class Asked:
    """What every system is to do."""

    memory: str
    batch: int
    prompt: int
    new: int
    vocab: int
    kept: str | None
    """Bytes of weights that accelerate is to keep in memory."""

    def words(self, seed: int) -> list[str]:
        """As the driver wants them."""
        numbers = {"batch": self.batch, "prompt": self.prompt, "new": self.new, "seed": seed, "vocab": self.vocab}
        numbers |= {"threads": cpu_count()}
        return [word for name, number in numbers.items() for word in (f"--{name}", str(number))]


Run = Callable[[Asked, int], Figures]
"""Runs one system with a seed for its prompts; raises TieredError that says why it does not."""


def setup(work: Path, names: Sequence[str], sites: Path | None) -> None:
    """Make the environments. `sites`: packages that are there already and need not be installed again."""
    for rival in RIVALS:
        if rival.name not in names:
            continue
        place = work / rival.name
        print(f"rivals: {rival.name}: installing {', '.join(rival.packages)}", file=sys.stderr)
        if subprocess.run([sys.executable, "-m", "venv", str(place)], stdout=2, check=False).returncode:
            raise TieredError(f"{place}: no environment could be made; see above")
        reason = place / _REASON
        reason.write_text("setup has not ended", encoding="utf-8")
        if sites is not None:
            (folder,) = place.glob("lib/python*/site-packages")
            (folder / "sites.pth").write_text(f"{sites.resolve()}\n", encoding="utf-8")
        words = [_python(work, rival.name), "-m", "pip", "install", "--disable-pip-version-check", *rival.packages]
        # Of llama.cpp's sources those that run texts are enough, and what its installation asks for besides.
        built = {"CMAKE_ARGS": "-DLLAVA_BUILD=OFF", "SKBUILD_BUILD_TARGETS": "llama;llama-common", **os.environ}
        done = subprocess.run(words, stdout=2, stderr=subprocess.PIPE, text=True, env=built, check=False)
        if done.returncode:
            sys.stderr.write(done.stderr)
            lines = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["pip failed"]
            reason.write_text(lines[-1], encoding="utf-8")
            print(f"rivals: {rival.name}: {lines[-1]}", file=sys.stderr)
        else:
            reason.unlink()


def refusal(work: Path, rival: Rival) -> str | None:
    """Why `rival` cannot run at all."""
    reason = work / rival.name / _REASON
    if reason.exists():
        return f"not installable: {reason.read_text(encoding='utf-8').strip()}"
    if not Path(_python(work, rival.name)).exists():
        return "not installed: run 'python -m tools.rivals setup'"
    return None


def identity(work: Path, rival: Rival) -> str:
    """What decides which code `rival` runs: its packages' versions, and how it is called. Raises TieredError."""
    asked = "import sys; from importlib.metadata import version; print(*(f'{n} {version(n)}' for n in sys.argv[1:]))"
    words = [_python(work, rival.name), "-c", asked, *rival.packages]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise TieredError(f"{rival.name}: its packages' versions cannot be told; see above")
    return f"{done.stdout.strip()}, driver {digest(DRIVER)}"


@cache
def digest(place: Path, *endings: str) -> str:
    """What tells whether a file, or those files in a folder that end so (without `endings`: all), have changed."""
    found = hashlib.sha256()
    for path in [place] if place.is_file() else sorted(place.rglob("*")):
        if path.is_file() and (not endings or path.suffix in endings):
            with path.open("rb") as file:
                found.update(str(path.relative_to(place)).encode() + hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()[:12]


def prepare(work: Path, checkpoint: Path, rival: Rival) -> Path:
    """The model in the form that `rival` reads, which is made where it is not there. Raises TieredError."""
    if rival.form is None:
        return checkpoint
    path = work / "gguf" / f"{_name(checkpoint)}-{rival.form}.gguf"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        part = path.with_suffix(".part")
        words = [_python(work, rival.name), str(DRIVER), "gguf", str(checkpoint), str(part), "--type", rival.form]
        if subprocess.run(words, stdout=2, check=False).returncode:
            raise TieredError("its file could not be written; see above")
        part.replace(path)
    return path


def run_rival(work: Path, checkpoint: Path, rival: Rival, asked: Asked, seed: int) -> Figures:
    """One run in the limit. Raises TieredError."""
    model = prepare(work, checkpoint, rival)
    scratch = work / f"{_name(checkpoint)}-{rival.name}"
    scratch.mkdir(exist_ok=True)
    words = [_python(work, rival.name), str(DRIVER), rival.name, str(model), *asked.words(seed)]
    words += ["--scratch", str(scratch), *(["--kept", asked.kept] if asked.kept else [])]
    for place in (model, scratch):
        drop_pages(place if place.is_dir() else place.parent)
    with tempfile.TemporaryDirectory(prefix="tiered-rivals-") as folder, limit.held_signals():
        out = Path(folder) / "out"
        usage = limit.run(words, parse_size(asked.memory), stdout=out)
        said = out.read_text(encoding="utf-8").splitlines()
    if usage.interrupted:
        raise KeyboardInterrupt
    if usage.exit_code:
        raise failure(usage, said[-1] if said else "")
    found = json.loads(said[-1])
    peak = max(usage.max_rss_bytes, usage.vm_hwm_bytes)
    return Figures(found["version"], found["prefill_seconds"], found["decode_seconds"], found["bytes_read"], peak)


def failure(usage: limit.Report, said: str) -> TieredError:
    """Why a run failed, of which `said` is the last line; an UnableError where it would fail again."""
    if usage.oom_kills or usage.exit_code == _KILLED:
        return UnableError(f"killed for more than {format_size(usage.limit_bytes or 0)}")
    try:
        found = json.loads(said)
        text = f"does not run: {found['error'].replace('|', '/')}"
        return TieredError(text) if found["may_pass"] else UnableError(text)
    except (ValueError, TypeError, KeyError):
        return TieredError(f"exit status {usage.exit_code}; see above")


def run_ours(store: Path, ours: str, asked: Asked, seed: int) -> Figures:
    """One run of `tiered` in the limit. Raises TieredError."""
    setting = Setting(memory=asked.memory, batch=asked.batch, prompt_tokens=asked.prompt, new_tokens=asked.new)
    try:
        done = run_once(store, setting, seed, Way())
    except StoppedError:
        raise KeyboardInterrupt from None
    if done.report is None:
        lasts = done.usage.oom_kills or done.usage.exit_code in (_KILLED, BudgetError.exit_code)
        raise (UnableError if lasts else TieredError)(done.failure or "no report")
    report: Mapping[str, Any] = done.report
    read = report["bytes_read_kernel"] or report["bytes_read"]
    return Figures(ours, report["prefill_seconds"], report["decode_seconds"], read, done.peak_bytes)


class Kept:
    """Runs that have ended, a line of a file each; counts those `asked` for, and those of them that are `reused`."""

    def __init__(self, path: Path, model: str) -> None:
        self._path, self._model, self.asked, self.reused = path, model, 0, 0
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self._found = [json.loads(line) for line in lines]

    def run(self, name: str, identity: str, run: Run, asked: Asked, seed: int) -> Figures:
        """What `run` gave of `asked` before with the code that `identity` stands for, or gives now. Raises TieredError
        where it failed, or fails; what is no UnableError is not kept."""
        what = {"system": name, "code": identity, "model": self._model, "seed": seed, **asdict(asked)}
        known = next((line for line in self._found if line["asked"] == what), None)
        self.asked, self.reused = self.asked + 1, self.reused + (known is not None)
        if known is None:
            known = {"asked": what, "figures": None, "failure": None}
            try:
                known["figures"] = asdict(run(asked, seed))
            except UnableError as error:
                known["failure"] = str(error)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(known) + "\n")
        if known["failure"] is not None:
            raise UnableError(known["failure"])
        return Figures(**known["figures"])


def alternate(runs: Mapping[str, Run], asked: Asked, repeat: int) -> dict[str, list[Figures] | str]:
    """`repeat` runs of each system, in turns; of one that does not run, the reason."""
    found: dict[str, list[Figures] | str] = {name: [] for name in runs}
    for seed in range(1, repeat + 1):
        for name, run in runs.items():
            figures = found[name]
            if isinstance(figures, str):
                continue
            print(f"rivals: batch {asked.batch}, round {seed} of {repeat}: {name}", file=sys.stderr)
            try:
                figures.append(run(asked, seed))
            except TieredError as error:
                found[name] = str(error)
    return found


def row(name: str, weights: str, asked: Asked, found: Sequence[Figures] | str) -> list[str]:
    """The cells of a system: medians, or why there are none."""
    if isinstance(found, str):
        return [name, found, weights, str(asked.batch), *["-"] * (len(COLUMNS) - 4)]
    prefill = median(one.prefill_seconds for one in found)
    decode = median(one.decode_seconds for one in found)
    decoded, every = asked.batch * (asked.new - 1), asked.batch * asked.new
    return [
        *(name, found[0].version, weights, str(asked.batch), f"{prefill:.3g}"),
        *(f"{decoded / decode:.3g}" if decode else "-", f"{every / (prefill + decode):.3g}"),
        f"{median(one.bytes_read for one in found) / 1e9:.3g}",
        format_size(int(median(one.peak_bytes for one in found))),
    ]


def _python(work: Path, name: str) -> str:
    return str(work.resolve() / name / "bin/python")


def _name(checkpoint: Path) -> str:
    """Of what is made of the checkpoint: another one of this name has another."""
    return f"{checkpoint.resolve().name}-{digest(checkpoint.resolve())}"


def _store(work: Path, checkpoint: Path) -> Path:
    """The checkpoint as a store of 4 bits."""
    store = work / f"{_name(checkpoint)}.tiered"
    if not (store / "manifest.json").exists():
        words = [*TIERED, "convert", str(checkpoint), "-o", str(store), "--quant", "int4"]
        if subprocess.run(words, stdout=2, check=False).returncode:
            raise TieredError(f"{checkpoint}: 'tiered convert' failed; it says why above")
    return store


def _vocabulary(checkpoint: Path) -> int:
    """Tokens that the model knows. Raises TieredError where there is no checkpoint."""
    config = checkpoint / "config.json"
    try:
        return int(json.loads(config.read_text(encoding="utf-8"))["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TieredError(
            f"{config}: {named(error)}; expected a checkpoint of OPT or Llama in a folder, with its vocab_size"
        ) from None


def run(options: argparse.Namespace) -> None:
    """Print the table."""
    work, checkpoint = options.work, options.checkpoint
    vocab = _vocabulary(checkpoint)
    store = _store(work, checkpoint)
    kept = Kept(work / "runs.jsonl", _name(checkpoint))
    # Its files rather than a commit: what is not committed counts, and other files do not.
    code = f"{version(OURS)}, code {digest(Path(tiered.__file__).parent, '.py', '.so')}"
    runs: dict[str, Run] = {OURS: partial(kept.run, OURS, code, partial(run_ours, store, version(OURS)))}
    weights, left = {OURS: "int4-g64"}, dict[str, str]()
    for rival in RIVALS:
        weights[rival.name] = rival.weights
        if rival.name not in options.only:
            continue
        if (reason := refusal(work, rival)) is not None:
            left[rival.name] = reason
            continue
        run_one = partial(run_rival, work, checkpoint, rival)
        runs[rival.name] = partial(kept.run, rival.name, identity(work, rival), run_one)
    for title, text in machine_facts(store).lines().items():
        print(f"- {title}: {text}")
    print(f"- limit: {options.memory}; {options.prompt} + {options.new} tokens; medians of {options.repeat}")
    print(f"- command: `python -m tools.rivals {' '.join(sys.argv[1:])}`\n")
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for batch in options.batch:
        asked = Asked(options.memory, batch, options.prompt, options.new, vocab, options.kept)
        for name, found in {**alternate(runs, asked, options.repeat), **left}.items():
            print(f"| {' | '.join(row(name, weights[name], asked, found))} |", flush=True)
    print(f"\n{kept.reused} of these {kept.asked} runs are of earlier calls of this program ({work / 'runs.jsonl'}).")


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        if options.action == "setup":
            options.work.mkdir(parents=True, exist_ok=True)
            setup(options.work, options.only, options.sites)
        else:
            run(options)
    except TieredError as error:
        print(f"rivals: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number above 0")
    return int(text)


def _size(text: str) -> str:
    """A number of bytes, which stays as it is written."""
    try:
        parse_size(text)
    except TieredError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.rivals", description="tiered beside other systems.")
    actions = parser.add_subparsers(dest="action", required=True)
    made = actions.add_parser("setup", help="install the other systems")
    names = [rival.name for rival in RIVALS]
    made.add_argument("--only", nargs="+", choices=names, default=names)
    made.add_argument("--sites", type=Path, help="a site-packages folder whose packages need not be installed again")
    ran = actions.add_parser("run", help="run all systems in turns and print a table")
    ran.add_argument("checkpoint", type=Path)
    ran.add_argument("--memory", type=_size, required=True, help="limit of memory and page cache, such as 2GiB")
    ran.add_argument("--batch", type=_count, nargs="+", default=[1, 8, 32])
    ran.add_argument("--prompt", type=_count, default=128)
    ran.add_argument("--new", type=_count, default=16)
    ran.add_argument("-r", "--repeat", type=_count, default=3)
    ran.add_argument("--only", nargs="+", choices=names, default=names, help="which others (default: all)")
    ran.add_argument("--kept", type=_size, help="weights that accelerate keeps in memory, such as 1GiB (default: none)")
    for each in (made, ran):
        each.add_argument("--work", type=Path, required=True, help="where environments and models go")
    return parser


if __name__ == "__main__":
    sys.exit(main())
