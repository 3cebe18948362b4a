"""Reading ahead of the computation: blocks of the tape, the KV cache's pages on disk, embedding rows."""

from tiered.stream.embedding import EmbeddingRows
from tiered.stream.handover import Handover, run_in
from tiered.stream.kv import KVStream
from tiered.stream.ring import Ring
from tiered.stream.streamer import LoadedBlock, Streamer
from tiered.stream.thread import Streams, StreamThread

__all__ = [
    "EmbeddingRows",
    "Handover",
    "KVStream",
    "LoadedBlock",
    "Ring",
    "StreamThread",
    "Streamer",
    "Streams",
    "run_in",
]
