"""Memory and disk: the arena that owns every large buffer, the reader that fills it, the file that it spills to."""

from tiered.io.arena import Arena, Slab
from tiered.io.disk import CHUNK_BUFFERS, ChunkBuffers, DiskReader
from tiered.io.modes import ReadMode, probe_mode
from tiered.io.spill import SpillFile
from tiered.io.threads import IdleClock, all_of
from tiered.io.transfer import PIECE_NBYTES, Faults
from tiered.io.verify import ChunkVerifier, VerifyPolicy

__all__ = [
    "CHUNK_BUFFERS",
    "PIECE_NBYTES",
    "Arena",
    "ChunkBuffers",
    "ChunkVerifier",
    "DiskReader",
    "Faults",
    "IdleClock",
    "ReadMode",
    "Slab",
    "SpillFile",
    "VerifyPolicy",
    "all_of",
    "probe_mode",
]
