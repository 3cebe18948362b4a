"""A runtime's memory: everything large in one arena, as its plan says, and the KV cache's file if it is on disk."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from tiered.cache import KVPool
from tiered.host import Host
from tiered.io import Arena, Slab, SpillFile
from tiered.options import Options
from tiered.plan import Plan
from tiered.store import CHUNK_NBYTES, PAGE, Store

SPILL_THREADS: Final = 8
"""Transfers of a KV cache on disk in flight, beside those of weights."""


@dataclass(frozen=True, eq=False)
class Memory:
    """Slabs of one arena."""

    arena: Arena
    pool: KVPool
    kv_ring: Slab | None
    """That the cache's pages pass through, where they are on disk; so is the next."""
    spill: SpillFile | None
    staging: Slab
    """One chunk, for rows of the embedding."""
    side: Slab | None
    """Scales and zeros of the embedding."""
    ring: Slab | None
    """That streamed blocks pass through."""
    resident: Mapping[int, Slab]
    """Of each resident block, by its position on the tape."""

    @property
    def largest(self) -> Slab:
        """Of what nothing is kept in while nothing streams."""
        slabs = [self.staging, *([self.ring] if self.ring is not None else []), *self.resident.values()]
        return max(slabs, key=lambda slab: slab.nbytes)


@contextlib.contextmanager
def open_memory(store: Store, plan: Plan, options: Options, host: Host) -> Iterator[Memory]:
    """The memory of `plan`, which all goes back when the context ends."""
    placement, cache = plan.placement, plan.cache
    total = placement.nbytes + CHUNK_NBYTES + plan.side_nbytes + plan.needs.kv + PAGE * (len(store.tape) + 8)
    with contextlib.ExitStack() as stack:
        arena = stack.enter_context(Arena(total))

        def keep(nbytes: int, label: str) -> Slab:
            slab = arena.borrow(nbytes, label)
            stack.callback(arena.release, slab)
            return slab

        pool, spill = KVPool(cache, keep(cache.pool_nbytes, "kv").tensor()), None
        if cache.on_disk:
            folder, nbytes = options.kv_folder or store.path, cache.blocks_nbytes
            spill = stack.enter_context(SpillFile(folder, nbytes, SPILL_THREADS, host.trace, clock=host.clock))
        yield Memory(
            arena,
            pool,
            kv_ring=keep(cache.ring_nbytes, "kv ring") if cache.on_disk else None,
            spill=spill,
            staging=keep(CHUNK_NBYTES, "staging"),
            side=keep(plan.side_nbytes, "embedding scales") if plan.side_nbytes else None,
            ring=keep(placement.ring_nbytes, "ring") if placement.ring_nbytes else None,
            resident={p: keep(plan.tape_sizes[p], "resident") for p in sorted(placement.resident)},
        )
