"""`tiered batch`, step by step: input, identity, results so far, passes, report."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Final

import click
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from tiered.arch import context_for, load_config
from tiered.bench.rates import measure_machine
from tiered.cli.lines import print_json
from tiered.cli.measuring import measured, predicted
from tiered.cli.progress import JobScreen
from tiered.cli.run_request import RunRequest
from tiered.errors import BudgetError, ConfigError
from tiered.generate import Generation, Report, Sequence, generate, make_report
from tiered.generate.tokenizer import load_generation_settings, load_tokenizer_if_any
from tiered.jobs import (
    Generate,
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
from tiered.jobs.identity import Setting
from tiered.jobs.input import open_input
from tiered.kernels import Kernels, Mode
from tiered.options import Options
from tiered.plan import MAX_BATCHED_TOKENS, Workload
from tiered.prepare import DeviceArithmetic, with_usable_device
from tiered.runtime import Runtime, compute_dtype
from tiered.store import Store

_ANY_LENGTH: Final = 1 << 31
"""Positions of a model that names no limit."""


@dataclass(frozen=True, kw_only=True)
class BatchRequest(RunRequest):
    """The options of the command, as they were given; None where one is to be chosen."""

    input_path: Path
    output_path: Path
    seed: int
    max_tokens: int
    context: int | None
    batch: int | None


@dataclass(frozen=True)
class _Summary:
    """What a run did to its job. Rates are over the whole run, reading prompts included."""

    requests: int
    done: int
    """Requests that have a result, errors included; also those of earlier runs."""
    failed: int
    """How many of these are error results."""
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


def run(request: BatchRequest) -> None:
    """Do what is left of the job, and write the report, or JSON."""
    _check(request)
    store = Store.open(request.store)
    # Before the tokenizer, which reads config.json too and would be blamed for an error in it.
    config = load_config(store.path)
    limit = context_for(config, request.context, "--context", _ANY_LENGTH)
    tokenizer = load_tokenizer_if_any(store)
    with JobScreen() as screen, Journal(request.output_path) as journal:
        input_ = scan_input(request.input_path, partial(screen.on_scan, "reading the input"))
        identity = _identity(request, store, config, input_)
        journal.check(identity)
        job = _job(request, store, tokenizer, input_, identity, limit, screen)
        with job.encoder:
            job, begun = _begin(journal, job, identity, screen)
            summary, report = _work(request, store, journal, job, begun, screen)
    if request.as_json:
        print_json({"job": asdict(summary), "report": None if report is None else report.to_json()})
        return
    for line in [*summary.lines(), *(report.lines() if report is not None else [])]:
        click.echo(line, err=True)


def _work(
    request: BatchRequest, store: Store, journal: Journal, job: Job, begun: JobFile, screen: JobScreen
) -> tuple[_Summary, Report | None]:
    """Do all passes that are left. No report where nothing was left to compute."""
    before, began = len(journal.done), time.monotonic()
    reports: list[Report] = []
    measure = partial(measure_machine, say=screen.status.say)

    @contextmanager
    def start() -> Iterator[Generate]:
        with (
            _saying_how_long_requests_are(begun),
            Runtime(store, _workload(request, journal, begun), request.options(), measure) as runtime,
        ):
            if request.batch is None and not request.as_json:
                screen.say(f"batch     {runtime.plan.why}")
            yield partial(_generate, request, runtime, screen, reports.append)

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
    return summary, reports[0] if reports else None


def _workload(request: BatchRequest, journal: Journal, begun: JobFile) -> Workload:
    """The workload of what is left of the job."""
    left = begun.sequences - journal.sequences
    return Workload(
        left,
        begun.longest,
        begun.longest,
        tokens=round(begun.tokens * left / begun.sequences),
        max_batched_tokens=MAX_BATCHED_TOKENS,
        batch_size=request.batch,
        objective=request.objective,
        choose_batch_size=True,
    )


def _generate(
    request: BatchRequest,
    runtime: Runtime,
    screen: JobScreen,
    on_report: Callable[[Report], None],
    sequences: Iterable[Sequence],
    *,
    on_pass: Callable[[], None],
    on_finished: Callable[[Sequence], None],
) -> Generation:
    """Run `sequences` to their ends, and report on it."""
    with measured(runtime, screen.status, request.measure) as around:
        generation = generate(
            runtime,
            sequences,
            runtime.plan.batch_size,
            on_pass=on_pass,
            on_finished=on_finished,
            on_block=screen.on_block,
        )
    surroundings = around.surroundings(runtime, generation.decode.disk_idle_seconds)
    on_report(make_report(generation, surroundings, predicted(runtime)))
    return generation


def _check(request: BatchRequest) -> None:
    """Refuse, before anything is read, options that are wrong whatever the files hold."""
    request.options()
    open_input(request.input_path).close()
    files = (request.output_path, job_path(request.output_path))
    if any(file.exists() and file.samefile(request.input_path) for file in files):
        raise ConfigError(f"-o {request.output_path}: is the input; name another file")


def _identity(request: BatchRequest, store: Store, config: PretrainedConfig, input_: Input) -> Identity:
    """Everything that the results depend on."""
    with Kernels(1, mode=Mode(request.kernel_mode), name=request.kernels) as kernels:
        computes = "torch" if kernels.level is None else kernels.level.name.lower()
    options, arithmetic = with_usable_device(request.options(), config)
    settings: dict[str, Setting] = {
        "seed": request.seed,
        "max-tokens": request.max_tokens,
        "context": request.context,
        "dtype": str(compute_dtype(options.dtype, config, options.has_device)).removeprefix("torch."),
        "kv-bits": int(request.kv_bits),
        "kernels": computes,
        "kernel-mode": request.kernel_mode,
        "tiered": version("tiered"),
        **_device_settings(options, arithmetic),
    }
    return Identity(input_.fingerprint, store_fingerprint(store.path), settings)


def _device_settings(options: Options, arithmetic: DeviceArithmetic | None) -> dict[str, Setting]:
    """What computes, where that is not the processor alone: jobs of earlier versions have no such settings."""
    if options.device_name is None or arithmetic is None:
        return {}
    prefill, decode = options.computes
    # Which CUDA device it is does not matter, but what it can: older ones have no bfloat16, and some no Triton.
    kind = options.device_name.partition(":")[0]
    return {
        "device": kind,
        "prefill-device": prefill,
        "decode-device": decode,
        "device-dtype": str(arithmetic.dtype).removeprefix("torch."),
        "device-kernels": arithmetic.kernels,
    }


def _job(
    request: BatchRequest,
    store: Store,
    tokenizer: PreTrainedTokenizerBase | None,
    input_: Input,
    identity: Identity,
    limit: int,
    screen: JobScreen,
) -> Job:
    """The job, as if it began now."""
    settings = load_generation_settings(store, tokenizer)
    # Lines sample unless they say otherwise, so do_sample of the store need not be reported as ignored.
    lengths = {"max_new_tokens", "max_length"} if "max_tokens" in request.stated else set()
    if (ignored := settings.ignored({"do_sample", *lengths})) is not None:
        screen.say(ignored)
    return Job(
        input=input_,
        label=Label(identity.key, int(time.time()), store.name),
        encoder=PromptEncoder(tokenizer, store.vocab_size, limit - 1),
        decoder=tokenizer,
        eos_ids=settings.eos_ids,
        stops=settings.stops,
        seed=request.seed,
        max_tokens=request.max_tokens,
        context=limit,
    )


def _begin(journal: Journal, job: Job, identity: Identity, screen: JobScreen) -> tuple[Job, JobFile]:
    """The job as it was begun; a new job is begun now."""
    begun = journal.job
    if begun is None:
        counted = measure_input(job, partial(screen.on_scan, "looking for the longest request"))
        begun = JobFile(identity, job.label.created, *counted)
    journal.begin(begun, job.input.lines)
    return replace(job, label=replace(job.label, created=begun.created)), begun


@contextmanager
def _saying_how_long_requests_are(begun: JobFile) -> Iterator[None]:
    """Around the plan: one request too long for the memory would stop all others, so the error names its length."""
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
