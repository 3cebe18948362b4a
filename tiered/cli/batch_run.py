"""What `tiered batch` does, step by step: input, identity, results so far, passes, report. Heavy imports live here."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from typing import Any, Final

import click
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from tiered.arch import load_config
from tiered.cli.batch_engine import Demand, Engine, open_engine
from tiered.cli.batch_options import BatchOptions
from tiered.cli.batch_screen import JobScreen
from tiered.errors import BudgetError, ConfigError
from tiered.generate import Report
from tiered.generate.tokenizer import load_generation_settings, load_tokenizer
from tiered.jobs import (
    Identity,
    Input,
    Job,
    JobFile,
    Journal,
    Label,
    PromptEncoder,
    job_path,
    measure_input,
    run_job,
    scan_input,
    store_fingerprint,
)
from tiered.jobs.input import open_input
from tiered.kernels import Kernels, Mode
from tiered.runtime import compute_dtype
from tiered.store import Store

_ANY_LENGTH: Final = 1 << 31
"""Positions of a model that names no limit."""


@dataclass(frozen=True)
class _Summary:
    """What a run did to its job. Rates are over the whole run, reading prompts included."""

    requests: int
    done: int
    """Requests that have a result, errors included; also those of earlier runs."""
    failed: int
    """Of these, error results."""
    done_before: int
    prompt_tokens: int
    generated_tokens: int
    seconds: float

    def lines(self) -> list[str]:
        """The summary as people read it."""
        before = f", {self.done_before} of them before" if self.done_before else ""
        lines = [f"requests  {self.done} of {self.requests} done{before}; {self.failed} failed"]
        if self.generated_tokens:
            rate = self.generated_tokens / self.seconds
            lines.append(
                f"tokens    {self.prompt_tokens} read, {self.generated_tokens} generated, {rate:.3g} tokens/s overall"
            )
        return lines


def run(options: BatchOptions) -> dict[str, Any]:
    """Do what is left of the job, writing the report unless `as_json`; returns what `--json` prints."""
    _check(options)
    store = Store.open(options.store)
    # Before the tokenizer, which reads it too and would be blamed for it.
    config = load_config(store.path)
    limit = _limit(options, config)
    tokenizer = load_tokenizer(store)
    with JobScreen() as screen, Journal(options.output_path) as journal:
        input_ = scan_input(options.input_path, partial(screen.on_scan, "reading the input"))
        identity = _identity(options, store, config, input_)
        journal.check(identity)
        job = _job(options, store, tokenizer, input_, identity, limit, screen)
        with job.encoder:
            job, begun = _begin(journal, job, identity, screen)
            summary, report = _work(options, store, journal, job, begun, screen)
    if not options.as_json:
        for line in [*summary.lines(), *(report.lines() if report is not None else [])]:
            click.echo(line, err=True)
    return {"job": asdict(summary), "report": None if report is None else report.to_json()}


def _work(
    options: BatchOptions, store: Store, journal: Journal, job: Job, begun: JobFile, screen: JobScreen
) -> tuple[_Summary, Report | None]:
    """All passes that are left. No report where nothing was left to compute."""
    before, began = len(journal.done), time.monotonic()
    report: Report | None = None

    @contextmanager
    def start() -> Iterator[Engine]:
        nonlocal report
        left = begun.sequences - journal.sequences
        demand = Demand(left, begun.longest, round(begun.tokens * left / begun.sequences))
        with _saying_how_long_requests_are(begun), open_engine(options, store, demand, screen) as engine:
            yield engine
            report = engine.report

    with _saying_how_to_go_on(journal, job.input):
        generation = run_job(job, journal, start, screen.on_progress)
    summary = _Summary(
        requests=job.input.requests,
        done=len(journal.done),
        failed=journal.failed,
        done_before=before,
        prompt_tokens=0 if generation is None else generation.prompt_tokens,
        generated_tokens=0 if generation is None else generation.generated_tokens,
        seconds=time.monotonic() - began,
    )
    return summary, report


def _check(options: BatchOptions) -> None:
    """Refuse, before anything is read, what can be seen to be wrong by itself."""
    options.options()
    open_input(options.input_path).close()
    files = (options.output_path, job_path(options.output_path))
    if any(file.exists() and file.samefile(options.input_path) for file in files):
        raise ConfigError(f"-o {options.output_path}: is the input; name another file")


def _limit(options: BatchOptions, config: PretrainedConfig) -> int:
    """Tokens that a sequence may have at most."""
    most = getattr(config, "max_position_embeddings", None) or _ANY_LENGTH
    if options.context is not None and options.context > most:
        raise ConfigError(f"--context {options.context}: this model has positions for {most}; ask for at most that")
    return options.context or most


def _identity(options: BatchOptions, store: Store, config: PretrainedConfig, input_: Input) -> Identity:
    """Everything that the results depend on."""
    with Kernels(1, mode=Mode(options.kernel_mode), name=options.kernels) as kernels:
        computes = "torch" if kernels.level is None else kernels.level.name.lower()
    settings = {
        "seed": options.seed,
        "max-tokens": options.max_tokens,
        "context": options.context,
        "dtype": str(compute_dtype(options.dtype, config)).removeprefix("torch."),
        "kv-bits": int(options.kv_bits),
        "kernels": computes,
        "kernel-mode": options.kernel_mode,
        "tiered": version("tiered"),
    }
    return Identity(input_.fingerprint, store_fingerprint(store.path), settings)


def _job(
    options: BatchOptions,
    store: Store,
    tokenizer: PreTrainedTokenizerBase,
    input_: Input,
    identity: Identity,
    limit: int,
    screen: JobScreen,
) -> Job:
    """The job, as if it began now."""
    settings = load_generation_settings(store, tokenizer)
    # Lines are sampled from unless they say otherwise.
    lengths = {"max_new_tokens", "max_length"} if "max_tokens" in options.stated else set()
    if (ignored := settings.ignored({"do_sample", *lengths})) is not None:
        screen.say(ignored)
    return Job(
        input=input_,
        label=Label(identity.key, int(time.time()), store.name),
        encoder=PromptEncoder(tokenizer, store.vocab_size, limit - 1),
        decoder=tokenizer,
        eos_ids=settings.eos_ids,
        stops=settings.stops,
        seed=options.seed,
        max_tokens=options.max_tokens,
        context=limit,
    )


def _begin(journal: Journal, job: Job, identity: Identity, screen: JobScreen) -> tuple[Job, JobFile]:
    """The job as it was begun, which is now where it had not been."""
    begun = journal.job
    if begun is None:
        counted = measure_input(job, partial(screen.on_scan, "looking for the longest request"))
        begun = JobFile(identity, job.label.created, *counted)
    journal.begin(begun, job.input.lines)
    return replace(job, label=replace(job.label, created=begun.created)), begun


@contextmanager
def _saying_how_long_requests_are(begun: JobFile) -> Iterator[None]:
    """Around the plan: one request that asks for more than there is memory for would keep all others from theirs."""
    try:
        yield
    except BudgetError as error:
        hint = (
            f"the longest request comes to {begun.longest} tokens; --context, with another -o, refuses long ones alone"
        )
        raise BudgetError(f"{error}; {hint}", error.smallest_bytes) from None


@contextmanager
def _saying_how_to_go_on(journal: Journal, input_: Input) -> Iterator[None]:
    """Around the passes: an interruption says what is kept."""
    try:
        yield
    except KeyboardInterrupt:
        text = f"tiered: {len(journal.done)} of {input_.requests} requests are done; run the same command to go on"
        click.echo(text, err=True)
        raise
