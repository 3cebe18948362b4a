"""What so many sequences at once take: how their passes run, and bytes of the host's memory and of a device's.

In: the four inputs of a plan, a number of sequences, and where their KV cache is. Out: `Passes`, for any budget. Where
weights go in what that leaves is for `way.py`, which calls this.
"""

from dataclasses import dataclass, replace
from typing import Final

from tiered.plan.inputs import Budgets, Computes, ExpertShape, Machine, ModelShape, Workload
from tiered.plan.kv import CachePlan, block_nbytes, outbox_nbytes
from tiered.plan.on_device import EXPERT_SLOTS, WAITING_SLOTS, DeviceNeeds, WaitingPlan
from tiered.plan.placement import Held, Tape
from tiered.plan.plan import Needs, host_held_of
from tiered.plan.workspace import MAX_ROWS, Workspace, transit_nbytes, workspace_for
from tiered.units import MIB, PAGE, PAGE_TOKENS

_LENT_SHARE: Final = 1 / 64
"""Part of the budget for the pages of a group of micro-batches, with the cache on disk; memory for four groups is set
aside."""
_AHEAD_PER_ROW: Final = 4 * MIB
_MOST_AHEAD: Final = 64 * MIB
"""The ring beyond a full one, by the rows of a decode pass but one. A single row computes in a third of the time in
which its weights are read, and what the ring takes is read once more in each pass. 16 rows compute nearly as long as
the disk reads: with them 64 MiB made passes 8 % shorter (docs/benchmarks/throughput.md)."""


@dataclass(frozen=True)
class Inputs:
    """The four inputs."""

    model: ModelShape
    machine: Machine
    workload: Workload
    budgets: Budgets


@dataclass(frozen=True)
class AtOnce:
    """So many sequences, and where their KV cache is."""

    asked: Inputs
    batch_size: int
    context: int
    on_disk: bool
    on_device: bool = False
    """Whether the KV cache is on the device, or on disk; else it is in memory."""

    @property
    def tokens(self) -> int:
        """Tokens in flight at most, if prompts take as few passes as asked for."""
        return max(self._least_rows, self.asked.workload.tokens_in_flight(self.batch_size, self.context))

    @property
    def _least_rows(self) -> int:
        """Tokens that a pass, and a micro-batch, must be able to take: of a prompt what cannot be cut, while all others
        decode."""
        state, prompt = self.asked.model.state, self.asked.workload.max_prompt or self.context
        return 1 if state is None else state.grid.cell(min(prompt, self.context)) + self.batch_size - 1

    @property
    def _pages(self) -> int:
        """Pages of the longest sequence."""
        return -(-self.context // PAGE_TOKENS)

    def cache(self, ram: int) -> CachePlan:
        """The KV cache's pages and memory."""
        model, workload, budgets = self.asked.model, self.asked.workload, self.asked.budgets
        lent_pages = lent_states = 0
        if self.on_disk and model.state is not None:
            share = int(ram * _LENT_SHARE) // model.state.layer_nbytes
            lent_states = max(1, min(self.batch_size, share))
        if self.on_disk:
            # At least the pages of one sequence; more at a time make longer reads and fuller micro-batches.
            largest = max((block_nbytes(group.shape, budgets.kv_bits) for group in model.groups), default=1)
            share = int(ram * _LENT_SHARE) // largest
            lent_pages = max(self._pages, min(self.batch_size * self._pages, share))
        return CachePlan(
            model.layers,
            budgets.kv_bits,
            self.on_disk,
            model.groups,
            sequences=self.batch_size,
            context=self.context,
            tokens=workload.kv_tokens(self.batch_size, self.context),
            tokens_at_once=min(max(budgets.micro_batch or MAX_ROWS, self._least_rows), self.tokens),
            one_pass=workload.one_pass,
            lent_pages=lent_pages,
            on_device=self.on_device,
            state=model.state,
            lent_states=lent_states,
        )

    def passes_of(self, ram: int, tokens: int, experts: ExpertShape | None, waits: bool = False) -> "Passes":
        """Passes of at most `tokens` tokens, with `experts` read on demand. `waits`: hidden states of a device's
        micro-batches wait in the host's memory."""
        model, workload, budgets = self.asked.model, self.asked.workload, self.asked.budgets
        logits, cache = self._logits(tokens), self.cache(ram)
        host = self._workspace(tokens, ram, self.asked.machine.scratch_nbytes, experts)
        device = self._device_workspace(tokens, waits) if budgets.has_device else None
        # A processor that has nothing to do but to pass on embedded tokens and logits bounds no rows.
        sides = [side for side in (None if self.on_device else host, device) if side is not None]
        rows, head_rows = min(tokens, *(side.rows for side in sides)), min(side.head_rows for side in sides)
        workspace = host.nbytes + cache.scratch_nbytes(host.rows, tokens)
        if self.on_device:
            workspace = transit_nbytes(model, tokens, self.batch_size, max(self.batch_size, head_rows), ram)
        state = cache.states_memory_nbytes + PAGE if model.state is not None and not self.on_device else 0
        waiting = WaitingPlan(tokens, rows, model.hidden_nbytes) if waits else None
        waiting_nbytes = 0 if waiting is None else waiting.host_nbytes + PAGE
        kv = self._kv_nbytes(cache, host)
        # Also where layers are read whole: views of what is resident are made once.
        objects = 0 if model.experts is None else model.experts.objects_nbytes(ram)
        needs = Needs(budgets.baseline, model.tables_nbytes, kv, workspace, state, waiting_nbytes, objects)
        # Without a limit on their tokens, passes are the caller's own, who may want logits at any positions.
        is_head_held = not workload.max_batched_tokens or (logits or self.batch_size) > head_rows
        is_layer_held = not self.is_one_micro_batch(tokens, rows, cache)
        return Passes(
            tokens=tokens,
            rows=rows,
            head_rows=head_rows,
            gathered_rows=min(side.gathered_rows for side in sides),
            needs=needs,
            held=Held(is_layer_held, is_head_held, min((self.batch_size - 1) * _AHEAD_PER_ROW, _MOST_AHEAD)),
            whole=model.tape,
            experts=experts,
            device_needs=None if device is None else self._device_needs(device, cache, tokens, experts, waiting),
            computes=budgets.computes,
            waiting=waiting,
        )

    def _logits(self, tokens: int) -> int:
        """Positions that get logits in a pass of `tokens` tokens, where they are more than one for each sequence."""
        return min(self.batch_size * self.context, tokens) if self.asked.workload.all_logits else 0

    def _workspace(
        self,
        tokens: int,
        budget: int,
        scratch: int,
        experts: ExpertShape | None,
        is_device: bool = False,
        waits: bool = False,
    ) -> Workspace:
        """What passes of `tokens` tokens take of the host's memory, or of the device's, which has `budget` bytes."""
        return workspace_for(
            self.asked.model,
            scratch,
            tokens,
            self.batch_size,
            self.context,
            budget,
            logits=self._logits(tokens),
            most_rows=self.asked.budgets.micro_batch or MAX_ROWS,
            least_rows=self._least_rows,
            waiting=experts.chosen if experts is not None else 0,
            native_steps=self.asked.machine.native_steps,
            is_device=is_device,
            hidden_elsewhere=waits,
        )

    def _device_tokens(self, tokens: int) -> int:
        """The tokens that a device has memory for: as many as one micro-batch may have at most, even if the host's
        memory leaves room for fewer, so that a larger `--ram` never asks for a larger `--vram`."""
        vram, scratch = self.asked.budgets.vram, self.asked.machine.device_scratch_nbytes
        most = self._workspace(self.tokens, vram, scratch, self.asked.model.experts, is_device=True).rows
        return max(tokens, min(self.tokens, most))

    def _device_workspace(self, tokens: int, waits: bool) -> Workspace:
        """The same of the device's."""
        vram, scratch = self.asked.budgets.vram, self.asked.machine.device_scratch_nbytes
        tokens, experts = self._device_tokens(tokens), self.asked.model.experts
        return self._workspace(tokens, vram, scratch, experts, is_device=True, waits=waits)

    def _device_needs(
        self,
        workspace: Workspace,
        cache: CachePlan,
        tokens: int,
        experts: ExpertShape | None,
        waiting: WaitingPlan | None,
    ) -> DeviceNeeds:
        nbytes = workspace.nbytes + (0 if experts is None else EXPERT_SLOTS * experts.nbytes)
        # For as many rows as the device's own memory allows, as all that is counted of it.
        nbytes += 0 if waiting is None else replace(waiting, rows=workspace.rows).device_nbytes + PAGE
        nbytes += cache.scratch_nbytes(workspace.rows, self.tokens) if self.on_device else 0
        kv = self._kv_nbytes(cache, workspace, is_device=True)
        if not self.on_device:
            begun = self._begun_at_once(workspace.rows, tokens)
            cut = 0 if self.asked.workload.one_pass else self._longest_prompt
            kv += cache.beginning_nbytes(workspace.rows, begun, cut)
        state = cache.states_nbytes if self.on_device else cache.away_states_nbytes(workspace.rows)
        return DeviceNeeds(
            self.asked.budgets.context_nbytes,
            self.asked.model.outer_nbytes,
            kv,
            nbytes,
            state + PAGE if self.asked.model.state is not None else 0,
        )

    def _begun_at_once(self, rows: int, tokens: int) -> int:
        """Tokens of prompts, of a pass of `tokens`, whose keys and values are on the device together: those of a
        micro-batch, and of the prompts that go on before and behind it. A caller's own passes take prompts together."""
        most = self._device_tokens(tokens)
        return min(most, 2 * self._longest_prompt + rows) if self.asked.workload.max_batched_tokens else most

    @property
    def _longest_prompt(self) -> int:
        """Tokens of a prompt, at most."""
        return min(self.asked.workload.max_prompt or self.context, self.context)

    def _kv_nbytes(self, cache: CachePlan, workspace: Workspace, is_device: bool = False) -> int:
        """Bytes of the KV cache in the host's memory or in the device's, which has this `workspace`; and what new keys
        and values need on their way between them, each for the most rows that its own memory allows."""
        pages = 2 * PAGE
        nbytes = cache.memory_nbytes + pages if is_device == self.on_device else 0
        is_between = self.asked.budgets.has_device and not self.on_device
        return nbytes + (outbox_nbytes(self.asked.model.groups, workspace.rows) + pages if is_between else 0)

    def is_one_micro_batch(self, tokens: int, rows: int, cache: CachePlan) -> bool:
        """Whether a pass of `tokens` tokens never has more than one micro-batch of `rows`."""
        if tokens > rows or (self.on_disk and cache.lent_pages < self.batch_size * self._pages):
            return False
        state = self.asked.model.state
        if state is not None and (self.batch_size > 1 or tokens > state.grid.cell(tokens)):
            # Recurrent layers compute several sequences, or what lies on both sides of a line of the grid, one after
            # the other.
            return state.grid.tokens == 1 and self.batch_size == 1
        # Dense attention takes each prompt by itself, and a page at a time where pages are quantized.
        return not self.asked.model.dense_attention or tokens == 1 or (self.batch_size == 1 and cache.bits == 16)


@dataclass(frozen=True)
class Passes:
    """How passes run."""

    tokens: int
    """Tokens of a pass, at most."""
    rows: int
    """Tokens of a micro-batch, at most."""
    head_rows: int
    gathered_rows: int
    needs: Needs
    held: Held
    whole: Tape
    """The tape of whole layers."""
    experts: ExpertShape | None
    """Those that are read on demand."""
    device_needs: DeviceNeeds | None = None
    """None: no device computes."""
    computes: tuple[Computes, Computes] = ("cpu", "cpu")
    """What computes prompts, and the rest."""
    waiting: WaitingPlan | None = None
    """None: hidden states stay where they are computed."""

    @property
    def may_wait(self) -> bool:
        """Whether a pass of a device has more micro-batches than it takes for those that wait to be worth it."""
        return self.device_needs is not None and self.waiting is None and self.tokens > WAITING_SLOTS * self.rows

    @property
    def host_held(self) -> Held:
        """What the host's ring holds as a whole; see `host_held_of`."""
        return host_held_of(self.held, self.computes)

    @property
    def device_held(self) -> Held:
        """What the device's ring holds as a whole. Copies are steady: none need go further ahead."""
        return replace(self.held, ahead_nbytes=0)

    @property
    def tape(self) -> Tape:
        """What is read ahead."""
        return self.whole if self.experts is None else self.experts.dense

    @property
    def experts_nbytes(self) -> int:
        """Bytes of the least cache of experts: it holds those that one token chooses."""
        return 0 if self.experts is None else self.experts.chosen * self.experts.nbytes
