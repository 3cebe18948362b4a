"""What a folder says of generation and text is taken as transformers takes it: `docs/folders.md`, row by row."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tests.commands import CHECKPOINT, make_store
from tests.generate.tokenizers import byte_fallback
from tiered.errors import StoreError
from tiered.generate.tokenizer import (
    SAMPLING,
    GenerationSettings,
    load_generation_config,
    load_generation_settings,
    load_tokenizer,
)
from tiered.jobs import PromptEncoder
from tiered.jobs.request import Request, parse_line
from tiered.store import Store
from tiered.store.beside import COPIED

TEMPLATE = "{% for m in messages %}<NAME>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
MESSAGES = [{"role": "user", "content": "run the package"}]


@dataclass
class Folder:
    """A checkpoint, and what its store is given of it."""

    path: Path
    blocks: Path

    def write(self, name: str, value: Any) -> "Folder":
        """Write a file; None removes it."""
        path = self.path / name
        path.parent.mkdir(exist_ok=True)
        if value is None:
            path.unlink()
        else:
            path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
        return self

    def change(self, name: str, **fields: Any) -> "Folder":
        """Set fields of a file; None removes one."""
        values = {**json.loads((self.path / name).read_text(encoding="utf-8")), **fields}
        return self.write(name, {field: value for field, value in values.items() if value is not None})

    @property
    def store(self) -> Store:
        """What conversion makes of it."""
        made = self.path.with_name("copy.tiered")
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir()
        for name in COPIED:
            if (self.path / name).is_file():
                shutil.copy(self.path / name, made)
        shutil.copy(self.blocks / "manifest.json", made)
        (made / "blocks").symlink_to(self.blocks / "blocks")
        return Store.open(made)

    @property
    def settings(self) -> GenerationSettings:
        store = self.store
        return load_generation_settings(store, load_tokenizer(store))

    def reference(self) -> GenerationConfig:
        """What transformers' own model of the folder generates by."""
        found = AutoModelForCausalLM.from_pretrained(self.path).generation_config
        assert isinstance(found, GenerationConfig)
        return found


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("store"))


@pytest.fixture
def folder(tmp_path: Path, blocks: Path) -> Folder:
    path = tmp_path / "model"
    path.mkdir()
    for file in CHECKPOINT.iterdir():
        if file.suffix == ".safetensors":
            (path / file.name).symlink_to(file)
        else:
            shutil.copyfile(file, path / file.name)
    return Folder(path, blocks)


LEGACY = {"eos_token_id": [7, 9], "stop_strings": ["\n\n"], "do_sample": True, "temperature": 0.5, "max_length": 30}


@pytest.mark.parametrize(
    ("config", "generation"),
    [
        ({"eos_token_id": 7}, {"eos_token_id": 5}),
        ({"eos_token_id": 7}, {"eos_token_id": [5, 6], "stop_strings": "The"}),
        ({"eos_token_id": 7}, None),
        ({"eos_token_id": [7, 9]}, None),
        (LEGACY, None),
        (LEGACY, {"eos_token_id": 5, "repetition_penalty": 1.3, "suppress_tokens": [4], "forced_eos_token_id": 5}),
    ],
)
def test_generation_settings_are_those_of_transformers(
    folder: Folder, config: dict[str, Any], generation: dict[str, Any] | None
) -> None:
    folder.change("config.json", **config).write("generation_config.json", generation)
    expected, found = folder.reference(), folder.settings
    assert load_generation_config(folder.store).to_dict() == expected.to_dict()
    eos, stops = expected.eos_token_id, expected.stop_strings
    assert found.eos_ids == set(eos if isinstance(eos, list) else [eos])
    assert list(found.stops) == ([stops] if isinstance(stops, str) else stops or [])
    assert found.file == ("config.json" if generation is None else "generation_config.json")
    for field, value in found.others.items():
        assert getattr(expected, field) == value


def test_fields_of_config_json_beside_a_generation_config_count_for_nothing(folder: Folder) -> None:
    folder.change("config.json", **LEGACY).write("generation_config.json", {"eos_token_id": 5})
    assert folder.settings == GenerationSettings("generation_config.json", frozenset({5}), (), {})


@pytest.mark.parametrize("generation", [None, {}, {"eos_token_id": None}, {"temperature": 1.0}])
def test_where_no_file_names_an_end_token_it_is_the_tokenizer_s(
    folder: Folder, generation: dict[str, Any] | None
) -> None:
    folder.write("generation_config.json", generation).change("config.json", eos_token_id=None)
    assert folder.reference().eos_token_id is None  # transformers would go on
    assert folder.settings.eos_ids == {AutoTokenizer.from_pretrained(CHECKPOINT).eos_token_id}


def test_an_empty_list_of_end_tokens_is_none(folder: Folder) -> None:
    folder.write("generation_config.json", {"eos_token_id": []})
    assert folder.settings.eos_ids == frozenset()


def test_what_is_not_honoured_is_named_unless_an_option_speaks_for_it(folder: Folder) -> None:
    folder.write(
        "generation_config.json",
        {
            **{"eos_token_id": 2, "pad_token_id": 1, "use_cache": True, "transformers_version": "5.0", "own": 3},
            **{"do_sample": True, "temperature": 0.6, "top_k": 50, "top_p": 0.9, "repetition_penalty": 1.05},
        },
    )
    told = folder.settings.ignored(())
    assert told is not None and "\n" not in told
    assert "generation_config.json: do_sample true, repetition_penalty 1.05, temperature 0.6, top_p 0.9;" in told
    told = folder.settings.ignored(["do_sample", "temperature"])
    assert told is not None and "repetition_penalty 1.05, top_p 0.9;" in told
    assert folder.settings.ignored([*SAMPLING, "do_sample", "repetition_penalty"]) is None


def test_sampling_settings_without_sampling_change_nothing_and_are_not_named(folder: Folder) -> None:
    folder.write("generation_config.json", {"eos_token_id": 2, "temperature": 0.6, "top_p": 0.9, "num_beams": 1})
    assert folder.settings.ignored(()) is None


def test_settings_that_transformers_would_have_anyway_are_not_named(folder: Folder) -> None:
    defaults = GenerationConfig._get_default_generation_params()
    folder.write("generation_config.json", {**defaults, "do_sample": True, "max_length": None})
    assert set(folder.settings.others) == {"do_sample"}


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("generation_config.json", "{", r"generation_config\.json: cannot be used \(.*not a valid JSON"),
        ("generation_config.json", "[1]", r"generation_config\.json: cannot be used"),
        ("generation_config.json", "5", r"generation_config\.json: cannot be used"),
        ("generation_config.json", {"max_new_tokens": "a"}, r"generation_config\.json: cannot be used"),
        ("generation_config.json", {"num_return_sequences": 3}, r"generation_config\.json: cannot be used"),
        ("generation_config.json", {"eos_token_id": "2"}, r'generation_config\.json: eos_token_id: expected .* "2"'),
        ("generation_config.json", {"eos_token_id": [True]}, r"eos_token_id: expected .*, found \[true\]"),
        ("generation_config.json", {"eos_token_id": {"a": 1}}, r"eos_token_id: expected"),
        ("generation_config.json", {"eos_token_id": 2.5}, r"eos_token_id: expected"),
        ("generation_config.json", {"eos_token_id": [*range(99), None]}, r"eos_token_id: .*\.\.\.; correct it"),
        ("generation_config.json", {"stop_strings": [""]}, r'stop_strings: expected .*, found \[""\]'),
        ("generation_config.json", {"stop_strings": 5}, r"stop_strings: expected"),
        ("config.json", {"stop_strings": [5]}, r"config\.json: stop_strings: expected"),
    ],
)
def test_settings_that_are_none_are_refused_in_a_line_that_names_the_file(
    folder: Folder, file: str, content: Any, told: str
) -> None:
    if file == "config.json":
        folder.write("generation_config.json", None).change(file, **content)
    else:
        folder.write(file, content)
    with pytest.raises(StoreError, match=told) as caught:
        _ = folder.settings
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def named(name: str) -> str:
    return TEMPLATE.replace("NAME", name)


@pytest.mark.parametrize(
    ("files", "used"),
    [
        ({"tokenizer_config.json": named("config")}, "config"),
        ({"tokenizer_config.json": named("config"), "chat_template.jinja": named("jinja")}, "jinja"),
        (
            {
                "tokenizer_config.json": [
                    {"name": "tool_use", "template": named("tools")},
                    {"name": "default", "template": named("default")},
                ]
            },
            "default",
        ),
        (
            {"chat_template.jinja": named("jinja"), "additional_chat_templates/tool_use.jinja": named("tools")},
            "jinja",
        ),
        ({"chat_template.json": json.dumps({"chat_template": named("json")})}, None),
    ],
    ids=["tokenizer_config.json", "jinja first", "the one named default", "not the additional ones", "none"],
)
def test_the_chat_template_is_that_of_transformers(folder: Folder, files: dict[str, Any], used: str | None) -> None:
    for name, content in files.items():
        if name == "tokenizer_config.json":
            folder.change(name, chat_template=content)
        else:
            folder.write(name, content)
    theirs = AutoTokenizer.from_pretrained(folder.path)
    ours = load_tokenizer(folder.store)
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": MESSAGES}}
    request = parse_line(json.dumps(line).encode(), 1, 0)
    assert isinstance(request, Request)
    found = PromptEncoder(ours, len(ours)).encode(request)
    if used is None:
        assert theirs.chat_template is None and not isinstance(found, list)
        return
    expected: Any = theirs.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=True)
    assert found == expected["input_ids"]
    assert isinstance(found, list) and ours.decode(found) == f"<{used}>run the packageA:"


ADDED = {"id": 4095, "content": "<added>", "single_word": False, "lstrip": False, "rstrip": False}


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: folder.change("tokenizer_config.json", add_bos_token=False),
        lambda folder: folder.change("tokenizer_config.json", add_bos_token=True, add_eos_token=True),
        lambda folder: folder.change("tokenizer_config.json", bos_token="<pad>", eos_token="<unk>"),
        lambda folder: folder.write("special_tokens_map.json", {"eos_token": "<pad>", "pad_token": "<unk>"}),
        lambda folder: folder.write("added_tokens.json", {"<added>": 4096}),
        lambda folder: folder.change(
            "tokenizer_config.json", added_tokens_decoder={"4096": {**ADDED, "normalized": False, "special": True}}
        ),
        lambda folder: folder.change("tokenizer_config.json", clean_up_tokenization_spaces=True),
        lambda folder: folder.change("tokenizer_config.json", tokenizer_class="LlamaTokenizer", legacy=False),
        lambda folder: byte_fallback().save_pretrained(folder.path),
    ],
    ids=["no bos", "bos and eos", "special", "map", "added", "decoder", "cleaning", "class", "another"],
)
def test_text_and_special_tokens_are_those_of_transformers(folder: Folder, change: Callable[[Folder], Any]) -> None:
    change(folder)
    theirs, ours = AutoTokenizer.from_pretrained(folder.path), load_tokenizer(folder.store)
    text = "a to <added> do n't . </s> naïve\n"
    ids = theirs(text)["input_ids"]
    assert ours(text)["input_ids"] == ids
    assert ours.decode(ids) == theirs.decode(ids)
    assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.special_tokens_map == theirs.special_tokens_map
