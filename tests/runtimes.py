"""Opening a runtime for the tiny models, and passes of it without a scheduler."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import pytest
import torch

from tests.answers import STEPS, Answers, Tokens
from tests.tiny import PROMPT_LENGTHS
from tests.tiny_configs import CONTEXT
from tiered.cache import SequenceKV
from tiered.errors import BudgetError
from tiered.host import Host
from tiered.io import Faults
from tiered.model import Segment
from tiered.plan import Workload
from tiered.runtime import Options, Runtime
from tiered.store import Store
from tiered.units import GIB


def open_runtime(store: Store, host: Host | None = None, **options: Any) -> Runtime:
    """A runtime of `store` for the test prompts, in float32, in plenty of memory unless `ram` says otherwise."""
    workload = Workload(len(PROMPT_LENGTHS), CONTEXT, max(PROMPT_LENGTHS))
    given = Options(**{"dtype": "float32", "ram": 16 * GIB, "threads": 1, **options})
    return Runtime(store, workload, given, host=host)


def streaming(store: Store, preadv: Faults | None = None, context: int = 112, **fields: Any) -> Runtime:
    """A runtime that streams most of the store in every pass, unless `ram` says otherwise."""
    workload, options = Workload(1, context, 8), {"dtype": "float32", "threads": 1, **fields}
    if "ram" not in options:
        with pytest.raises(BudgetError) as refused, Runtime(store, workload, Options(ram=1 << 20, **options)):
            pass
        options["ram"] = refused.value.smallest_bytes
    runtime = Runtime(store, workload, Options(**options))
    if preadv is not None:
        runtime._preadv = preadv
    return runtime


def run_greedy(runtime: Runtime, prompts: Sequence[Tokens], steps: int = STEPS, end: bool = True) -> Answers:
    """What the engine makes of `prompts`, all of them in every pass; the last pass is announced if `end`."""
    tokens: list[list[int]] = [[] for _ in prompts]
    logits: list[list[torch.Tensor]] = [[] for _ in prompts]
    with ExitStack() as stack:
        caches = [reserved(stack, runtime, len(prompt) + steps) for prompt in prompts]
        following = [list(prompt) for prompt in prompts]
        for step in range(steps):
            segments = [Segment(kv, ids, keep=len(ids)) for kv, ids in zip(caches, following, strict=True)]
            found = run_segments(runtime, segments, end and step == steps - 1)
            for number, part in enumerate(found):
                logits[number].append(part)
                tokens[number].append(int(part[-1].argmax()))
            following = [[chosen[-1]] for chosen in tokens]
    return Answers(tuple(tokens), tuple(torch.cat(parts) for parts in logits))


def reserved(stack: ExitStack, runtime: Runtime, tokens: int) -> SequenceKV:
    """A place in the cache that is given back with `stack`."""
    kv = runtime.reserve(tokens)
    assert kv is not None, "the runtime was opened for fewer tokens"
    stack.callback(runtime.release, kv)
    return kv


def run_segments(
    runtime: Runtime,
    segments: Sequence[Segment],
    is_last: bool = False,
    on_block: Callable[[int, int], None] | None = None,
) -> list[torch.Tensor]:
    """One pass; the logits [keep, vocab] of each segment."""
    parts: list[list[torch.Tensor]] = [[] for _ in segments]

    def on_logits(number: int, index: int, rows: torch.Tensor) -> None:
        assert index == sum(map(len, parts[number])), "rows come in order"
        parts[number].append(rows.clone())

    runtime.run(segments, on_logits, on_block, is_last)
    return [torch.cat(found) if found else torch.empty(0) for found in parts]
