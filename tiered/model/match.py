"""Whether a store's blocks are those of the model that its config.json describes, checked before weights are read."""

from transformers import PretrainedConfig

from tiered.arch import Skeleton
from tiered.errors import StoreError
from tiered.store import BlockInfo, Store
from tiered.store.manifest import MANIFEST_NAME, RANGE


def check_layers(store: Store, config: PretrainedConfig) -> None:
    """Compare the number of layers before a graph of so many is built; raises StoreError."""
    found = sum(block.role == "layer" for block in store.tape)
    if config.num_hidden_layers != found:
        path = store.path / "config.json"
        raise StoreError(f"{path}: describes {config.num_hidden_layers} layers, the store has {found}; {_REMEDY}")


def check_match(store: Store, skeleton: Skeleton) -> None:
    """Compare names and shapes of every block's tensors with the graph's; `skeleton` must be as built.

    Raises StoreError, which names the first difference.
    """
    config = store.path / "config.json"
    prefixes: dict[str, str] = {}  # by file: blocks that share one have the prefix of the first
    for expected in skeleton.blocks():
        if not expected.parameters:
            continue
        block = store.blocks.get(expected.name)
        if block is None:
            raise StoreError(f"{config}: describes a block {expected.name!r} that the store lacks; {_REMEDY}")
        _check_prefix(store, block, prefixes.setdefault(block.file.path, expected.prefix))
        wanted = {p.name.removeprefix(expected.prefix): p.shape for p in expected.parameters}
        found = {
            name.removeprefix(block.prefix): tuple(weight.shape) for name, weight in store.layout(block).weights.items()
        }
        for name in sorted(wanted.keys() | found.keys()):
            if wanted.get(name) != found.get(name):
                raise StoreError(
                    f"{config}: describes {name!r} of block {expected.name} as {wanted.get(name, 'absent')}, "
                    f"{block.file.path} holds {found.get(name, 'none')}; {_REMEDY}"
                )
        for stack in (p for p in expected.parameters if len(p.shape) == 3):
            weight = store.layout(block).weights[block.prefix + stack.name.removeprefix(expected.prefix)]
            if any(RANGE in part for part in weight.parts) != stack.is_linear:
                raise StoreError(
                    f"{store.path / block.file.path}: {stack.name} is stored as another version of transformers has "
                    "it, expected as the installed one computes with experts; convert the model again"
                )
    # A tied head has no tensors of its own in the graph, but it reads those of the embedding's file by their names.
    for block in store.blocks.values():
        _check_prefix(store, block, prefixes.get(block.file.path, block.prefix))


def _check_prefix(store: Store, block: BlockInfo, expected: str) -> None:
    if block.prefix != expected:
        raise StoreError(
            f"{store.path / MANIFEST_NAME}: block {block.name} has prefix {block.prefix!r}, expected {expected!r}; "
            "the store is damaged, convert it again"
        )


_REMEDY = "config.json has been changed since the conversion: put it back, or convert the model again"
