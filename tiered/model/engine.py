"""One pass over the tape: every block's weights are used for all chunks of the work while they are there.

    embeddings of all tokens -> record every chunk -> for each layer: for each chunk: hidden = layer(hidden)
    -> head: replay -> logits

Within a block, one text may pass in several chunks of tokens, one behind the other: a chunk finds the keys of the
earlier ones in the cache. So a long prompt costs one pass, and activations stay small.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Final, TypeVar

import torch

from tiered.cache import PackedKV
from tiered.kernels import CancelFlag
from tiered.model.bind import BoundModel
from tiered.model.record import Recorder
from tiered.model.work import Chunk, Embedded, Unit, Work
from tiered.stream import EmbeddingRows, KVStream, LoadedBlock, Streamer
from tiered.trace import Tracer

T = TypeVar("T")
_TOGETHER: Final = 8
"""Resident layers that are computed without a hand-over between them: each takes some 0.2 ms."""
OnBlock = Callable[[int, int], None]
"""Called after each block with (blocks done, blocks in a pass)."""


@dataclass(frozen=True)
class Pass:
    """The result of one traversal of the tape, and what it cost."""

    logits: tuple[torch.Tensor, ...]
    """Per micro-batch, [rows, kept, vocab]; empty where logits were handed over as they came."""
    seconds: float
    compute_seconds: float
    """Spent in the compute thread."""
    wait_seconds: float
    """The computation waited for blocks, or for the cache's pages on disk."""
    block_seconds: tuple[float, ...]
    """Wall time of each block beyond waiting and computing: hand-over and bookkeeping."""


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
    ) -> None:
        self._model, self._recorder, self._embedding = model, recorder, embedding
        self._compute, self._cancel, self._trace = compute, cancel, trace
        self._compute_seconds = 0.0
        self._expected = 0

    async def run_pass(
        self,
        work: Work,
        streamer: Streamer,
        tape_length: int,
        kv: KVStream | None = None,
        on_block: OnBlock | None = None,
    ) -> Pass:
        """All of `work` through all blocks; its caches grow. Raises what reading or computing raised.

        `kv` brings the cache's pages where they are on disk.
        """
        await self._resynchronize(streamer, tape_length)
        start, waited, computed = time.perf_counter(), self._waited(streamer, kv), self._compute_seconds
        ids = work.ids
        packed = await self._embedding.fetch(ids)
        units = await self._run("record", lambda: self._record(work, packed, ids))
        logits: tuple[torch.Tensor, ...] = ()
        overheads = []
        try:
            if kv is not None:
                kv.begin([unit.records for unit in units if unit.records is not None])
            done = 0
            while done < tape_length:
                began, waited_before, computed_before = (
                    time.perf_counter(),
                    self._waited(streamer, kv),
                    self._compute_seconds,
                )
                blocks = await self._next_blocks(streamer, tape_length, several=kv is None)
                try:
                    if blocks[0].info.role == "layer":
                        await self._run_layers(blocks, units, kv)
                    else:
                        (head,) = blocks
                        logits = await self._run(head.info.name, lambda: self._run_head(head, work, units))  # noqa: B023
                finally:
                    for block in blocks:
                        await streamer.release(block)
                busy = self._waited(streamer, kv) - waited_before + self._compute_seconds - computed_before
                overheads += [(time.perf_counter() - began - busy) / len(blocks)] * len(blocks)
                done += len(blocks)
                if on_block is not None:
                    on_block(done, tape_length)
        finally:
            if kv is not None:
                await kv.end()
        work.commit()
        return Pass(
            logits,
            time.perf_counter() - start,
            self._compute_seconds - computed,
            self._waited(streamer, kv) - waited,
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

    async def _run(self, name: str | None, work: Callable[[], T]) -> T:
        """Run `work` in the compute thread and account for its time; as a span `name`, unless it makes its own."""

        def timed() -> T:
            self._cancel.check()
            start = time.perf_counter()
            try:
                with torch.no_grad():
                    return work()
            finally:
                seconds = time.perf_counter() - start
                self._compute_seconds += seconds
                if name is not None:
                    self._trace.record("compute", name, start, seconds)

        return await asyncio.get_running_loop().run_in_executor(self._compute, timed)

    async def _next_blocks(self, streamer: Streamer, tape_length: int, several: bool) -> list[LoadedBlock]:
        """The next block; or, of resident layers, as many as may be computed without a look at anything else."""
        blocks = [await streamer.next()]
        # A streamed block's memory is wanted back at once. The head, last on the tape, is another matter.
        while several and blocks[0].span is None and blocks[-1].position < tape_length - 2 and len(blocks) < _TOGETHER:
            following = streamer.next_resident()
            if following is None:
                break
            blocks.append(following)
        self._expected = (blocks[-1].position + 1) % tape_length
        return blocks

    def _waited(self, streamer: Streamer, kv: KVStream | None) -> float:
        return streamer.wait_seconds + (kv.wait_seconds if kv is not None else 0.0)

    def _record(self, work: Work, packed: torch.Tensor, ids: list[int]) -> list[Unit]:
        rows = self._embedding.widen(packed, ids, self._model.dtype)
        return work.record(self._recorder, Embedded(self._model, rows, ids))

    async def _run_layers(self, blocks: Sequence[LoadedBlock], units: Sequence[Unit], kv: KVStream | None) -> None:
        """All chunks through some layers: at once, or unit after unit as their pages arrive."""
        if kv is None:
            chunks = [chunk for unit in units for chunk in unit.chunks]
            await self._run(None, lambda: self._compute_layers(blocks, chunks))
            return
        (block,) = blocks
        for unit in units:
            assert unit.records is not None, "a cache of transformers' kind is never on disk"
            await kv.fetch(unit.records, block.position)
            await self._run(None, lambda: self._compute_layers(blocks, unit.chunks))  # noqa: B023
            kv.store(unit.records, block.position)

    def _compute_layers(self, blocks: Sequence[LoadedBlock], chunks: Sequence[Chunk]) -> None:
        for block in blocks:
            with self._trace.span("compute", block.info.name):
                self._compute_layer(block, chunks)

    def _compute_layer(self, block: LoadedBlock, chunks: Sequence[Chunk]) -> None:
        index = block.position
        with self._model.lend(self._model.layers[index], block.weights()) as layer:
            for chunk in chunks:
                self._cancel.check()
                call = chunk.calls[index]
                output = layer(chunk.hidden, *call.args, **call.kwargs)
                chunk.hidden = output[0] if isinstance(output, tuple) else output
                if isinstance(chunk.kv, PackedKV):
                    chunk.kv.check(index)

    def _run_head(self, block: LoadedBlock, work: Work, units: Sequence[Unit]) -> tuple[torch.Tensor, ...]:
        with self._model.lend(self._model.head, block.weights()):
            return work.finish(self._recorder, units)
