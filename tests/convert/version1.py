"""Stores of format version 1, which nothing writes any more: made from stores of today, byte for byte as it was."""

import json
from pathlib import Path
from typing import Any, Final

import torch
import zstandard

from tests.store.make import load_unit
from tiered.arch import build_skeleton, load_config
from tiered.convert.source import tensor_bytes
from tiered.quant import QuantizedWeight
from tiered.store import ALIGNMENT, CHUNK_NBYTES, PAGE, Manifest, Store, TensorEntry, hash_chunk
from tiered.store.block import BlockLayout
from tiered.store.format import DTYPE_NAMES, header_bytes, header_room_nbytes, read_header
from tiered.store.manifest import MANIFEST_NAME
from tiered.units import round_up

FRAME_NBYTES: Final = 2 << 20
"""Of zstd, before compression."""


def make_old(folder: Path) -> Path:
    """Turn the store at `folder` into one of version 1; returns `folder`."""
    store = Store.open(folder)
    order = [p.name for block in build_skeleton(load_config(folder)).blocks() for p in block.parameters]
    value = json.loads(store.manifest.to_json())
    value["version"] = 1
    value["quantization"]["compress"] = value["quantization"]["compress"].replace("planes", "zstd")
    for file in value["files"]:
        write_old_block(folder, store.layouts[file["path"]], order)
        content = (folder / file["path"]).read_bytes()
        starts = range(0, len(content), CHUNK_NBYTES)
        file["nbytes"] = len(content)
        file["xxh3_64"] = [hash_chunk(content[start : start + CHUNK_NBYTES]) for start in starts]
        del file["units"]
    (folder / MANIFEST_NAME).write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    return folder


def old_manifest(folder: Path) -> Manifest:
    return Manifest.from_json((folder / MANIFEST_NAME).read_bytes(), folder / MANIFEST_NAME, 1)


def write_old_block(folder: Path, layout: BlockLayout, order: list[str]) -> None:
    """Tensors in the order of the graph, each followed by a pad to 64, and the file padded to 4096."""
    path = folder / layout.file.path
    content, (_, metadata, _) = path.read_bytes(), read_header(path)
    memory = {
        entry.name: loaded
        for unit in layout.units
        for loaded in [load_unit(path.parents[1], unit)]
        for weight in unit.weights.values()
        for entry in weight.parts.values()
    }
    compressed = {item.target.name for item in layout.compressed}
    zstd: dict[str, Any] = {}
    start = header_room_nbytes(layout.weights, len(content) // FRAME_NBYTES)
    entries: list[TensorEntry] = []
    data = bytearray()

    def append(name: str, dtype: torch.dtype, shape: tuple[int, ...], piece: bytes | memoryview) -> None:
        entries.append(TensorEntry(name, dtype, shape, start + len(data), len(piece)))
        data.extend(piece)
        pad(ALIGNMENT)

    def pad(multiple: int) -> None:
        gap = round_up(start + len(data), multiple) - start - len(data)
        if gap:
            entries.append(TensorEntry(f"__pad{len(entries)}", torch.uint8, (gap,), start + len(data), gap))
            data.extend(bytes(gap))

    for weight in sorted(layout.weights.values(), key=lambda weight: order.index(weight.name)):
        if weight.rows is not None:
            # A record for each row, which has its scales inside, was three tensors.
            (entry,) = weight.parts.values()
            records = memory[entry.name][entry.offset : entry.offset + entry.nbytes].view(entry.shape)
            rows_of = weight.rows.view(records)
            assert isinstance(rows_of, QuantizedWeight)
            for part, tensor in rows_of.codes._asdict().items():
                append(f"{weight.name}.{part}", tensor.dtype, tuple(tensor.shape), tensor_bytes(tensor.contiguous()))
            continue
        for part in ("", "q", "scale", "zero"):
            found = [entry for name, entry in weight.parts.items() if name.partition("#")[0] == part]
            if not found:
                continue
            first, is_whole = found[0], len(found) == 1 and "#" not in found[0].name
            # What is in ranges now was one tensor; of a stack's matrices the rows, if they are quantized.
            rows = (sum(entry.shape[0] for entry in found), *first.shape[1:])
            shape = first.shape if is_whole else rows if part else weight.shape
            name = f"{weight.name}.{part}" if part else weight.name
            pieces = [memory[entry.name][entry.offset : entry.offset + entry.nbytes] for entry in found]
            plain = b"".join(piece.numpy().tobytes() for piece in pieces)
            if any(entry.name in compressed for entry in found):
                cut = [plain[begin : begin + FRAME_NBYTES] for begin in range(0, len(plain), FRAME_NBYTES)]
                frames = [zstandard.ZstdCompressor(level=1, write_checksum=True).compress(piece) for piece in cut]
                sizes = list(map(len, frames))
                zstd[name] = {"dtype": DTYPE_NAMES[first.dtype], "shape": list(shape)}
                zstd[name] |= {"frames": sizes, "frame_nbytes": FRAME_NBYTES}
                append(f"{name}.zst", torch.uint8, (sum(sizes),), b"".join(frames))
            else:
                append(name, first.dtype, shape, plain)
    pad(PAGE)
    described = json.loads(metadata["tiered"])
    del described["version"], described["planes"]
    described["zstd"] = zstd
    for name, value in list(described["weights"].items()):
        value.pop("ranges", None)
        value.pop("rows", None)
        if value["scheme"] is None:
            del described["weights"][name]
    text = json.dumps(described, separators=(",", ":"), sort_keys=True)
    path.write_bytes(header_bytes(entries, {"format": "pt", "tiered": text}, start) + data)
