"""The keys of what --json prints are what other programs read: none goes, comes or changes its kind unnoticed.

`data/json-keys.json` holds them, with the kinds of their values ("any" where there may be none); a change of it belongs
in CHANGELOG.md. What `doctor` says depends on the machine, but for its sections.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.commands import make_mixture, make_store, run_here, smallest_ram

KEYS: dict[str, dict[str, str]] = json.loads(
    (Path(__file__).parent / "data/json-keys.json").read_text(encoding="utf-8")
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("keys"), "int4")


def kinds(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Path and kind of every value; the members of a list share a path."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from kinds(inner, f"{path}.{key}" if path else key)
    elif isinstance(value, list) and value and not isinstance(value[0], int | float | str):
        for inner in value:
            yield from kinds(inner, f"{path}[]")
    else:
        yield path, {int: "number", float: "number"}.get(type(value), type(value).__name__)


def found(text: str) -> dict[str, str]:
    """Several kinds of one path are joined."""
    joined: dict[str, set[str]] = {}
    for path, kind in kinds(json.loads(text)):
        joined.setdefault(path, set()).add(kind)
    return {path: "|".join(sorted(kinds)) for path, kinds in sorted(joined.items())}


def words(command: str, store: Path, folder: Path) -> list[str | Path]:
    text, requests = folder / "text", folder / "in.jsonl"
    text.write_text("The function returns the value. " * 20, encoding="utf-8")
    body = {"model": "any", "prompt": "The function", "max_tokens": 4, "ignore_eos": True}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}
    requests.write_text(json.dumps(line) + "\n", encoding="utf-8")
    known: dict[str, list[str | Path]] = {
        "generate": ["generate", store, "-p", "The function", "-n", "4", "--ignore-eos"],
        "score": ["score", store, "-f", text],
        "batch": ["batch", store, "-i", requests, "-o", folder / "out.jsonl"],
        "inspect": ["inspect", store, "--disk-bandwidth", "1GB"],
        "verify": ["verify", store],
        "doctor": ["doctor"],
        "plan": ["plan", "opt-125m", "--hardware", "t4-208gb"],
        "simulate a GPU": [
            *("simulate", "opt-125m", "--hardware", "t4-208gb", "--ram", "8GiB", "--tiers", "disk,cpu,gpu"),
            *("--passes", "2"),
        ],
        "simulate": ["simulate", store, "--hardware", "laptop-16gb", "--ram", "1GiB", "--passes", "2"],
    }
    return known[command]


@pytest.mark.parametrize(
    "command",
    ["generate", "score", "batch", "inspect", "verify", "doctor", "plan", "simulate", "simulate a GPU"],
)
def test_the_keys_are_as_they_were(command: str, store: Path, tmp_path: Path) -> None:
    asked = words(command, store, tmp_path)
    if command == "generate":
        # Streaming, so that there is a disk to measure.
        asked += ["--ram", smallest_ram(run_here(*asked, "--ram", "1MiB").err)]
    done = run_here(*asked, "--json")
    assert done.code == 0, done.err
    seen, expected = found(done.out), KEYS[command]
    if command == "doctor":
        seen = {path.split(".")[0].split("[")[0]: "any" for path in seen}
    assert seen.keys() == expected.keys()
    assert {
        path: kind for path, kind in seen.items() if expected[path] not in ("any", kind) and kind != "NoneType"
    } == {}


@pytest.mark.slow
def test_what_is_said_of_experts_has_keys_of_its_own() -> None:
    words: list[str | Path] = ["generate", make_mixture(), "--prompt-tokens", "4", "-n", "4", "--ignore-eos", "--json"]
    generated = run_here(*words, "--ram", smallest_ram(run_here(*words, "--ram", "1MiB").err))
    inspected = run_here("inspect", make_mixture(), "--json")
    assert (generated.code, inspected.code) == (0, 0), generated.err + inspected.err
    seen = {**found(generated.out), **found(inspected.out)}
    assert {path: kind for path, kind in seen.items() if "experts" in path.split(".")[-2:]} == KEYS["experts"]
