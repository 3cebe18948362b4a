"""One pass over the tape: every block's weights are used for all micro-batches while they are there.

    embeddings of all tokens -> record every chunk -> for each layer: for each chunk: hidden = layer(hidden)
    -> head: replay -> logits

Within a block, a micro-batch's prompt may pass in several chunks of tokens, one behind the other: a chunk finds the
keys of the earlier ones in the cache. So a long prompt costs one pass, and activations stay small.
"""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from transformers.cache_utils import Cache

from tiered.cache import PositionCache
from tiered.errors import ConfigError
from tiered.kernels import CancelFlag
from tiered.model.bind import BoundModel
from tiered.model.record import LayerCall, Recorder
from tiered.stream import EmbeddingRows, LoadedBlock, Streamer
from tiered.trace import Tracer

T = TypeVar("T")
OnBlock = Callable[[int, int], None]
"""Called after each block with (blocks done, blocks in a pass)."""


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Rows that are computed together and share a cache."""

    input_ids: torch.Tensor  # [rows, tokens]
    cache: Cache
    attention_mask: Any = None
    """None, [rows, past + tokens], or what the family's forward accepts: 4-D, or one per attention type."""
    position_ids: torch.Tensor | None = None  # [rows, tokens]
    logits_to_keep: int | torch.Tensor = 1
    """How many of the last positions need logits (0: all), or which."""


@dataclass(frozen=True)
class Pass:
    """The result of one traversal of the tape, and what it cost."""

    logits: tuple[torch.Tensor, ...]
    """Per micro-batch, [rows, kept, vocab]."""
    seconds: float
    compute_seconds: float
    """Spent in the compute thread."""
    wait_seconds: float
    """The computation waited for blocks."""
    block_seconds: tuple[float, ...]
    """Wall time of each block beyond waiting and computing: hand-over and bookkeeping."""

    @property
    def logits_rows(self) -> int:
        """Sequences that got logits."""
        return sum(logits.shape[0] for logits in self.logits)


@dataclass(eq=False)
class _Chunk:
    """Some tokens of a micro-batch on their way through the layers."""

    hidden: torch.Tensor  # [rows, tokens, hidden]
    calls: tuple[LayerCall, ...]
    micro_batch: int


class Engine:
    """Drives a bound model over the blocks a streamer delivers."""

    def __init__(
        self,
        model: BoundModel,
        recorder: Recorder,
        embedding: EmbeddingRows,
        compute: Executor,
        cancel: CancelFlag,
        trace: Tracer,
        rows_per_chunk: int,
    ) -> None:
        self._model, self._recorder, self._embedding = model, recorder, embedding
        self._compute, self._cancel, self._trace = compute, cancel, trace
        self._rows_per_chunk = rows_per_chunk
        self._compute_seconds = 0.0
        self._expected = 0

    async def run_pass(
        self, batch: list[MicroBatch], streamer: Streamer, tape_length: int, on_block: OnBlock | None = None
    ) -> Pass:
        """All of `batch` through all blocks; its caches grow. Raises what reading or computing raised."""
        await self._resynchronize(streamer, tape_length)
        start, waited, computed = time.perf_counter(), streamer.wait_seconds, self._compute_seconds
        ids = sorted({int(i) for micro_batch in batch for i in micro_batch.input_ids.unique()})
        packed = await self._embedding.fetch(ids)
        chunks = await self._run("record", lambda: self._record(batch, packed, ids))
        logits: tuple[torch.Tensor, ...] = ()
        overheads = []
        for number in range(tape_length):
            began, waited_before, computed_before = time.perf_counter(), streamer.wait_seconds, self._compute_seconds
            block = await streamer.next()
            self._expected = (block.position + 1) % tape_length
            try:
                if block.info.role == "layer":
                    await self._run(block.info.name, lambda: self._run_layer(block, chunks, batch))  # noqa: B023
                else:
                    logits = await self._run(block.info.name, lambda: self._run_head(block, chunks, batch))  # noqa: B023
            finally:
                await streamer.release(block)
            busy = streamer.wait_seconds - waited_before + self._compute_seconds - computed_before
            overheads.append(time.perf_counter() - began - busy)
            if on_block is not None:
                on_block(number + 1, tape_length)
        return Pass(
            logits,
            time.perf_counter() - start,
            self._compute_seconds - computed,
            streamer.wait_seconds - waited,
            tuple(overheads),
        )

    def rewind(self) -> None:
        """A new streamer begins at the start of the tape."""
        self._expected = 0

    async def _resynchronize(self, streamer: Streamer, tape_length: int) -> None:
        """After an interrupted pass the tape stands in the middle: let the rest of it go by."""
        while self._expected:
            block = await streamer.next()
            self._expected = (block.position + 1) % tape_length
            await streamer.release(block)

    async def _run(self, name: str, work: Callable[[], T]) -> T:
        """Run `work` in the compute thread and account for its time."""

        def timed() -> T:
            self._cancel.check()
            start = time.perf_counter()
            try:
                with torch.no_grad():
                    return work()
            finally:
                seconds = time.perf_counter() - start
                self._compute_seconds += seconds
                self._trace.record("compute", name, start, seconds)

        return await asyncio.get_running_loop().run_in_executor(self._compute, timed)

    def _record(self, batch: list[MicroBatch], packed: torch.Tensor, ids: list[int]) -> list[_Chunk]:
        rows = self._embedding.widen(packed, ids, self._model.dtype)
        table = torch.tensor(ids)
        chunks = []
        for number, micro_batch in enumerate(batch):
            count, tokens = micro_batch.input_ids.shape
            step = max(1, self._rows_per_chunk // count)
            past = int(micro_batch.cache.get_seq_length())
            for start in range(0, tokens, step):
                stop = min(start + step, tokens)
                index = torch.searchsorted(table, micro_batch.input_ids[:, start:stop].contiguous())
                recording = self._record_chunk(micro_batch, self._model.embed(rows, index), past, start, stop)
                chunks.append(_Chunk(recording[0], recording[1], number))
        return chunks

    def _record_chunk(
        self, batch: MicroBatch, embedded: torch.Tensor, past: int, start: int, stop: int
    ) -> tuple[torch.Tensor, tuple[LayerCall, ...]]:
        """Hidden states that enter layer 0 and the layers' arguments, for tokens start..stop of `batch`."""
        whole = stop - start == batch.input_ids.shape[1]
        # Later chunks are recorded before the earlier ones have filled the cache, so a stand-in tells the lengths.
        cache = batch.cache if whole else PositionCache(past + start, len(self._model.layers))
        position_ids = batch.position_ids
        recording = self._recorder.record(
            _last_positions(batch, past),
            inputs_embeds=embedded,
            # Untouched where possible: a preallocating cache wants masks wider than what is filled.
            attention_mask=batch.attention_mask if whole else slice_mask(batch.attention_mask, past, start, stop),
            position_ids=None if position_ids is None else position_ids[:, start:stop],
            past_key_values=cache,
            use_cache=True,
        )
        if whole:
            return recording.hidden, recording.calls
        calls = tuple(_with_cache(call, cache, batch.cache) for call in recording.calls)
        return recording.hidden, calls

    def _run_layer(self, block: LoadedBlock, chunks: list[_Chunk], batch: list[MicroBatch]) -> None:
        index = block.position
        with self._model.lend(self._model.layers[index], block.weights()) as layer:
            for chunk in chunks:
                self._cancel.check()
                call = chunk.calls[index]
                output = layer(chunk.hidden, *call.args, **call.kwargs)
                chunk.hidden = output[0] if isinstance(output, tuple) else output

    def _run_head(self, block: LoadedBlock, chunks: list[_Chunk], batch: list[MicroBatch]) -> tuple[torch.Tensor, ...]:
        logits = []
        with self._model.lend(self._model.head, block.weights()):
            for number, micro_batch in enumerate(batch):
                parts = [chunk.hidden for chunk in chunks if chunk.micro_batch == number]
                hidden = keep_positions(
                    torch.cat(parts, dim=1) if len(parts) > 1 else parts[0], micro_batch.logits_to_keep
                )
                step = max(1, self._rows_per_chunk // hidden.shape[0])
                pieces = [self._recorder.replay(part) for part in hidden.split(step, dim=1)]
                logits.append(torch.cat(pieces, dim=1) if len(pieces) > 1 else pieces[0])
        return tuple(logits)


def check_token_ids(input_ids: torch.Tensor, vocab: int) -> None:
    """Refuse what is not [rows, tokens] of ids below `vocab`: rows of the embedding are read by number."""
    if input_ids.ndim != 2 or 0 in input_ids.shape or input_ids.is_floating_point():
        raise ConfigError(
            f"input_ids: expected integers [rows, tokens], found {input_ids.dtype} {list(input_ids.shape)}"
        )
    least, most = int(input_ids.min()), int(input_ids.max())
    if least < 0 or most >= vocab:
        wrong = least if least < 0 else most
        raise ConfigError(f"input_ids: token {wrong} is not in the vocabulary, which has tokens 0 to {vocab - 1}")


def keep_positions(hidden: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """The positions of [rows, tokens, ...] that `logits_to_keep` means, as transformers selects them."""
    index = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
    return hidden[:, index]


def _last_positions(batch: MicroBatch, past: int) -> torch.Tensor:
    """Where the texts of `batch` end so far: [rows], or [1] where positions are just counted."""
    if batch.position_ids is None:
        return torch.tensor([past + batch.input_ids.shape[1] - 1])
    return batch.position_ids.amax(1)


def slice_mask(mask: Any, past: int, start: int, stop: int) -> Any:
    """The part of an attention mask that concerns queries start..stop and the keys up to them."""
    if mask is None:
        return None
    if isinstance(mask, dict):
        return {key: slice_mask(value, past, start, stop) for key, value in mask.items()}
    if mask.ndim == 4:
        return mask[:, :, start:stop, : past + stop]
    return mask[:, : past + stop]


def _with_cache(call: LayerCall, stand_in: Cache, cache: Cache) -> LayerCall:
    """The same call with the real cache in the stand-in's place."""
    kwargs = {key: cache if value is stand_in else value for key, value in call.kwargs.items()}
    return LayerCall(tuple(cache if value is stand_in else value for value in call.args), kwargs)
