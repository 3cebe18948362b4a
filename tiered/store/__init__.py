"""The store: a folder of quantized safetensors blocks that `tiered convert` writes and everything else reads."""

from tiered.store.file import FileInfo, UnitInfo
from tiered.store.format import (
    ALIGNMENT,
    CHUNK_NBYTES,
    TensorEntry,
    checkpoint_header,
    hash_chunk,
    read_header,
)
from tiered.store.manifest import BlockInfo, Manifest, Weight
from tiered.store.open import Store, read_manifest
from tiered.store.rows import RowLayout
from tiered.store.unit import Move, Unit
from tiered.store.write import BlockWriter, atomic_write
from tiered.units import PAGE

__all__ = [
    "ALIGNMENT",
    "CHUNK_NBYTES",
    "PAGE",
    "BlockInfo",
    "BlockWriter",
    "FileInfo",
    "Manifest",
    "Move",
    "RowLayout",
    "Store",
    "TensorEntry",
    "Unit",
    "UnitInfo",
    "Weight",
    "atomic_write",
    "checkpoint_header",
    "hash_chunk",
    "read_header",
    "read_manifest",
]
