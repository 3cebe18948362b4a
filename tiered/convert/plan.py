"""The plan of a store: its block files, and the manifest that will list them. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tiered.arch import BlockTensors, Skeleton
from tiered.convert.options import ConvertOptions
from tiered.convert.recipe import BlockRecipe, block_recipes, quantizable, unquantized
from tiered.errors import ConfigError
from tiered.store import BlockInfo, FileInfo, Manifest


@dataclass(frozen=True)
class PlannedBlock:
    """An entry of the manifest. Repeated layers and tied heads name a file that another entry names too."""

    name: str
    role: str
    path: str
    prefix: str


@dataclass(frozen=True)
class StorePlan:
    """What a store will hold, decided from shapes and options alone."""

    files: tuple[BlockRecipe, ...]
    blocks: tuple[PlannedBlock, ...]
    tied: bool
    architecture: Mapping[str, Any]
    quantization: Mapping[str, Any]
    unquantized: tuple[str, ...]
    distinct_blocks: int | None

    @property
    def weights(self) -> int:
        """Numbers that the block files stand for."""
        return sum(tensor.numel for block in self.files for tensor in block.tensors)

    def manifest(
        self, files: Mapping[str, FileInfo], source: Mapping[str, Any], compress: str, *, synthetic: bool
    ) -> Manifest:
        """The manifest once every file of the plan has been written."""
        return Manifest(
            source=source,
            architecture=self.architecture,
            quantization={**self.quantization, "compress": compress},
            files=tuple(files[block.path] for block in self.files),
            blocks=tuple(BlockInfo(b.name, b.role, files[b.path], b.prefix) for b in self.blocks),
            tape=tuple(block.name for block in self.blocks if block.role in ("layer", "head")),
            tied=self.tied,
            synthetic=synthetic,
            distinct_blocks=self.distinct_blocks,
        )


def plan_store(skeleton: Skeleton, options: ConvertOptions) -> StorePlan:
    """Plan the store of `skeleton`'s model; raises ConfigError where its layers cannot be repeated as asked."""
    blocks = list(skeleton.blocks())
    layers = [block for block in blocks if block.role == "layer"]
    distinct = options.distinct_blocks
    if distinct is not None:
        _check_repeatable(layers, distinct)
        blocks = [block for block in blocks if block.role != "layer" or block in layers[:distinct]]
    files = block_recipes(blocks, options)
    wanted = [name for block in blocks for name in quantizable(block)]
    plain = () if options.quant == "none" else unquantized(files, wanted)
    layer_scheme, embed_scheme = options.layer_scheme, options.embed_scheme
    quantization = {
        "layers": None if layer_scheme is None else layer_scheme.name,
        "embed": None if embed_scheme is None else embed_scheme.name,
        "head": None if embed_scheme is None else embed_scheme.name,
        "clip": options.clip if layer_scheme is not None and layer_scheme.bits == 4 else None,
        "unquantized": list(plain),
    }
    architecture = {
        "model_type": skeleton.config.model_type,
        "layers": len(layers),
        "embed": skeleton.embed_name,
        "head": skeleton.head_name,
    }
    return StorePlan(
        files,
        _planned_blocks(files, layers, skeleton.tied),
        skeleton.tied,
        architecture,
        quantization,
        plain,
        distinct if distinct is not None and distinct < len(layers) else None,
    )


def _planned_blocks(files: tuple[BlockRecipe, ...], layers: list[BlockTensors], tied: bool) -> tuple[PlannedBlock, ...]:
    """embed, outer, every layer in order, head."""
    by_role: dict[str, list[BlockRecipe]] = {}
    for file in files:
        by_role.setdefault(file.role, []).append(file)
    (embed,) = by_role["embed"]
    stored = by_role["layer"]
    planned = [PlannedBlock(b.name, b.role, b.path, b.prefix) for b in (embed, *by_role.get("outer", []))]
    for index, layer in enumerate(layers):
        file = stored[index % len(stored)]
        planned.append(PlannedBlock(layer.name, "layer", file.path, file.prefix))
    head = embed if tied else by_role["head"][0]
    return (*planned, PlannedBlock("head", "head", head.path, head.prefix))


def _check_repeatable(layers: list[BlockTensors], distinct: int) -> None:
    shapes = [[(p.name.removeprefix(b.prefix), p.shape) for p in b.parameters] for b in layers]
    for index, layer in enumerate(layers):
        if shapes[index] != shapes[index % distinct]:
            raise ConfigError(
                f"--distinct-blocks {distinct}: {layer.name} has other tensors than {layers[index % distinct].name}, "
                "which it would repeat; choose another number"
            )
