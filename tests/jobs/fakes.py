"""Jobs without a model: requests, a tokenizer of letters, and a generation whose tokens are a function of the text."""

import contextlib
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import torch

from tiered.errors import ModelError
from tiered.generate import Generation, Sequence
from tiered.jobs import Identity, Job, JobFile, Journal, Label, PromptEncoder, measure_input, run_job, scan_input

VOCAB: Final = 128
END: Final = 0
LIMIT: Final = 200
"""Positions of the model that is not there."""


class Letters:
    """A tokenizer whose tokens are characters. Token 0 ends a text."""

    chat_template: str | None = "A: {messages}"

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % VOCAB for letter in text]}

    def decode(self, token_ids: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(chr(token) for token in token_ids if token or not skip_special_tokens)

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> str:
        if messages[0]["role"] == "assistant":
            raise ValueError("a conversation must begin with the user")
        return "".join(f"<{message['role']}>{message['content']}" for message in messages) + "<assistant>"


def request(custom_id: str, chat: bool = False, **body: Any) -> str:
    """A line of input, without its end."""
    url = "/v1/chat/completions" if chat else "/v1/completions"
    what: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]} if chat else {"prompt": "Hi"}
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": {**what, **body}})


def logits_after(ids: list[int]) -> torch.Tensor:
    """Logits [VOCAB] as a function of the text alone, as those of a model are."""
    generator = torch.Generator().manual_seed(zlib.crc32(bytes(token % 256 for token in ids)))
    return torch.randn(VOCAB, generator=generator)


class FakeGenerate:
    """Runs `batch_size` sequences at a time, one token per pass; interrupted when `stop_after` have ended.

    A sequence whose prompt has a "!" fails, as if its logits were NaN.
    """

    def __init__(self, batch_size: int = 4, stop_after: int | None = None) -> None:
        self.batch_size, self.stop_after = batch_size, stop_after
        self.ended = 0
        self.most_running = 0

    def __call__(
        self,
        sequences: Iterable[Sequence],
        *,
        on_pass: Callable[[], None],
        on_finished: Callable[[Sequence], None],
    ) -> Generation:
        waiting, running = iter(sequences), list[Sequence]()
        generation = Generation()
        while True:
            while len(running) < self.batch_size and (new := next(waiting, None)) is not None:
                running.append(new)
            if not running:
                return generation
            self.most_running = max(self.most_running, len(running))
            for sequence in running:
                if ord("!") in sequence.prompt_ids:
                    sequence.fail(ModelError("the model's logits are NaN"))
                    continue
                sequence.advance(logits_after(sequence.prompt_ids + sequence.token_ids))
            on_pass()
            for sequence in [s for s in running if s.finish_reason is not None]:
                if self.ended == self.stop_after:
                    raise KeyboardInterrupt
                self.ended += 1
                running.remove(sequence)
                on_finished(sequence)


def fake_job(path: Path, seed: int = 0, max_tokens: int = 8) -> tuple[Job, Identity]:
    """The job of the input at `path`."""
    input_ = scan_input(path)
    identity = Identity(input_.fingerprint, "store", {"seed": seed, "max-tokens": max_tokens})
    tokenizer: Any = Letters()
    job = Job(
        input=input_,
        label=Label(identity.key, 1700000000, "letters"),
        encoder=PromptEncoder(tokenizer, VOCAB),
        decoder=tokenizer,
        eos_ids=frozenset({END}),
        seed=seed,
        max_tokens=max_tokens,
        context=LIMIT,
    )
    return job, identity


def run_fake(path: Path, results: Path, generate: FakeGenerate | None = None, **fields: Any) -> Journal:
    """Run the job of the input at `path`, or go on with it; returns the journal, closed."""
    job, identity = fake_job(path, **fields)
    with Journal(results) as journal:
        journal.begin(JobFile(identity, job.label.created, *measure_input(job)[:3]), job.input.lines)

        @contextlib.contextmanager
        def start() -> Iterator[FakeGenerate]:
            yield generate or FakeGenerate()

        run_job(job, journal, start)
    return journal


def results_of(path: Path) -> list[dict[str, Any]]:
    """The results in a file, in the order of their lines of input."""
    found = [json.loads(line) for line in path.read_bytes().splitlines()]
    return sorted(found, key=lambda result: int(result["id"].rpartition("_")[2]))


def write_lines(path: Path, lines: Iterable[str]) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path
