"""Stores of format version 1, which nothing writes any more: made from stores of today, byte for byte as it was."""

import json
from pathlib import Path

import torch

from tiered.arch import build_skeleton, load_config
from tiered.store import ALIGNMENT, CHUNK_NBYTES, PAGE, Manifest, Store, TensorEntry, hash_chunk
from tiered.store.block import BlockLayout
from tiered.store.format import header_bytes, header_room_nbytes, read_header
from tiered.store.manifest import MANIFEST_NAME
from tiered.units import round_up


def make_old(folder: Path) -> Path:
    """Turn the store at `folder` into one of version 1; returns `folder`."""
    store = Store.open(folder)
    order = [p.name for block in build_skeleton(load_config(folder)).blocks() for p in block.parameters]
    value = json.loads(store.manifest.to_json())
    value["version"] = 1
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
    places = {e.name: unit.offset for unit in layout.units for w in unit.weights.values() for e in w.parts.values()}
    compressed = {item.target.name: item for item in layout.compressed}
    frames = sum(len(item.frames) for item in compressed.values())
    start = header_room_nbytes(layout.weights, frames)
    entries: list[TensorEntry] = []
    data = bytearray()

    def append(name: str, dtype: torch.dtype, shape: tuple[int, ...], piece: bytes) -> None:
        entries.append(TensorEntry(name, dtype, shape, start + len(data), len(piece)))
        data.extend(piece)
        pad(ALIGNMENT)

    def pad(multiple: int) -> None:
        gap = round_up(start + len(data), multiple) - start - len(data)
        if gap:
            entries.append(TensorEntry(f"__pad{len(entries)}", torch.uint8, (gap,), start + len(data), gap))
            data.extend(bytes(gap))

    for weight in sorted(layout.weights.values(), key=lambda weight: order.index(weight.name)):
        for part in ("", "q", "scale", "zero"):
            pieces = []
            for entry in (e for name, e in weight.parts.items() if name.partition("#")[0] == part):
                stored = compressed[entry.name].source if entry.name in compressed else entry
                begin = places[entry.name] + stored.offset
                pieces.append((stored, content[begin : begin + stored.nbytes]))
            if len(pieces) == 1 and "#" not in pieces[0][0].name:
                ((stored, data_of),) = pieces
                append(stored.name, stored.dtype, stored.shape, data_of)
            elif pieces:
                # What is in ranges now was one tensor; of a stack's matrices the rows, if they are quantized.
                first = pieces[0][0]
                rows = (sum(stored.shape[0] for stored, _ in pieces), *first.shape[1:])
                name = f"{weight.name}.{part}" if part else weight.name
                append(name, first.dtype, rows if part else weight.shape, b"".join(piece for _, piece in pieces))
    pad(PAGE)
    described = json.loads(metadata["tiered"])
    del described["version"]
    for name, value in list(described["weights"].items()):
        value.pop("ranges", None)
        if value["scheme"] is None:
            del described["weights"][name]
    text = json.dumps(described, separators=(",", ":"), sort_keys=True)
    path.write_bytes(header_bytes(entries, {"format": "pt", "tiered": text}, start) + data)
