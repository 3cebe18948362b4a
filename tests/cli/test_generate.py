"""`tiered generate` gives the checkpoint's own text, whatever the budget, and says plainly what it cannot do."""

import io
import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Final
from unittest import mock

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.commands import CHECKPOINT, SLOW_TOKENS, TerminalInput, copy_store, make_mixture, make_store, run_here
from tests.commands import smallest_ram as named_ram
from tests.damage import ADDED, poisoned, with_added_token, without_tokenizer
from tests.generate.tokenizers import byte_fallback
from tiered.errors import BudgetError
from tiered.plan import Workload
from tiered.plan.machines import load_hardware
from tiered.plan.plan import HOLDS_LESS
from tiered.runtime import Options, Runtime
from tiered.store import Store
from tiered.units import MIB, parse_size

pytestmark = pytest.mark.usefixtures("steady_baseline")

PROMPTS = ("To install the package, run", "The function returns", "def main():\n")
FLOAT32 = ("--dtype", "float32")
QUIET = ("--no-measure",)
FIELDS: dict[str, type | tuple[type, ...]] = {
    "prefill_seconds": float,
    "decode_seconds": float,
    "tokens_per_second": float,
    "seconds_per_pass": float,
    "passes": int,
    "bytes_read": int,
    "bytes_written": (int, type(None)),
    "disk_bandwidth": float,
    "raw_disk_bandwidth": (float, type(None)),
    "raw_disk_best_look": (float, type(None)),
    "bound_share": float,
    "compute_wait_seconds": float,
    "disk_wait_seconds": float,
    "peak_rss_bytes": int,
    "ram_budget_bytes": int,
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("generate"))


@pytest.fixture(scope="module")
def reference() -> Callable[[str, int], tuple[str, list[int]]]:
    """Text and tokens of transformers' own greedy generate on the checkpoint, in float32."""
    model: Any = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)

    @cache
    def answer(prompt: str, tokens: int) -> tuple[str, list[int]]:
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        ids = output[0, inputs["input_ids"].shape[1] :].tolist()
        return str(tokenizer.decode(ids, skip_special_tokens=True)), ids

    return answer


def answer(*words: str | Path) -> dict[str, Any]:
    """What --json prints."""
    done = run_here("generate", *words, "--json")
    assert done.code == 0, done.err
    assert done.err == ""
    result = json.loads(done.out)
    assert isinstance(result, dict)
    return result


def tokens_of(*words: str | Path) -> list[list[int]]:
    return [completion["token_ids"] for completion in answer(*words, *QUIET)["completions"]]


def smallest_ram(*words: str | Path) -> str:
    """The budget in which this process, as large as it has become by now, can run `words`."""
    done = run_here("generate", *words, "--ram", "1MiB")
    assert done.code == 3, done.err
    return named_ram(done.err)


# What is generated.


@pytest.mark.slow
def test_the_greedy_text_is_that_of_transformers(store: Path, reference: Callable[..., Any]) -> None:
    done = run_here("generate", store, "-p", PROMPTS[1], "-n", "40", *FLOAT32)
    assert done.code == 0, done.err
    assert done.out == reference(PROMPTS[1], 40)[0] + "\n"


def test_prompts_of_a_batch_get_their_own_texts_in_order(store: Path, reference: Callable[..., Any]) -> None:
    words = [word for prompt in PROMPTS for word in ("-p", prompt)]
    done = run_here("generate", store, *words, "-n", "24", *FLOAT32, *QUIET)
    texts = [reference(prompt, 24)[0] for prompt in PROMPTS]
    assert done.out == "".join(f"[{number}] {text}\n" for number, text in enumerate(texts, start=1))
    found = answer(store, *words, "-n", "24", *FLOAT32, *QUIET)
    assert found["prompts"] == list(PROMPTS)
    assert [completion["text"] for completion in found["completions"]] == texts
    assert [completion["token_ids"] for completion in found["completions"]] == [reference(p, 24)[1] for p in PROMPTS]


def test_a_prompt_comes_from_an_option_a_file_or_standard_input(store: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text(PROMPTS[1], encoding="utf-8")
    options = ("-n", "8", *QUIET)
    by_option = run_here("generate", store, "-p", PROMPTS[1], *options)
    by_file = run_here("generate", store, "-f", tmp_path / "prompt.txt", *options)
    by_input = run_here("generate", store, *options, stdin=PROMPTS[1])
    assert by_option.code == 0
    assert by_option.out == by_file.out == by_input.out
    both = answer(store, "-f", tmp_path / "prompt.txt", "-p", PROMPTS[0], *options)
    assert both["prompts"] == [PROMPTS[0], PROMPTS[1]]


@pytest.mark.parametrize("count", [1, 500])
def test_prompt_tokens_makes_a_prompt_of_exact_length(store: Path, count: int) -> None:
    found = answer(store, "--prompt-tokens", str(count), "-n", "2", *QUIET)
    assert found["report"]["prompt_tokens"] == count
    assert len(found["completions"][0]["token_ids"]) == 2


def test_as_many_tokens_as_asked_for(store: Path) -> None:
    for count in (1, 7):
        (completion,) = answer(store, "-p", PROMPTS[0], "-n", str(count), *QUIET)["completions"]
        assert (len(completion["token_ids"]), completion["finish_reason"]) == (count, "length")


def test_the_text_ends_before_a_stop(store: Path, reference: Callable[..., Any]) -> None:
    whole = reference(PROMPTS[1], 40)[0]
    stop = whole[20:26]
    words = (store, "-p", PROMPTS[1], "-n", "40", *FLOAT32, "--stop", "never seen", "--stop", stop, *QUIET)
    assert run_here("generate", *words).out == whole[: whole.index(stop)] + "\n"
    (completion,) = answer(*words)["completions"]
    assert completion["text"] == whole[: whole.index(stop)]
    assert completion["finish_reason"] == "stop"


def test_the_end_of_text_ends_it_unless_ignored(store: Path, tmp_path: Path, reference: Callable[..., Any]) -> None:
    ids = reference(PROMPTS[1], 12)[1]
    end = next(token for number, token in enumerate(ids) if number >= 3 and token not in ids[:number])
    copy = copy_store(store, tmp_path)
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [end]}), encoding="utf-8")
    words = ("-p", PROMPTS[1], "-n", "12", *FLOAT32, *QUIET)
    (completion,) = answer(copy, *words)["completions"]
    assert completion["token_ids"] == ids[: ids.index(end) + 1]
    assert completion["finish_reason"] == "stop"
    assert tokens_of(copy, *words, "--ignore-eos") == [ids]


@pytest.mark.parametrize("form", [int, list])
def test_end_tokens_that_only_config_json_names_end_the_text(
    store: Path, tmp_path: Path, reference: Callable[..., Any], form: type
) -> None:
    ids = reference(PROMPTS[1], 12)[1]
    end = next(token for number, token in enumerate(ids) if number >= 3 and token not in ids[:number])
    copy = copy_store(store, tmp_path)
    (copy / "generation_config.json").unlink()
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    config["eos_token_id"] = end if form is int else [4095, end]
    (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert tokens_of(copy, "-p", PROMPTS[1], "-n", "12", *FLOAT32) == [ids[: ids.index(end) + 1]]


def test_stop_strings_of_the_store_end_the_text_where_transformers_ends_it(
    store: Path, tmp_path: Path, reference: Callable[..., Any]
) -> None:
    whole = reference(PROMPTS[1], 40)[0]
    stop = whole[20:26]
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    model: Any = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    inputs = tokenizer(PROMPTS[1], return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=40, stop_strings=[stop, "never seen"], tokenizer=tokenizer)
    copy = copy_store(store, tmp_path)
    settings = {"eos_token_id": 2, "stop_strings": [stop, "never seen"]}
    (copy / "generation_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (completion,) = answer(copy, "-p", PROMPTS[1], "-n", "40", *FLOAT32, *QUIET)["completions"]
    assert completion["token_ids"] == output[0, inputs["input_ids"].shape[1] :].tolist()
    assert (completion["text"], completion["finish_reason"]) == (whole[: whole.index(stop)], "stop")


@pytest.mark.slow
def test_what_the_store_says_of_sampling_is_named_once_and_options_count_instead(store: Path, tmp_path: Path) -> None:
    copy = copy_store(store, tmp_path)
    settings = {"eos_token_id": 2, "do_sample": True, "temperature": 0.6, "top_p": 0.9, "max_length": 500}
    (copy / "generation_config.json").write_text(json.dumps(settings), encoding="utf-8")
    words = ("-p", PROMPTS[0], "-p", PROMPTS[1], *QUIET)
    done = run_here("generate", copy, *words, "-n", "4")
    assert done.out == run_here("generate", store, *words, "-n", "4").out
    told = [line for line in done.err.splitlines() if "ignored" in line]
    assert len(told) == 1 and "do_sample true, temperature 0.6, top_p 0.9;" in told[0], told
    assert "max_length 500" in run_here("generate", copy, *words, "--temperature", "0").err
    for options in (("--temperature", "0"), ("--temperature", "0.5", "--top-p", "1")):
        assert "ignored" not in run_here("generate", copy, *words, "-n", "4", *options).err


def test_generation_settings_that_are_none_are_an_error_of_the_store(store: Path, tmp_path: Path) -> None:
    copy = copy_store(store, tmp_path)
    (copy / "generation_config.json").write_text('{"eos_token_id": "2"}', encoding="utf-8")
    done = run_here("generate", copy, "-p", "a")
    assert (done.code, done.out, done.err.count("\n")) == (4, "", 1)
    assert 'generation_config.json: eos_token_id: expected a token id, or a list of them, found "2"' in done.err


@pytest.mark.slow
def test_a_tokenizer_that_drops_a_text_s_first_space_keeps_that_of_the_completion(store: Path, tmp_path: Path) -> None:
    copy = copy_store(store, tmp_path)
    llama = byte_fallback(*(f"▁w{number}" for number in range(3800)))
    llama.chat_template = "{{ bos_token }}{{ messages[0]['content'] }}"
    llama.save_pretrained(copy)
    words = (copy, "-p", "a a", "-n", "12", *QUIET)
    for chat in ((), ("--chat",)):
        (completion,) = answer(*words, *chat)["completions"]
        text, ids = completion["text"], completion["token_ids"]
        prompt = [*([llama.bos_token_id] if chat else []), *llama("a a")["input_ids"]]
        expected = str(llama.decode([*prompt, *ids], skip_special_tokens=True)).removeprefix("a a")
        assert text == expected and text.startswith(" w")
        assert run_here("generate", *words, *chat).out == f"{text}\n"
        (stopped,) = answer(*words, *chat, "--stop", text[:3])["completions"]
        assert (stopped["text"], stopped["token_ids"]) == ("", ids[:1])


def test_a_seed_repeats_a_sample_and_another_one_does_not(store: Path) -> None:
    words = (store, "-p", PROMPTS[0], "-n", "16", "--temperature", "1")
    first, again, other = (tokens_of(*words, "--seed", seed) for seed in ("7", "7", "8"))
    assert first == again
    assert first != other


@pytest.mark.slow
def test_neighbours_change_neither_text_nor_sample(store: Path) -> None:
    words = (store, "-n", "12", "--temperature", "1", *FLOAT32)
    alone = tokens_of(*words, "-p", PROMPTS[0])
    together = tokens_of(*words, "-p", PROMPTS[0], "-p", PROMPTS[1])
    assert together[0] == alone[0]


@pytest.mark.slow
def test_neither_budget_nor_read_ahead_changes_the_tokens(store: Path) -> None:
    words = (store, "-p", PROMPTS[1], "-n", "12", *FLOAT32)
    expected = tokens_of(*words)
    smallest = smallest_ram(*words)
    more = f"{parse_size(smallest) // MIB + 6}MiB"
    for options in (
        ("--prefetch", "0"),
        ("--ram", smallest),
        ("--ram", smallest, "--prefetch", "0"),
        ("--ram", more),
        ("--ram", more, "--prefetch", "1"),
        ("--tiers", "cpu"),
    ):
        assert tokens_of(*words, *options) == expected, options


# Token ids.


def ids_text(ids: list[int]) -> str:
    return ",".join(map(str, ids))


@pytest.fixture(scope="module")
def bare(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store without its tokenizer."""
    return without_tokenizer(store, tmp_path_factory.mktemp("bare"))


def test_a_prompt_in_token_ids_is_continued_as_its_text_is(store: Path, tmp_path: Path) -> None:
    ids = [AutoTokenizer.from_pretrained(CHECKPOINT)(prompt)["input_ids"] for prompt in PROMPTS[:2]]
    (tmp_path / "ids").write_text(json.dumps(ids[1]) + "\n", encoding="utf-8")
    options = ("-n", "12", *FLOAT32, *QUIET)
    by_text = answer(store, "-p", PROMPTS[0], "-p", PROMPTS[1], *options)
    by_ids = answer(store, "--prompt-ids", ids_text(ids[0]), "--ids-file", tmp_path / "ids", *options)
    assert by_ids["completions"] == by_text["completions"]
    assert by_ids["prompts"] == ids
    mixed = answer(store, "--prompt-ids", ids_text(ids[0]), "-p", PROMPTS[1], *options)
    assert mixed["prompts"] == [PROMPTS[1], ids[0]]
    assert mixed["completions"] == by_text["completions"][::-1]
    by_input = run_here("generate", store, "--ids-file", "-", *options, stdin=" ".join(map(str, ids[0])))
    assert by_input.out == by_text["completions"][0]["text"] + "\n"


def test_without_a_tokenizer_token_ids_go_in_and_come_out(bare: Path, reference: Callable[..., Any]) -> None:
    ids = AutoTokenizer.from_pretrained(CHECKPOINT)(PROMPTS[1])["input_ids"]
    expected = reference(PROMPTS[1], 12)[1]
    words = (bare, "--prompt-ids", ids_text(ids), "-n", "12", *FLOAT32, *QUIET)
    (completion,) = answer(*words)["completions"]
    assert (completion["text"], completion["token_ids"], completion["finish_reason"]) == (None, expected, "length")
    done = run_here("generate", *words)
    assert (done.code, done.out) == (0, ids_text(expected) + "\n")
    # What came out goes in again.
    again = answer(bare, "--prompt-ids", ids_text(ids), "--prompt-ids", done.out, "-n", "2", *QUIET)
    assert again["prompts"] == [ids, expected]
    assert len(answer(bare, "--prompt-tokens", "5", "-n", "2", *QUIET)["prompts"][0]) == 5


def test_without_a_tokenizer_the_end_of_text_ends_it_and_stop_strings_are_named(
    bare: Path, tmp_path: Path, reference: Callable[..., Any]
) -> None:
    ids = AutoTokenizer.from_pretrained(CHECKPOINT)(PROMPTS[1])["input_ids"]
    expected = reference(PROMPTS[1], 12)[1]
    end = next(token for number, token in enumerate(expected) if number >= 3 and token not in expected[:number])
    copy = copy_store(bare, tmp_path)
    settings = {"eos_token_id": end, "stop_strings": ["a"]}
    (copy / "generation_config.json").write_text(json.dumps(settings), encoding="utf-8")
    done = run_here("generate", copy, "--prompt-ids", ids_text(ids), "-n", "12", *FLOAT32, *QUIET)
    assert done.out == ids_text(expected[: expected.index(end)]) + "\n"
    assert 'stop_strings ["a"]' in next(line for line in done.err.splitlines() if line.startswith("ignored"))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("-p", "Hello"), "has no tokenizer: pass token ids instead of a text (generate: --prompt-ids"),
        (("--prompt-ids", "2", "--stop", "a"), "--stop: looks for a text"),
        (("--chat", "-p", "Hello"), "--chat: this store has no tokenizer"),
    ],
)
def test_what_takes_a_tokenizer_is_refused_without_one(bare: Path, words: tuple[str, ...], told: str) -> None:
    done = run_here("generate", bare, *words)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1), done.err
    assert told in done.err and "--tokenizer PATH" in done.err


def test_token_ids_that_are_none_are_named(store: Path, bare: Path, tmp_path: Path) -> None:
    (tmp_path / "ids").write_text("2,\n100,\n5O\n", encoding="utf-8")
    wrong = {
        ("--prompt-ids", "2,two"): "--prompt-ids: expected token ids such as 2,100,524, found 'two'",
        ("--prompt-ids", " "): "--prompt-ids: expected token ids such as 2,100,524, found none",
        ("--ids-file", str(tmp_path / "ids")): f"{tmp_path / 'ids'}: expected token ids such as 2,100,524, found '5O'",
        ("--prompt-ids", "2,4096"): "token ids of this model are 0 to 4095, found 4096",
        ("--prompt-ids", "2,-1"): "token ids of this model are 0 to 4095, found -1",
        ("--prompt-ids", "2", "--prompt-tokens", "3"): "drop -p, -f, --prompt-ids",
        ("--prompt-ids", "2", "--chat"): "--chat: puts texts into a template",
    }
    for words, told in wrong.items():
        for path in (store, bare):
            done = run_here("generate", path, *words)
            assert (done.code, done.out) == (2, "") and told in done.err, done
    # One of several keeps the others from nothing.
    done = run_here("generate", bare, "--prompt-ids", "2,9999", "--prompt-ids", "2,5", "-n", "2", *QUIET)
    assert done.code == 1 and "prompt 1: token ids of this model" in done.err
    assert re.fullmatch(r"\[1\] \n\[2\] \d+,\d+\n", done.out)


# Chat.


def test_chat_without_a_template_is_explained(store: Path) -> None:
    done = run_here("generate", store, "--chat", "-p", "Hello")
    assert done.code == 2
    assert "--chat" in done.err and "no chat template" in done.err and "drop --chat" in done.err


@pytest.mark.parametrize(
    ("template", "told"),
    [("{{ raise_exception('no users') }}", "no users"), ("{{ 'a' * 10**10 }}", "more than 256 MiB of memory")],
)
def test_a_template_that_goes_wrong_is_refused_by_name(store: Path, tmp_path: Path, template: str, told: str) -> None:
    copy = copy_store(store, tmp_path)
    (copy / "chat_template.jinja").write_text(template, encoding="utf-8")
    done = run_here("generate", copy, "--chat", "-p", "Hello")
    assert done.code == 2 and done.err.count("\n") == 1
    assert f"--chat: the chat template in {copy} refuses the prompt: " in done.err and told in done.err


def test_prompts_share_a_process_for_their_template_which_ends(store: Path, tmp_path: Path) -> None:
    copy = copy_store(store, tmp_path)
    (copy / "chat_template.jinja").write_text("{{ raise_exception('no users') }}", encoding="utf-8")
    with (
        mock.patch.multiple("tiered.generate.template", _LIFE_SECONDS=100.0, _IDLE_SECONDS=100.0),
        mock.patch("os.fork", wraps=os.fork) as fork,
        mock.patch("os.waitpid", wraps=os.waitpid) as wait,
    ):
        done = run_here("generate", copy, "--chat", *(["-p", "Hello"] * 5))
    assert done.code == 1 and done.err.count("no users") == 5
    assert fork.call_count == wait.call_count == 1


def test_a_prompt_that_cannot_fit_never_comes_to_the_tokenizer(store: Path, tmp_path: Path) -> None:
    (tmp_path / "long").write_text("ab " * 400_000, encoding="utf-8")
    done = run_here("generate", store, "-f", tmp_path / "long")
    assert (done.code, done.out) == (2, "")
    assert "1200000 characters" in done.err and "room for 1920 tokens" in done.err


def test_chat_applies_the_template(store: Path, tmp_path: Path) -> None:
    copy = copy_store(store, tmp_path)
    path = copy / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["chat_template"] = (
        "{{ bos_token }}{% for m in messages %}Q: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}A:{% endif %}"
    )
    path.write_text(json.dumps(config), encoding="utf-8")
    plain = tokens_of(copy, "-p", "Q: What is a list?\nA:", "-n", "10")
    assert tokens_of(copy, "--chat", "-p", "What is a list?", "-n", "10") == plain


# What is refused.


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--dtype", "float16"), ("float16", "auto, bfloat16 or float32")),
        (("--tiers", "nvme"), ("unknown tier 'nvme'", "disk, cpu and gpu")),
        (("--tiers", "disk,gpu"), ("on its way to the GPU", "disk,cpu,gpu")),
        (("--vram", "1GiB"), ("--vram is for a GPU", "--tiers disk,cpu,gpu")),
        (("--kv", "gpu"), ("--kv gpu is for a GPU",)),
        (("--tiers", "gpu", "--vram", "lots"), ("--vram", "lots", "8GiB")),
        (("--tiers", "disk,cpu,gpu", "--device", "opencl"), ("device 'opencl'", "emulated")),
        (("--tiers", "disk,cpu,gpu", "--kv", "gpu", "--kv-dir", "/tmp"), ("--kv-dir", "on the GPU")),
        (("--tiers", "cpu,disk"), ("slowest first", "disk,cpu")),
        (("--tiers", "disk"), ("need a tier that computes", "disk,cpu")),
        (("--ram", "lots"), ("lots", "8GiB")),
        (("--stop", ""), ("--stop",)),
        (("--temperature", "-1"), ("temperature -1",)),
        (("--top-p", "0"), ("top-p 0",)),
        (("--top-p", "0.9"), ("--temperature",)),
        (("-n", "0"), ("-n",)),
        (("-n", "3000"), ("2048", "--max-new-tokens")),
        (("--prompt-tokens", "10"), ("--prompt-tokens", "drop -p")),
        (("-f", "no/such/file"), ("no/such/file",)),
        (("--trace", "no/such/folder/trace.json"), ("--trace", "no/such/folder/trace.json")),
        (("--trace", "/proc/trace.json"), ("--trace", "/proc/trace.json")),
        (("--trace", "/"), ("--trace",)),
        (("--prompt", "\udcff"), ("not UTF-8",)),
    ],
)
def test_bad_usage_is_explained(store: Path, words: tuple[str, ...], told: tuple[str, ...]) -> None:
    done = run_here("generate", store, "-p", "Hello", *words)
    assert done.code == 2, done.err
    assert done.out == ""
    assert "Traceback" not in done.err
    for text in told:
        assert text in done.err


def test_a_prompt_and_completion_beyond_the_positions_are_refused_and_up_to_them_not(store: Path) -> None:
    done = run_here("generate", store, "--prompt-tokens", "2040", "-n", "9")
    assert done.code == 2
    assert "2049 tokens" in done.err and "2048" in done.err
    assert len(tokens_of(store, "--prompt-tokens", "2046", "-n", "2", "--ignore-eos")[0]) == 2


def test_without_a_prompt_on_a_terminal_there_is_nothing_to_wait_for(store: Path) -> None:
    done = run_here("generate", store, stdin=TerminalInput())
    assert done.code == 2
    assert "no prompt" in done.err and "-p" in done.err


def test_an_empty_prompt_starts_from_the_token_that_begins_texts(store: Path, reference: Callable[..., Any]) -> None:
    assert tokens_of(store, "-p", "", "-n", "8", *FLOAT32) == [reference("", 8)[1]]


@pytest.mark.slow
def test_an_empty_prompt_without_such_a_token_is_explained(store: Path, tmp_path: Path) -> None:
    copy = copy_store(store, tmp_path)
    path = copy / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**tokenizer, "post_processor": None}), encoding="utf-8")
    for done in (run_here("generate", copy, "-p", ""), run_here("generate", copy, stdin="")):
        assert done.code == 2, done
        assert "empty prompt" in done.err


def test_a_prompt_that_is_no_text_is_explained(store: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.bin").write_bytes(b"caf\xe9 au lait")
    binary = io.TextIOWrapper(io.BytesIO(b"caf\xe9 au lait"), encoding="utf-8")
    for done in (
        run_here("generate", store, "-f", tmp_path / "prompt.bin"),
        run_here("generate", store, stdin=binary),
    ):
        assert done.code == 2
        assert "not UTF-8" in done.err


# Tiers and budgets.


def test_the_cpu_tier_reads_each_block_once(store: Path) -> None:
    report = answer(store, "-p", PROMPTS[0], "-n", "12", "--tiers", "cpu", *QUIET)["report"]
    assert report["resident_bytes"] == report["tape_bytes"]
    assert 0 <= report["bytes_read"] - Store.open(store).tape_nbytes <= _besides_the_tape(store, 12)


def test_a_streaming_run_reads_what_is_not_resident_once_per_pass(store: Path) -> None:
    words = (store, "-p", PROMPTS[0], "-n", "12")
    report = answer(*words, "--ram", smallest_ram(*words), *QUIET)["report"]
    assert report["resident_bytes"] < report["tape_bytes"] / 2
    streamed = (report["tape_bytes"] - report["resident_bytes"]) * report["passes"] + report["resident_bytes"]
    assert 0 <= report["bytes_read"] - streamed <= _besides_the_tape(store, 12)


def test_weights_stay_in_memory_as_wished_and_the_tokens_are_the_same(store: Path) -> None:
    words = (store, "-p", PROMPTS[0], "-n", "4", *FLOAT32, *QUIET)
    whole, none = answer(*words), answer(*words, "--resident-cpu", "0")
    assert none["completions"] == whole["completions"]
    assert whole["report"]["resident_bytes"] == whole["report"]["tape_bytes"] and not none["report"]["resident_bytes"]
    assert none["report"]["bytes_read"] >= none["report"]["passes"] * none["report"]["tape_bytes"]


def test_a_text_of_few_tokens_keeps_less_in_memory_where_taking_it_is_slow(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = load_hardware("laptop-16gb")
    slow = replace(machine, gpu=None, cpu=replace(machine.cpu, cores=1), disk=replace(machine.disk, kept=1e7))
    monkeypatch.setattr("tiered.cli.measuring.find_profile", lambda folder: slow)
    words, measured = (store, "-n", "2", "--threads", "1", *QUIET), ("--prompt-tokens", "8")
    report = answer(*words, "-p", PROMPTS[0])["report"]
    assert report["resident_bytes"] == 0 and report["holds_less"]
    assert HOLDS_LESS in run_here("generate", *words, "-p", PROMPTS[0]).err
    report = answer(*words, *measured)["report"]
    assert report["resident_bytes"] == report["tape_bytes"] and not report["holds_less"]


def test_a_mixture_in_little_memory_reads_the_experts_that_are_chosen_and_answers_the_same() -> None:
    store, passes = Store.open(make_mixture()), 12
    words = (store.path, "--prompt-tokens", "6", "-n", str(passes), "--ignore-eos", *FLOAT32, *QUIET)
    whole, demanded = answer(*words), answer(*words, "--ram", smallest_ram(*words))
    assert demanded["completions"] == whole["completions"]
    assert whole["report"]["experts"] is None
    report, experts = demanded["report"], demanded["report"]["experts"]
    # In each decode pass two experts in each of four layers.
    assert experts["hits"] + experts["misses"] == (passes - 1) * 4 * 2
    nbytes = store.expert_units[0][0].nbytes
    assert experts["bytes_per_pass"] * (passes - 1) == experts["misses"] * nbytes
    assert report["tape_bytes"] == sum(unit.nbytes for units in store.dense_units for unit in units)
    assert report["bytes_read"] < passes * store.tape_nbytes / 2


def _besides_the_tape(store: Path, tokens: int) -> int:
    """At most: outer and small tensors, the embedding once for its checksum, and two pages for every token's row."""
    opened = Store.open(store)
    once = sum(opened.blocks[name].file.units_nbytes for name in ("outer", "embed"))
    once += sum(block.file.units_nbytes for block in opened.tape) - opened.tape_nbytes
    return once + 2 * 4096 * (tokens + 16)


def test_a_budget_that_cannot_work_is_refused_before_anything_is_read(store: Path) -> None:
    reads = 0

    def count(*_: object) -> int:
        nonlocal reads
        reads += 1
        raise AssertionError("nothing is to be read")

    runtime = Runtime(Store.open(store), Workload(), Options(ram=64 * MIB))
    runtime._preadv = count
    with pytest.raises(BudgetError, match="too small"), runtime:
        pass
    assert reads == 0
    done = run_here("generate", store, "-p", "Hello", "--tiers", "cpu", "--ram", "64MiB")
    assert done.code == 3
    assert "all weights" in done.err and "or use --tiers disk,cpu" in done.err


# Report, JSON and trace.


def test_text_goes_to_standard_output_and_all_else_to_standard_error(
    store: Path, reference: Callable[..., Any]
) -> None:
    words = (store, "-p", PROMPTS[1], "-n", "12", *FLOAT32)
    done = run_here("generate", *words, "--ram", smallest_ram(*words))
    assert done.out == reference(PROMPTS[1], 12)[0] + "\n"
    for start in ("prefill", "decode", "disk", "bound", "waits", "memory"):
        assert re.search(rf"^{start} ", done.err, re.MULTILINE), done.err
    assert "measured raw" in done.err
    assert "\x1b" not in done.out + done.err


@pytest.mark.parametrize("streams", [False, True])
def test_the_json_report_is_complete_and_agrees_with_itself(store: Path, streams: bool) -> None:
    words = (store, "-p", PROMPTS[0], "-p", PROMPTS[1], "-n", "10", "--ignore-eos")
    budget = ("--ram", smallest_ram(*words)) if streams else ()
    began = time.perf_counter()
    found = answer(*words, *budget)
    wall = time.perf_counter() - began
    report = found["report"]
    assert set(found) == {"prompts", "completions", "report"}
    for completion in found["completions"]:
        assert set(completion) == {"text", "token_ids", "finish_reason", "error"}
    for name, kind in FIELDS.items():
        assert isinstance(report[name], kind), name
    assert report["passes"] == 10
    assert report["generated_tokens"] == 20
    assert report["tokens_per_second"] == pytest.approx(18 / report["decode_seconds"])
    assert report["seconds_per_pass"] == pytest.approx(report["decode_seconds"] / 9)
    assert report["prefill_seconds"] <= report["first_token_seconds"]
    assert report["first_token_seconds"] + report["decode_seconds"] <= wall
    assert report["bound_share"] > 0
    if report["bytes_read_kernel"] and report["read_mode"] == "O_DIRECT":
        # The kernel also counts what this process reads otherwise, such as modules imported meanwhile.
        assert 0 <= report["bytes_read_kernel"] - report["bytes_read"] <= 32 * MIB
    if streams:
        assert report["raw_disk_bandwidth"] > 0
        assert report["disk_bandwidth"] * report["decode_seconds"] <= report["bytes_read"]
        assert report["bottleneck"] in ("disk", "compute")
    else:
        assert report["bound_share"] <= 1.05  # with a disk it may be more, if that is slower now than it was
        assert report["bottleneck"] == "memory"
        assert report["ram_budget_bytes"] >= report["peak_rss_bytes"]


def test_a_trace_shows_every_lane_within_the_run(store: Path, tmp_path: Path) -> None:
    began = time.perf_counter()
    answer(store, "-p", PROMPTS[0], "-n", "3", "--trace", tmp_path / "trace.json", *QUIET)
    wall_microseconds = (time.perf_counter() - began) * 1e6
    events = json.loads((tmp_path / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    lanes = {event["args"]["name"] for event in events if event["ph"] == "M"}
    assert lanes >= {"disk", "compute", "wait", "verify"}
    spans = [event for event in events if event["ph"] == "X"]
    assert {event["cat"] for event in spans} == lanes
    for event in spans:
        assert event["ts"] >= 0 and event["dur"] >= 0
        assert event["ts"] + event["dur"] <= wall_microseconds


def test_a_refused_run_leaves_no_trace_file(store: Path, tmp_path: Path) -> None:
    done = run_here("generate", store, "-p", "Hello", "--ram", "1MiB", "--trace", tmp_path / "trace.json")
    assert done.code == 3
    assert list(tmp_path.iterdir()) == []


# One of several prompts that cannot be continued.

LONG: Final = "the function returns " * 16
"""Far more than 40 tokens."""


def test_a_prompt_that_fails_keeps_no_other_from_its_text(store: Path, tmp_path: Path) -> None:
    bad = poisoned(with_added_token(store, tmp_path), tmp_path, "model.decoder.embed_positions.weight", 42).path
    words = (bad, "-n", "6", "--verify", "never", *QUIET)
    alone = run_here("generate", *words, "-p", PROMPTS[1])
    assert (alone.code, alone.out.strip() != "") == (0, True)
    prompts = (LONG, PROMPTS[1], f"An {ADDED} added token", "word " * 3000)
    done = run_here("generate", *words, *(word for prompt in prompts for word in ("-p", prompt)))
    assert done.code == 1
    assert done.out == f"[1] \n[2] {alone.out}[3] \n[4] \n"
    told = [line for line in done.err.splitlines() if line.startswith("tiered: ")]
    assert [line[:17] for line in told] == ["tiered: prompt 1:", "tiered: prompt 3:", "tiered: prompt 4:"]
    assert "NaN" in told[0] and ADDED in told[1] and "positions for 2048" in told[2]
    both = run_here("generate", *words, "-p", LONG, "-p", PROMPTS[1], "--json")
    first, second = json.loads(both.out)["completions"]
    assert (both.code, first["finish_reason"], first["text"]) == (1, "error", "")
    assert first["error"] in told[0]
    assert (second["error"], second["finish_reason"], second["text"] + "\n") == (None, "length", alone.out)
    # A single prompt that fails ends the command with its own error.
    only = run_here("generate", *words, "-p", LONG)
    assert only.code == 1 and "prompt 1" not in only.err and "NaN" in only.err
    added = run_here("generate", *words, "-p", ADDED)
    assert (added.code, added.out) == (2, "") and ADDED in added.err
    # No runtime is opened where no prompt is left.
    none = run_here("generate", *words, "-p", ADDED, "-p", f"{ADDED}!")
    assert (none.code, none.out, len(none.err.splitlines())) == (1, "", 2)
    found = json.loads(run_here("generate", *words, "-p", ADDED, "-p", f"{ADDED}!", "--json").out)
    assert [ADDED in completion["error"] for completion in found["completions"]] == [True, True]
    assert found["report"] is None


def test_a_profile_foretells_what_it_has_measured_and_nothing_of_an_emulated_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = load_hardware("t4-208gb")
    profile = replace(machine, cpu=replace(machine.cpu, cores=1))
    monkeypatch.setattr("tiered.cli.measuring.find_profile", lambda folder: profile)
    words: list[str | Path] = [make_store(tmp_path, "int8"), "-p", "a", "-n", "2", "--threads", "1", "--no-measure"]
    emulated = ["--tiers", "disk,cpu,gpu", "--device", "emulated", "--vram", "256MiB"]
    assert answer(*words)["report"]["predicted_seconds_per_pass"] > 0
    assert answer(*words, *emulated)["report"]["predicted_seconds_per_pass"] is None


@pytest.mark.parametrize(
    ("rates", "chosen"),
    [
        ({}, "prompts on the GPU, the rest on the processor"),
        pytest.param({"memory": 1e6}, "all on the processor", marks=pytest.mark.slow),
        pytest.param({"name": "Tesla T4", "memory": 1e6}, None, marks=pytest.mark.slow),
    ],
    ids=["both", "processor", "of another device"],
)
def test_who_computes_is_chosen_by_a_profile_of_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rates: dict[str, Any], chosen: str | None
) -> None:
    assert SLOW_TOKENS.gpu is not None
    profile = replace(SLOW_TOKENS, gpu=replace(SLOW_TOKENS.gpu, **rates))
    monkeypatch.setattr("tiered.cli.measuring.find_profile", lambda folder: profile)
    words: list[str | Path] = ["generate", make_store(tmp_path, "int8"), "-p", "The function " * 20, "-n", "6"]
    words += ["--threads", "1", "--no-measure", "--tiers", "disk,cpu,gpu", "--device", "emulated", "--vram", "1GiB"]
    done = run_here(*words)
    assert done.code == 0, done.err
    told = [line for line in done.err.splitlines() if line.startswith("phases ")]
    assert len(told) == (chosen is not None) and all(f"  {chosen}, which is expected" in line for line in told)
    found = answer(*words[1:])
    device = found["report"]["device"]
    computes = None if device is None else (device["prefill_device"], device["decode_device"])
    by_name = {"prompts on the GPU, the rest on the processor": ("gpu", "cpu"), None: ("gpu", "gpu")}
    assert computes == by_name.get(chosen)
    assert found["completions"][0]["text"].strip() in done.out


@pytest.mark.parametrize(("prompts", "said"), [(12, True), (1, False)])
def test_prompts_run_as_many_at_once_as_a_profile_makes_worth_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prompts: int, said: bool
) -> None:
    # Each further row takes as long as the first: whoever waits for a text has it soonest if they take turns.
    monkeypatch.setattr("tiered.cli.measuring.find_profile", lambda folder: SLOW_TOKENS)
    words: list[str | Path] = ["generate", make_store(tmp_path, "int8"), "-n", "3", "--threads", "1", "--no-measure"]
    for number in range(prompts):
        words += ["-p", f"The function {number}"]
    done = run_here(*words)
    assert done.code == 0, done.err
    lines = [line for line in done.err.splitlines() if line.startswith("batch ")]
    assert len(lines) == said and all(f"of {prompts} sequences at once; predicted per pass: " in one for one in lines)
    assert "predicted prefill " in done.err
    alone = run_here(*words, "--batch", str(prompts))
    assert "batch  " not in alone.err
