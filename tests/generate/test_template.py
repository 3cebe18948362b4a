"""Chat templates: transformers' own text, within limits; what a template does beyond them costs nobody anything."""

import fcntl
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tests.commands import CHECKPOINT
from tests.waiting import SECONDS
from tiered.generate.prompt import Prompts
from tiered.generate.template import ChatTemplate, TemplateRefused
from tiered.plan import process_rss_bytes
from tiered.units import MIB

MESSAGES = [{"role": "user", "content": "Hello é日本"}, {"role": "assistant", "content": "Yes?"}]
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}>{% endif %}"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(CHECKPOINT)
    return found


def template(tokenizer: PreTrainedTokenizerBase, text: str, seconds: float = SECONDS) -> ChatTemplate:
    tokenizer.chat_template = text
    return ChatTemplate(tokenizer, seconds)


def refusal(tokenizer: PreTrainedTokenizerBase, text: str, seconds: float = SECONDS) -> str:
    with pytest.raises(TemplateRefused) as caught:
        template(tokenizer, text, seconds).render(MESSAGES)
    return str(caught.value)


def children() -> set[int]:
    return {int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}


def test_it_is_what_transformers_makes(tokenizer: PreTrainedTokenizerBase) -> None:
    found = template(tokenizer, PLAIN)
    assert found.render(MESSAGES) == "user: Hello é日本\nassistant: Yes?\n>"
    expected: Any = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=True)
    with Prompts(tokenizer, len(tokenizer), None) as prompts:
        assert prompts.encode_chat(MESSAGES) == list(expected["input_ids"])


def test_many_conversations_share_a_process(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    forks = []
    fork = os.fork

    def counted() -> int:
        forks.append(1)
        return fork()

    for limit in ("_LIFE_SECONDS", "_IDLE_SECONDS"):
        monkeypatch.setattr(f"tiered.generate.template.{limit}", 100.0)
    monkeypatch.setattr(os, "fork", counted)
    found = template(tokenizer, PLAIN)
    for number in range(50):
        assert f"user: {number}\n" in found.render([{"role": "user", "content": str(number)}])
    assert len(forks) == 1


def test_an_old_helper_gives_way_to_a_new_one(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tiered.generate.template._LIFE_SECONDS", 0.0)
    found = template(tokenizer, PLAIN)
    assert found.render(MESSAGES) == found.render(MESSAGES) == found.render(MESSAGES)


def test_a_helper_that_has_ended_meanwhile_is_not_missed(tokenizer: PreTrainedTokenizerBase) -> None:
    found = template(tokenizer, PLAIN)
    text = found.render(MESSAGES)
    assert found._helper is not None
    os.kill(found._helper._pid, signal.SIGKILL)
    assert found.render(MESSAGES) == text


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[7].role.x }}", "no element 7"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ broken", "unexpected"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
        ("{{ '\\ud800' }}", "surrogates not allowed"),
        ("{{ 'a' * 10**10 }}", "256 MiB of memory"),
        ("{{ '%1000000000d' % 5 }}", "256 MiB of memory"),
        ("{% for m in messages * 10 ** 9 %}{% endfor %}", "256 MiB of memory"),
        ("{{ 'ab' * 20000000 }}", "40,000,000 characters"),
    ],
)
def test_what_a_template_does_wrong_is_told_in_one_line(
    tokenizer: PreTrainedTokenizerBase, text: str, told: str
) -> None:
    before = process_rss_bytes()
    found = refusal(tokenizer, text)
    assert told in found and "\n" not in found
    assert process_rss_bytes() - before < 100 * MIB


@pytest.mark.parametrize(
    "text", ["{{ 10 ** (10 ** 9) }}", "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"]
)
def test_one_that_never_ends_is_ended(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    before = children()
    assert refusal(tokenizer, text, seconds=0.5) == "it takes more than 0.5 s for one conversation"
    assert children() <= before, "nothing goes on computing"


def test_it_is_closed_where_ended_children_are_not_waited_for(tokenizer: PreTrainedTokenizerBase) -> None:
    before, handler = children(), signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        with template(tokenizer, PLAIN) as found:
            found.render(MESSAGES)
        assert children() <= before
    finally:
        signal.signal(signal.SIGCHLD, handler)


def test_an_interrupt_around_the_fork_is_raised_after_it(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raised by a function that Python calls around a fork it would be swallowed, and leave logging locked."""
    armed = [True]

    def interrupt() -> None:
        if armed:
            armed.clear()
            signal.raise_signal(signal.SIGINT)

    os.register_at_fork(after_in_parent=interrupt)
    found = template(tokenizer, PLAIN)
    with pytest.raises(KeyboardInterrupt):
        found.render(MESSAGES)
    assert found.render(MESSAGES).endswith("assistant: Yes?\n>")


def test_a_helper_holds_no_file_of_this_process(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    with (tmp_path / "locked").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        found = template(tokenizer, PLAIN)
        found.render(MESSAGES)
    with (tmp_path / "locked").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_after_a_refusal_others_are_rendered(tokenizer: PreTrainedTokenizerBase) -> None:
    found = template(tokenizer, "{% if messages[0].content == 'x' %}{{ 'a' * 10**10 }}{% endif %}fine")
    with pytest.raises(TemplateRefused):
        found.render([{"role": "user", "content": "x"}])
    assert found.render(MESSAGES) == "fine"
