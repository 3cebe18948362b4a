"""A job is its input, its store and its settings: whatever changes a result makes it another job."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.convert.version1 import make_old
from tiered.convert import ConvertOptions, convert_checkpoint
from tiered.errors import ConfigError, CorruptError
from tiered.jobs import Identity, JobFile, job_path, store_fingerprint
from tiered.jobs.identity import check_same, read_job, write_job

BEGUN = Identity("11", "22", {"seed": 0, "dtype": "bfloat16", "context": None})
JOB = JobFile(BEGUN, 1700000000, 40, 37, 900)
RESULTS = Path("folder/results.jsonl")


def test_what_is_written_down_is_read_again(tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    assert read_job(results) is None
    write_job(results, JOB)
    assert read_job(results) == JOB
    assert job_path(results).name == "results.jsonl.job"


def test_the_same_job_may_be_gone_on_with() -> None:
    check_same(RESULTS, Identity("11", "22", {"context": None, "dtype": "bfloat16", "seed": 0}), BEGUN)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (replace(BEGUN, input="12"), "the input has other contents"),
        (replace(BEGUN, store="23"), "it is another store"),
        (replace(BEGUN, settings={**BEGUN.settings, "seed": 7}), "seed is 7, it was 0"),
        (replace(BEGUN, settings={**BEGUN.settings, "context": 9}), "context is 9, it was unset"),
        (replace(BEGUN, settings={**BEGUN.settings, "new": "x"}), "new is x, it was unset"),
        (replace(BEGUN, settings={"seed": 0}), "dtype is unset, it was bfloat16"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_differs_is_named_and_makes_another_key(changed: Identity, told: str) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        check_same(RESULTS, changed, BEGUN)
    assert str(RESULTS) in str(caught.value) and "another file with -o" in str(caught.value)
    assert caught.value.exit_code == 2
    assert changed.key != BEGUN.key


def test_a_job_begun_before_its_store_was_upgraded_is_refused(tmp_path: Path) -> None:
    new = convert_checkpoint("tiny-llama", tmp_path / "new", ConvertOptions(synthetic=True)).store
    old = make_old(shutil.copytree(new, tmp_path / "old"))
    begun = replace(BEGUN, store=store_fingerprint(old))
    convert_checkpoint(old)
    with pytest.raises(ConfigError, match=r"it is another store, or was converted or upgraded since.*file with -o"):
        check_same(RESULTS, replace(BEGUN, store=store_fingerprint(old)), begun)
    assert store_fingerprint(old) == store_fingerprint(new)


def test_the_key_is_the_same_in_every_process() -> None:
    assert BEGUN.key == Identity("11", "22", {"context": None, "dtype": "bfloat16", "seed": 0}).key
    assert len(BEGUN.key) == 16


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff",
        b'{"format": "tiered-job", "version": 2}',
        JOB.to_json().replace('"created": 1700000000', '"created": "now"').encode(),
        JOB.to_json().replace('"longest"', '"shortest"').encode(),
    ],
)
def test_a_damaged_job_file_is_explained(tmp_path: Path, content: bytes) -> None:
    results = tmp_path / "results.jsonl"
    job_path(results).write_bytes(content)
    with pytest.raises(CorruptError, match=r"results\.jsonl\.job: .*name another file with -o"):
        read_job(results)


def test_a_store_is_known_by_everything_beside_its_blocks(tmp_path: Path) -> None:
    (tmp_path / "blocks").mkdir()
    (tmp_path / "manifest.json").write_text("{}", encoding="utf-8")
    prints = [store_fingerprint(tmp_path)]
    (tmp_path / "blocks" / "layer").write_bytes(b"what is in it is in the manifest")
    for name in ("shape.json", "shape.json-123"):  # which a plan has kept, or is about to
        (tmp_path / name).write_text("{}", encoding="utf-8")
    assert store_fingerprint(tmp_path) == prints[0]
    for name, content in (("tokenizer.json", "a"), ("tokenizer.json", "b"), ("manifest.json", "[]"), ("new", "")):
        (tmp_path / name).write_text(content, encoding="utf-8")
        prints.append(store_fingerprint(tmp_path))
    assert len(set(prints)) == len(prints)


def test_a_job_file_too_large_to_be_one_is_not_parsed(tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    job_path(results).touch()
    os.truncate(job_path(results), 65 << 20)  # sparse
    with pytest.raises(CorruptError, match=r"expected at most 67,108,864; name another file with -o"):
        read_job(results)


@pytest.mark.slow
def test_whatever_lies_in_a_stores_folder_counts_however_large(tmp_path: Path) -> None:
    (tmp_path / "notes").touch()
    os.truncate(tmp_path / "notes", (512 << 20) + 1)  # sparse
    whole = store_fingerprint(tmp_path)
    with (tmp_path / "notes").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"!")
    assert store_fingerprint(tmp_path) != whole
