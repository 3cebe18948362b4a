"""The KV cache in numbers: what a model's tokens add to it, and which memory a run sets aside for it.

In: the shape of a model's cache, and what a run holds at once. Out: pages, KV blocks and bytes, before any of them is
taken. `cache/` puts them to use; how codes, scales and zeros lie inside a block is `cache/layout.py`'s.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import cached_property, lru_cache
from typing import Any, Final, Literal

from tiered.errors import ConfigError
from tiered.plan.state import StateShape
from tiered.units import PAGE, PAGE_TOKENS, round_up

Bits = Literal[16, 8, 4]
AnyBits = Bits | Literal["auto"]
"""auto: the plan chooses."""
BITS_BY_NAME: Final[dict[str, Bits]] = {"16": 16, "8": 8, "4": 4}
GROUPS_AT_ONCE: Final = 4
"""Groups of micro-batches whose KV blocks are in memory together: one computes while the others are read. With several
being read, the disk's queue never runs empty, as it does at the end of a single group's reads."""
STACKED_PAGES: Final = 8
"""Complete pages that are copied side by side at a time while they are written to their blocks."""
PART_ALIGNMENT: Final = 64
"""Codes, scales and zeros begin at multiples of so many bytes in a block."""
_ITEMSIZES: Final = {"float32": 4, "bfloat16": 2, "float16": 2}


def parse_bits(text: str) -> AnyBits:
    """The bits that `text` names: "auto", or one of `BITS_BY_NAME`."""
    return "auto" if text == "auto" else BITS_BY_NAME[text]


def itemsize(dtype: str) -> int:
    """Bytes of a number in the compute dtype of this name."""
    return _ITEMSIZES[dtype]


@dataclass(frozen=True)
class KVShape:
    """Keys and values one token adds to one layer."""

    heads: int
    head_dim: int
    """Channels of a head's keys."""
    value_dim: int
    """Channels of a head's values. 0: there are none but the keys, whose first channels are values too (latents)."""
    dtype: str
    """The name of the compute dtype, as torch spells it."""

    @property
    def itemsize(self) -> int:
        """Bytes of a number in the compute dtype."""
        return itemsize(self.dtype)

    @property
    def token_nbytes(self) -> int:
        """Bytes of one token's keys and values in one layer, in the compute dtype."""
        return self.heads * (self.head_dim + self.value_dim) * self.itemsize

    @property
    def widths(self) -> tuple[int, int]:
        """Channels of what a query is multiplied with, and of what its weights are."""
        return self.head_dim, self.value_dim or self.head_dim


def check_bits(shape: KVShape, bits: int) -> None:
    """Raise ConfigError for bits other than 16, 8 and 4, and for 4 bits where a head has an odd number of channels."""
    if bits not in (16, 8, 4):
        raise ConfigError(f"KV cache: {bits} bits, expected 16, 8 or 4")
    odd = [width for width in (shape.head_dim, shape.value_dim) if width % 2]
    if bits == 4 and odd:
        raise ConfigError(f"KV cache: heads of {odd[0]} channels cannot be packed in 4 bits; use 8 or 16")


@lru_cache(maxsize=256)
def block_nbytes(shape: KVShape, bits: int, slots: int = PAGE_TOKENS) -> int:
    """Bytes of one page's keys and values in one layer; a page of 16 bits has `slots` tokens.

    Raises ConfigError as `check_bits` does.
    """
    check_bits(shape, bits)
    if bits == 16:
        keys, values = (shape.heads * slots * width * shape.itemsize for width in (shape.head_dim, shape.value_dim))
        return round_up(round_up(keys, PART_ALIGNMENT) + values, PAGE)
    # Scales and zeros of keys are per channel, those of values per token and group of channels.
    width = shape.widths[1]
    of_values = width, PAGE_TOKENS * (width // math.gcd(width, PAGE_TOKENS))
    stop = 0
    for width, per_head in ((shape.head_dim, shape.head_dim), of_values) if shape.value_dim else (of_values,):
        count = shape.heads * per_head
        stop = round_up(stop, PART_ALIGNMENT) + shape.heads * PAGE_TOKENS * (width * bits // 8)
        stop = round_up(stop, PART_ALIGNMENT) + 2 * count
        stop = round_up(stop, PART_ALIGNMENT) + count
    return round_up(stop, PAGE)


@dataclass(frozen=True)
class LayerGroup:
    """Layers that keep the same tokens, in pages of the same shape."""

    layers: tuple[int, ...]
    window: int
    """Tokens that a query sees, itself included; 0: all before it."""
    shape: KVShape
    chunked: bool = False
    """The window does not move with the query: positions are cut into chunks of so many, and a query sees what is
    before it in its own."""
    readers: tuple[int, ...] = ()
    """Later layers that keep none and read these: those of one layer, which is then the only one here."""

    def first_seen(self, position: int) -> int:
        """The position of the first token that a query at `position` sees."""
        if self.chunked:
            return position // self.window * self.window
        return max(0, position - self.window + 1) if self.window else 0

    @property
    def token_nbytes(self) -> int:
        """Bytes of one token's keys and values in all of these layers, in the compute dtype."""
        return len(self.layers) * self.shape.token_nbytes


def group_from_json(fields: Mapping[str, Any]) -> LayerGroup:
    """The group that `dataclasses.asdict` has made `fields` of."""
    lists = {name: tuple(fields.get(name, ())) for name in ("layers", "readers")}
    return LayerGroup(**{**fields, **lists, "shape": KVShape(**fields["shape"])})


@dataclass(frozen=True)
class CachePlan:
    """How much memory and disk the cache takes, and for what; none of it is taken yet."""

    layers: int
    """Decoder layers; those in no group keep no keys and values of their own."""
    bits: Bits
    on_disk: bool
    groups: tuple[LayerGroup, ...]
    sequences: int
    """Sequences at once, at most."""
    context: int
    """Tokens of the longest sequence."""
    tokens: int
    """Tokens of all sequences together, at most."""
    tokens_at_once: int
    """Tokens of one sequence in a micro-batch, at most: all are stored before the first of them attends."""
    lent_pages: int = 0
    """Where the cache is on disk: pages of one layer that one group of micro-batches has in memory, at most."""
    one_pass: bool = False
    """Every sequence begins and ends in the same pass. A layer's blocks are not needed after it has computed, so all
    layers share the memory of one, if the cache is in memory."""
    on_device: bool = False
    """All of it is in the memory of the device that computes, and none in the host's."""
    state: StateShape | None = None
    """What recurrent layers keep of a sequence, which is where the blocks are."""
    lent_states: int = 0
    """Where the cache is on disk: sequences whose states of one layer a group of micro-batches has in memory, at
    most."""

    @property
    def has_tails(self) -> bool:
        """Whether the pages being filled lie apart from the blocks."""
        return self.on_disk or self.bits != 16

    def pages(self, group: LayerGroup, tokens: int) -> int:
        """Blocks that a sequence of `tokens` tokens holds in each layer of `group`."""
        # Where there are tails, the page that is being filled has no block yet.
        pages = tokens // PAGE_TOKENS if self.has_tails else -(-tokens // PAGE_TOKENS)
        # What other layers read when all micro-batches of a pass have been stored may not be overwritten by then.
        if group.window and not group.readers:
            # The oldest page a query sees, all up to its own, and those that its micro-batch fills before it attends.
            pages = min(pages, -(-(group.window + self.tokens_at_once) // PAGE_TOKENS) + 1)
        return pages

    def blocks(self, group: LayerGroup) -> int:
        """Blocks per layer of `group`."""
        most = min(self.sequences, self.tokens)
        whole = self.pages(group, self.context)
        # Every sequence may have a single token in its last page.
        shared = (self.tokens + most * (PAGE_TOKENS - 1)) // PAGE_TOKENS
        return min(most * whole, shared)

    def block_nbytes(self, group: LayerGroup) -> int:
        """Bytes of a page's keys and values in one layer of `group`, as they are kept."""
        return block_nbytes(group.shape, self.bits, self.slots)

    def exact_nbytes(self, group: LayerGroup) -> int:
        """Bytes of the same in a tail, or while the page is being put together."""
        return block_nbytes(group.shape, 16, self.slots)

    @property
    def slots(self) -> int:
        """Slots of a page, no more than sequences fill."""
        return min(PAGE_TOKENS, round_up(self.context, 8))

    @cached_property
    def layer_nbytes(self) -> tuple[tuple[int, int, int], ...]:
        """Of each group how many layers it has, their window, and the bytes of a page's keys and values in one."""
        return tuple((len(group.layers), group.window, self.block_nbytes(group)) for group in self.groups)

    @property
    def blocks_nbytes(self) -> int:
        """Bytes of all blocks, in memory or on disk."""
        return self._of_layers({group: self.blocks(group) * self.block_nbytes(group) for group in self.groups})

    @property
    def shares_layers(self) -> bool:
        """Whether all layers use the same memory."""
        return self.one_pass and not self.on_disk and not any(group.readers for group in self.groups)

    @property
    def tails_nbytes(self) -> int:
        """Bytes of the pages being filled, in memory."""
        if not self.has_tails:
            return 0
        return self._of_layers({group: self.sequences * self.exact_nbytes(group) for group in self.groups})

    def _of_layers(self, nbytes: Mapping[LayerGroup, int]) -> int:
        """Bytes for all layers, from those for one layer of each group."""
        if self.shares_layers:
            return max(nbytes.values(), default=0)
        return sum(len(group.layers) * each for group, each in nbytes.items())

    @property
    def ring_nbytes(self) -> int:
        """Bytes for blocks on their way from disk and back: one unit computes while the next ones are read."""
        largest = max(map(self.block_nbytes, self.groups), default=0)
        return GROUPS_AT_ONCE * self.lent_pages * largest if self.on_disk else 0

    @property
    def states_nbytes(self) -> int:
        """Bytes of all sequences' recurrent states, in memory or on disk."""
        if self.state is None:
            return 0
        return self.sequences * (self.state.layer_nbytes if self.shares_layers else self.state.nbytes)

    @property
    def states_memory_nbytes(self) -> int:
        """Bytes of memory for recurrent states, of the device's if the cache is there: all of them, or those on their
        way from disk and back."""
        if self.state is None or not self.on_disk:
            return self.states_nbytes
        return GROUPS_AT_ONCE * self.lent_states * self.state.layer_nbytes

    def away_states_nbytes(self, rows: int) -> int:
        """Bytes that a device takes for recurrent states in the layer that computes, where the cache is elsewhere:
        those of the sequences that a micro-batch of `rows` tokens may have."""
        return 0 if self.state is None else min(self.sequences, rows) * self.state.layer_nbytes

    @property
    def file_nbytes(self) -> int:
        """Bytes of the file, where the cache is on disk."""
        return self.blocks_nbytes + self.states_nbytes

    @property
    def pool_nbytes(self) -> int:
        """Bytes of memory that the pool itself takes."""
        return self.tails_nbytes + (0 if self.on_disk else self.blocks_nbytes)

    @property
    def memory_nbytes(self) -> int:
        """Bytes of all memory set aside for the cache."""
        return self.pool_nbytes + self.ring_nbytes

    def scratch_nbytes(self, rows: int, tokens: int) -> int:
        """Bytes that a micro-batch of `rows` tokens takes while it puts pages together, and while they are stored; and
        that a pass of `tokens` tokens keeps of them for layers that read them later."""
        if not self.has_tails:
            return 0
        # A long part has a page more than its tokens fill.
        pages, kept = (2 * (count // PAGE_TOKENS + 1) for count in (rows, tokens))
        nbytes = (pages + STACKED_PAGES) * max(map(self.exact_nbytes, self.groups), default=0)
        return nbytes + kept * sum(self.exact_nbytes(group) for group in self.groups if group.readers)

    def beginning_nbytes(self, rows: int, tokens: int, prompt: int) -> int:
        """Bytes that a device takes in the layer that computes, where the cache is elsewhere: keys and values of
        `tokens` tokens of prompts, as they are computed and as pages hold them, while those of a micro-batch of `rows`
        are put together, with those before them in the pages that they go on with; and the pages of one sequence of
        `prompt` tokens, which come there while it attends. 0: every prompt is computed in one pass."""
        tokens += min(rows, self.sequences) * PAGE_TOKENS if prompt else 0
        nbytes = tokens * max((group.shape.token_nbytes for group in self.groups), default=0)
        block = max(map(self.block_nbytes, self.groups), default=0)
        nbytes += prompt // PAGE_TOKENS * block
        if self.bits == 16:
            return nbytes
        return nbytes + tokens // PAGE_TOKENS * block + self.scratch_nbytes(rows, 0)


def outbox_nbytes(groups: Sequence[LayerGroup], rows: int) -> int:
    """Bytes, on the device and in the host's memory, for the new keys and values of two micro-batches of `rows` tokens
    on their way from one to the other: one is computed while the other is copied."""
    return 2 * round_up(rows * max((group.shape.token_nbytes for group in groups), default=0), PART_ALIGNMENT)


def layer_groups(
    windows: Sequence[int],
    shapes: KVShape | Sequence[KVShape | None],
    chunked: Collection[int] = (),
    sources: Sequence[int] = (),
) -> tuple[LayerGroup, ...]:
    """Groups of the layers with equal windows and shapes, from the window of each layer (0: none).

    `shapes`: of all layers, or of each; None: the layer keeps no keys and values of its own, and is in no group.
    `chunked`: the layers whose windows are chunks. `sources`: for each layer, whose keys and values it reads; none: its
    own. A layer that others read is by itself.
    """
    each = [shapes] * len(windows) if isinstance(shapes, KVShape) else shapes
    found: dict[tuple[int, KVShape, bool, tuple[int, ...]], list[int]] = {}
    for layer, (window, shape) in enumerate(zip(windows, each, strict=True)):
        if shape is not None:
            readers = tuple(other for other, source in enumerate(sources) if source == layer and other != layer)
            found.setdefault((window, shape, layer in chunked, readers), []).append(layer)
    ordered = sorted(found.items(), key=lambda item: (item[0][0], astuple(item[0][1]), *item[0][2:]))
    return tuple(LayerGroup(tuple(layers), *key) for key, layers in ordered)
