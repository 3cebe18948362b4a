"""A runtime's memory: everything large in one arena, as its plan says, and the KV cache's file if it is on disk."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import torch

from tiered.cache import AwayStates, KVPool, Outbox
from tiered.device import Lease
from tiered.host import Host
from tiered.io import CHUNK_BUFFERS, Arena, Slab, SpillFile
from tiered.model import WaitingRoom
from tiered.options import Options
from tiered.plan import Plan
from tiered.plan.kv import outbox_nbytes
from tiered.store import CHUNK_NBYTES, PAGE, Store
from tiered.stream import register

SPILL_THREADS: Final = 8
"""Transfers of a KV cache on disk in flight, beside those of weights."""


@dataclass(frozen=True, eq=False)
class Memory:
    """Slabs of one arena; the pool may be in a device's memory."""

    arena: Arena
    pool: KVPool
    kv_ring: Slab | None
    """Memory that KV blocks pass through; None unless the KV cache is on disk."""
    spill: SpillFile | None
    """The KV cache's file; None unless it is on disk."""
    staging: Slab
    """Memory for one chunk, through which rows of the embedding are read."""
    side: Slab | None
    """Scales and zeros of the embedding; None if it has none."""
    buffers: tuple[memoryview, ...]
    """Memory for chunks of compressed units, before they are decoded; none if there are none."""
    ring: Slab | None
    """Memory that streamed units pass through; None if all are resident."""
    resident: Mapping[int, Slab]
    """Memory of each resident unit, by its number on the tape."""
    experts: Slab | None
    """Memory of the cache of experts; None where layers are read whole."""
    room: WaitingRoom | None
    """Where hidden states wait that have no room on the device."""

    @property
    def largest(self) -> Slab:
        """The largest slab of those that hold nothing of use while nothing streams."""
        slabs = [self.staging, *filter(None, (self.ring, self.experts)), *self.resident.values()]
        return max(slabs, key=lambda slab: slab.nbytes)

    def rest(self) -> None:
        """Give back what is borrowed from a device to bring states and hidden states there, until they are brought
        again. For the thread that computes, in which nothing does."""
        if self.pool.outbox is not None:
            self.pool.outbox.rest()
        if self.pool.away is not None:
            self.pool.away.rest()
        if self.room is not None:
            self.room.rest()


@contextlib.contextmanager
def open_memory(store: Store, plan: Plan, options: Options, host: Host, has_pool: bool = True) -> Iterator[Memory]:
    """The memory of `plan`; all of it is released when the context ends. Without `has_pool` the memory of a KV cache on
    the device is left to others, who keep keys and values there themselves."""
    placement, cache, device = plan.placement, plan.cache, host.computer.device if host.computer is not None else None
    tables = CHUNK_NBYTES + plan.side_nbytes + plan.buffers_nbytes
    outbox_size = 0 if device is None or cache.on_device else outbox_nbytes(cache.groups, plan.micro_batch_rows)
    needs = plan.needs
    kept = needs.kv + needs.state + needs.waiting
    total = plan.nbytes - needs.total + tables + kept + PAGE * (len(plan.tape.nbytes) + 9)
    with contextlib.ExitStack() as stack:
        arena = stack.enter_context(Arena(total))

        def keep(nbytes: int, label: str) -> Slab:
            slab = arena.borrow(nbytes, label)
            stack.callback(arena.release, slab)
            return slab

        def lease(nbytes: int, label: str) -> Lease:
            assert device is not None, f"{label}: the plan has a device, the host none"
            made = Lease(device, nbytes, label)
            made.take()
            stack.callback(made.end)
            return made

        def make_pool() -> KVPool:
            if cache.on_device and device is not None and not has_pool:
                return KVPool(cache, torch.empty(0, dtype=torch.uint8, device=device.where))
            if cache.on_device:
                states = lease(cache.states_nbytes, "recurrent states").take() if cache.states_nbytes else None
                return KVPool(cache, lease(cache.pool_nbytes, "kv").take(), states=states)
            # Without a pool nothing is reserved in it, and memory that nobody touches takes none.
            slots = keep(cache.states_nbytes, "recurrent states") if cache.states_nbytes and not cache.on_disk else None
            outbox = away = None
            if device is not None:
                slab = keep(outbox_size, "kv from the device")
                # States are copied from where they are, and to there.
                register(device, [slab, *filter(None, (slots, kv_ring if cache.state is not None else None))], stack)
                outbox = Outbox(lease(outbox_size, "kv to the host"), slab.tensor()[:outbox_size])
                if cache.state is not None and has_pool:
                    nbytes = cache.away_states_nbytes(plan.micro_batch_rows)
                    away = AwayStates(outbox, lease(nbytes, "recurrent states of a layer"), cache.state.layer_nbytes)
                # Before any of its memory is given back.
                stack.callback(outbox.close)
            states = None if slots is None else slots.tensor()
            return KVPool(cache, keep(cache.pool_nbytes, "kv").tensor(), outbox, states, away)

        def make_room() -> WaitingRoom | None:
            waiting = None if plan.device is None else plan.device.waiting
            if waiting is None or device is None:
                return None
            slab = keep(waiting.host_nbytes, "hidden states")
            register(device, [slab], stack)
            there, here = lease(waiting.device_nbytes, "hidden states"), slab.tensor()[: waiting.host_nbytes]
            room = WaitingRoom(there, here, waiting.token_nbytes, host.trace)
            stack.callback(room.close)
            return room

        part = plan.buffers_nbytes // CHUNK_BUFFERS
        chunks = keep(plan.buffers_nbytes, "compressed chunks").view if part else memoryview(b"")
        kv_ring = keep(cache.ring_nbytes + cache.states_memory_nbytes, "kv ring") if cache.on_disk else None
        pool, spill = make_pool(), None
        if cache.on_disk:
            folder, nbytes = options.kv_folder or store.path, cache.file_nbytes
            spill = stack.enter_context(SpillFile(folder, nbytes, SPILL_THREADS, host.trace, clock=host.clock))
        yield Memory(
            arena,
            pool,
            kv_ring=kv_ring,
            spill=spill,
            staging=keep(CHUNK_NBYTES, "staging"),
            side=keep(plan.side_nbytes, "embedding scales") if plan.side_nbytes else None,
            buffers=tuple(chunks[i * part : (i + 1) * part] for i in range(CHUNK_BUFFERS) if part),
            ring=keep(placement.ring_nbytes, "ring") if placement.ring_nbytes else None,
            resident={unit: keep(plan.tape.nbytes[unit], "resident") for unit in sorted(placement.resident)},
            experts=keep(plan.experts.nbytes, "experts") if plan.experts else None,
            room=make_room(),
        )
