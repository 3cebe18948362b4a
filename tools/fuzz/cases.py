"""One case for each seed: a damaged copy of an original in a folder, and a command that opens it."""

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

from tiered.configs_path import config_dir
from tools.fuzz.mutate import NASTY, mutate_bytes, mutate_json, mutate_safetensors, mutate_text, mutate_toml
from tools.fuzz.originals import Originals

_RUN: Final = ("--no-measure", "--threads", "1")
_BATCH: Final = ("--batch", "2", *_RUN)
_SHORT: Final = ("-p", "Hello", "-n", "3", *_RUN)
_DEVICES: Final = ("/dev/zero", "/dev/null", "/dev/tty", "/proc/self/mem")
_TOKENIZER_FILES: Final = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


@dataclass
class Case:
    """What one seed stands for."""

    seed: int
    kind: str
    words: list[str] = field(default_factory=list)
    """The command line after `tiered`."""
    stdin: bytes = b""
    signals: list[float] = field(default_factory=list)
    """Seconds at which it is interrupted."""
    damaged: str = ""
    """Name of the damaged file."""
    folder: str = ""
    """Name of the store or checkpoint that it is in."""

    @property
    def names(self) -> list[str]:
        """Names of which an error about damage must contain one."""
        return [name for name in (self.damaged, self.folder) if name]


def make_case(seed: int, folder: Path, originals: Originals, kinds: tuple[str, ...]) -> Case:
    """Put what the case needs into `folder`, which is empty."""
    chance = random.Random(seed)
    case = Case(seed, chance.choice(kinds))
    KINDS[case.kind](chance, folder, originals, case)
    if case.damaged:
        case.folder = next((Path(word).name for word in case.words if str(folder) in word), "")
    return case


def _copy(source: Path, folder: Path) -> Path:
    """A copy whose files are shared until `_write` replaces one."""
    return Path(shutil.copytree(source, folder / source.name, copy_function=os.link))


def _write(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def _store(chance: random.Random, folder: Path, originals: Originals) -> Path:
    return _copy(chance.choice(originals.stores), folder)


def _run_store(chance: random.Random, case: Case, store: Path) -> None:
    """Some command that opens `store`."""
    case.words, case.stdin = chance.choice(
        (
            (["generate", str(store), *_SHORT], b""),
            (["generate", str(store), "--chat", *_SHORT], b""),
            (["inspect", str(store), *chance.choice(((), ("--json",)))], b""),
            (["verify", str(store), "--threads", "2"], b""),
            (["score", str(store), "-f", "-", "--context", "16", *_RUN], b"Hello, world. Is it you?"),
            (["batch", str(store), "-i", "in.jsonl", "-o", "results.jsonl", *_BATCH], b""),
        )
    )
    if case.words[0] == "batch":
        lines = [_request(1, {"prompt": "Hi"}), _request(2, {"messages": [{"role": "user", "content": "Hi"}]})]
        (store.parent / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def _request(number: int, body: dict[str, Any]) -> dict[str, Any]:
    url = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    return {"custom_id": f"r{number}", "method": "POST", "url": url, "body": {"max_tokens": 3, **body}}


def _damage(chance: random.Random, case: Case, path: Path, change: Callable[[random.Random, bytes], bytes]) -> None:
    case.damaged = path.name
    _write(path, change(chance, path.read_bytes()))


def _manifest(chance: random.Random, folder: Path, originals: Originals, case: Case) -> None:
    store = _store(chance, folder, originals)
    _damage(chance, case, store / "manifest.json", mutate_json)
    _run_store(chance, case, store)


def _block(chance: random.Random, folder: Path, originals: Originals, case: Case) -> None:
    store = _store(chance, folder, originals)
    _damage(chance, case, chance.choice(sorted((store / "blocks").iterdir())), mutate_safetensors)
    _run_store(chance, case, store)


def _store_config(chance: random.Random, folder: Path, originals: Originals, case: Case) -> None:
    store = _store(chance, folder, originals)
    _damage(chance, case, store / "config.json", mutate_json)
    _run_store(chance, case, store)


def _tokenizer(chance: random.Random, folder: Path, originals: Originals, case: Case) -> None:
    store = _store(chance, folder, originals)
    _damage(chance, case, store / chance.choice(_TOKENIZER_FILES), mutate_json)
    _run_store(chance, case, store)


def _checkpoint_config(chance: random.Random, folder: Path, originals: Originals, case: Case) -> None:
    checkpoint = _copy(chance.choice(originals.checkpoints), folder)
    _damage(chance, case, checkpoint / "config.json", mutate_json)
    case.words = ["convert", str(checkpoint), "-o", "out.tiered", "--quant", chance.choice(("int4", "int8", "none"))]


def _weights(chance: random.Random, folder: Path, originals: Originals, case: Case) -> None:
    checkpoint = _copy(chance.choice(originals.checkpoints), folder)
    files = [p for p in sorted(checkpoint.iterdir()) if p.name.startswith(("model", "pytorch_model"))]
    path = chance.choice(files)
    changes = {".safetensors": mutate_safetensors, ".json": mutate_json, ".bin": mutate_bytes}
    _damage(chance, case, path, changes[path.suffix])
    case.words = ["convert", str(checkpoint), "-o", "out.tiered", "--compress", chance.choice(("auto", "none"))]


class _Exits:
    """Ends the process where it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[int]]:
        return os._exit, (77,)


def _opt(chance: random.Random, folder: Path, originals: Originals, case: Case) -> None:
    """One file of OPT in another form is damaged, gone, a copy of another, or has code in its pickle."""
    checkpoint = _copy(chance.choice(originals.forms), folder)
    files = sorted(checkpoint.iterdir())
    path = chance.choice(files)
    how = chance.randrange(8)
    case.damaged = path.name
    if how == 0:
        path.unlink()
    elif how == 1:
        _write(path, chance.choice(files).read_bytes())
    elif how == 2 and path.suffix == ".pt":
        path.unlink()
        torch.save({"model": {"decoder.version": torch.ones(1)}, "cfg": _Exits(), "args": [_Exits()]}, path)
    else:
        _damage(chance, case, path, mutate_bytes)
    source = chance.choice(([str(checkpoint)], ["tiny-opt", "--from", str(checkpoint)]))
    case.words = ["convert", *source, "-o", "out.tiered", "--compress", "none"]


def _gguf(chance: random.Random, folder: Path, originals: Originals, case: Case) -> None:
    """A model in GGUF is damaged, more often in its header."""
    path = next(_copy(originals.gguf, folder).iterdir())
    case.damaged, raw = path.name, path.read_bytes()
    header = raw.index(b"token_embd.weight") if chance.random() < 0.8 else len(raw)
    _write(path, mutate_bytes(chance, raw[:header]) + raw[header:])
    case.words = ["convert", str(path), "-o", "out.tiered", "--compress", "none"]


_EXPRESSIONS: Final = (
    *(
        "'a' * 10**10",
        "10 ** (10 ** 9)",
        "'%1000000000d' % 5",
        "range(100000) | list * 100",
        "messages * 10**9",
        "1 / 0",
    ),
    *("'%s' | format(messages)", "messages[7].x.y", "raise_exception('no')", "''.__class__.__mro__", "none + 1"),
    *(
        "'x'.center(10**10)",
        "[0] * 10**9",
        "'\\ud800'",
        "messages | tojson(indent=10**9)",
        "strftime_now('%Y' * 10**8)",
    ),
    *("messages", "undefined", "dict(a=dict)", "lipsum(n=10**7)", "'a'.join(['b' * 10**5] * 10**5)", "cycler", "''"),
)
_TEMPLATES: Final = (
    "{{ X }}",
    "{{ X ",
    "{% set x = X %}{{ x }}",
    "{% if X %}a{% else %}b{% endif %}",
    "{% for i in X %}{{ i }}{% endfor %}",
    "{% include 'x' %}{{ X }}",
    "{% macro m(n) %}{{ m(n) }}{% endmacro %}{{ m(X) }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{{ X }}",
    "{% set s = namespace(t='ab') %}{% for i in range(60) %}{% set s.t = s.t + s.t %}{% endfor %}{{ s.t }}{{ X }}",
)
"""Templates; X is replaced by one of the expressions."""


def _template(chance: random.Random, folder: Path, originals: Originals, case: Case) -> None:
    store = _store(chance, folder, originals)
    template = chance.choice(_TEMPLATES).replace("X", chance.choice(_EXPRESSIONS))
    case.damaged = "chat_template.jinja"
    _write(store / case.damaged, template.encode())
    _run_store(chance, case, store)
    if case.words[0] == "generate" and "--chat" not in case.words:
        case.words.append("--chat")


def _requests(chance: random.Random, folder: Path, originals: Originals, case: Case) -> None:
    store = _store(chance, folder, originals)
    bodies: list[dict[str, Any]] = [
        {"prompt": "Hello", "temperature": 0.7, "top_p": 0.9, "seed": 5, "n": 2, "logprobs": 2, "stop": ["a", "\n"]},
        {"prompt": [1, 2, 3], "min_p": 0.1, "top_k": 5, "repetition_penalty": 1.1, "ignore_eos": True},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}], "logprobs": True},
    ]
    lines = []
    for number in range(chance.randrange(1, 8)):
        line = json.dumps(_request(number, chance.choice(bodies))).encode()
        lines.append(line if chance.random() < 0.3 else mutate_json(chance, line))
    raw = chance.choice((b"\n", b"\n", b"\n", b"\r\n", b"")).join(lines)
    case.damaged = "in.jsonl"
    _write(folder / case.damaged, mutate_text(chance, raw) if chance.random() < 0.1 else raw)
    case.words = ["batch", str(store), "-i", "in.jsonl", "-o", "results.jsonl", "--max-tokens", "3", *_BATCH]


def _arguments(chance: random.Random, folder: Path, originals: Originals, case: Case) -> None:
    store = _store(chance, folder, originals)
    command = chance.choice(("generate", "batch", "score", "inspect", "verify", "convert", "doctor", ""))
    values = [str(value) for value in NASTY if not isinstance(value, list | dict)]
    values += ["1MiB", "512MiB", "64GiB", "-5GiB", "1e3", "auto", "cpu", "disk", "float32", "bfloat16", "8", "torch"]
    values = [value.replace("\x00", "0") for value in [*values, str(store), "/dev/full", "/", ".", "-", "nowhere/x"]]
    case.words = [command] if command else []
    if command and chance.random() < 0.9:
        case.words += [str(store)] if command != "doctor" else []
    if command == "generate":
        case.words += _SHORT
    for _ in range(chance.choice((0, 1, 1, 2, 3))):
        name = chance.choice(_OPTIONS.get(command, ("--version", "--nothing")))
        case.words += [name] if chance.random() < 0.1 else [name, chance.choice(values)]
    # As the system passes them: bytes that are not UTF-8 become surrogates other than those in the string.
    case.words = [os.fsdecode(word.encode("utf-8", "surrogatepass")) for word in case.words]
    case.stdin = chance.choice((b"", b"Some text", b"\xff\xfe", b"\x00", "é\u2028".encode()))


_COMMON: Final = ("--dtype", "--verify", "--tiers", "--ram", "--threads", "--kernels", "--kernel-mode", "--kv-bits")
_OPTIONS: Final[dict[str, tuple[str, ...]]] = {
    "generate": (
        *_COMMON,
        *("-n", "-p", "-f", "--temperature", "--top-k", "--top-p", "--min-p", "--repetition-penalty", "--seed"),
        *("--stop", "--prompt-tokens", "--sequences", "--batch", "--micro-batch", "--kv", "--kv-dir", "--prefetch"),
        *("--trace", "--json", "--chat", "--ignore-eos"),
    ),
    "batch": (*_COMMON, "-i", "-o", "--seed", "--max-tokens", "--context", "--batch", "--micro-batch", "--kv"),
    "score": (*_COMMON, "-f", "--context", "--stride", "--batch", "--per-token", "--json"),
    "inspect": ("--context", "--sequences", "--dtype", "--disk-bandwidth", "--json"),
    "verify": ("--threads", "--json"),
    "convert": (
        *("-o", "--quant", "--group-size", "--compress", "--ram", "--force", "--revision", "--delete-downloads"),
        *("--synthetic", "--distinct-blocks", "--seed", "--from", "--md5"),
    ),
    "doctor": ("--json", "--disk-test", "--nothing"),
}


def _stdin(chance: random.Random, folder: Path, originals: Originals, case: Case) -> None:
    store = _store(chance, folder, originals)
    case.stdin = chance.choice(
        (b"", bytes(100), chance.randbytes(300), "é日本\U0001f600".encode(), b"a" * 3000, b"\r\n\r\n")
    )
    command = chance.choice((["generate", str(store), "-n", "3"], ["score", str(store), "-f", "-"]))
    case.words = [*command, *_RUN]


def _files(chance: random.Random, folder: Path, originals: Originals, case: Case) -> None:
    """One file is replaced by a pipe, a folder, a link, a device, a huge file, or nothing."""
    is_store = chance.random() < 0.6
    root = _copy(chance.choice(originals.stores if is_store else originals.checkpoints), folder)
    path = chance.choice([p for p in sorted(root.rglob("*")) if p.is_file()])
    case.damaged = path.name
    path.unlink()
    makers: tuple[Callable[[], object], ...] = (
        lambda: os.mkfifo(path),
        path.mkdir,
        lambda: path.symlink_to(path.name),
        lambda: path.symlink_to("nowhere"),
        *(lambda target=target: path.symlink_to(target) for target in _DEVICES),
        lambda: _make_huge(path),
        lambda: None,
    )
    chance.choice(makers)()
    if is_store:
        _run_store(chance, case, root)
    else:
        case.words = ["convert", str(root), "-o", "out.tiered"]


def _make_huge(path: Path) -> None:
    """A file of 200 GiB of holes, which takes no space."""
    path.touch()
    os.truncate(path, 200 << 30)


def _leftovers(chance: random.Random, folder: Path, originals: Originals, case: Case) -> None:
    """What commands have written, or are given, beside stores and checkpoints."""
    which = chance.choice(("shape", "progress", "job", "results"))
    if which == "shape":
        case.damaged = "shape.toml"
        raw = (originals.stores[0].parent / case.damaged).read_bytes()
        _write(folder / case.damaged, mutate_toml(chance, raw))
        case.words = ["convert", "--synthetic", case.damaged, "-o", "out.tiered"]
    elif which == "progress":
        _copy(originals.unfinished, folder)
        _damage(chance, case, folder / originals.unfinished.name / "conversion.json", mutate_json)
        force = chance.choice(((), ("--force",)))
        case.words = ["convert", str(originals.checkpoints[0]), "-o", originals.unfinished.name, *force]
    else:
        store = _copy(originals.stores[0], folder)
        for path in originals.job.iterdir():
            _write(folder / path.name, path.read_bytes())
        name, change = ("results.jsonl.job", mutate_json) if which == "job" else ("results.jsonl", mutate_bytes)
        _damage(chance, case, folder / name, change)
        case.words = ["batch", store.name, "-i", "in.jsonl", "-o", "results.jsonl", *_BATCH]


def _described(chance: random.Random, folder: Path, originals: Originals, case: Case) -> None:
    """A file that describes a machine or a workload. Workloads end before anything runs: they have no such part."""
    kind = chance.choice(("hardware", "workloads"))
    path = chance.choice(sorted((config_dir() / kind).glob("*.toml")))
    case.damaged = path.name
    _write(folder / path.name, mutate_toml(chance, path.read_bytes()))
    model = chance.choice((str(_store(chance, folder, originals)), "tiny-opt", "opt-125m"))
    if kind == "workloads":
        case.words = ["bench", model, "--workload", path.name, "--part", "no such part", "-r", "1"]
    else:
        more = chance.choice((["plan", "--batch", "4"], ["plan", "--json"], ["simulate", "--passes", "2"]))
        case.words = [more[0], model, "--hardware", path.name, "--prompt-len", "9", "--gen-len", "5", *more[1:]]


def _interrupts(chance: random.Random, folder: Path, originals: Originals, case: Case) -> None:
    store = _store(chance, folder, originals)
    _run_store(chance, case, store)
    if case.words[0] == "generate":
        case.words += ["-n", "200"]
    begin = chance.random() * 1.5
    case.signals = [begin + number * chance.choice((0.0, 0.01, 0.05)) for number in range(chance.choice((1, 2, 30)))]


KINDS: Final[dict[str, Callable[[random.Random, Path, Originals, Case], None]]] = {
    "manifest": _manifest,
    "block": _block,
    "store-config": _store_config,
    "tokenizer": _tokenizer,
    "checkpoint-config": _checkpoint_config,
    "weights": _weights,
    "opt": _opt,
    "gguf": _gguf,
    "template": _template,
    "requests": _requests,
    "arguments": _arguments,
    "stdin": _stdin,
    "files": _files,
    "leftovers": _leftovers,
    "described": _described,
    "interrupts": _interrupts,
}
