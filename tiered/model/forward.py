"""Forwards of the Hugging Face facade: rows of equal length that share a cache of transformers' kind.

A prompt may pass through each block in several micro-batches, one behind the other: each finds the keys of the earlier
ones in the cache. So a long prompt costs one pass, and activations stay small.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

from tiered.cache import PositionCache
from tiered.errors import ConfigError, NotSupportedError
from tiered.model.homebound import Home, Homebound, can_come_home
from tiered.model.record import LayerCall
from tiered.model.seat import Seats
from tiered.model.waiting import WaitingRoom
from tiered.model.work import Embedded, Group, MicroBatch
from tiered.plan.state import ANYWHERE, Grid


@dataclass(frozen=True, eq=False)
class ForwardBatch:
    """Rows that are computed together and share a cache. All tensors may be anywhere."""

    input_ids: torch.Tensor  # [rows, tokens]
    cache: Cache
    attention_mask: Any = None
    """None, [rows, past + tokens], or what the family's forward accepts: 4-D, or one per attention type."""
    position_ids: torch.Tensor | None = None  # [rows, tokens]
    logits_to_keep: int | torch.Tensor = 1
    """How many of the last positions need logits (0: all), or the indices of those that do."""


class ForwardWork:
    """A pass over `batch` at one seat; its result is logits [rows, kept, vocab] per `ForwardBatch`, which the seat that
    decodes computes.

    Caches of transformers keep what they are given where it is, and that is where decoding is. So prompts that begin
    their caches, and no others, compute at a seat of their own, and `Homebound` gives the caches what they keep. There
    they are cut on `grid` only.
    """

    def __init__(
        self,
        batch: Sequence[ForwardBatch],
        rows_per_micro_batch: int,
        layers: int,
        seats: Seats,
        grid: Grid = ANYWHERE,
    ) -> None:
        self._batch, self._rows_per_micro_batch, self._layers, self._grid = batch, rows_per_micro_batch, layers, grid
        self._seat, self.head = seats.prefill if all(map(_begins, batch)) else seats.decode, seats.decode
        self.seats = seats.of_pass([self._seat])

    @property
    def ids(self) -> list[int]:
        return sorted({int(i) for batch in self._batch for i in batch.input_ids.unique()})

    def record(self, embedded: Embedded, room: WaitingRoom | None = None) -> list[Group]:
        seat, micro_batches = self._seat, []
        waiting = room if seat.device is not None else None
        if waiting is not None:
            waiting.begin(sum(len(self._cuts(batch)) for batch in self._batch), self._layers)
        for number, batch in enumerate(self._batch):
            tokens = batch.input_ids.shape[1]
            home = None if seat is self.head else Home(batch.cache, self.head.where, self.head.model.dtype)
            past, cuts = past_tokens(batch), self._cuts(batch)
            check_padding(batch, cuts)
            for start, stop in cuts:
                inputs = embedded(seat, batch.input_ids[:, start:stop].cpu())
                hidden, calls = self._record_micro_batch(batch, inputs, past, start, stop)
                if home is not None:
                    away = Homebound(home, start, stop, tokens, self._layers)
                    calls = tuple(_with_cache(call, batch.cache, away) for call in calls)
                micro_batches.append(MicroBatch(hidden, calls, number))
                if waiting is not None:
                    micro_batches[-1].wait_in(waiting)
        return [Group(seat, tuple(micro_batches))]

    def _cuts(self, batch: ForwardBatch) -> list[tuple[int, int]]:
        """Where micro-batches of `batch` begin and end."""
        count, tokens = batch.input_ids.shape
        step = max(1, self._rows_per_micro_batch // count)
        # Several rows may leave no memory for what has to be computed together to have the bits of the whole.
        is_cut = self._seat is not self.head and step >= self._grid.cell(tokens)
        grid, cuts, stop = self._grid if is_cut else ANYWHERE, [], 0
        while stop < tokens:
            start, stop = stop, grid.next_stop(stop, tokens, step)
            cuts.append((start, stop))
        return cuts

    def _record_micro_batch(
        self, batch: ForwardBatch, embedded: Mapping[str, torch.Tensor], past: int, start: int, stop: int
    ) -> tuple[torch.Tensor, tuple[LayerCall, ...]]:
        """Hidden states that enter layer 0 and the layers' arguments, for tokens start..stop of `batch`."""
        whole = stop - start == batch.input_ids.shape[1]
        # All micro-batches are recorded before the first one fills the cache, so a stand-in gives the lengths.
        cache = batch.cache if whole else PositionCache(past + start, self._layers)
        position_ids = batch.position_ids
        # Untouched where possible: a preallocating cache wants masks wider than what is filled.
        mask = batch.attention_mask if whole else slice_mask(batch.attention_mask, past, start, stop)
        where = self._seat.where
        recording = self._seat.recorder.record(
            _last_positions(batch, past),
            **embedded,
            attention_mask=_moved(mask, where),
            position_ids=None if position_ids is None else position_ids[:, start:stop].to(where),
            cache=cache,
            use_cache=True,
        )
        if whole:
            return recording.hidden, recording.calls
        calls = tuple(_with_cache(call, cache, batch.cache) for call in recording.calls)
        return recording.hidden, calls

    def head_steps(self, groups: Sequence[Group]) -> int:
        return sum(map(len, self._steps(groups)))

    def finish(self, groups: Sequence[Group]) -> tuple[torch.Tensor, ...]:
        logits, seat = [], self.head
        for steps in self._steps(groups):
            pieces = [seat.recorder.replay(part.to(seat.where, seat.model.dtype)).cpu() for part in steps]
            logits.append(torch.cat(pieces, dim=1) if len(pieces) > 1 else pieces[0])
        return tuple(logits)

    def _steps(self, groups: Sequence[Group]) -> list[tuple[torch.Tensor, ...]]:
        """For each `ForwardBatch`, the hidden states that need logits, as many as are computed at a time."""
        micro_batches = [micro_batch for group in groups for micro_batch in group.micro_batches]
        steps = []
        for number, batch in enumerate(self._batch):
            parts = [micro_batch.hidden for micro_batch in micro_batches if micro_batch.number == number]
            whole = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
            hidden = keep_positions(whole, batch.logits_to_keep)
            steps.append(hidden.split(max(1, self._rows_per_micro_batch // hidden.shape[0]), dim=1))
        return steps

    def commit(self) -> None:
        """Nothing to do: the caches have grown while the layers computed."""


def _begins(batch: ForwardBatch) -> bool:
    """Whether `batch` are prompts that begin a cache which takes what it is given, and returns that."""
    if batch.input_ids.shape[1] == 1 or past_tokens(batch):
        return False
    return can_come_home(batch.cache)


def fits_one_pass(batch: ForwardBatch, rows_per_micro_batch: int, seats: Seats) -> bool:
    """Whether the engine can take `batch` as it is: in one micro-batch, or in several that grow the cache in turn."""
    rows, tokens = batch.input_ids.shape
    if rows * tokens <= rows_per_micro_batch or tokens == 1 or (seats.prefill is not seats.decode and _begins(batch)):
        return True
    # The lengths of a cache that drops or preallocates keys are known only to its own `update`.
    return all(type(layer) is DynamicLayer for layer in batch.cache.layers) and not isinstance(
        batch.attention_mask, dict
    )


def check_padding(batch: ForwardBatch, cuts: Sequence[tuple[int, int]]) -> None:
    """Raises NotSupportedError where `cuts` of a prompt with recurrent layers leave a padded token to itself:
    transformers masks none in the states of a single token."""
    mask, tokens = batch.attention_mask, batch.input_ids.shape[1]
    is_plain = isinstance(mask, torch.Tensor) and mask.ndim == 2
    # The cache's `is_linear` is of layers that keep nothing else.
    has_states = any(hasattr(layer, "recurrent_states") for layer in getattr(batch.cache, "layers", ()))
    if tokens == 1 or not is_plain or not has_states:
        return
    mine = mask[:, -tokens:]
    if any(stop - start == 1 and not bool(mine[:, start].all()) for start, stop in cuts):
        raise NotSupportedError(
            f"{len(mine)} x {tokens} tokens with padding: memory was set aside for so few that they would be computed "
            "one by one, and recurrent layers cannot leave out a single one; pass fewer rows or such of equal length, "
            "or a larger ram= (vram= with a GPU) to tiered.load"
        )


def past_tokens(batch: ForwardBatch) -> int:
    """Tokens that the cache of `batch` holds. One of recurrent layers only does not know; the mask does, if there is
    one."""
    if all(getattr(batch.cache, "is_linear", (False,))):
        mask = batch.attention_mask
        return mask.shape[1] - batch.input_ids.shape[1] if isinstance(mask, torch.Tensor) and mask.ndim == 2 else 0
    return int(batch.cache.get_seq_length())


def check_token_ids(input_ids: torch.Tensor, vocab: int) -> None:
    """Raises ConfigError unless `input_ids` [rows, tokens] are 0 to `vocab` - 1: they number rows on disk."""
    if input_ids.ndim != 2 or 0 in input_ids.shape or input_ids.is_floating_point():
        raise ConfigError(
            f"input_ids: expected integers [rows, tokens], found {input_ids.dtype} {list(input_ids.shape)}"
        )
    least, most = int(input_ids.min()), int(input_ids.max())
    if least < 0 or most >= vocab:
        wrong = least if least < 0 else most
        raise ConfigError(f"input_ids: token {wrong} is not in the vocabulary, which has tokens 0 to {vocab - 1}")


def keep_positions(hidden: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """The positions of `hidden` [rows, tokens, ...] that `logits_to_keep` selects, as in transformers."""
    index = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep.to(hidden.device)
    return hidden[:, index]


def _last_positions(batch: ForwardBatch, past: int) -> torch.Tensor:
    """Position of the last token of each row's text: [rows], or [1] if it is the same for all."""
    if batch.position_ids is None:
        return torch.tensor([past + batch.input_ids.shape[1] - 1])
    return batch.position_ids.amax(1).cpu()


def slice_mask(mask: Any, past: int, start: int, stop: int) -> Any:
    """The part of an attention mask that concerns queries start..stop and the keys up to them."""
    if mask is None:
        return None
    if isinstance(mask, dict):
        return {key: slice_mask(value, past, start, stop) for key, value in mask.items()}
    if mask.ndim == 4:
        return mask[:, :, start:stop, : past + stop]
    return mask[:, : past + stop]


def _moved(mask: Any, where: torch.device) -> Any:
    """An attention mask of any kind, at `where`."""
    if isinstance(mask, dict):
        return {key: _moved(value, where) for key, value in mask.items()}
    return mask.to(where) if isinstance(mask, torch.Tensor) else mask


def _with_cache(call: LayerCall, stand_in: Cache, cache: Cache) -> LayerCall:
    """The same call with the real cache in the stand-in's place."""
    kwargs = {key: cache if value is stand_in else value for key, value in call.kwargs.items()}
    return LayerCall(tuple(cache if value is stand_in else value for value in call.args), kwargs)
