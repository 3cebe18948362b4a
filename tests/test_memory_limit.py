"""A store larger than the memory allowed generates the right text, where exceeding the limit is death."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.commands import CHECKPOINT, LIMIT, TIERED, Done, make_store, run_apart, run_here, smallest_ram
from tiered.convert import ConvertOptions, convert_checkpoint
from tiered.store import Store
from tiered.units import GIB, MIB, parse_size
from tools.inflate import inflate

PROMPT = ("-p", "The function returns", "--ignore-eos")
SIZE = 2_000_000_000
PAGE_CACHE = 128 * MIB
"""What a run may take beside its budget: pages of files, which the kernel charges and can take back."""

pytestmark = [pytest.mark.cgroup, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module", autouse=True)
def can_limit() -> None:
    checked = run_apart((*LIMIT, "--check"))
    if checked.code == 125:
        pytest.skip(checked.err)
    assert checked.code == 0, checked.err


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The trained model at 2 GB, which computes what the small one computes; removed after the last test."""
    folder = tmp_path_factory.mktemp("large")
    inflate(CHECKPOINT, folder / "large", SIZE)
    convert_checkpoint(folder / "large", folder / "large.tiered", ConvertOptions(quant="none", compress="none"))
    remove(folder / "large")
    yield folder / "large.tiered"
    remove(folder / "large.tiered")


def remove(folder: Path) -> None:
    """Delete what takes gigabytes; pytest keeps the last temporary folders."""
    for path in folder.rglob("*.safetensors"):
        path.unlink()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("small"))


def expected_tokens(small: Path, count: int, *words: str) -> list[list[int]]:
    done = run_here("generate", small, *words, "-n", str(count), "--json", "--no-measure")
    assert done.code == 0, done.err
    return tokens(done)


def tokens(done: Done) -> list[list[int]]:
    return [completion["token_ids"] for completion in json.loads(done.out)["completions"]]


@dataclass(frozen=True)
class Limited:
    """A run under a limit: how it ended, and what the limiting tool saw."""

    done: Done
    seen: dict[str, Any]


def run_limited(folder: Path, words: Sequence[str | Path], ram: int) -> Limited:
    """`tiered` `words` with a budget of `ram` in a group limited to that and some page cache."""
    path = folder / "limit.json"
    tool = (*LIMIT, "--memory", str(ram + PAGE_CACHE), "--json", path, "--")
    done = run_apart((*tool, *TIERED, *words, "--ram", str(ram), "--json"), seconds=500)
    assert done.code == 0, done.err
    return Limited(done, json.loads(path.read_text(encoding="utf-8")))


def assert_within(run: Limited, ram: int) -> None:
    report = json.loads(run.done.out)["report"]
    figures = f"budget {ram / MIB:.0f} MiB: {run.seen}"
    assert run.seen["limited"] and run.seen["oom_kills"] == 0, figures
    assert run.seen["vm_hwm_bytes"] <= ram, figures
    assert report["peak_rss_bytes"] <= report["ram_budget_bytes"] == ram, figures
    assert run.seen["cgroup_peak_bytes"] <= ram + PAGE_CACHE, figures


def test_two_gigabytes_in_one(store: Path, small: Path, tmp_path: Path) -> None:
    assert Store.open(store).tape_nbytes > GIB + PAGE_CACHE
    run = run_limited(tmp_path, ("generate", store, *PROMPT, "-n", "12"), GIB)
    assert tokens(run.done) == expected_tokens(small, 12, *PROMPT)
    assert_within(run, GIB)
    report = json.loads(run.done.out)["report"]
    # Much of it came from the disk in every pass, and nothing was written.
    assert report["bytes_read"] > 12 * GIB
    assert report["resident_bytes"] < GIB


@pytest.mark.parametrize(
    "words", [PROMPT, ("--prompt-tokens", "160", "--ignore-eos", "--dtype", "float32")], ids=["short", "long, float32"]
)
def test_the_smallest_budget_that_is_named(store: Path, small: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    command = ("generate", str(store), *words, "-n", "2", "--no-measure")
    refused = run_apart((*TIERED, *command, "--ram", "64MiB"))
    assert refused.code == 3, refused.err
    ram = parse_size(smallest_ram(refused.err))
    assert ram < GIB
    run = run_limited(tmp_path, command, ram)
    assert tokens(run.done) == expected_tokens(small, 2, *words)
    assert_within(run, ram)


def test_by_default_the_budget_follows_from_the_group_that_the_process_is_in(store: Path, tmp_path: Path) -> None:
    path = tmp_path / "limit.json"
    words = ("generate", store, *PROMPT, "-n", "2", "--no-measure", "--json")
    done = run_apart((*LIMIT, "--memory", "1GiB", "--json", path, "--", *TIERED, *words), seconds=500)
    assert done.code == 0, done.err
    seen = json.loads(path.read_text(encoding="utf-8"))
    budget = json.loads(done.out)["report"]["ram_budget_bytes"]
    assert seen["oom_kills"] == 0, seen
    assert seen["vm_hwm_bytes"] <= budget < GIB
