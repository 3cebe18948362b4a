"""A job ends with every request answered once, alike however often it was interrupted and in whatever order it ran."""

import contextlib
import json
import os
import random
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.jobs.fakes import LIMIT, FakeGenerate, fake_job, request, results_of, run_fake, write_lines
from tiered.jobs import JobFile, Journal, Progress, measure_input, run_job
from tiered.jobs.input import Input, Line
from tiered.jobs.results import result_line


def mixed(count: int) -> list[str]:
    """Requests of all kinds, and lines that are none."""
    lines = []
    for number in range(count):
        body: dict[str, Any] = {"prompt": f"Prompt {number}", "max_tokens": 1 + number % 9}
        kinds: list[dict[str, Any]] = [
            {},
            {"n": 3},
            {"logprobs": 2},
            {"temperature": 0},
            {"seed": 5},
            {"stop": ["a", "e"]},
        ]
        lines.append(request(f"id-{number}", **body, **kinds[number % 6]))
    lines[3:3] = ["", "nonsense", request("chat", chat=True), request("bad", n=0)]
    lines.append(request("id-0", prompt="the same custom_id"))
    lines.append(request("long", prompt="x" * LIMIT))
    return lines


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """That lines are durable is the journal's tests' concern."""
    monkeypatch.setattr(os, "fdatasync", lambda fd: None)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "requests.jsonl", mixed(20))


@pytest.fixture
def whole(source: Path, tmp_path: Path) -> list[bytes]:
    """The result lines of a run in one go."""
    run_fake(source, tmp_path / "whole.jsonl")
    return (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)


def test_every_line_has_one_result_that_says_how_it_went(source: Path, tmp_path: Path) -> None:
    journal = run_fake(source, tmp_path / "out.jsonl")
    found = results_of(tmp_path / "out.jsonl")
    lines = source.read_text(encoding="utf-8").splitlines()
    assert len(found) == len(journal.done) == sum(bool(line) for line in lines)
    for result in found:
        number = int(result["id"].rpartition("_")[2])
        error = result["error"]
        assert (error is None) == (result["response"]["status_code"] == 200)
        if error is None:
            assert result["custom_id"] == json.loads(lines[number - 1])["custom_id"]
        else:
            assert error["line"] == number and error["message"].startswith(f"line {number}: ")
    errors = {result["error"]["code"]: result["custom_id"] for result in found if result["error"]}
    assert errors == {
        "invalid_json": None,
        "invalid_value": "bad",
        "duplicate_custom_id": None,
        "context_length_exceeded": "long",
    }
    assert journal.failed == len(errors)


def test_a_custom_id_has_one_result_even_if_two_lines_have_it(source: Path, tmp_path: Path) -> None:
    run_fake(source, tmp_path / "out.jsonl")
    found = results_of(tmp_path / "out.jsonl")
    custom_ids = [result["custom_id"] for result in found if result["custom_id"] is not None]
    assert len(custom_ids) == len(set(custom_ids))
    (first,) = [result for result in found if result["custom_id"] == "id-0"]
    assert first["error"] is None
    (refused,) = [result for result in found if result["error"] and "earlier line" in result["error"]["message"]]
    assert '"id-0"' in refused["error"]["message"]


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_batch_size_and_order_change_no_result(
    source: Path, tmp_path: Path, whole: list[bytes], batch_size: int
) -> None:
    run_fake(source, tmp_path / "out.jsonl", FakeGenerate(batch_size))
    found = (tmp_path / "out.jsonl").read_bytes().splitlines(keepends=True)
    assert sorted(found) == sorted(whole)


def test_interrupted_after_any_sequence_it_goes_on_to_the_same_results(
    source: Path, tmp_path: Path, whole: list[bytes]
) -> None:
    results = tmp_path / "out.jsonl"
    for stop_after in range(40):
        with contextlib.suppress(KeyboardInterrupt):
            run_fake(source, results, FakeGenerate(3, stop_after))
            break
        kept = results.read_bytes()
        run_fake(source, results)
        assert results.read_bytes().startswith(kept)
        assert sorted(results.read_bytes().splitlines(keepends=True)) == sorted(whole)
        results.unlink()
        (tmp_path / "out.jsonl.job").unlink()
    else:
        raise AssertionError("it was never run to the end")


@pytest.mark.slow
def test_from_any_first_lines_in_any_order_and_a_torn_one_it_comes_to_the_same_results(
    source: Path, tmp_path: Path, whole: list[bytes]
) -> None:
    results, chance = tmp_path / "whole.jsonl", random.Random(5)
    for _ in range(40):
        order = chance.sample(whole, len(whole))
        kept = chance.randrange(len(whole))
        torn = order[kept][: chance.randrange(len(order[kept]))]
        results.write_bytes(b"".join(order[:kept]) + torn)
        run_fake(source, results, FakeGenerate(chance.randrange(1, 6)))
        found = results.read_bytes().splitlines(keepends=True)
        assert found[:kept] == order[:kept]
        assert sorted(found) == sorted(whole)


def test_what_is_done_is_not_computed_again(source: Path, tmp_path: Path, whole: list[bytes]) -> None:
    (tmp_path / "whole.jsonl").write_bytes(b"".join(whole[:-2]))
    generate = FakeGenerate()
    run_fake(source, tmp_path / "whole.jsonl", generate)
    assert 1 <= generate.ended <= 6


def test_a_request_whose_sequences_fail_has_an_error_and_the_others_go_on(tmp_path: Path) -> None:
    lines = mixed(12)
    run_fake(write_lines(tmp_path / "plain", lines), tmp_path / "plain.jsonl")
    lines[1] = request("id-1", prompt="Prompt!", n=3)
    lines[8:8] = [request("also", prompt="!")]
    source = write_lines(tmp_path / "in", lines)
    journal = run_fake(source, tmp_path / "out.jsonl", FakeGenerate(3))
    found = {result["custom_id"]: result for result in results_of(tmp_path / "out.jsonl")}
    assert len(journal.done) == journal.failed + sum(r["error"] is None for r in found.values()) == len(lines) - 1
    for name, number in (("id-1", 2), ("also", 9)):
        assert found[name]["response"]["status_code"] == 500
        message = f"line {number}: the model's logits are NaN"
        assert found[name]["error"] == {"code": "model_error", "message": message, "line": number}
    # Seeds count lines; those before the one put in have kept theirs.
    for result in results_of(tmp_path / "plain.jsonl")[:6]:
        if result["custom_id"] != "id-1":
            assert found[result["custom_id"]]["response"]["body"].get("choices") == result["response"]["body"].get(
                "choices"
            )


def test_what_has_failed_is_served_again_only_where_its_line_is_taken_out_of_the_results(tmp_path: Path) -> None:
    source, results = write_lines(tmp_path / "in", [request("a"), request("b", prompt="!")]), tmp_path / "out.jsonl"
    run_fake(source, results)
    whole = results.read_bytes()
    generate = FakeGenerate()
    run_fake(source, results, generate)
    assert generate.ended == 0 and results.read_bytes() == whole
    good = [line for line in whole.splitlines(keepends=True) if json.loads(line)["error"] is None]
    results.write_bytes(b"".join(good))
    run_fake(source, results, generate)
    assert generate.ended == 1 and sorted(results.read_bytes().splitlines()) == sorted(whole.splitlines())


def test_an_answer_that_cannot_be_written_is_an_error_of_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(label: Any, request: Any, *rest: Any) -> bytes:
        if request.custom_id == "b":
            raise ValueError("no such token")
        return result_line(label, request, *rest)

    monkeypatch.setattr("tiered.jobs.run.result_line", fails)
    source = write_lines(tmp_path / "in", [request("a"), request("b"), request("c")])
    run_fake(source, tmp_path / "out.jsonl")
    codes = [result["error"] and result["error"]["code"] for result in results_of(tmp_path / "out.jsonl")]
    assert codes == [None, "sequence_failed", None]


@pytest.mark.parametrize("lines", [[], [""], ["nonsense", request("a", n=0)]], ids=["empty", "blank", "only bad lines"])
def test_with_nothing_to_compute_nothing_is_started(tmp_path: Path, lines: list[str]) -> None:
    job, identity = fake_job(write_lines(tmp_path / "in", lines))

    @contextlib.contextmanager
    def start() -> Iterator[FakeGenerate]:
        raise AssertionError("there is nothing to compute")
        yield

    for _ in range(2):
        with Journal(tmp_path / "out") as journal:
            journal.begin(JobFile(identity, 0, *measure_input(job)[:3]), job.input.lines)
            assert run_job(job, journal, start) is None
    assert len(results_of(tmp_path / "out")) == sum(bool(line) for line in lines)


def test_requests_are_read_no_further_than_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_lines(tmp_path / "in", (request(f"id-{number}", max_tokens=3) for number in range(100)))
    read = 0
    lines = Input.read

    def counted(self: Input) -> Iterator[Line]:
        nonlocal read
        for line in lines(self):
            read += 1
            yield line

    class Watching(FakeGenerate):
        def __call__(self, sequences: Any, *, on_pass: Any, on_finished: Any) -> Any:
            def watched() -> None:
                assert read <= self.ended + self.batch_size + 1
                on_pass()

            nonlocal read
            assert read == 1
            return super().__call__(sequences, on_pass=watched, on_finished=on_finished)

    job, identity = fake_job(path)
    with Journal(tmp_path / "out") as journal:
        journal.begin(JobFile(identity, 0, *measure_input(job)[:3]), job.input.lines)
        monkeypatch.setattr(Input, "read", counted)
        run_job(job, journal, lambda: contextlib.nullcontext(Watching(5)))
    assert read == 100


@pytest.mark.slow
def test_memory_does_not_grow_with_the_requests_done(tmp_path: Path) -> None:
    peaks: list[int] = []
    for count in (300, 300, 1300):
        path = write_lines(tmp_path / "in", (request(f"id-{number}", max_tokens=2) for number in range(count)))
        tracemalloc.start()
        run_fake(path, tmp_path / f"out-{len(peaks)}")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] - peaks[1] < 30 * 1000


# Sampling.


def texts(path: Path, results: Path, **fields: Any) -> dict[str, list[str]]:
    run_fake(path, results, **fields)
    found = results_of(results)
    return {r["custom_id"]: [c["text"] for c in r["response"]["body"]["choices"]] for r in found}


def test_choices_requests_and_seeds_draw_differently(tmp_path: Path) -> None:
    lines = [request(custom_id, n=3) for custom_id in "ab"]
    path = write_lines(tmp_path / "in", lines)
    first, other = (texts(path, tmp_path / f"out-{seed}", seed=seed, max_tokens=30) for seed in (1, 2))
    assert len({text for found in (first, other) for choices in found.values() for text in choices}) == 12


def test_a_line_with_its_own_seed_is_answered_alike_in_any_file_and_any_job(tmp_path: Path) -> None:
    line = request("a", seed=11, n=2)
    one = texts(write_lines(tmp_path / "one", [line]), tmp_path / "out-1", seed=1, max_tokens=20)
    lines = ["", request("x"), request("y", seed=11), line]
    many = texts(write_lines(tmp_path / "many", lines), tmp_path / "out-2", seed=2, max_tokens=20)
    assert one["a"] == many["a"]
    assert many["y"] == many["a"][:1] != many["x"]


def test_the_input_is_measured_by_what_can_be_run(source: Path) -> None:
    job, _ = fake_job(source)
    sequences, longest, tokens, prompt_tokens = measure_input(job)
    # Twenty requests, four of them with three choices, and the chat.
    assert sequences == 20 + 4 * 2 + 1
    assert longest <= LIMIT and longest <= tokens <= sequences * longest and 0 < prompt_tokens < tokens


def test_progress_ends_with_every_sequence(source: Path, tmp_path: Path) -> None:
    seen: list[str] = []
    job, identity = fake_job(source)
    with Journal(tmp_path / "out") as journal:
        journal.begin(JobFile(identity, 0, *measure_input(job)[:3]), job.input.lines)

        def note(progress: Progress) -> None:
            seen.append(progress.line().split("  ")[0])

        run_job(job, journal, lambda: contextlib.nullcontext(FakeGenerate()), note)
        assert journal.job is not None
        total = journal.job.sequences
    counts = [int(text.partition("/")[0]) for text in seen]
    assert counts == sorted(counts) and counts[-1] == total
    assert journal.sequences == total
