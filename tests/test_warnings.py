"""No warning of a library reaches the terminal: neither by a command, nor by a program that uses the API as it should.

All run in processes of their own, with Python's own filters and transformers' own verbosity; the commands without the
filter of the entry point, which would hide what we ourselves should do otherwise.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from tests.commands import CHECKPOINT, ROOT, make_store, run_apart

pytestmark = pytest.mark.inputs(
    "constraints.txt",
    "tiered/__main__.py",
    "tiered/process.py",
    "tiered/api.py",
    "tiered/offloaded.py",
    "tiered/cli",
    "tiered/convert",
)

COMMANDS: Final = """
import json, logging, sys
from tiered.cli import main

for words in json.loads(sys.argv[1]):
    sys.argv = ["tiered", *words]
    try:
        main()
    except SystemExit as ended:
        assert not ended.code, (words, ended.code)
logging.getLogger("httpx").warning("a library warns")
logging.getLogger("tiered.runtime").warning("ours")
"""
PROGRAM: Final = """
import sys
import tiered

with tiered.load(sys.argv[1], ram="2GiB", context=64, sequences=2) as loaded:
    inputs = loaded.tokenizer("The sea", return_tensors="pt")
    loaded.model.generate(**inputs, max_new_tokens=3)
    loaded.model.generate(**inputs, max_new_tokens=3, do_sample=True, top_k=5)
    loaded.model.generate(**inputs, max_new_tokens=3, num_beams=2)
    first = loaded.model(**inputs)
    print(loaded.model(inputs["input_ids"][:, :1], cache=first.cache).logits.shape)
"""
TEMPLATE: Final = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
NOISE: Final = re.compile(r"warn|deprecat|transformers|hugging|torch\.|site-packages|not valid", re.IGNORECASE)


def said(*words: str) -> str:
    """What a Python program says on standard error, as somebody's own would: without settings of the test's."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "TRANSFORMERS"))}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quiet")


def test_commands_show_no_warning_of_a_library(folder: Path) -> None:
    # A model whose settings contradict themselves, as many published ones do: transformers warns of each.
    source = folder / "model"
    source.mkdir()
    for path in CHECKPOINT.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    settings = {"do_sample": False, "temperature": 0.7, "top_p": 0.9, "bos_token_id": 2, "eos_token_id": 2}
    (source / "generation_config.json").write_text(json.dumps(settings))
    (source / "chat_template.jinja").write_text(TEMPLATE)
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
    request = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    (folder / "requests.jsonl").write_text(json.dumps(request) + "\n")
    (folder / "text").write_text("The sea is deep.")
    store, requests, results = (str(folder / name) for name in ("m.tiered", "requests.jsonl", "results.jsonl"))
    commands = [
        ["convert", str(source), "-o", store],
        ["generate", store, "-p", "The sea", "-n", "3", "--no-measure"],
        ["generate", store, "-p", "The sea", "-n", "3", "--no-measure", "--chat", "--temperature", "0.5"],
        ["batch", store, "-i", requests, "-o", results, "--no-measure"],
        ["score", store, "-f", str(folder / "text")],
    ]
    found = said("-c", COMMANDS, json.dumps(commands))
    assert "decode" in found and "tiered: ours" in found, "what we say is there"
    assert NOISE.findall(found) == [], found


def test_a_program_that_uses_the_api_sees_no_warning(folder: Path) -> None:
    assert said("-c", PROGRAM, str(make_store(folder))) == ""


def test_a_damaged_file_says_no_more_than_its_error(folder: Path) -> None:
    source = folder / "damaged"
    source.mkdir()
    (source / "config.json").write_bytes((CHECKPOINT / "config.json").read_bytes())
    # Protocol 22, which torch warns of before it fails.
    (source / "pytorch_model.bin").write_bytes(b"\x80\x16}.")
    words = ("-m", "tiered", "convert", source, "-o", folder / "out.tiered")
    # Each imports everything itself, as imports make noise, too.
    quiet, asked = (run_apart((sys.executable, *options, *words)) for options in ((), ("-W", "default")))
    assert quiet.code == asked.code == 4
    assert "UserWarning" in asked.err, asked.err
    assert "UserWarning" not in quiet.err and quiet.err.count("\n") == 1, quiet.err
