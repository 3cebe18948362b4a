"""What a conversion is asked to do, and the recipe that follows: which tensors each block file holds, in which form.

In: `ConvertOptions` and the skeleton of the model. Out: a `StoreRecipe` with one `BlockRecipe` for each block file,
and the manifest that will list them. Decided before any weight is read.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from tiered.arch import BlockTensors, ParameterInfo, Skeleton, order_of_use
from tiered.convert.blocks import BlockRecipe, TensorRecipe
from tiered.errors import ConfigError
from tiered.quant import CODEBOOKS, CodebookScheme, GroupScheme, Scheme, folded
from tiered.store import BlockInfo, FileInfo, Manifest
from tiered.store.file import Kind
from tiered.units import MIB

_QUANTS: Final = ("int4", "int8", "none")
"""Besides the name of a codebook's scheme, as it is."""
_COMPRESSIONS: Final = ("auto", "planes", "none")
_BY_ROW: Final = ("embed", "table")
"""Roles of blocks whose rows are read one by one."""
_FEW: Final = 0.05
"""Share of the layers' weights that may keep the source's precision without a word."""


@dataclass(frozen=True)
class ConvertOptions:
    """Everything `tiered convert` can be told, besides what to convert and where to."""

    quant: str = "int4"  # of the layers' linear weights: int4, int8, none, or a codebook's scheme: mxfp4-g32
    group_size: int = 64  # weights along `in` that share a scale and a zero
    clip: Literal["mse", "minmax"] = "mse"  # how int4 chooses each group's range
    compress: str = "auto"  # planes (wherever it shrinks), auto (only where the disk is slow enough) or none
    ram_bytes: int | None = None  # peak RSS of the whole process; None does not check
    force: bool = False  # replace what an earlier conversion left in the output folder
    revision: str | None = None  # of a hub repository: branch, tag or commit
    delete_downloads: bool = False  # remove each file this conversion downloaded once it is converted
    weights: Path | None = None  # where they are, if what is converted is called by the name of its shape
    md5: Path | None = None  # a list of the weight files' checksums, which are tested first
    synthetic: bool = False  # random weights of a known shape, no checkpoint
    distinct_blocks: int | None = None  # layer files of a synthetic store, repeated; None: one for each layer
    seed: int = 0  # of synthetic weights
    tokenizer: Path | None = None  # a folder or tokenizer.json to take instead of the source's tokenizer

    def __post_init__(self) -> None:
        if self.quant not in _QUANTS and self.codebook_scheme is None:
            raise ConfigError(
                f"quantization {self.quant!r}: expected one of {', '.join(_QUANTS)}, or a codebook such as mxfp4-g32"
            )
        if self.compress not in _COMPRESSIONS:
            raise ConfigError(f"compression {self.compress!r}: expected one of {', '.join(_COMPRESSIONS)}")
        GroupScheme(8, self.group_size)  # raises for a group size there is no layout for
        if self.clip not in ("mse", "minmax"):
            raise ConfigError(f"clip {self.clip!r}: expected mse or minmax")
        if not self.synthetic and self.distinct_blocks is not None:
            raise ConfigError("--distinct-blocks repeats random layers; it needs --synthetic")
        if self.synthetic and (self.delete_downloads or self.revision or self.weights or self.md5):
            raise ConfigError("--synthetic reads no checkpoint; drop --revision, --delete-downloads, --from and --md5")
        if self.distinct_blocks is not None and self.distinct_blocks < 1:
            raise ConfigError(f"--distinct-blocks {self.distinct_blocks}: expected at least 1")

    @property
    def layer_scheme(self) -> Scheme | None:
        """The scheme of the layers' linear weights; None keeps the checkpoint's precision."""
        if self.quant == "none":
            return None
        return self.codebook_scheme or GroupScheme(int(self.quant[3:]), self.group_size)

    @property
    def codebook_scheme(self) -> CodebookScheme | None:
        """The scheme that `quant` names with its group size, such as mxfp4-g32; None for integers and none."""
        if self.quant.partition("-")[0] not in CODEBOOKS:
            return None
        scheme = Scheme.parse(self.quant)
        assert isinstance(scheme, CodebookScheme)
        return scheme

    @property
    def embed_scheme(self) -> GroupScheme | None:
        """The scheme of token embedding, tables beside it and head: 8 bits even where layers have 4, as every token
        passes all of them."""
        return None if self.quant == "none" else GroupScheme(8, self.group_size)

    def settings(self) -> dict[str, Any]:
        """The options that decide what the store's bytes are: a resumed conversion must repeat them."""
        return {
            "quant": self.quant,
            "group_size": self.group_size,
            "clip": self.clip,
            # Without being asked, random weights are written at the speed of the disk.
            "compress": "none" if self.synthetic and self.compress == "auto" else self.compress,
            "distinct_blocks": self.distinct_blocks,
            "seed": self.seed if self.synthetic else None,
        }


@dataclass(frozen=True)
class BlockEntry:
    """An entry of the manifest. Repeated layers and tied heads name a file that another entry names too."""

    name: str
    role: str
    path: str
    prefix: str


@dataclass(frozen=True)
class StoreRecipe:
    """What a store will hold, decided from shapes and options alone."""

    files: tuple[BlockRecipe, ...]
    blocks: tuple[BlockEntry, ...]
    tied: bool
    architecture: Mapping[str, Any]
    quantization: Mapping[str, Any]
    unquantized: tuple[str, ...]
    kept: tuple[str, ...]
    """Matrices of layers that are not quantized because no linear layer multiplies by them, where they are more than a
    few of the layers' weights."""
    synthetic: bool
    distinct_blocks: int | None

    @property
    def weights(self) -> int:
        """How many weights the block files hold."""
        return sum(tensor.numel for block in self.files for tensor in block.tensors)

    def manifest(self, files: Mapping[str, FileInfo], source: Mapping[str, Any], compress: str) -> Manifest:
        """The manifest once every file of the recipe has been written."""
        return Manifest(
            source=source,
            architecture=self.architecture,
            quantization={**self.quantization, "compress": compress},
            files=tuple(files[block.path] for block in self.files),
            blocks=tuple(BlockInfo(b.name, b.role, files[b.path], b.prefix) for b in self.blocks),
            tape=tuple(block.name for block in self.blocks if block.role in ("layer", "head")),
            tied=self.tied,
            synthetic=self.synthetic,
            distinct_blocks=self.distinct_blocks,
        )


def make_recipe(skeleton: Skeleton, options: ConvertOptions) -> StoreRecipe:
    """The recipe of a store of `skeleton`'s model; raises ConfigError where its layers cannot be repeated as asked."""
    blocks = list(skeleton.blocks())
    layers = [block for block in blocks if block.role == "layer"]
    distinct = options.distinct_blocks
    if distinct is not None:
        _check_repeatable(layers, distinct)
        blocks = [block for block in blocks if block.role != "layer" or block in layers[:distinct]]
    order = {name: number for number, name in enumerate(order_of_use(skeleton))}
    # A family may have no `outer` tensors.
    files = tuple(_recipe(block, options, order) for block in blocks if block.parameters)
    layer_scheme, embed_scheme = options.layer_scheme, options.embed_scheme
    unquantized = () if layer_scheme is None else tuple(_unquantized(blocks, files))
    kept = () if layer_scheme is None else _kept(files, {*unquantized})
    quantization = {
        "layers": None if layer_scheme is None else layer_scheme.name,
        "embed": None if embed_scheme is None else embed_scheme.name,
        "head": None if embed_scheme is None else embed_scheme.name,
        "clip": options.clip if layer_scheme == GroupScheme(4, options.group_size) else None,
        "unquantized": list(unquantized),
    }
    architecture = {
        "model_type": skeleton.config.model_type,
        "layers": len(layers),
        "embed": skeleton.embed_name,
        "head": skeleton.head_name,
    }
    return StoreRecipe(
        files,
        _entries(files, layers, skeleton.tied),
        skeleton.tied,
        architecture,
        quantization,
        unquantized,
        kept,
        options.synthetic,
        distinct if distinct is not None and distinct < len(layers) else None,
    )


def _recipe(block: BlockTensors, options: ConvertOptions, order: Mapping[str, int]) -> BlockRecipe:
    """Small tensors, then large ones that are not lent, then lent ones in the `order` of their use."""
    scheme = options.layer_scheme if block.role == "layer" else options.embed_scheme
    tensors = []
    for parameter in block.parameters:
        # Not of all parameters: one that is a number has no rows.
        fits = (
            _is_quantizable(parameter, block.role) and scheme is not None and scheme.accepts(*folded(parameter.shape))
        )
        used = scheme if fits else None
        kind, by_row = _kind(parameter, block.role), block.role == "table"
        tensors.append(TensorRecipe(parameter.name, parameter.shape, used, kind, by_row, parameter.is_transposed))
    tensors.sort(key=lambda tensor: (tensor.kind != "small", order.get(tensor.name, -1)))
    return BlockRecipe(block.name, block.role, block.prefix, tuple(tensors))


def _kind(parameter: ParameterInfo, role: str) -> Kind:
    """The kind of the unit it goes into. Whether 1 MiB is reached is told in 16 bits, whatever the source has."""
    if parameter.is_linear and len(parameter.shape) == 3:
        return "expert"
    is_lent = parameter.is_linear or role in _BY_ROW
    return "small" if not is_lent and 2 * parameter.numel < MIB else "dense"


def _is_quantizable(parameter: ParameterInfo, role: str) -> bool:
    """Whether a scheme is meant for it: tables that are read row by row, linear weights of layers and head. `outer`
    tensors are small."""
    return role in _BY_ROW or (role in ("layer", "head") and parameter.is_linear)


def _unquantized(blocks: Iterable[BlockTensors], files: Iterable[BlockRecipe]) -> Iterator[str]:
    """Names of weights that a scheme is meant for, but whose shape does not fit: they keep the source's precision."""
    plain = {tensor.name for file in files for tensor in file.tensors if tensor.scheme is None}
    for block in blocks:
        for parameter in block.parameters:
            if parameter.name in plain and _is_quantizable(parameter, block.role):
                yield parameter.name


def _kept(files: Iterable[BlockRecipe], unquantized: Collection[str]) -> tuple[str, ...]:
    """Names of the matrices in layers that no scheme is meant for; none where they are few (routers)."""
    layers = [tensor for file in files if file.role == "layer" for tensor in file.tensors]
    kept = [t for t in layers if t.scheme is None and t.name not in unquantized and len(t.shape) > 1]
    many = sum(tensor.numel for tensor in kept) > _FEW * sum(tensor.numel for tensor in layers)
    return tuple(tensor.name for tensor in kept) if many else ()


def _entries(files: tuple[BlockRecipe, ...], layers: list[BlockTensors], tied: bool) -> tuple[BlockEntry, ...]:
    """embed, outer, tables, every layer in order, head."""
    by_role: dict[str, list[BlockRecipe]] = {}
    for file in files:
        by_role.setdefault(file.role, []).append(file)
    (embed,) = by_role["embed"]
    stored = by_role["layer"]
    before = (embed, *by_role.get("outer", []), *by_role.get("table", []))
    entries = [BlockEntry(b.name, b.role, b.path, b.prefix) for b in before]
    for index, layer in enumerate(layers):
        file = stored[index % len(stored)]
        entries.append(BlockEntry(layer.name, "layer", file.path, file.prefix))
    head = embed if tied else by_role["head"][0]
    return (*entries, BlockEntry("head", "head", head.path, head.prefix))


def _check_repeatable(layers: list[BlockTensors], distinct: int) -> None:
    shapes = [[(p.name.removeprefix(b.prefix), p.shape) for p in b.parameters] for b in layers]
    for index, layer in enumerate(layers):
        if shapes[index] != shapes[index % distinct]:
            raise ConfigError(
                f"--distinct-blocks {distinct}: {layer.name} has other tensors than {layers[index % distinct].name}, "
                "which it would repeat; choose another number"
            )
