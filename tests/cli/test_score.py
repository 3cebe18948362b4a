"""`tiered score` gives transformers' own perplexity, however the text is cut, shared out or piped in."""

import io
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.commands import CHECKPOINT, ROOT, TerminalInput, copy_store, make_store, run_here
from tests.commands import smallest_ram as named_ram
from tests.damage import ADDED, poisoned, with_added_token, without_tokenizer
from tiered.units import MIB, parse_size

pytestmark = pytest.mark.usefixtures("steady_baseline")

TEXT = (ROOT / "LICENSE").read_text(encoding="utf-8")[:6000]
FLOAT32 = ("--dtype", "float32")
QUIET = ("--no-measure",)
ON_DEVICE = ("--tiers", "disk,cpu,gpu", "--device", "emulated")
CONTEXT = 256


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("score"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def bare_store(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store whose tokenizer puts nothing in front of a text."""
    copy = copy_store(store, tmp_path_factory.mktemp("bare"))
    path = copy / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**tokenizer, "post_processor": None}), encoding="utf-8")
    return copy


@pytest.fixture(scope="module")
def losses() -> Callable[[list[int]], list[float]]:
    """transformers' own cross entropy of each token of a text after the first, in float32."""
    model: Any = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)

    def answer(ids: list[int]) -> list[float]:
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits[0, :-1]
        found: list[float] = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none").tolist()
        return found

    return answer


def ids_of(text: str) -> list[int]:
    """Tokens of `text`, without what the tokenizer puts in front."""
    ids: list[int] = AutoTokenizer.from_pretrained(CHECKPOINT)(text, add_special_tokens=False)["input_ids"]
    return ids


BEGIN: int = 2
"""What this checkpoint's tokenizer puts in front of a text."""


def answer(*words: str | Path, stdin: io.TextIOBase | str = "") -> dict[str, Any]:
    """What --json prints."""
    done = run_here("score", *words, "--json", stdin=stdin)
    assert (done.code, done.err) == (0, "")
    result = json.loads(done.out)
    assert isinstance(result, dict)
    return result


def piped(content: bytes) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(content), encoding="utf-8")


def smallest_ram(*words: str | Path) -> str:
    """The budget in which this process, as large as it has become by now, can run `words`."""
    done = run_here("score", *words, "--ram", "1MiB")
    assert done.code == 3, done.err
    return named_ram(done.err)


# What is scored.


def test_perplexity_is_that_of_transformers_over_the_same_windows(
    store: Path, text: Path, losses: Callable[[list[int]], list[float]]
) -> None:
    ids = ids_of(TEXT)
    expected = [
        loss for start in range(0, len(ids), CONTEXT) for loss in losses([BEGIN, *ids[start : start + CONTEXT]])
    ]
    assert len(expected) == len(ids) > 3 * CONTEXT
    found = answer(store, "-f", text, "--context", str(CONTEXT), *FLOAT32, *QUIET)
    (scores,) = found["texts"]
    assert (scores["file"], scores["tokens"], scores["bytes"]) == (str(text), len(ids), len(TEXT))
    assert scores["nats_per_token"] == pytest.approx(sum(expected) / len(ids), rel=1e-5)
    assert scores["perplexity"] == pytest.approx(math.exp(sum(expected) / len(ids)), rel=1e-4)
    assert scores["bits_per_byte"] == pytest.approx(sum(expected) / math.log(2) / len(TEXT), rel=1e-5)


def test_every_token_gets_a_line_with_its_own_log_probability(
    store: Path, text: Path, tmp_path: Path, losses: Callable[[list[int]], list[float]]
) -> None:
    ids, stride = ids_of(TEXT), 100
    found = answer(
        *(store, "-f", text, "--context", "160", "--stride", str(stride)),
        *("--per-token", tmp_path / "tokens.jsonl", *FLOAT32, *QUIET),
    )
    lines = [json.loads(line) for line in (tmp_path / "tokens.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["token_id"] for line in lines] == ids
    assert [line["position"] for line in lines] == list(range(len(ids)))
    assert {line["file"] for line in lines} == {str(text)}
    assert "".join(line["text"] for line in lines) == TEXT
    expected = [-loss for loss in losses([BEGIN, *ids[:160]])]
    while len(expected) < len(ids):
        # Behind the first window each one is as long, ends a stride later, and scores only what is new.
        end = len(expected) + stride
        window = losses([BEGIN, *ids[end - 160 : end]])
        expected += [-loss for loss in window[160 - stride :]]
    assert [line["logprob"] for line in lines] == pytest.approx(expected, abs=2e-4)
    assert found["texts"][0]["nats_per_token"] == pytest.approx(-sum(expected) / len(ids), rel=1e-5)


def test_texts_are_scored_each_on_its_own_and_together(store: Path, text: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("def main() -> None:\n    print('Grüße, 世界')\n", encoding="utf-8")
    options = ("--context", str(CONTEXT), *QUIET)
    alone = [answer(store, "-f", path, *options)["texts"][0] for path in (other, text)]
    found = answer(store, "-f", other, "-f", text, *options, "--per-token", tmp_path / "tokens.jsonl")
    assert found["texts"] == alone
    assert alone[0]["bytes"] == other.stat().st_size
    tokens = sum(scores["tokens"] for scores in alone)
    nats = sum(scores["tokens"] * scores["nats_per_token"] for scores in alone)
    assert found["together"]["tokens"] == tokens
    assert found["together"]["nats_per_token"] == pytest.approx(nats / tokens)
    lines = [json.loads(line) for line in (tmp_path / "tokens.jsonl").read_text(encoding="utf-8").splitlines()]
    places = [(line["file"], line["position"]) for line in lines]
    assert places == [(s["file"], n) for s in alone for n in range(s["tokens"])]


@pytest.mark.slow
def test_without_a_token_that_begins_texts_the_first_one_is_not_counted(
    bare_store: Path, text: Path, losses: Callable[[list[int]], list[float]]
) -> None:
    ids = ids_of(TEXT)
    found = answer(bare_store, "-f", text, "--context", "2048", *FLOAT32, *QUIET)["texts"][0]
    assert found["tokens"] == len(ids) - 1
    assert found["nats_per_token"] == pytest.approx(sum(losses(ids)) / (len(ids) - 1), rel=1e-5)


def test_a_text_comes_from_a_file_or_from_standard_input_as_it_is(store: Path, tmp_path: Path) -> None:
    content = b"One line.\r\nAnother.\r\n"
    (tmp_path / "text").write_bytes(content)
    by_file = answer(store, "-f", tmp_path / "text", *QUIET)["texts"][0]
    by_input = answer(store, *QUIET, stdin=piped(content))["texts"][0]
    assert by_file["bytes"] == len(content)
    assert by_input == {**by_file, "file": "standard input"}


@pytest.mark.slow
def test_token_ids_get_the_score_of_their_text_with_and_without_a_tokenizer(
    store: Path, text: Path, tmp_path: Path
) -> None:
    bare, ids, lines = without_tokenizer(store, tmp_path), tmp_path / "ids", tmp_path / "tokens.jsonl"
    ids.write_text(",\n".join(map(str, [BEGIN, *ids_of(TEXT)])), encoding="utf-8")
    words = ("--context", str(CONTEXT), *QUIET, "--per-token", lines)
    expected = answer(store, "-f", text, *words)["texts"][0]
    by_token = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
    nameless = {"file": str(ids), "bytes": None, "bits_per_byte": None}
    for path, has_texts in ((store, True), (bare, False)):
        found = answer(path, "--ids-file", ids, *words)
        assert found["texts"] == [{**expected, **nameless}]
        assert found["together"]["bits_per_byte"] is None
        wanted = [{**line, "file": str(ids), "text": line["text"] if has_texts else None} for line in by_token]
        assert [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()] == wanted
    both = run_here("score", store, "-f", text, "--ids-file", ids, *QUIET)
    assert [line.split()[-1] for line in both.out.splitlines()[2:]] == ["-", "-"]


def test_token_ids_that_begin_otherwise_are_scored_from_the_second_one(
    store: Path, tmp_path: Path, losses: Callable[[list[int]], list[float]]
) -> None:
    ids = ids_of(TEXT[:400])
    done = answer(store, "--ids-file", "-", *FLOAT32, *QUIET, stdin=json.dumps(ids))["texts"][0]
    assert (done["file"], done["tokens"]) == ("standard input", len(ids) - 1)
    assert done["nats_per_token"] == pytest.approx(sum(losses(ids)) / (len(ids) - 1), rel=1e-5)


def test_without_a_tokenizer_a_text_is_refused_and_so_are_ids_that_are_none(
    store: Path, text: Path, tmp_path: Path
) -> None:
    bare = without_tokenizer(store, tmp_path)
    done = run_here("score", bare, "-f", text)
    assert done.code == 2 and f"{text}: this store has no tokenizer: pass token ids" in done.err
    for content, told in (("2,4096", "token ids of this model are 0 to 4095, found 4096"), ("2 x", "found 'x'")):
        (tmp_path / "ids").write_text(content, encoding="utf-8")
        done = run_here("score", bare, "--ids-file", tmp_path / "ids")
        assert (done.code, done.out) == (2, "") and f"{tmp_path / 'ids'}: " in done.err and told in done.err


# Precision.


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "change"), [("8", 0.005), ("4", 0.01)])
def test_a_quantized_cache_costs_little_perplexity(store: Path, text: Path, bits: str, change: float) -> None:
    words = (store, "-f", text, "--context", "1024", *FLOAT32, *QUIET)
    exact, found = (answer(*words, "--kv-bits", kv_bits)["together"]["perplexity"] for kv_bits in ("16", bits))
    assert found != exact
    assert found == pytest.approx(exact, rel=change)


# How the work is shared out.


@pytest.mark.slow
def test_neither_budget_nor_windows_per_pass_change_a_score(store: Path, text: Path) -> None:
    words = (store, "-f", text, "--context", "64", "--stride", "50", *QUIET)
    expected = answer(*words, "--windows-per-pass", "1", "--tiers", "cpu")
    assert expected["report"]["passes"] == expected["report"]["windows"] > 10
    smallest = smallest_ram(*words, "--batch", "3")
    for options in (("--batch", "3"), ("--batch", "1000"), ("--batch", "3", "--ram", smallest), ()):
        found = answer(*words, *options)
        assert found["texts"] == expected["texts"], options
        assert found["report"]["windows"] == expected["report"]["windows"]


@pytest.mark.slow
def test_in_little_memory_windows_share_passes_over_the_streamed_weights(tmp_path: Path) -> None:
    store, text = tmp_path / "opt-125m.tiered", tmp_path / "text.txt"
    assert run_here("convert", "--synthetic", "opt-125m", "--distinct-blocks", "1", "-o", store).code == 0
    text.write_text(TEXT[:700], encoding="utf-8")
    words = (store, "-f", text, "--context", "64", *QUIET)
    ram = f"{parse_size(smallest_ram(*words, '--batch', '1')) // MIB + 24}MiB"
    alone, shared = answer(*words, "--batch", "1", "--ram", ram), answer(*words, "--ram", ram)
    assert shared["windows_per_pass"] > 1
    assert shared["report"]["passes"] < alone["report"]["passes"]
    assert shared["report"]["bytes_read"] < 0.8 * alone["report"]["bytes_read"]
    assert shared["texts"] == alone["texts"]


# What is shown.


def test_the_table_goes_to_standard_output_and_all_else_to_standard_error(store: Path, text: Path) -> None:
    words = (store, "-f", text, "--context", "64")
    done = run_here("score", *words, "--ram", smallest_ram(*words, "--batch", "2"), "--batch", "2")
    assert done.code == 0, done.err
    head, row = done.out.splitlines()
    assert head.split() == ["text", "tokens", "nats/token", "perplexity", "bits/byte"]
    scores = answer(*words, *QUIET)["texts"][0]
    assert row.split()[0] == str(text)
    assert row.split()[1:] == [
        str(scores["tokens"]),
        f"{scores['nats_per_token']:.4f}",
        f"{scores['perplexity']:.3f}",
        f"{scores['bits_per_byte']:.4f}",
    ]
    for start in ("score", "passes", "disk", "bound", "waits", "kernels", "memory"):
        assert re.search(rf"^{start} ", done.err, re.MULTILINE), done.err
    assert "measured raw" in done.err
    assert "\x1b" not in done.out + done.err


@pytest.mark.slow
def test_several_texts_end_in_a_line_for_all_of_them(store: Path, text: Path) -> None:
    done = run_here("score", store, "-f", text, "-f", text, *QUIET)
    assert done.out.splitlines()[-1].split()[:2] == ["together", str(2 * len(ids_of(TEXT)))]


def test_the_json_report_agrees_with_itself(store: Path, text: Path) -> None:
    found = answer(store, "-f", text, "--context", "64", "--stride", "32", "--batch", "4")
    report = found["report"]
    assert report["scored_tokens"] == found["together"]["tokens"]
    assert report["input_tokens"] > report["scored_tokens"]
    assert report["passes"] == -(-report["windows"] // 4)
    assert report["tokens_per_second"] == pytest.approx(report["scored_tokens"] / report["seconds"])
    assert report["passes"] * report["compute_seconds_per_pass"] <= report["seconds"]
    assert report["bottleneck"] == "memory"
    assert report["peak_rss_bytes"] <= report["ram_budget_bytes"]


# What is refused.


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--context", "4096"), ("--context 4096", "positions for 2048")),
        (("--context", "0"), ("--context",)),
        (("--context", "64", "--stride", "65"), ("--stride 65", "64 tokens")),
        (("--kv-bits", "5"), ("--kv-bits",)),
        (("--tiers", "nvme"), ("unknown tier 'nvme'",)),
        (("--resident-gpu", "1GiB"), ("--resident-gpu is for a GPU",)),
        ((*ON_DEVICE, "--vram", "1GiB", "--decode-device", "cpu"), ("--decode-device cpu", "all texts are prompts")),
        ((*ON_DEVICE, "--vram", "999TiB"), ("--vram of 999 TiB", "this machine's, of which")),
        (("--dtype", "float16"), ("float16", "auto, bfloat16 or float32")),
        (("-f", "no/such/file"), ("no/such/file",)),
        (("--per-token", "no/such/folder/tokens.jsonl"), ("--per-token", "no/such/folder/tokens.jsonl")),
    ],
)
def test_bad_usage_is_explained(store: Path, text: Path, words: tuple[str, ...], told: tuple[str, ...]) -> None:
    done = run_here("score", store, "-f", text, *words)
    assert done.code == 2, done.err
    assert done.out == ""
    assert "Traceback" not in done.err
    for part in told:
        assert part in done.err


def test_a_text_with_nothing_to_score_is_explained(
    store: Path, bare_store: Path, tmp_path: Path, losses: Callable[[list[int]], list[float]]
) -> None:
    empty, one = tmp_path / "empty", tmp_path / "one"
    empty.write_bytes(b"")
    one.write_bytes(b"\n")
    assert len(ids_of("\n")) == 1
    for done in (run_here("score", store, "-f", empty), run_here("score", store, stdin=piped(b""))):
        assert done.code == 2
        assert "is empty" in done.err
    done = run_here("score", bare_store, "-f", one)
    assert done.code == 2
    assert f"{one}: is 1 tokens long" in done.err
    # Behind the token that begins texts, even one token has a probability.
    found = answer(store, "-f", one, *FLOAT32, *QUIET)["texts"][0]
    assert found["nats_per_token"] == pytest.approx(losses([BEGIN, *ids_of("\n")])[0], rel=1e-4)


def test_bytes_that_are_no_text_are_explained(store: Path, tmp_path: Path) -> None:
    (tmp_path / "text.bin").write_bytes(b"caf\xe9 au lait")
    for done in (
        run_here("score", store, "-f", tmp_path / "text.bin"),
        run_here("score", store, stdin=piped(b"caf\xe9 au lait")),
    ):
        assert done.code == 2
        assert "not UTF-8" in done.err and "byte 3" in done.err


def test_without_a_text_on_a_terminal_there_is_nothing_to_wait_for(store: Path) -> None:
    done = run_here("score", store, stdin=TerminalInput())
    assert done.code == 2
    assert "no text" in done.err and "-f" in done.err


def test_a_refused_run_leaves_no_file(store: Path, text: Path, tmp_path: Path) -> None:
    done = run_here("score", store, "-f", text, "--ram", "1MiB", "--per-token", tmp_path / "tokens.jsonl")
    assert done.code == 3
    assert not (tmp_path / "tokens.jsonl").exists()


def test_a_text_is_not_overwritten_by_its_own_scores(store: Path, text: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.txt"
    link.symlink_to(text)
    done = run_here("score", store, "-f", text, *QUIET, "--per-token", link)
    assert done.code == 2 and "is a text to score" in done.err
    assert text.read_text(encoding="utf-8") == TEXT


@pytest.mark.slow
def test_a_full_disk_is_named(store: Path, text: Path) -> None:
    done = run_here("score", store, "-f", text, *QUIET, "--per-token", "/dev/full")
    assert done.code == 1
    assert "--per-token /dev/full" in done.err and "No space left" in done.err


def test_a_text_that_fails_keeps_no_other_from_its_score(store: Path, tmp_path: Path) -> None:
    bad = poisoned(with_added_token(store, tmp_path), tmp_path, "model.decoder.embed_positions.weight", 42).path
    texts = {"good": "The function returns", "nan": TEXT[:800], "added": f"An {ADDED} added token", "empty": ""}
    for name, content in texts.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    words = (bad, "--verify", "never", *QUIET)
    alone = answer(*words, "-f", tmp_path / "good")
    files = [word for name in ("nan", "good", "added", "empty") for word in ("-f", tmp_path / name)]
    done = run_here("score", *words, *files)
    assert done.code == 1
    assert [line.split()[1] for line in done.out.splitlines()[1:]] == ["failed", "3", "failed", "failed", "3"]
    told = [line for line in done.err.splitlines() if line.startswith("tiered: ")]
    assert [Path(line.split(": ")[1]).name for line in told] == ["nan", "added", "empty"]
    assert "NaN" in told[0] and "this model knows tokens" in told[1] and "is empty" in told[2]
    found = json.loads(run_here("score", *words, *files, "--json").out)
    assert found["texts"][1] == alone["texts"][0] and found["texts"][1]["error"] is None
    assert found["texts"][0]["tokens"] == 0 and found["texts"][0]["error"] in told[0]
    assert found["together"] == alone["together"]
    none = run_here("score", *words, "-f", tmp_path / "added", "-f", tmp_path / "empty", "--json")
    assert none.code == 1 and json.loads(none.out)["report"] is None
    assert [text["error"] in none.err for text in json.loads(none.out)["texts"]] == [True, True]
    only = run_here("score", *words, "-f", tmp_path / "nan")
    assert (only.code, only.out) == (1, "") and "NaN" in only.err


def test_windows_behind_the_one_that_failed_are_not_computed(store: Path, tmp_path: Path) -> None:
    bad = poisoned(store, tmp_path, "model.decoder.embed_positions.weight", 42).path
    (tmp_path / "text").write_text(TEXT, encoding="utf-8")
    (tmp_path / "good").write_text("The function returns", encoding="utf-8")
    words = ("-f", tmp_path / "text", "-f", tmp_path / "good", "--context", "64", "--batch", "2")
    done = run_here("score", bad, "--verify", "never", *QUIET, *words, "--json")
    assert done.code == 1 and json.loads(done.out)["report"]["windows"] <= 4


def test_a_token_in_front_of_texts_that_only_the_tokenizer_has_is_named(
    store: Path, text: Path, tmp_path: Path
) -> None:
    copy = copy_store(store, tmp_path)
    path = copy / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    (special,) = tokenizer["post_processor"]["special_tokens"].values()
    special["ids"] = [5000]
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    done = run_here("score", copy, "-f", text)
    assert done.code == 2 and "knows tokens 0 to" in done.err and "found 5000" in done.err, done
