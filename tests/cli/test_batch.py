"""`tiered batch` answers a file of requests with a real model, goes on where it stopped, and says what it refuses."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.commands import SLOW_TOKENS, TIERED, copy_store, make_store, run_apart, run_here, smallest_ram
from tests.damage import ADDED, poisoned, with_added_token, without_tokenizer
from tests.jobs.fakes import request, results_of, write_lines
from tests.warm import run_warm
from tiered.device import Device, open_device
from tiered.errors import ConfigError
from tiered.plan import Machine, ModelShape, Plan, Workload
from tiered.plan.predict import Prediction, predict
from tiered.units import MIB, parse_size

QUIET = ("--no-measure", "--batch", "3")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}Q: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}A:{% endif %}"
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("batch"))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Good lines and bad ones."""
    lines = [request(f"id-{number}", prompt=f"The function {number}", max_tokens=4 + number) for number in range(6)]
    lines[2:2] = ["", "nonsense", request("n", n=2, max_tokens=5), request("chat", chat=True)]
    lines.append(request("long", prompt="word " * 2100))
    lines.append(request("stream", stream=True))
    return write_lines(tmp_path / "requests.jsonl", lines)


def batch(store: Path, source: Path, results: Path, *words: str | Path) -> dict[str, Any]:
    """What --json prints."""
    done = run_here("batch", store, "-i", source, "-o", results, *QUIET, "--json", *words)
    assert (done.code, done.err) == (0, "")
    found = json.loads(done.out)
    assert isinstance(found, dict)
    return found


def texts_of(results: Path) -> dict[str, list[str]]:
    found = [result for result in results_of(results) if result["error"] is None]
    return {r["custom_id"]: [choice["text"] for choice in r["response"]["body"]["choices"]] for r in found}


def test_every_line_is_answered_or_says_why_not(store: Path, source: Path, tmp_path: Path) -> None:
    summary = batch(store, source, tmp_path / "out.jsonl")["job"]
    found = results_of(tmp_path / "out.jsonl")
    good = [result for result in found if result["error"] is None]
    errors = {result["error"]["line"]: result["error"] for result in found if result["error"]}
    assert [result["custom_id"] for result in good] == [*(f"id-{number}" for number in (0, 1)), "n", "id-2"] + [
        f"id-{number}" for number in (3, 4, 5)
    ]
    for result in good:
        body = result["response"]["body"]
        assert result["response"]["status_code"] == 200
        assert body["model"] == "opt-docs-8m" and body["object"] == "text_completion"
        usage = body["usage"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert {line: error["code"] for line, error in errors.items()} == {
        4: "invalid_json",
        6: "no_chat_template",
        11: "context_length_exceeded",
        12: "unsupported_value",
    }
    assert "2048" in errors[11]["message"]
    assert (summary["requests"], summary["done"], summary["failed"], summary["done_before"]) == (11, 11, 4, 0)
    assert summary["generated_tokens"] == sum(r["response"]["body"]["usage"]["completion_tokens"] for r in good)


def test_greedy_texts_are_those_of_generate(store: Path, tmp_path: Path) -> None:
    prompts = ("The function returns", "To install the package, run", "def main():\n")
    lines = [request(prompt, prompt=prompt, temperature=0, max_tokens=16) for prompt in prompts]
    batch(store, write_lines(tmp_path / "in", lines), tmp_path / "out.jsonl")
    found = texts_of(tmp_path / "out.jsonl")
    for prompt in prompts:
        alone = run_here("generate", store, "-p", prompt, "-n", "16", "--no-measure")
        assert alone.out == found[prompt][0] + "\n"


def test_without_a_tokenizer_results_are_token_ids_and_texts_are_refused(store: Path, tmp_path: Path) -> None:
    ids = [2, 100, 200, 300]
    lines = [request("ids", prompt=ids, temperature=0, max_tokens=6), request("n", prompt=ids, n=2, max_tokens=3)]
    lines += [request("text", prompt="Hello"), request("chat", chat=True), request("range", prompt=[2, 4096])]
    lines += [request("stop", prompt=ids, stop="a"), request("logprobs", prompt=ids, logprobs=1)]
    path = write_lines(tmp_path / "in", lines)
    batch(without_tokenizer(store, tmp_path), path, tmp_path / "out.jsonl")
    found = {result["custom_id"]: result for result in results_of(tmp_path / "out.jsonl")}
    alone = run_here("generate", store, "--prompt-ids", "2,100,200,300", "-n", "6", "--no-measure", "--json")
    (choice,) = found["ids"]["response"]["body"]["choices"]
    assert choice["text"] is None and choice["token_ids"] == json.loads(alone.out)["completions"][0]["token_ids"]
    assert [len(choice["token_ids"]) for choice in found["n"]["response"]["body"]["choices"]] == [3, 3]
    told = {name: (r["error"]["code"], r["error"]["message"]) for name, r in found.items() if r["error"] is not None}
    assert told.keys() == {"text", "chat", "range", "stop", "logprobs"}
    for name, (code, message) in told.items():
        assert code == ("invalid_value" if name in ("text", "range") else "unsupported_value")
        assert (
            "token ids of this model are 0 to 4095" if name == "range" else "this store has no tokenizer"
        ) in message


def test_log_probabilities_agree_with_the_choice(store: Path, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "in", [request("a", prompt="The function", temperature=0, max_tokens=8, logprobs=3)])
    batch(store, path, tmp_path / "out.jsonl")
    (result,) = results_of(tmp_path / "out.jsonl")
    (choice,) = result["response"]["body"]["choices"]
    found = choice["logprobs"]
    assert "".join(found["tokens"]) == choice["text"]
    assert len(found["token_logprobs"]) == len(found["top_logprobs"]) == 8
    for token, logprob, top in zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True):
        # Greedy: what was chosen is the likeliest.
        assert top[token] == logprob == max(top.values()) <= 0
    for token, offset in zip(found["tokens"], found["text_offset"], strict=True):
        assert choice["text"][offset:].startswith(token)


def test_a_chat_goes_through_the_model_s_own_template(store: Path, tmp_path: Path) -> None:
    copy = copy_store(store, tmp_path)
    path = copy / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "chat_template": TEMPLATE}), encoding="utf-8")
    messages = [{"role": "user", "content": "What is a list?"}]
    lines = [
        request("chat", chat=True, messages=messages, temperature=0, max_tokens=10),
        request("plain", prompt="Q: What is a list?\nA:", temperature=0, max_tokens=10),
    ]
    batch(copy, write_lines(tmp_path / "in", lines), tmp_path / "out.jsonl")
    chat, plain = (result["response"]["body"] for result in results_of(tmp_path / "out.jsonl"))
    assert chat["choices"][0]["message"]["content"] == plain["choices"][0]["text"]
    assert chat["usage"] == plain["usage"]


@pytest.mark.slow
def test_batch_size_and_cache_tier_change_no_result(store: Path, source: Path, tmp_path: Path) -> None:
    expected = None
    for number, words in enumerate([("--batch", "1"), ("--batch", "8"), ("--micro-batch", "3"), ("--kv", "disk")]):
        batch(store, source, tmp_path / f"{number}.jsonl", *words)
        found = texts_of(tmp_path / f"{number}.jsonl")
        expected = expected or found
        assert found == expected, words


def test_the_same_command_goes_on_and_then_has_nothing_to_do(store: Path, source: Path, tmp_path: Path) -> None:
    results = tmp_path / "out.jsonl"
    batch(store, source, results)
    whole = results.read_bytes()
    lines = whole.splitlines(keepends=True)
    results.write_bytes(b"".join(lines[:5]) + lines[5][:30])
    again = batch(store, source, results)
    assert again["job"]["done_before"] == 5
    assert sorted(results.read_bytes().splitlines()) == sorted(whole.splitlines())
    after = results.read_bytes()
    nothing = batch(store, source, results)
    assert nothing["report"] is None and nothing["job"]["done_before"] == len(lines)
    assert results.read_bytes() == after


@pytest.mark.slow
def test_what_ends_a_text_comes_from_the_store_too_and_the_rest_is_named(store: Path, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "in", [request("a", prompt="The function", temperature=0, max_tokens=30, stop="zz")])
    batch(store, path, tmp_path / "whole")
    ((whole,),) = texts_of(tmp_path / "whole").values()
    copy = copy_store(store, tmp_path)
    settings = {"stop_strings": whole[10:14], "do_sample": True, "top_p": 0.5, "max_length": 99}
    (copy / "generation_config.json").write_text(json.dumps(settings), encoding="utf-8")
    done = run_here("batch", copy, "-i", path, "-o", tmp_path / "cut", *QUIET, "--max-tokens", "9")
    assert texts_of(tmp_path / "cut") == {"a": [whole[: whole.index(whole[10:14])]]}
    assert [line for line in done.err.splitlines() if "ignored" in line] == [
        "ignored   generation_config.json: top_p 0.5; only what ends a text is taken from it, pass options instead"
    ]


ON_DEVICE = ("--tiers", "disk,cpu,gpu", "--device", "emulated")


def test_results_of_another_job_are_refused_by_name(store: Path, source: Path, tmp_path: Path) -> None:
    results = tmp_path / "out.jsonl"
    batch(store, source, results)
    content = results.read_bytes()
    other = write_lines(tmp_path / "other.jsonl", [request("a")])
    copy = copy_store(store, tmp_path)
    (copy / "generation_config.json").write_text("{}", encoding="utf-8")
    cases: list[tuple[Path, Path, tuple[str, ...], str]] = [
        (store, other, (), "the input has other contents"),
        (copy, source, (), "it is another store"),
        (store, source, ("--seed", "1"), "seed is 1, it was 0"),
        (store, source, ("--max-tokens", "9"), "max-tokens is 9, it was 128"),
        (store, source, ("--context", "100"), "context is 100, it was unset"),
        (store, source, ("--dtype", "float32"), "dtype is float32, it was bfloat16"),
        (store, source, ("--kv-bits", "8"), "kv-bits is 8, it was 16"),
        (store, source, ("--kernels", "torch"), "kernels is torch, it was"),
        (store, source, ("--kernel-mode", "fast"), "kernel-mode is fast, it was invariant"),
        (store, source, (*ON_DEVICE, "--vram", "1GiB", "--prefill-device", "gpu"), "device is emulated, it was unset"),
    ]
    for which, input_, words, told in cases:
        done = run_here("batch", which, "-i", input_, "-o", results, *QUIET, *words)
        assert done.code == 2, done
        assert told in done.err and "another file with -o" in done.err
        assert results.read_bytes() == content
    # What changes no result may change.
    batch(store, source, results, "--threads", "1", "--kv", "cpu", "--ram", "6GiB")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("patched", "value", "told"),
    [
        ("tiered.prepare.device_dtype", lambda *_: torch.float16, "device-dtype is float16, it was bfloat16"),
        ("tiered.kernels.DeviceKernels.kind", "triton", "device-kernels is triton, it was torch"),
    ],
)
def test_a_job_of_a_device_that_computes_otherwise_is_refused_by_name(
    store: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patched: str, value: Any, told: str
) -> None:
    words = ("-i", source, "-o", tmp_path / "out.jsonl", *QUIET, *ON_DEVICE, "--vram", "1GiB", "--max-tokens", "2")
    assert run_here("batch", store, *words).code == 0
    monkeypatch.setattr(patched, value)
    done = run_here("batch", store, *words)
    assert done.code == 2 and told in done.err


def test_a_job_opens_its_device_once_and_goes_on_where_it_was_begun(
    store: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []

    def open_counted(name: str, vram: int | None) -> Device:
        opened.append(name)
        return open_device(name, vram)

    monkeypatch.setattr("tiered.host.open_device", open_counted)
    monkeypatch.setattr("tiered.cli.measuring.find_profile", lambda folder: SLOW_TOKENS)
    results = tmp_path / "out.jsonl"
    words = ("batch", store, "-i", source, "-o", results, *QUIET, *ON_DEVICE, "--vram", "1GiB", "--threads", "1")
    done = run_here(*words, "--max-tokens", "20")
    assert done.code == 0 and opened == ["emulated"], done.err
    assert sum(line.startswith("phases    prompts on the GPU, the rest on the") for line in done.err.splitlines()) == 1
    settings = json.loads((tmp_path / "out.jsonl.job").read_text(encoding="utf-8"))["settings"]
    assert (settings["prefill-device"], settings["decode-device"]) == ("gpu", "cpu")
    whole = results.read_bytes()
    results.write_bytes(b"".join(whole.splitlines(keepends=True)[:-2]))
    # What a profile says now, or none, does not matter to a job that has begun.
    monkeypatch.setattr("tiered.cli.measuring.find_profile", lambda folder: None)
    again = run_here(*words, "--max-tokens", "20")
    assert again.code == 0 and "phases " not in again.err and len(opened) == 2, again.err
    assert sorted(results.read_bytes().splitlines()) == sorted(whole.splitlines())


def settings_of_job(results: Path) -> Any:
    return json.loads(results.with_name(results.name + ".job").read_text(encoding="utf-8"))


@pytest.mark.parametrize("place", ["gpu", "cpu", "disk"])
def test_a_job_goes_on_with_its_cache_where_what_attended_attends(
    store: Path, source: Path, tmp_path: Path, place: str
) -> None:
    results = tmp_path / "out.jsonl"
    on_gpu = ("--prefill-device", "gpu", "--decode-device", "gpu", "--threads", "1", "--max-tokens", "6")
    words = ("batch", store, "-i", source, "-o", results, *QUIET, *ON_DEVICE, "--vram", "1GiB", *on_gpu)
    assert run_here(*words, "--kv", place).code == 0
    begun, whole = settings_of_job(results), results.read_bytes()
    assert begun["attention"] == ("gpu" if place == "gpu" else "cpu")

    def again(*more: str) -> Any:
        results.write_bytes(b"".join(whole.splitlines(keepends=True)[:-2]))
        return run_here(*words, *more)

    # Where nothing is said the plan of a new job would have it on the GPU.
    done = again()
    assert done.code == 0, done.err
    assert sorted(results.read_bytes().splitlines()) == sorted(whole.splitlines())
    assert settings_of_job(results) == begun
    # Memory and disk hold the same bits, so these may be changed for each other.
    assert place == "gpu" or again("--kv", "disk" if place == "cpu" else "cpu").code == 0
    other = again("--kv", "cpu" if place == "gpu" else "gpu")
    assert other.code == 2 and "whose results differ in bits. Run it with --kv" in other.err, other.err
    if place == "gpu":
        held = "its KV cache is on the GPU, where the job was begun with it"
        for word, size, is_told in (("--vram", "1MiB", True), ("--ram", "1MiB", False)):
            refused = again(word, size)
            assert refused.code == 3 and (held in refused.err) is is_told, refused.err
        # Results that are gone hold it nowhere.
        results.write_bytes(b"")
        assert run_here(*words, "--kv", "cpu").code == 0
        assert settings_of_job(results)["attention"] == "cpu"


def test_a_job_that_falls_back_is_the_processor_s(store: Path, source: Path, tmp_path: Path) -> None:
    results = tmp_path / "out.jsonl"
    words = ("--tiers", "disk,cpu,gpu", "--device", "cuda:99", "--fallback", "cpu", "--dtype", "float16")
    done = run_here("batch", store, "-i", source, "-o", results, *QUIET, *words)
    assert done.code == 0, done.err
    assert "fallback  the processor computed" in done.err
    # Neither is the option named that chose the device, nor what has been done already advised.
    assert "--device" not in done.err and "--tiers" not in done.err
    before = results.read_bytes()
    batch(store, source, results)
    assert results.read_bytes() == before


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("-o", "out.jsonl"), "'-i'"),
        (("-i", "requests.jsonl"), "'-o'"),
        (("-i", "missing.jsonl", "-o", "out.jsonl"), "missing.jsonl"),
        (("-i", "requests.jsonl", "-o", "requests.jsonl"), "is the input"),
        (("-i", "requests.jsonl", "-o", "missing/out.jsonl"), "missing/out.jsonl"),
        (("-i", "requests.jsonl", "-o", "other.txt"), "other.txt.job"),
        (("-i", "requests.jsonl", "-o", "pipe"), "not a regular file"),
        (("-i", "pipe", "-o", "out.jsonl"), "not a regular file"),
        (("-i", "requests.jsonl", "-o", "out.jsonl", "--context", "5000"), "positions for 2048"),
        (("-i", "requests.jsonl", "-o", "out.jsonl", "--kv-bits", "5"), "'5'"),
        (("-i", "requests.jsonl", "-o", "out.jsonl", "--kv", "cpu", "--kv-dir", "."), "--kv disk or auto"),
        (("-i", "-", "-o", "out.jsonl"), "a regular file"),
        (("-i", "requests.jsonl", "-o", "out.jsonl", "--seed", "-1"), "--seed"),
        (("-i", "requests.jsonl", "-o", "out.jsonl", "--ram", "lots"), "lots"),
        (("-i", "requests.jsonl", "-o", "out.jsonl", "--tiers", "nvme"), "nvme"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_usage_is_explained_before_anything_is_written(
    store: Path, source: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], told: str
) -> None:
    monkeypatch.chdir(source.parent)
    Path("other.txt").write_text("what somebody wants to keep", encoding="utf-8")
    os.mkfifo("pipe")
    before = source.read_bytes()
    done = run_here("batch", store, *words)
    assert (done.code, done.out) == (2, ""), done
    assert told in done.err and "Traceback" not in done.err
    assert source.read_bytes() == before
    assert Path("other.txt").read_text(encoding="utf-8") == "what somebody wants to keep"
    assert not [*Path().glob("*.job"), *Path().glob("out.jsonl")]


def test_a_file_of_only_bad_lines_needs_no_model(store: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in", ["nonsense", request("a", n=0)])
    done = run_here("batch", store, "-i", source, "-o", tmp_path / "out.jsonl")
    assert done.code == 0
    assert done.err == "requests  2 of 2 done; 2 failed\n"


@pytest.mark.slow
def test_away_from_a_terminal_the_report_is_all_that_is_said(store: Path, source: Path, tmp_path: Path) -> None:
    done = run_warm(tmp_path, "batch", store, "-i", source, "-o", tmp_path / "out.jsonl", *QUIET)
    assert (done.code, done.out) == (0, "")
    assert done.err.startswith("requests  11 of 11 done; 4 failed\ntokens    ")
    assert "\ndecode " in done.err and "\x1b" not in done.err


def test_without_a_batch_size_the_run_says_what_it_chose_and_why(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tiered.cli.measuring.find_profile", lambda folder: None)
    source = write_lines(tmp_path / "in.jsonl", [request(f"r{number}", max_tokens=4) for number in range(5)])
    done = run_here("batch", store, "-i", source, "-o", tmp_path / "out.jsonl", "--no-measure")
    assert done.code == 0
    quick, chosen = [line for line in done.err.splitlines() if line][:2]
    assert quick.startswith("rates     measured in ") and "no profile of this machine fits this run" in quick
    assert chosen.startswith("batch     ") and "of 5 sequences at once; predicted per pass: " in chosen
    assert "of computing" in chosen and "KV cache" in chosen and "in memory" in chosen
    assert "predicted " in done.err


def test_a_profile_spares_a_job_from_measuring(
    store: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tiered.cli.measuring.find_profile", lambda folder: SLOW_TOKENS)
    monkeypatch.setattr("tiered.cli.measuring.quick_hardware", None)
    words = ("batch", store, "-i", source, "-o", tmp_path / "out.jsonl", "--no-measure", "--threads", "1")
    done = run_here(*words)
    assert done.code == 0 and "rates " not in done.err, done.err
    assert "of 8 sequences at once; predicted per pass: " in done.err


@pytest.fixture(scope="module")
def least(store: Path, tmp_path_factory: pytest.TempPathFactory) -> int:
    """The smallest budget, in bytes, in which a job runs one sequence at a time."""
    folder = tmp_path_factory.mktemp("least")
    source = write_lines(folder / "in.jsonl", [request("id", max_tokens=2)])
    words = (*TIERED, "batch", store, "-i", source, "-o", folder / "out.jsonl", "--no-measure")
    return parse_size(smallest_ram(run_apart([*words, "--batch", "1", "--ram", "1MiB"]).err))


@pytest.mark.inputs("tiered/plan", "tiered/model")
def test_choosing_a_batch_size_does_not_take_the_memory_it_is_about(store: Path, least: int, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "requests.jsonl", [request(f"id-{n}", max_tokens=2) for n in range(40)])
    words = (*TIERED, "batch", store, "-i", source, "-o", tmp_path / "out.jsonl", "--no-measure")
    done = run_apart([*words, "--ram", f"{least // MIB + 20}MiB"])
    assert done.code == 0, done.err
    assert "of 40 sequences at once, as fit; KV cache" in done.err


def test_a_request_that_cannot_be_served_keeps_no_other_from_it(store: Path, tmp_path: Path) -> None:
    bad = poisoned(with_added_token(store, tmp_path), tmp_path, "model.decoder.embed_positions.weight", 42).path
    lines = [request(f"r{number}", prompt=[*range(100, 108)], temperature=0, max_tokens=4) for number in range(12)]
    expected = batch(store, write_lines(tmp_path / "good", lines), tmp_path / "good.jsonl")
    lines[5] = request("nan", prompt=[*range(100, 180)], max_tokens=4)
    lines[7] = request("added", prompt=f"An {ADDED} added token")
    source, results = write_lines(tmp_path / "in", lines), tmp_path / "out.jsonl"
    summary = batch(bad, source, results, "--verify", "never")["job"]
    assert (summary["done"], summary["failed"]) == (12, 2) and expected["job"]["failed"] == 0
    found = {result["custom_id"]: result for result in results_of(results)}
    assert found["nan"]["response"]["status_code"] == 500 and found["nan"]["error"]["code"] == "model_error"
    assert found["added"]["response"]["status_code"] == 400 and found["added"]["error"]["code"] == "invalid_value"
    assert ADDED in found["added"]["error"]["message"]
    good = texts_of(tmp_path / "good.jsonl")
    texts = texts_of(results)
    assert len(texts) == 10 and all(texts[name] == good[name] for name in texts)
    whole = results.read_bytes()
    assert batch(bad, source, results, "--verify", "never")["job"]["done_before"] == 12
    assert results.read_bytes() == whole


def test_a_refusal_names_the_longest_request_and_how_to_refuse_it_alone(store: Path, tmp_path: Path) -> None:
    lines = [request("a", prompt=[5, 6, 7], max_tokens=4), request("b", prompt=[5, 6, 7], max_tokens=2000)]
    source = write_lines(tmp_path / "in", lines)
    done = run_here("batch", store, "-i", source, "-o", tmp_path / "out.jsonl", *QUIET, "--ram", "1MiB")
    assert done.code == 3
    assert "the longest request comes to 2003 tokens; --context, with another -o, refuses long ones alone" in done.err
    assert parse_size(smallest_ram(done.err)) > 64 * MIB
    summary = batch(store, source, tmp_path / "other.jsonl", "--context", "100")["job"]
    assert (summary["done"], summary["failed"]) == (2, 1)


@pytest.mark.parametrize("refused", [0, 2])
def test_a_job_s_prediction_is_that_of_its_own_passes(
    store: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: int
) -> None:
    asked: list[Workload] = []
    admitted = iter(range(100))

    def refuse(ids: torch.Tensor, vocab_size: int) -> None:
        if next(admitted) < refused:
            raise ConfigError("refused before it has begun")

    def noted(plan: Plan, model: ModelShape, machine: Machine, workload: Workload, gpu: None) -> Prediction:
        asked.append(workload)
        return predict(plan, model, machine, workload, gpu)

    monkeypatch.setattr("tiered.cli.measuring.find_profile", lambda folder: SLOW_TOKENS)
    monkeypatch.setattr("tiered.cli.measuring.predict", noted)
    monkeypatch.setattr("tiered.generate.scheduler.check_token_ids", refuse)
    words = ("batch", store, "-i", source, "-o", tmp_path / "out.jsonl", *QUIET, "--json", "--threads", "1")
    done = run_here(*words)
    assert done.code == 0, done.err
    report = json.loads(done.out)["report"]
    (workload,) = asked
    sequences = 8 - refused  # of those that were answered, one twice
    assert workload.sequences == sequences
    assert workload.max_prompt == round(report["prompt_tokens"] / sequences)
    assert workload.max_context == round((report["prompt_tokens"] + report["generated_tokens"]) / sequences)
    assert report["predicted_seconds_per_pass"] > 0 and report["predicted_prefill_seconds"] > 0
