"""One run of a job: requests are read when sequences are asked for, results appended when sequences end.

In: the input, the open journal, what turns requests into sequences, and how a generation is started. The caller
(`cli/`) knows the plan; this module knows nothing of memory and batch size.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple, Protocol

from tiered.errors import ConfigError, ModelError, TieredError, contained
from tiered.generate import Generation, Sampler, Sequence
from tiered.generate.sequence import Decoder
from tiered.jobs.fields import shown
from tiered.jobs.input import LONGEST_LINE_NBYTES, Input, Line
from tiered.jobs.journal import Journal
from tiered.jobs.progress import Counts, Progress
from tiered.jobs.prompts import PromptEncoder, tokens_to_generate
from tiered.jobs.request import Problem, Request, custom_id_of, parse_line, parse_object
from tiered.jobs.results import Label, TokenTexts, problem_line, result_line


class Generate(Protocol):
    """Runs sequences to their ends: `tiered.generate.generate`, bound to a runtime and a batch size.

    It takes from `sequences` whenever there is room for one more, calls `on_pass` after every pass, and then
    `on_finished` for every sequence that has ended in it; all in the thread that called it.
    """

    def __call__(
        self,
        sequences: Iterable[Sequence],
        *,
        on_pass: Callable[[], None],
        on_finished: Callable[[Sequence], None],
    ) -> Generation: ...


Start = Callable[[], AbstractContextManager[Generate]]
"""Opens what computes; called only if there is something to compute."""


@dataclass(frozen=True)
class Job:
    """What is to be done, and with what."""

    input: Input
    label: Label
    encoder: PromptEncoder
    decoder: Decoder | None
    """None where there is no tokenizer: results have token ids instead of texts."""
    eos_ids: frozenset[int]
    seed: int
    max_tokens: int
    """Tokens to generate for lines that name no number."""
    context: int
    """The most tokens of prompt and completion together."""
    stops: tuple[str, ...] = ()
    """Texts that end a completion, in addition to those of its line."""


@dataclass(eq=False)
class _Running:
    """A request some of whose sequences have been handed out."""

    request: Request
    sequences: list[Sequence]
    ended: int = 0


class InputSize(NamedTuple):
    """What an input asks for."""

    sequences: int
    """Each choice of a request is one."""
    longest: int
    """Tokens of the longest sequence, prompt and completion; 0 where there is none."""
    tokens: int
    """Tokens of all sequences together, at most."""
    prompt_tokens: int
    """Of these, those of prompts."""


def read_request(job: Job, line: Line) -> tuple[Request, list[int], int] | Problem:
    """A line's request, the token ids of its prompt, and how many tokens may follow."""
    if line.is_too_long:
        message = f"longer than {LONGEST_LINE_NBYTES} bytes; split what it asks for"
        return Problem(line.number, "line_too_long", message)
    if line.number in job.input.duplicates:
        value = parse_object(line.raw, line.number)
        if isinstance(value, Problem):
            return value
        message = f"custom_id {shown(custom_id_of(value))} is that of an earlier line; give each line its own"
        # Without the custom_id, whose one result is that of the earlier line.
        return Problem(line.number, "duplicate_custom_id", message)
    request = parse_line(line.raw, line.number, job.seed)
    if isinstance(request, Problem):
        return request
    ids = job.encoder.encode(request)
    if isinstance(ids, Problem):
        return ids
    most = tokens_to_generate(request, len(ids), job.max_tokens, job.context)
    return most if isinstance(most, Problem) else (request, ids, most)


def measure_input(job: Job, on_progress: Callable[[int, int], None] = lambda done, total: None) -> InputSize:
    """What the input asks for. Reads and encodes all of it. `on_progress` is called with the bytes done and the bytes
    of the input."""
    sequences = longest = tokens = prompt_tokens = 0
    for line in job.input.read():
        found = read_request(job, line)
        if not isinstance(found, Problem):
            request, ids, most = found
            sequences, longest = sequences + request.choices, max(longest, len(ids) + most)
            tokens += request.choices * (len(ids) + most)
            prompt_tokens += request.choices * len(ids)
        on_progress(line.offset, job.input.nbytes)
    return InputSize(sequences, longest, tokens, prompt_tokens)


def run_job(
    job: Job, journal: Journal, start: Start, on_progress: Callable[[Progress], None] = lambda _: None
) -> Generation | None:
    """Finish the job from where `journal` says it stands. Returns None where nothing was left to compute.

    `on_progress` is called after every pass and at the end. If the job is interrupted, the journal holds what
    was finished.
    """
    run = _Run(job, journal, on_progress)
    sequences = run.sequences()
    # Before anything is opened: a job that is done, or has only bad lines, needs no model.
    first = next(sequences, None)
    if first is None:
        return None
    with start() as generate:
        generation = generate(chain([first], sequences), on_pass=run.on_pass, on_finished=run.on_finished)
    assert not run.unfinished, "the generation ended before its sequences"
    run.on_pass()
    return generation


class _Run:
    """The state of one run: the requests in flight, and what has been counted."""

    def __init__(self, job: Job, journal: Journal, on_progress: Callable[[Progress], None]) -> None:
        self._job, self._journal, self._on_progress = job, journal, on_progress
        self._texts = None if job.decoder is None else TokenTexts(job.decoder)
        self._running: dict[Sequence, _Running] = {}
        self._sequences = self._prompt_tokens = self._generated_tokens = 0
        """Of sequences that have ended."""
        assert journal.job is not None, "Journal.begin comes first"
        self._progress = Progress(journal.job.sequences, journal.sequences, time.monotonic())

    @property
    def unfinished(self) -> bool:
        return bool(self._running)

    def sequences(self) -> Iterator[Sequence]:
        """The choices of every request that is not done, in order; a bad line gets its error result on the way."""
        for line in self._job.input.read():
            if line.number in self._journal.done:
                continue
            found = read_request(self._job, line)
            if isinstance(found, Problem):
                self._journal.append(line.number, problem_line(self._job.label, found), sequences=0)
                continue
            request, ids, most = found
            running = _Running(request, [self._sequence(request, ids, most, n) for n in range(request.choices)])
            for sequence in running.sequences:
                self._running[sequence] = running
                yield sequence

    def on_finished(self, sequence: Sequence) -> None:
        """A sequence has ended; with the last one of a request, the request's result is written."""
        running = self._running.pop(sequence)
        running.ended += 1
        self._sequences += 1
        self._prompt_tokens += len(sequence.prompt_ids)
        self._generated_tokens += len(sequence.token_ids)
        if running.ended == len(running.sequences):
            self._journal.append(running.request.line, *self._record(running))

    def _record(self, running: _Running) -> tuple[bytes, int]:
        """The result line of a request whose sequences have ended, and how many choices it has: 0 where it failed."""
        errors = [sequence.error for sequence in running.sequences if sequence.error is not None]
        if not errors:
            with contained(errors.append):
                record = result_line(self._job.label, running.request, running.sequences, self._texts)
                return record, len(running.sequences)
        return problem_line(self._job.label, _failure(running.request, errors[0])), 0

    def on_pass(self) -> None:
        """A pass has ended."""
        # A prompt has been computed when its sequence has a first token.
        begun = [sequence for sequence in self._running if sequence.token_ids]
        counts = Counts(
            sequences=self._sequences,
            running=sum(len(sequence.token_ids) / sequence.max_new_tokens for sequence in begun),
            prompt_tokens=self._prompt_tokens + sum(len(sequence.prompt_ids) for sequence in begun),
            generated_tokens=self._generated_tokens + sum(len(sequence.token_ids) for sequence in begun),
        )
        self._progress.update(time.monotonic(), counts)
        self._on_progress(self._progress)

    def _sequence(self, request: Request, ids: list[int], most: int, choice: int) -> Sequence:
        job = self._job
        sampler = Sampler(request.sampling, request.number, choice)
        eos = frozenset[int]() if request.ignore_eos else job.eos_ids
        return Sequence(ids, sampler, job.decoder, most, eos, (*request.stops, *job.stops), request.logprobs)


def _failure(request: Request, error: TieredError) -> Problem:
    """Why a good line has no answer."""
    if isinstance(error, ConfigError):
        return Problem(request.line, "invalid_value", str(error), custom_id=request.custom_id)
    code = "model_error" if isinstance(error, ModelError) else "sequence_failed"
    return Problem(request.line, code, str(error), custom_id=request.custom_id, status=500)
