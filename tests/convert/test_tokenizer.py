"""`--tokenizer`: another one than the source's, checked before any work; and the two files of metaseq's OPT release."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, GPT2Tokenizer

from tests.commands import CHECKPOINT, make_store, run_here
from tests.damage import without_tokenizer
from tests.generate.tokenizers import byte_fallback
from tests.quick import ONE_FORM
from tiered.convert import ConvertOptions, convert_checkpoint
from tiered.convert.tokenizer import GivenTokenizer
from tiered.errors import CheckpointError, ConfigError
from tiered.generate.tokenizer import load_tokenizer
from tiered.store import Store
from tiered.store.beside import TOKENIZER

pytestmark = ONE_FORM

TEXTS = ("A photo of a cat", " in  two\nlines: naïve €.", "", "a</s> b<pad>", "</s>def main():")


def names_in(folder: Path) -> set[str]:
    """The files in `folder` that a tokenizer is made of."""
    return {name for name in TOKENIZER if (folder / name).exists()}


def metaseq(folder: Path, first: tuple[str, ...] = ("<s>", "<pad>", "</s>", "<unk>")) -> Path:
    """The trained tokenizer as metaseq publishes OPT's: ids 0 to 3 are `first`, pairs of tokens follow in merges."""
    folder.mkdir(exist_ok=True)
    model = json.loads((CHECKPOINT / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    rest = [text for text in sorted(model["vocab"], key=model["vocab"].get)][4:]
    vocabulary = {text: number for number, text in enumerate((*first, *rest))}
    (folder / "gpt2-vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    merges = "".join(f"{' '.join(merge)}\n" for merge in model["merges"])
    (folder / "gpt2-merges.txt").write_text("#version: 0.2\n" + merges, encoding="utf-8")
    (folder / "dict.txt").write_text("".join(f"{number} 1\n" for number in range(4, len(vocabulary))))
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """An OPT without a tokenizer."""
    folder = tmp_path / "source"
    shutil.copytree(CHECKPOINT, folder)
    for name in names_in(folder):
        (folder / name).unlink()
    return folder


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A finished store without a tokenizer."""
    return without_tokenizer(make_store(tmp_path), tmp_path)


def assert_like(found: Any, expected: Any) -> None:
    """Two tokenizers make the same tokens of every text, and the same text of tokens."""
    for text in TEXTS:
        ids = expected(text)["input_ids"]
        assert found(text)["input_ids"] == ids
        assert found.decode(ids) == expected.decode(ids)
        assert found.decode(ids, skip_special_tokens=True) == expected.decode(ids, skip_special_tokens=True)
    special = ("bos_token_id", "eos_token_id", "pad_token_id", "all_special_ids")
    assert [getattr(found, name) for name in special] == [getattr(expected, name) for name in special]


def test_a_given_tokenizer_takes_the_place_of_all_of_the_source_s(tmp_path: Path) -> None:
    other = byte_fallback("▁word")
    other.chat_template = "{{ messages[0]['content'] }}"
    other.save_pretrained(tmp_path / "other")
    source = Path(shutil.copytree(CHECKPOINT, tmp_path / "source"))
    (source / "special_tokens_map.json").write_text("{}", encoding="utf-8")
    out = tmp_path / "out"
    assert convert_checkpoint(source, out, ConvertOptions(tokenizer=tmp_path / "other")).has_tokenizer
    assert names_in(out) == names_in(tmp_path / "other") and "special_tokens_map.json" not in names_in(out)
    for name in names_in(out):
        assert (out / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
    assert (out / "config.json").read_bytes() == (CHECKPOINT / "config.json").read_bytes()
    assert_like(load_tokenizer(Store.open(out)), other)


def test_a_tokenizer_json_is_taken_alone_and_as_it_is(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert_checkpoint(source, out, ConvertOptions(tokenizer=CHECKPOINT / "tokenizer.json"))
    found = load_tokenizer(Store.open(out))
    assert len(found) == 4096  # no token of GPT-2's was added
    assert found(TEXTS[0])["input_ids"] == AutoTokenizer.from_pretrained(CHECKPOINT)(TEXTS[0])["input_ids"]


@pytest.mark.parametrize("where", ["source", "option"])
def test_metaseq_s_files_make_the_tokenizer_that_transformers_has_for_opt(
    where: str, source: Path, tmp_path: Path
) -> None:
    files = metaseq(source if where == "source" else tmp_path / "release")
    options = ConvertOptions(tokenizer=None if where == "source" else files)
    assert convert_checkpoint(source, tmp_path / "out", options).has_tokenizer
    found = load_tokenizer(Store.open(tmp_path / "out"))
    # As facebook/opt-* on the hub, whose vocab.json and merges.txt are these two files.
    expected = GPT2Tokenizer(
        str(files / "gpt2-vocab.json"), str(files / "gpt2-merges.txt"), add_bos_token=True, bos_token="</s>",
        eos_token="</s>", unk_token="</s>", pad_token="<pad>",
    )  # fmt: skip
    assert_like(found, expected)
    assert found("A")["input_ids"][0] == 2 and found.pad_token_id == 1
    assert found(TEXTS[1])["input_ids"] == AutoTokenizer.from_pretrained(CHECKPOINT)(TEXTS[1])["input_ids"]


def test_gpt_2_s_own_vocabulary_is_not_taken_for_opt_s(source: Path, tmp_path: Path) -> None:
    files = metaseq(tmp_path / "release", first=())
    for options in (ConvertOptions(tokenizer=files), ConvertOptions()):
        with pytest.raises(CheckpointError, match=r"gpt2-vocab\.json: expected the tokens <s>.* as 0 to 3, found '!'"):
            convert_checkpoint(source, tmp_path / "out", options)
        assert not (tmp_path / "out").exists()
        metaseq(source, first=())


@pytest.mark.parametrize("content", ["[]", '{"<s>": [0]}', '{"<s>": 0', "{}"])
def test_a_damaged_vocabulary_of_metaseq_s_is_named(content: str, source: Path, tmp_path: Path) -> None:
    (metaseq(source) / "gpt2-vocab.json").write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"gpt2-vocab\.json: "):
        convert_checkpoint(source, tmp_path / "out", ConvertOptions())


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (lambda path: None, "no such file or folder"),
        (lambda path: path.mkdir(), "has no tokenizer"),
        (lambda path: path.write_text('{"model": {}}'), "cannot be used"),
        (lambda path: path.write_text('{"!": 0, "model": 1}'), "not a tokenizer.json; pass that, or the folder"),
        (lambda path: path.write_text("hello"), "not valid JSON"),
        (lambda path: byte_fallback(*(f"w{n}" for n in range(4000))).save_pretrained(path), "this model knows 0 to"),
    ],
)
def test_what_is_no_tokenizer_of_the_model_is_refused_before_any_work(
    build: Any, told: str, store: Path, tmp_path: Path
) -> None:
    build(tmp_path / "given")
    for words in ((CHECKPOINT, "-o", tmp_path / "out"), (store,)):
        done = run_here("convert", *words, "--tokenizer", tmp_path / "given")
        assert done.code in (2, 4) and done.err.splitlines()[-1].startswith("tiered: "), done
        assert str(tmp_path / "given") in done.err and told in done.err and "Traceback" not in done.err
    assert not (tmp_path / "out").exists() and not names_in(store)


def test_a_finished_store_gets_a_tokenizer_and_another(store: Path, tmp_path: Path) -> None:
    blocks = {path: path.stat().st_mtime_ns for path in (store / "blocks").iterdir()}
    done = run_here("convert", store, "--tokenizer", CHECKPOINT)
    assert done.code == 0 and f"{store}: has the tokenizer of {CHECKPOINT} now" in done.out
    assert_like(load_tokenizer(Store.open(store)), AutoTokenizer.from_pretrained(CHECKPOINT))
    byte_fallback("▁word").save_pretrained(tmp_path / "other")
    assert run_here("convert", store, "--tokenizer", tmp_path / "other").code == 0
    assert names_in(store) == names_in(tmp_path / "other")
    assert {path: path.stat().st_mtime_ns for path in (store / "blocks").iterdir()} == blocks


def test_who_forgot_it_is_told_how_to_add_it_without_converting_again(store: Path) -> None:
    done = run_here("convert", CHECKPOINT, "-o", store, "--tokenizer", CHECKPOINT)
    assert done.code == 2 and f"gets a tokenizer by 'tiered convert {store} --tokenizer PATH'" in done.err


class Stop(Exception):
    pass


def test_a_resumed_conversion_must_name_the_same_tokenizer(tmp_path: Path) -> None:
    out = tmp_path / "out"
    byte_fallback().save_pretrained(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "same")
    byte_fallback("▁word").save_pretrained(tmp_path / "other")

    def stop(_: object) -> None:
        raise Stop

    with pytest.raises(Stop):
        convert_checkpoint(CHECKPOINT, out, ConvertOptions(tokenizer=tmp_path / "one"), stop)
    with pytest.raises(ConfigError, match=r"other settings \(tokenizer .* None now\); repeat those"):
        convert_checkpoint(CHECKPOINT, out, ConvertOptions())
    with pytest.raises(ConfigError, match=r"other settings \(tokenizer .*a finished store gets a tokenizer by"):
        convert_checkpoint(CHECKPOINT, out, ConvertOptions(tokenizer=tmp_path / "other"))
    assert convert_checkpoint(CHECKPOINT, out, ConvertOptions(tokenizer=tmp_path / "same")).has_tokenizer
    assert GivenTokenizer.read(out).digest == GivenTokenizer.read(tmp_path / "one").digest
