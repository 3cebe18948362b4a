"""Which packages a tokenizer needs is known before anything is converted, and told where it is loaded."""

import importlib.util
import json
from base64 import b64encode
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.commands import copy_store, make_store, run_here
from tests.convert.models import save_model, tiny_model
from tiered.errors import ConfigError
from tiered.store.beside import check_beside, check_packages

TIKTOKEN = b"IQ== 0\nIg== 1\nIw== 2\n"
PIECES = b"\x0a\x0e\x0a\x05<unk>"


def without(monkeypatch: pytest.MonkeyPatch, *missing: str) -> None:
    """Have these modules not be installed, and all others be."""

    def find_spec(name: str, *_: Any) -> Any:
        return None if name in missing else object()

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)


@pytest.mark.parametrize(
    ("names", "content", "packages"),
    [
        (["tokenizer.model"], PIECES, "sentencepiece and protobuf"),
        (["spiece.model", "config.json"], PIECES, "sentencepiece and protobuf"),
        (["tokenizer.model"], TIKTOKEN, "tiktoken"),
        (["tiktoken.model"], TIKTOKEN, "tiktoken"),
    ],
)
def test_what_is_missing_is_named_with_the_command_that_brings_it(
    names: list[str], content: bytes, packages: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch, "sentencepiece", "google.protobuf", "tiktoken")
    install = packages.replace(" and", "")
    with pytest.raises(
        ConfigError, match=rf"M: its tokenizer is {names[0]} alone, .*{packages} .*pip install {install}'"
    ):
        check_packages("M", names, lambda _: content)


def tekken(**beside: Any) -> bytes:
    """What Mistral's models have for a vocabulary: the bytes alone, and "th"."""
    tokens = [*(bytes([byte]) for byte in range(256)), b"th"]
    vocab = [{"rank": rank, "token_bytes": b64encode(token).decode()} for rank, token in enumerate(tokens)]
    config = {"pattern": r"\p{L}+|\s|.", "default_vocab_size": 260, "default_num_special_tokens": 3}
    return json.dumps({"config": config, "vocab": vocab, **beside}).encode()


SPECIAL = [{"rank": rank, "token_str": text} for rank, text in enumerate(("<unk>", "<s>", "</s>"))]


def test_a_tekken_of_old_alone_takes_the_package_that_made_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that lists its special tokens does not."""
    (tmp_path / "config.json").write_text('{"model_type": "mistral"}')
    (tmp_path / "tekken.json").write_bytes(tekken(special_tokens=SPECIAL))
    check_beside(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert tokenizer.decode(tokenizer("the text").input_ids) == "the text"
    (tmp_path / "tekken.json").write_bytes(tekken())
    without(monkeypatch, "mistral_common")
    with pytest.raises(
        ConfigError, match=r"tekken\.json alone, which takes mistral-common .*'pip install mistral-common"
    ):
        check_beside(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b"{}")
    check_beside(tmp_path)


def test_transformers_too_says_that_a_tekken_of_old_takes_the_package(tmp_path: Path) -> None:
    if importlib.util.find_spec("mistral_common") is not None:
        pytest.skip("mistral-common is installed")
    (tmp_path / "config.json").write_text('{"model_type": "mistral"}')
    (tmp_path / "tekken.json").write_bytes(tekken())
    with pytest.raises(ImportError, match="mistral-common"):
        AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)


@pytest.mark.parametrize("other", ["tokenizer.json", "vocab.json", "vocab.txt"])
def test_where_there_is_another_vocabulary_nothing_is_needed(other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "sentencepiece", "google.protobuf", "tiktoken")
    check_packages("M", ["tokenizer.model", other], lambda _: PIECES)
    check_packages("M", ["config.json"], lambda _: PIECES)


def test_what_is_installed_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "tiktoken")
    check_packages("M", ["tokenizer.model"], lambda _: PIECES)
    without(monkeypatch, "google.protobuf")
    with pytest.raises(ConfigError, match="takes protobuf to read"):
        check_packages("M", ["tokenizer.model"], lambda _: PIECES)


def test_the_commands_say_it_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_model(tmp_path / "source", tiny_model("llama"))
    (source / "tokenizer.model").write_bytes(TIKTOKEN)
    store = copy_store(make_store(tmp_path), tmp_path)
    (store / "tokenizer.json").unlink()
    (store / "tokenizer.model").write_bytes(TIKTOKEN)
    without(monkeypatch, "tiktoken")
    for command in (("convert", source, "-o", tmp_path / "out"), ("generate", store, "-p", "Hi")):
        done = run_here(*command)
        assert done.code == 2 and "pip install tiktoken" in done.err, done
    assert not (tmp_path / "out").exists()
