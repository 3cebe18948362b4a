"""Small stores of given shape, written block by block: for tests that need no model."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from tiered.convert.compression import in_pieces
from tiered.kernels import decode_planes, encode_planes
from tiered.quant import GroupScheme, QuantizedTensor, quantize
from tiered.store import CHUNK_NBYTES, BlockInfo, BlockWriter, FileInfo, Manifest, Store, Unit, atomic_write
from tiered.store.manifest import MANIFEST_NAME


def bytes_of(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy()).cast("B")  # type: ignore[arg-type]


def random_bytes(nbytes: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def random_quantized(rows: int, columns: int, scheme: GroupScheme, seed: int = 0) -> QuantizedTensor:
    return quantize(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)), scheme)


def load_unit(root: Path, unit: Unit) -> torch.Tensor:
    """The unit's memory, as a reader and a decoder leave it. `root` is the folder of its store."""
    memory = torch.zeros(unit.memory_nbytes, dtype=torch.uint8)
    content = (root / unit.file.path).read_bytes()[unit.offset : unit.offset + unit.nbytes]
    if not unit.compressed:
        memory[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    for number, moves in enumerate(unit.moves if unit.compressed else ()):
        for move in moves:
            start = number * CHUNK_NBYTES + move.source
            out = bytes_of(memory[move.target : move.target + move.nbytes])
            if move.frames:
                frames = memoryview(content)[start : start + sum(move.frames)]
                decode_planes(frames, move.frames, move.frame_nbytes, out, move.tensor.dtype, move.tensor.name)
            else:
                out[:] = content[start : start + move.nbytes]
    return memory


def write_block(
    root: Path,
    path: str,
    plain: Mapping[str, torch.Tensor],
    quantized: Mapping[str, tuple[GroupScheme, QuantizedTensor]] | None = None,
    compressed: Mapping[str, torch.Tensor] | None = None,
    frame_nbytes: int = 4096,
    starts: Sequence[str] = (),
) -> FileInfo:
    """One block file of these tensors: one unit, and a new one at each of the weights `starts`."""
    quantized, compressed = quantized or {}, compressed or {}
    frames = sum(-(-tensor.nbytes // frame_nbytes) for tensor in compressed.values())
    with BlockWriter(root / path, root, [*plain, *quantized, *compressed], frames) as writer:
        writer.start_unit("all")

        def begin(name: str) -> None:
            if name in starts:
                writer.start_unit(name)

        for name, tensor in plain.items():
            begin(name)
            writer.add(name, tensor.dtype, tensor.shape, [bytes_of(tensor)])
        for name, (scheme, codes) in quantized.items():
            begin(name)
            for part, tensor in zip(("q", "scale", "zero"), codes, strict=True):
                writer.add(f"{name}.{part}", tensor.dtype, tensor.shape, [bytes_of(tensor)])
            rows, groups = codes.scale.shape
            writer.add_weight(name, (rows, groups * scheme.group_size), scheme)
        for name, tensor in compressed.items():
            begin(name)
            pieces = in_pieces(iter([bytes_of(tensor)]), frame_nbytes)
            coded = (encode_planes(piece, tensor.dtype) for piece in pieces)
            writer.add_planes(name, tensor.dtype, tensor.shape, coded, frame_nbytes)
        return writer.finish()


def write_store(
    root: Path, sizes: Sequence[int], embed: FileInfo | None = None, compressed: frozenset[int] = frozenset()
) -> Store:
    """A store whose tape is one block of about `sizes[i]` random bytes each, the last one its head."""
    root.mkdir(exist_ok=True)
    embed = embed or write_block(root, "blocks/embed.safetensors", {"embed.weight": random_bytes(64, 99).view(8, 8)})
    names = [f"layer-{i:03d}" for i in range(len(sizes) - 1)] + ["head"]
    blocks = [BlockInfo("embed", "embed", embed, "embed.")]
    for position, (name, nbytes) in enumerate(zip(names, sizes, strict=True)):
        path, prefix = f"blocks/{name}.safetensors", f"{name}."
        tensor = random_bytes(nbytes, position)
        if position in compressed:
            values = torch.randn(nbytes // 2, generator=torch.Generator().manual_seed(position)).to(torch.bfloat16)
            file = write_block(root, path, {}, compressed={f"{name}.weight": values})
        else:
            file = write_block(root, path, {f"{name}.weight": tensor})
        blocks.append(BlockInfo(name, "head" if name == "head" else "layer", file, prefix))
    return write_manifest(root, blocks)


EXPERT = {"gate_up_proj": (64, 128), "down_proj": (128, 64)}
"""The matrices of an expert of `write_mixture`."""


def write_mixture(root: Path, layers: int, experts: int) -> Store:
    """A store of so many layers, each with so many random experts in int8 and nothing else."""
    root.mkdir()
    embed = write_block(root, "blocks/embed.safetensors", {"embed.weight": random_bytes(64, 99).view(8, 8)})
    head = write_block(root, "blocks/head.safetensors", {"head.weight": random_bytes(4096, 98)})
    blocks = [BlockInfo("embed", "embed", embed, "embed.")]
    for number in range(layers):
        file = _write_experts(root, f"blocks/layer-{number:03d}.safetensors", f"layers.{number}.", experts, number)
        blocks.append(BlockInfo(f"layer-{number:03d}", "layer", file, f"layers.{number}."))
    return write_manifest(root, [*blocks, BlockInfo("head", "head", head, "head.")])


def _write_experts(root: Path, path: str, prefix: str, experts: int, seed: int) -> FileInfo:
    scheme, stack = GroupScheme(8), f"{prefix}mlp.experts."
    with BlockWriter(root / path, root, [f"{stack}{name}#{k}" for k in range(experts) for name in EXPERT]) as writer:
        for expert in range(experts):
            writer.start_unit(f"mlp.experts#{expert}", "expert")
            for name, shape in EXPERT.items():
                codes = random_quantized(*shape, scheme, seed=1000 * seed + expert)
                for part, tensor in zip(("q", "scale", "zero"), codes, strict=True):
                    writer.add(f"{stack}{name}#{expert}.{part}", tensor.dtype, tensor.shape, [bytes_of(tensor)])
        for name, shape in EXPERT.items():
            writer.add_weight(stack + name, (experts, *shape), scheme, experts)
        return writer.finish()


def write_manifest(root: Path, blocks: Sequence[BlockInfo]) -> Store:
    """The store of these blocks, the first of which is the embedding; layers and head are the tape."""
    names = tuple(block.name for block in blocks if block.role in ("layer", "head"))
    manifest = Manifest(
        source={"kind": "test", "name": "test", "revision": None, "fingerprint": "0"},
        architecture={"model_type": "opt", "layers": len(names) - 1, "embed": "embed.weight", "head": "head.weight"},
        quantization={"layers": None, "embed": None, "head": None, "clip": None, "unquantized": []},
        files=tuple(block.file for block in blocks),
        blocks=tuple(blocks),
        tape=names,
        tied=False,
    )
    (root / "config.json").write_text("{}")
    atomic_write(root / MANIFEST_NAME, manifest.to_json())
    return Store.open(root)
