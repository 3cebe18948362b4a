"""Memory and disk: the arena that owns every large buffer, and the reader that fills it."""

from tiered.io.arena import Arena, Slab
from tiered.io.disk import PIECE_NBYTES, DiskReader, Faults, all_of
from tiered.io.modes import ReadMode, probe_mode
from tiered.io.verify import ChunkVerifier, VerifyPolicy

__all__ = [
    "PIECE_NBYTES",
    "Arena",
    "ChunkVerifier",
    "DiskReader",
    "Faults",
    "ReadMode",
    "Slab",
    "VerifyPolicy",
    "all_of",
    "probe_mode",
]
