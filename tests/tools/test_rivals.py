"""Other systems in turns with `tiered`: who runs when, what the table says, and the tensors that llama.cpp gets."""

import argparse
import json
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.bench.made_up import usage
from tests.commands import CHECKPOINT
from tiered.bench.runs import StoppedError
from tiered.errors import TieredError
from tools import rivals
from tools.rival_driver import Tensors, llama_parts, measured, opt_parts, prompts
from tools.rivals import (
    COLUMNS,
    RIVALS,
    Asked,
    Figures,
    Kept,
    UnableError,
    alternate,
    digest,
    failure,
    main,
    refusal,
    row,
    run_ours,
)

ASKED = Asked("1GiB", batch=4, prompt=8, new=3, vocab=100, kept=None)


def figures(seconds: float = 1.0) -> Figures:
    return Figures("1.0", seconds, 2 * seconds, 3_000_000_000, 1 << 30)


def test_systems_take_turns_with_the_same_prompts_and_one_that_fails_is_left_out() -> None:
    turns: list[tuple[str, int]] = []

    def whole(asked: Asked, seed: int) -> Figures:
        turns.append(("whole", seed))
        return figures(seed)

    def fails(asked: Asked, seed: int) -> Figures:
        turns.append(("fails", seed))
        raise TieredError("killed for more than 1GiB")

    found = alternate({"whole": whole, "fails": fails}, ASKED, 3)
    assert turns == [("whole", 1), ("fails", 1), ("whole", 2), ("whole", 3)]
    assert found == {"whole": [figures(1), figures(2), figures(3)], "fails": "killed for more than 1GiB"}


def test_what_has_ended_is_not_run_again(tmp_path: Path) -> None:
    turns: list[int] = []

    def run(asked: Asked, seed: int) -> Figures:
        turns.append(seed)
        if seed == 2:
            raise UnableError("killed for more than 1GiB")
        if seed == 3:
            raise KeyboardInterrupt
        if seed == 4:
            raise TieredError("no space left")
        return figures(seed)

    for reused in (0, 2):
        kept = Kept(tmp_path / "runs.jsonl", "model")
        assert kept.run("one", "1.0", run, ASKED, 1) == figures(1)
        with pytest.raises(TieredError, match="more than 1GiB"):
            kept.run("one", "1.0", run, ASKED, 2)
        with pytest.raises(KeyboardInterrupt):
            kept.run("one", "1.0", run, ASKED, 3)
        with pytest.raises(TieredError, match="no space left"):
            kept.run("one", "1.0", run, ASKED, 4)
        assert (kept.asked, kept.reused) == (4, reused)
    assert turns == [1, 2, 3, 4, 3, 4]
    turns.clear()
    more = replace(ASKED, batch=8)
    others = [("other", "1.0", "model", ASKED), ("one", "1.1", "model", ASKED), ("one", "1.0", "larger", ASKED)]
    for name, code, model, asked in [*others, ("one", "1.0", "model", more)]:
        Kept(tmp_path / "runs.jsonl", model).run(name, code, run, asked, 1)
    assert turns == [1, 1, 1, 1]


def test_a_file_that_has_changed_is_another(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"one")
    (tmp_path / "code.py").write_bytes(b"one")
    before, code = digest(tmp_path), digest(tmp_path, ".py")
    (tmp_path / "weights").write_bytes(b"two")
    digest.cache_clear()
    assert digest(tmp_path) != before and digest(tmp_path, ".py") == code


def test_what_a_system_is_includes_its_packages_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals, "_python", lambda work, name: sys.executable)
    found = rivals.identity(tmp_path, replace(RIVALS[0], packages=("torch", "transformers")))
    assert found.startswith(f"torch {version('torch')} transformers {version('transformers')}, driver ")
    with pytest.raises(TieredError, match="hf: its packages' versions cannot be told"):
        rivals.identity(tmp_path, replace(RIVALS[0], packages=("no-such-package",)))


def test_an_interruption_is_no_failure_of_a_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object) -> None:
        raise StoppedError("interrupted")

    monkeypatch.setattr(rivals, "run_once", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_ours(tmp_path, "1.0", ASKED, 1)


def test_a_row_has_medians_or_the_reason() -> None:
    cells = dict(zip(COLUMNS, row("hf", "16 bits", ASKED, [figures(1), figures(5), figures(2)]), strict=True))
    assert (cells["prefill s"], cells["decode t/s"], cells["all t/s"]) == ("2", "2", "2")
    assert (cells["GB read"], cells["peak RSS"]) == ("3", "1 GiB")
    cells = dict(zip(COLUMNS, row("airllm", "16 bits", ASKED, "not installable: no such wheel"), strict=True))
    assert cells["version"] == "not installable: no such wheel" and cells["decode t/s"] == "-"


def test_why_a_run_failed_is_said_in_a_few_words() -> None:
    said = '{"error": "no | such model", "may_pass": false}'
    for found, text, is_kept in (
        (failure(usage(1), said), "does not run: no / such model", True),
        (failure(usage(1), said.replace("false", "true")), "does not run: no / such model", False),
        (failure(usage(137), ""), "killed for more than 1 GiB", True),
        (failure(usage(1), "Loading"), "exit status 1; see above", False),
    ):
        assert (str(found), isinstance(found, UnableError)) == (text, is_kept)


def test_a_system_without_its_environment_is_named_with_the_reason(tmp_path: Path) -> None:
    (rival,) = (one for one in RIVALS if one.name == "llama.cpp")
    assert refusal(tmp_path, rival) == "not installed: run 'python -m tools.rivals setup'"
    (tmp_path / rival.name).mkdir()
    (tmp_path / rival.name / "refusal").write_text("no compiler\n")
    assert refusal(tmp_path, rival) == "not installable: no compiler"


def test_the_table_tells_of_systems_that_are_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rivals, "machine_facts", lambda store: argparse.Namespace(lines=lambda: {"machine": "made up"}))
    monkeypatch.setattr(rivals, "_store", lambda work, checkpoint: tmp_path)
    monkeypatch.setattr(rivals, "run_ours", lambda *_: figures())
    words = ["run", str(CHECKPOINT), "--work", str(tmp_path), "--memory", "1GiB", "--batch", "1", "-r", "1"]
    assert main(words) == 0
    assert "0 of these 1 runs are of earlier calls" in capsys.readouterr().out
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "- machine: made up" in out and "| tiered | " in out and "1 of these 1 runs are of earlier calls" in out
    assert "| hf | not installed: run 'python -m tools.rivals setup' | 16 bits | 1 | - |" in out


def test_every_tensor_of_an_opt_is_used_once() -> None:
    config = json.loads((CHECKPOINT / "config.json").read_text())
    tensors, used = Tensors(CHECKPOINT), [name for part in opt_parts(config) for name in part.sources]
    assert len(used) == len(set(used)) == 4 + 16 * config["num_hidden_layers"]
    assert all(tensors.shape(name) for name in used)
    assert [part.first_row for part in opt_parts(config) if part.first_row] == [2]
    with pytest.raises(ValueError, match="norms come first"):
        opt_parts(config | {"do_layer_norm_before": False})


def test_only_queries_and_keys_of_a_llama_are_reordered() -> None:
    config = {"num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 3, "tie_word_embeddings": True}
    parts = llama_parts(config)
    assert {part.name.split(".")[-2]: part.heads for part in parts if part.heads} == {"attn_q": 8, "attn_k": 2}
    assert len(parts) == 2 + 9 * 3 and len(llama_parts(config | {"tie_word_embeddings": False})) == 3 + 9 * 3


def test_weights_of_16_bits_are_read_as_they_are(tmp_path: Path) -> None:
    values = {name: torch.randn(3, 4).to(dtype) for name, dtype in (("a", torch.bfloat16), ("b", torch.float16))}
    save_file(values, tmp_path / "model.safetensors")
    for name, value in values.items():
        assert np.array_equal(Tensors(tmp_path).read(name), value.float().numpy())


def test_prompts_are_those_of_their_seed_and_within_the_vocabulary() -> None:
    found = prompts(2, 50, 40, seed=3)
    assert found == prompts(2, 50, 40, seed=3) != prompts(2, 50, 40, seed=4)
    assert {len(prompt) for prompt in found} == {50} and all(16 <= token < 40 for prompt in found for token in prompt)


def test_seconds_are_those_of_the_first_pass_and_of_all_others() -> None:
    found = measured(iter([1.0, 3.0, 3.5, 4.5]))
    assert (found["prefill_seconds"], found["decode_seconds"], found["passes"]) == (2.0, 1.5, 3)


def test_a_missing_checkpoint_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(tmp_path / "none"), "--work", str(tmp_path), "--memory", "1GiB"]) == 1
    assert "none/config.json: FileNotFoundError" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("run", "model", "--memory", "1GiB", "-r", "0"), "'0': expected a whole number above 0"),
        (("run", "model", "--memory", "1GiB", "--batch", "8", "0"), "'0': expected a whole number above 0"),
        (("run", "model", "--memory", "lots"), "size 'lots': expected a number with a unit"),
        (("setup", "--only", "nosuch"), "nosuch"),
    ],
)
def test_what_cannot_be_run_is_refused_by_name(
    words: tuple[str, ...], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*words, "--work", str(tmp_path)])
    assert ended.value.code == 2 and named in capsys.readouterr().err
