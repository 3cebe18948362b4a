"""A store larger than the memory allowed generates the right text, where exceeding the limit kills it."""

import json
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.commands import CHECKPOINT, LIMIT, TIERED, Done, make_store, run_apart, run_here, smallest_ram
from tests.convert.models import save_bin
from tiered.convert import ConvertOptions, convert_checkpoint
from tiered.store import Store
from tiered.units import MIB, parse_size
from tools.inflate import inflate

PROMPT = ("-p", "The function returns", "--ignore-eos")
LIMIT_NBYTES = 768 * MIB
SIZE = 1_100_000_000
PAGE_CACHE = 128 * MIB
"""What a run may take beside its budget: pages of files, which the kernel charges and can take back."""

SPARE = 72 * MIB
"""What a named budget may lie above what is used, or a tenth of that."""
LOAD = """
import sys
import tiered
try:
    for _ in range(2):  # what the first took, the second may have
        with tiered.load(sys.argv[1], ram=sys.argv[3]) as loaded:
            ids = loaded.tokenizer("The function returns. " * 40, return_tensors="pt")["input_ids"][:, :120]
            loaded.model.generate(ids, max_new_tokens=4, do_sample=False)
except tiered.TieredError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""

pytestmark = [pytest.mark.cgroup, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def can_limit() -> None:
    checked = run_apart((*LIMIT, "--check"))
    if checked.code == 125:
        pytest.skip(checked.err)
    assert checked.code == 0, checked.err


@pytest.fixture(scope="module")
def store(can_limit: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The trained model at 1.1 GB, which computes what the small one computes; removed after the last test."""
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


@pytest.mark.slow
def test_more_than_there_is_memory_for(store: Path, small: Path, tmp_path: Path) -> None:
    assert Store.open(store).tape_nbytes > LIMIT_NBYTES + PAGE_CACHE
    run = run_limited(tmp_path, ("generate", store, *PROMPT, "-n", "4"), LIMIT_NBYTES)
    assert tokens(run.done) == expected_tokens(small, 4, *PROMPT)
    assert_within(run, LIMIT_NBYTES)
    report = json.loads(run.done.out)["report"]
    # Much of it came from the disk in every pass, and nothing was written.
    assert report["bytes_read"] > 2 * LIMIT_NBYTES
    assert report["resident_bytes"] < LIMIT_NBYTES


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    # In so little memory 16 tokens at a time are computed, whatever their number: these are three times that.
    [PROMPT, ("--prompt-tokens", "48", "--ignore-eos", "--dtype", "float32")],
    ids=["short", "long, float32"],
)
def test_the_smallest_budget_that_is_named(store: Path, small: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    command = ("generate", str(store), *words, "-n", "2", "--no-measure")
    refused = run_apart((*TIERED, *command, "--ram", "64MiB"))
    assert refused.code == 3, refused.err
    ram = parse_size(smallest_ram(refused.err))
    assert ram < LIMIT_NBYTES
    run = run_limited(tmp_path, command, ram)
    assert tokens(run.done) == expected_tokens(small, 2, *words)
    assert_within(run, ram)


@pytest.mark.slow
def test_by_default_the_budget_follows_from_the_group_that_the_process_is_in(store: Path, tmp_path: Path) -> None:
    path = tmp_path / "limit.json"
    words = ("generate", store, *PROMPT, "-n", "2", "--no-measure", "--json")
    done = run_apart((*LIMIT, "--memory", str(LIMIT_NBYTES), "--json", path, "--", *TIERED, *words), seconds=500)
    assert done.code == 0, done.err
    seen = json.loads(path.read_text(encoding="utf-8"))
    budget = json.loads(done.out)["report"]["ram_budget_bytes"]
    assert seen["oom_kills"] == 0, seen
    assert seen["vm_hwm_bytes"] <= budget < LIMIT_NBYTES


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """A model with layers of some size, in each format, and as a store in 4 bits."""
    folder = tmp_path_factory.mktemp("checkpoints")
    sizes = {"vocab_size": 4096, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4}
    config = AutoConfig.for_model("llama", **sizes, num_attention_heads=16)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder / "safetensors")
    for form in ("zip", "legacy"):
        save_bin(folder / form, model, zipped=form == "zip")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(CHECKPOINT / name, folder / "safetensors" / name)
    convert_checkpoint(folder / "safetensors", folder / "store")
    yield {path.name: path for path in folder.iterdir()}
    shutil.rmtree(folder)


def named_and_used(folder: Path, command: Sequence[str | Path]) -> tuple[int, int, Done]:
    """The budget that `command` names when it has too little, and its peak when it has that and page cache.

    Where memory cannot be limited, it is told all the same what was used.
    """
    refused = run_apart((*command, "--ram", "64MiB"))
    assert (refused.code, refused.out) == (3, ""), refused
    ram = parse_size(re.findall(r"--ram (\d+MiB)", refused.err)[-1])
    path = folder / "limit.json"
    tool = (*LIMIT, "--memory", str(ram + PAGE_CACHE), "--or-unlimited", "--json", path, "--")
    done = run_apart((*tool, *command, "--ram", str(ram)))
    assert done.code == 0, done.err
    seen = json.loads(path.read_text(encoding="utf-8"))
    assert not seen["limited"] or seen["oom_kills"] == 0, seen
    return ram, max(seen["vm_hwm_bytes"], seen["max_rss_bytes"]), done


def assert_tight(named: int, used: int) -> None:
    figures = f"{named / MIB:.0f} MiB named, {used / MIB:.0f} MiB used"
    assert used <= named <= used + max(SPARE, used // 10), figures


@pytest.mark.inputs("tiered/convert", "tiered/plan")
@pytest.mark.parametrize(
    ("form", "words"),
    [("safetensors", ("--quant", "int4")), ("zip", ("--quant", "none", "--compress", "planes")), ("legacy", ())],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_conversion_works_within_the_budget_it_names(
    form: str, words: tuple[str, ...], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    output = tmp_path / "out.tiered"
    named, used, _ = named_and_used(tmp_path, (*TIERED, "convert", checkpoints[form], "-o", output, *words))
    assert_tight(named, used)
    Store.open(output)
    remove(output)


@pytest.mark.slow
def test_a_model_at_its_default_context_loads_within_the_budget_it_names(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    named, used, _ = named_and_used(tmp_path, (sys.executable, "-c", LOAD, checkpoints["store"]))
    assert_tight(named, used)


@pytest.mark.inputs("tiered/plan", "tiered/model")
@pytest.mark.parametrize("command", ["generate", "batch", "score"])
def test_commands_work_within_the_budget_they_name(command: str, small: Path, tmp_path: Path) -> None:
    text, job = tmp_path / "text", tmp_path / "job"
    text.write_text("The function returns the value. " * 600)
    body = {"model": "any", "prompt": "The function returns", "max_tokens": 4}
    job.write_text(json.dumps({"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}) + "\n")
    words = {
        "generate": ("generate", small, "--prompt-tokens", "500", "-n", "6"),  # measures the disk, too
        "batch": ("batch", small, "-i", job, "-o", tmp_path / "out.jsonl", "--batch", "1", "--no-measure"),
        "score": ("score", small, "-f", text, "--context", "128", "--batch", "30", "--no-measure"),
    }[command]
    named, used, done = named_and_used(tmp_path, (*TIERED, *words, "--json"))
    assert_tight(named, used)
    report = json.loads(done.out)["report"]
    assert report["peak_rss_bytes"] <= report["ram_budget_bytes"] == named
