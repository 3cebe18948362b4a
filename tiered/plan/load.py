"""The tokens of each pass of a workload whose sequences are alike, as the scheduler would choose them."""

from collections.abc import Iterator
from dataclasses import dataclass

from tiered.plan.inputs import Workload
from tiered.plan.pace import Pace
from tiered.plan.passes import share_pass
from tiered.plan.plan import Plan


@dataclass(frozen=True)
class PassLoad:
    """One pass."""

    segments: tuple[range, ...]
    """Positions of the tokens of each sequence that takes part."""
    decoding: int
    """How many of these decode; they come first."""
    logits: int
    """Positions whose logits are computed."""
    is_last: bool

    @property
    def tokens(self) -> int:
        return sum(map(len, self.segments))

    @property
    def prompt_tokens(self) -> int:
        return self.tokens - self.decoding


def pass_loads(plan: Plan, workload: Workload, pace: Pace) -> Iterator[PassLoad]:
    """All passes of `workload`: its sequences run as many at once as `plan` says, each with the longest prompt and as
    many tokens as its context then has room for."""
    context = min(workload.max_context, plan.max_context)
    prompt = min(workload.max_prompt or context, context)
    # The last token is not computed with any more.
    stop = prompt if workload.one_pass else max(prompt, context - 1)
    waiting, running = workload.sequences, list[int]()
    while waiting or running:
        entering = min(waiting, plan.batch_size - len(running))
        waiting, running = waiting - entering, running + [0] * entering
        decoding = [length for length in running if length >= prompt]
        prompts = [length for length in running if length < prompt]
        shares = share_pass(plan, pace, len(decoding), [prompt - length for length in prompts])
        parts = [range(length, length + count) for length, count in zip(prompts, shares, strict=True)]
        segments = [*(range(length, length + 1) for length in decoding), *filter(len, parts)]
        running = [length for length in (length + 1 for length in decoding) if length < stop]
        running += [part.stop for part in parts if part.stop < stop]
        ends = sum(segment.stop >= prompt for segment in segments)
        logits = sum(map(len, segments)) if workload.all_logits else ends
        yield PassLoad(tuple(segments), len(decoding), logits, not running and not waiting)
