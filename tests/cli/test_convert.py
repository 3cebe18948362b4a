"""`tiered convert` from the outside: exit codes, what it says, and where."""

import io
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.commands import Done, run_here
from tests.convert.models import TRAINED
from tiered.cli import convert
from tiered.cli.commands import convert as command
from tiered.cli.convert import summary
from tiered.convert import ConvertResult
from tiered.errors import BudgetError, ConfigError, StoreError
from tiered.store import Store


def run(*words: str | Path) -> Done:
    return run_here("convert", *words)


def test_it_converts_and_says_what_to_do_next(tmp_path: Path) -> None:
    done = run(TRAINED, "-o", tmp_path / "out")
    assert done.code == 0, done.err
    assert "11 blocks" in done.out and "int4-g64" in done.out and "bits per weight" in done.out
    assert f"next: tiered generate {tmp_path / 'out'}" in done.out
    assert done.err == ""  # no bar where there is no terminal
    Store.open(tmp_path / "out")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["opt-175b"], 2, "992 metaseq shards. Pass the folder that has them"),
        (["opt-175b", "--from", str(TRAINED)], 2, "not those of opt-175b: hidden_size is"),
        ([str(TRAINED), "--md5", "/nowhere"], 2, "expected a list of checksums"),
        (["no-such-thing"], 2, "no such folder"),
        ([str(TRAINED), "--quant", "int3"], 2, "int3"),
        ([str(TRAINED), "--ram", "much"], 2, "expected a number with a unit"),
        ([str(TRAINED), "--ram", "100MiB"], 3, "pass at least --ram"),
        ([str(TRAINED.parent)], 4, "no config.json"),
    ],
)
def test_mistakes_have_their_exit_code_and_no_traceback(
    words: list[str], code: int, message: str, tmp_path: Path
) -> None:
    done = run(*words, "-o", tmp_path / "out")
    assert done.code == code, done.err
    assert message in done.err and "Traceback" not in done.err
    assert not (tmp_path / "out").exists()


def test_options_reach_the_conversion(tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = [
        "tiny-opt",
        "--synthetic",
        "--distinct-blocks",
        "1",
        "--seed",
        "3",
        "--quant",
        "int8",
        "--group-size",
        "32",
    ]
    done = CliRunner().invoke(command, [*words, "-o", str(out)], catch_exceptions=False)
    assert done.exit_code == 0 and "synthetic (random weights)" in done.output
    manifest = Store.open(out).manifest
    assert manifest.synthetic and manifest.distinct_blocks == 1
    assert manifest.quantization["layers"] == "int8-g32"


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ([str(TRAINED), "--distinct-blocks", "2"], ConfigError),
        (["tiny-opt", "--synthetic", "--revision", "main"], ConfigError),
        ([str(TRAINED), "--ram", "1MiB"], BudgetError),
    ],
)
def test_errors_pass_through_to_the_group(words: list[str], error: type[Exception], tmp_path: Path) -> None:
    done = CliRunner().invoke(command, [*words, "-o", str(tmp_path / "out")])
    assert isinstance(done.exception, error)


def test_an_unfinished_store_tells_how_to_go_on(tmp_path: Path) -> None:
    (tmp_path / "conversion.json").write_text("{}")
    with pytest.raises(StoreError, match="same 'tiered convert' command again"):
        Store.open(tmp_path)


def test_the_summary_lists_what_stayed_unquantized_and_warnings() -> None:
    fields = {"store": Path("x.tiered"), "blocks": 3, "nbytes": 1000, "weights": 2000, "seconds": 1.0}
    rest = {"resumed_blocks": 2, "scheme": "int4-g64", "warnings": ("odd names",), "synthetic": False}
    text = summary(ConvertResult(unquantized=tuple("abcdef"), kept=("g",), **fields, **rest))  # type: ignore[arg-type]
    assert "not quantized: 6 weights whose rows" in text and "(a, b, c, d, …)" in text
    assert "not quantized: 1 weights that the model's own code computes with, and no linear layer (g)" in text
    assert "warning: odd names" in text and "resumed: 2" in text and "4.00 bits per weight" in text


class Terminal(io.StringIO):
    """Somewhere a person looks."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_sees_one_line_that_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal)
    convert.run("tiny-opt", tmp_path / "out", ram=None, group_size="64", synthetic=True)
    shown = terminal.getvalue()
    assert "%  embed  " in shown and " of " in shown and "\x1b" in shown and "\n" not in shown


def test_options_for_the_hub_are_refused_for_a_folder(tmp_path: Path) -> None:
    for option in (["--revision", "main"], ["--delete-downloads"]):
        result = CliRunner().invoke(command, [str(TRAINED), "-o", str(tmp_path / "out"), *option])
        assert isinstance(result.exception, ConfigError)
        assert "local folder" in str(result.exception)
