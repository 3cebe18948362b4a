"""What a conversion is asked to do, and the recipe that follows: which tensors each block file holds, in which form.

In: `ConvertOptions` and the skeleton of the model. Out: a `StoreRecipe` with one `BlockRecipe` for each block file,
and the manifest that will list them. Decided before any weight is read.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

from tiered.arch import BlockTensors, ParameterInfo, Skeleton, order_of_use
from tiered.convert.blocks import BlockRecipe, TensorRecipe
from tiered.convert.source import StoredTensor
from tiered.errors import ConfigError
from tiered.quant import CODEBOOKS, CodebookScheme, GroupScheme, Scheme, folded
from tiered.store import BlockInfo, FileInfo, Manifest
from tiered.store.file import Kind
from tiered.units import MIB

_QUANTS: Final = ("keep", "int4", "int8", "none")
"""Besides the name of a codebook's scheme, as it is."""
_COMPRESSIONS: Final = ("auto", "planes", "none")
_BY_ROW: Final = ("embed", "table")
"""Roles of blocks whose rows are read one by one."""
_FEW: Final = 0.05
"""Share of the layers' weights that may keep the source's precision without a word."""


@dataclass(frozen=True)
class ConvertOptions:
    """Everything `tiered convert` can be told, besides what to convert and where to."""

    quant: str | None = None
    """keep, int4, int8, none or a codebook's scheme (mxfp4-g32), see `scheme_of`; None keeps what is quantized already,
    and is int4 where nothing is."""
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
        if self.quant is not None and self.quant not in _QUANTS and self.codebook_scheme is None:
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
        if self.synthetic and self.quant == "keep":
            raise ConfigError("--quant keep takes a checkpoint's quantized weights; --synthetic reads none")
        if self.distinct_blocks is not None and self.distinct_blocks < 1:
            raise ConfigError(f"--distinct-blocks {self.distinct_blocks}: expected at least 1")

    @property
    def codebook_scheme(self) -> CodebookScheme | None:
        """The scheme that `quant` names with its group size, such as mxfp4-g32; None for any other."""
        if self.quant is None or self.quant.partition("-")[0] not in CODEBOOKS:
            return None
        scheme = Scheme.parse(self.quant)
        assert isinstance(scheme, CodebookScheme)
        return scheme

    def of_source(self, is_quantized: bool) -> "ConvertOptions":
        """These options for a source whose weights are quantized already, or are not: `quant` is no longer None.

        Raises ConfigError where there is nothing to keep.
        """
        if self.quant == "keep" and not is_quantized:
            raise ConfigError(
                "--quant keep: no weights of this checkpoint are quantized; pass --quant int4, int8, or none to keep "
                "its precision"
            )
        return self if self.quant is not None else replace(self, quant="keep" if is_quantized else "int4")

    def scheme_of(self, role: str, stored: StoredTensor | None = None) -> Scheme | None:
        """The scheme of a linear weight in a block of this `role`, which the source holds as `stored`; None where it
        is not quantized in the store.

        "int4", "int8" and codebooks are for layers; embedding, tables beside it and head have 8 bits even then, as
        every token passes all of them. What is quantized already in no more bits is taken as it is: to quantize it anew
        adds an error and saves nothing.
        "keep" takes all that is quantized as it is, what no scheme holds in 8 bits, and leaves the rest in the source's
        precision.
        """
        own = None if stored is None else stored.scheme
        if self.quant == "none" or (self.quant == "keep" and (stored is None or stored.method is None)):
            return None
        bits = 8 if self.quant in ("int8", "keep") or role != "layer" else 4
        keeps = own is not None and (self.quant == "keep" or own.bits <= bits)
        codebook = self.codebook_scheme if role == "layer" else None
        return own if keeps else codebook or GroupScheme(bits, self.group_size)

    def settings(self) -> dict[str, Any]:
        """The options that decide what the store's bytes are: a resumed conversion must repeat them."""
        return {
            "quant": self.quant or "int4",
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
    plain: tuple[str, ...]
    """Those that "keep" leaves as they are because the source has not quantized them either, where they are more."""
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


def make_recipe(
    skeleton: Skeleton, options: ConvertOptions, stored: Mapping[str, StoredTensor] | None = None
) -> StoreRecipe:
    """The recipe of a store of `skeleton`'s model; raises ConfigError where its layers cannot be repeated as asked.

    `stored`: those of the model's tensors, by their names in it, that the source holds quantized.
    """
    stored = stored or {}
    blocks = list(skeleton.blocks())
    layers = [block for block in blocks if block.role == "layer"]
    distinct = options.distinct_blocks
    if distinct is not None:
        _check_repeatable(layers, distinct)
        blocks = [block for block in blocks if block.role != "layer" or block in layers[:distinct]]
    order = {name: number for number, name in enumerate(order_of_use(skeleton))}
    # A family may have no `outer` tensors.
    files = tuple(_recipe(block, options, order, stored, skeleton.tied) for block in blocks if block.parameters)
    unquantized = tuple(_unquantized(blocks, files, options, stored))
    kept = () if options.quant == "none" else _kept(files, {*unquantized})
    kept, plain = ((), kept) if options.quant == "keep" else (kept, ())
    roles = {
        kind: options.scheme_of(role) if options.quant != "keep" else _most_used(files, role)
        for kind, role in (("layers", "layer"), ("embed", "embed"), ("head", "embed" if skeleton.tied else "head"))
    }
    clips = options.quant != "keep" and options.scheme_of("layer") == GroupScheme(4, options.group_size)
    quantization = {
        **{kind: None if scheme is None else scheme.name for kind, scheme in roles.items()},
        "clip": options.clip if clips else None,
        "unquantized": list(unquantized),
        **({"source": sorted({each.method for each in stored.values() if each.method})} if stored else {}),
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
        plain,
        options.synthetic,
        distinct if distinct is not None and distinct < len(layers) else None,
    )


def _recipe(
    block: BlockTensors,
    options: ConvertOptions,
    order: Mapping[str, int],
    stored: Mapping[str, StoredTensor],
    tied: bool,
) -> BlockRecipe:
    """Small tensors, then large ones that are not lent, then lent ones in the `order` of their use."""
    tensors = []
    for parameter in block.parameters:
        scheme = options.scheme_of(block.role, stored.get(parameter.name))
        # Not of all parameters: one that is a number has no rows.
        fits = (
            _is_quantizable(parameter, block.role) and scheme is not None and scheme.accepts(*folded(parameter.shape))
        )
        used = scheme if fits else None
        # An embedding that is the head, too, is stored as heads are; one without scales has nothing to keep with a row.
        is_embedding = block.role == "embed" and not tied and used is not None
        kind, by_row = _kind(parameter, block.role), block.role == "table" or is_embedding
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


def _unquantized(
    blocks: Iterable[BlockTensors],
    files: Iterable[BlockRecipe],
    options: ConvertOptions,
    stored: Mapping[str, StoredTensor],
) -> Iterator[str]:
    """Names of weights that a scheme is meant for, but whose shape does not fit: they keep the source's precision."""
    plain = {tensor.name for file in files for tensor in file.tensors if tensor.scheme is None}
    for block in blocks:
        for parameter in block.parameters:
            name, is_meant = parameter.name, _is_quantizable(parameter, block.role)
            if name in plain and is_meant and options.scheme_of(block.role, stored.get(name)) is not None:
                yield name


def _most_used(files: Iterable[BlockRecipe], role: str) -> Scheme | None:
    """The scheme of most weights in the blocks of this `role`; None where most are not quantized."""
    numels: Counter[Scheme | None] = Counter()
    for tensor in (tensor for file in files if file.role == role for tensor in file.tensors):
        numels[tensor.scheme] += tensor.numel
    return numels.most_common(1)[0][0] if numels else None


def _kept(files: Iterable[BlockRecipe], unquantized: Collection[str]) -> tuple[str, ...]:
    """Names of the matrices in layers that no scheme is used for; none where they are few (routers)."""
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
