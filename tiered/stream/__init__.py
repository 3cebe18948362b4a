"""Reading ahead of the computation: units of the tape, the KV cache's pages on disk, rows of tables."""

from tiered.stream.bus import register
from tiered.stream.embedding import EmbeddingRows, FetchedRows
from tiered.stream.experts import NO_EXPERTS, ExpertCache, ExpertUse
from tiered.stream.fork import Fork
from tiered.stream.handover import Handover, run_in
from tiered.stream.kv import KVStream
from tiered.stream.loan import AnyWeight, Brought, Loan
from tiered.stream.ring import Ring
from tiered.stream.streamer import Streamer
from tiered.stream.thread import Streams, StreamThread

__all__ = [
    "NO_EXPERTS",
    "AnyWeight",
    "Brought",
    "EmbeddingRows",
    "ExpertCache",
    "ExpertUse",
    "FetchedRows",
    "Fork",
    "Handover",
    "KVStream",
    "Loan",
    "Ring",
    "StreamThread",
    "Streamer",
    "Streams",
    "register",
    "run_in",
]
