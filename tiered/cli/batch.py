"""`tiered batch`, step by step: input, identity, results so far, passes, report."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Final

import click
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from tiered.arch import context_for, load_config
from tiered.cli.lines import print_json
from tiered.cli.measuring import hardware_of, measured, predicted, with_chosen_phases
from tiered.cli.progress import JobScreen
from tiered.cli.run_request import RunRequest
from tiered.errors import BudgetError, ConfigError, DeviceBudgetError
from tiered.generate import Generation, Report, Sequence, generate, make_report
from tiered.generate.tokenizer import load_generation_settings, load_tokenizer_if_any
from tiered.host import Host
from tiered.jobs import (
    Generate,
    Identity,
    Input,
    InputSize,
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
from tiered.jobs.identity import Setting, check_attention
from tiered.jobs.input import open_input
from tiered.options import Options
from tiered.plan import MAX_BATCHED_TOKENS, Workload
from tiered.prepare import DeviceArithmetic, device_arithmetic, host_for, usable
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
        job = _job(request, store, tokenizer, input_, limit, screen)
        with job.encoder:
            count = cache(partial(measure_input, job, partial(screen.on_scan, "looking for the longest request")))
            options = _options(request, store, journal, count, screen)
            # Opened once, for the job's identity and for its passes.
            with host_for(options) as host:
                identity = _identity(request, usable(options, host), host, store, config, input_)
                journal.check(identity)
                job, begun = _begin(journal, job, identity, count)
                options = _with_cache_as_begun(options, journal)
                summary, report = _work(request, store, options, host, journal, job, begun, screen)
    if request.as_json:
        print_json({"job": asdict(summary), "report": None if report is None else report.to_json()})
        return
    for line in [*summary.lines(), *(report.lines() if report is not None else [])]:
        click.echo(line, err=True)


def _work(
    request: BatchRequest,
    store: Store,
    options: Options,
    host: Host,
    journal: Journal,
    job: Job,
    begun: JobFile,
    screen: JobScreen,
) -> tuple[_Summary, Report | None]:
    """Do all passes that are left. No report where nothing was left to compute."""
    before, began = len(journal.done), time.monotonic()
    reports: list[Report] = []
    find_hardware = hardware_of(store, options, None if request.as_json else screen.say, screen.status)

    @contextmanager
    def start() -> Iterator[Generate]:
        with (
            _saying_how_long_requests_are(begun, journal.attention),
            Runtime(store, _workload(request, begun, journal.sequences), options, find_hardware, host) as runtime,
        ):
            if runtime.plan.decode_device == "gpu":
                journal.attends("gpu" if runtime.plan.cache.on_device else "cpu")
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


def _options(
    request: BatchRequest, store: Store, journal: Journal, count: Callable[[], InputSize], screen: JobScreen
) -> Options:
    """The options with what "auto" stands for: what the job was begun with; for a new one what is quickest, if that can
    be told, for which its input is counted."""
    options = request.options()
    if journal.job is None:
        say = None if request.as_json else screen.say
        return with_chosen_phases(options, store, lambda: _workload(request, count(), 0), say)
    begun = journal.job.identity.settings
    phases = tuple(begun.get(name, "cpu") for name in ("prefill-device", "decode-device"))
    return next((options.with_phases(each) for each in options.phase_choices if each == phases), options)


def _with_cache_as_begun(options: Options, journal: Journal) -> Options:
    """`options` with the KV cache where what attends is what attended for the results of `journal`."""
    attention = journal.attention
    if attention is None or not options.has_device or options.computes[1] == "cpu":
        return options
    if options.kv == "auto":
        return replace(options, kv="gpu" if attention == "gpu" else "host")
    check_attention(journal.path, "gpu" if options.kv == "gpu" else "cpu", attention)
    return options


def _workload(request: BatchRequest, job: JobFile | InputSize, done: int) -> Workload:
    """The workload of what is left of the job, of whose sequences so many are `done`."""
    if not job.sequences:
        return Workload()
    left = job.sequences - done
    return Workload(
        left,
        job.longest,
        job.longest,
        tokens=round(job.tokens * left / job.sequences),
        prompt_tokens=round(job.prompt_tokens * left / job.sequences),
        max_batched_tokens=MAX_BATCHED_TOKENS,
        batch_size=request.batch,
        objective=request.objective,
        choose_batch_size=True,
        is_whole=True,
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
    done = _as_run(runtime.workload, generation)
    on_report(make_report(generation, surroundings, predicted(runtime, done)))
    return generation


def _as_run(workload: Workload, generation: Generation) -> Workload:
    """`workload` with prompts and completions as long, on average, as those of the sequences that have begun: plans
    count every prompt as long as it may be, and where completions end nobody knows before."""
    count, prompt = max(1, generation.sequences), generation.prompt_tokens
    generated = generation.generated_tokens
    context = max(1, round((prompt + generated) / count))
    found = replace(workload, sequences=count, max_context=context, max_prompt=max(1, round(prompt / count)))
    return replace(found, tokens=0, prompt_tokens=0)


def _check(request: BatchRequest) -> None:
    """Refuse, before anything is read, options that are wrong whatever the files hold."""
    request.options()
    open_input(request.input_path).close()
    files = (request.output_path, job_path(request.output_path))
    if any(file.exists() and file.samefile(request.input_path) for file in files):
        raise ConfigError(f"-o {request.output_path}: is the input; name another file")


def _identity(
    request: BatchRequest, options: Options, host: Host, store: Store, config: PretrainedConfig, input_: Input
) -> Identity:
    """Everything that the results depend on: `options` and `host`, which is open, compute them."""
    level = host.kernels.level
    arithmetic = None if host.computer is None else device_arithmetic(host.computer, options, config)
    settings: dict[str, Setting] = {
        "seed": request.seed,
        "max-tokens": request.max_tokens,
        "context": request.context,
        "dtype": str(compute_dtype(options.dtype, config, options.has_device)).removeprefix("torch."),
        "kv-bits": int(request.kv_bits),
        "kernels": "torch" if level is None else level.name.lower(),
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
    limit: int,
    screen: JobScreen,
) -> Job:
    """The job, as if it began now; what it is called is still to be known."""
    settings = load_generation_settings(store, tokenizer)
    # Lines sample unless they say otherwise, so do_sample of the store need not be reported as ignored.
    lengths = {"max_new_tokens", "max_length"} if "max_tokens" in request.stated else set()
    if (ignored := settings.ignored({"do_sample", *lengths})) is not None:
        screen.say(ignored)
    return Job(
        input=input_,
        label=Label("", int(time.time()), store.name),
        encoder=PromptEncoder(tokenizer, store.vocab_size, limit - 1),
        decoder=tokenizer,
        eos_ids=settings.eos_ids,
        stops=settings.stops,
        seed=request.seed,
        max_tokens=request.max_tokens,
        context=limit,
    )


def _begin(journal: Journal, job: Job, identity: Identity, count: Callable[[], InputSize]) -> tuple[Job, JobFile]:
    """The job as it was begun; a new job is begun now."""
    begun = journal.job
    if begun is None:
        size = count()
        begun = JobFile(identity, job.label.created, size.sequences, size.longest, size.tokens, size.prompt_tokens)
    journal.begin(begun, job.input.lines)
    return replace(job, label=replace(job.label, key=identity.key, created=begun.created)), begun


@contextmanager
def _saying_how_long_requests_are(begun: JobFile, attention: str | None) -> Iterator[None]:
    """Around the plan: one request too long for the memory would stop all others, so the error names its length; and
    where the GPU's memory is too little, that results keep the cache there, if `attention` is the GPU's."""
    try:
        yield
    except BudgetError as error:
        hint = (
            f"the longest request comes to {begun.longest} tokens; --context, with another -o, refuses long ones alone"
        )
        if attention == "gpu" and isinstance(error, DeviceBudgetError):
            hint = f"its KV cache is on the GPU, where the job was begun with it; {hint}"
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
