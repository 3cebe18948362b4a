"""The KV cache in numbers: what a model's tokens add to it, and which memory a run sets aside for it.

In: the shape of a model's cache, and what a run holds at once. Out: pages, KV blocks and bytes, before any of them is
taken. `cache/` puts them to use; how codes, scales and zeros lie inside a block is `cache/layout.py`'s.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

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


@dataclass(frozen=True)
class KVShape:
    """Keys and values one token adds to one layer."""

    heads: int
    head_dim: int
    layers: int
    dtype: str
    """The name of the compute dtype, as torch spells it."""

    @property
    def itemsize(self) -> int:
        """Bytes of a number in the compute dtype."""
        return _ITEMSIZES[self.dtype]

    @property
    def token_nbytes(self) -> int:
        """Bytes of one token's keys and values in one layer, in the compute dtype."""
        return 2 * self.heads * self.head_dim * self.itemsize

    def nbytes(self, sequences: int, tokens: int) -> int:
        """Bytes of the whole cache for `sequences` sequences of `tokens` tokens."""
        return self.layers * self.token_nbytes * sequences * tokens


def check_bits(shape: KVShape, bits: int) -> None:
    """Raise ConfigError for bits other than 16, 8 and 4, and for 4 bits where head_dim is odd."""
    if bits not in (16, 8, 4):
        raise ConfigError(f"KV cache: {bits} bits, expected 16, 8 or 4")
    if bits == 4 and shape.head_dim % 2:
        raise ConfigError(f"KV cache: heads of {shape.head_dim} channels cannot be packed in 4 bits; use 8 or 16")


def block_nbytes(shape: KVShape, bits: int, slots: int = PAGE_TOKENS) -> int:
    """Bytes of one page's keys and values in one layer; a page of 16 bits has `slots` tokens.

    Raises ConfigError as `check_bits` does.
    """
    check_bits(shape, bits)
    if bits == 16:
        states = shape.heads * slots * shape.head_dim * shape.itemsize
        return round_up(round_up(states, PART_ALIGNMENT) + states, PAGE)
    codes = shape.heads * PAGE_TOKENS * (shape.head_dim * bits // 8)
    # Scales and zeros of keys are per channel, those of values per token and group of channels.
    per_channel, per_token = shape.head_dim, PAGE_TOKENS * (shape.head_dim // math.gcd(shape.head_dim, PAGE_TOKENS))
    stop = 0
    for count in (shape.heads * per_channel, shape.heads * per_token):
        stop = round_up(stop, PART_ALIGNMENT) + codes
        stop = round_up(stop, PART_ALIGNMENT) + 2 * count
        stop = round_up(stop, PART_ALIGNMENT) + count
    return round_up(stop, PAGE)


@dataclass(frozen=True)
class LayerGroup:
    """Layers that keep the same tokens."""

    layers: tuple[int, ...]
    window: int
    """Tokens that a query sees, itself included; 0: all before it."""


@dataclass(frozen=True)
class CachePlan:
    """How much memory and disk the cache takes, and for what; none of it is taken yet."""

    shape: KVShape
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
        if group.window:
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

    @property
    def block_nbytes(self) -> int:
        """Bytes of a page's keys and values in one layer, as they are kept."""
        return block_nbytes(self.shape, self.bits, self.slots)

    @property
    def exact_nbytes(self) -> int:
        """Bytes of a page's keys and values in one layer in a tail, or while the page is being put together."""
        return block_nbytes(self.shape, 16, self.slots)

    @property
    def slots(self) -> int:
        """Slots of a page, no more than sequences fill."""
        return min(PAGE_TOKENS, round_up(self.context, 8))

    @property
    def blocks_nbytes(self) -> int:
        """Bytes of all blocks, in memory or on disk."""
        nbytes = self.block_nbytes
        if self.shares_layers:
            return max(self.blocks(group) for group in self.groups) * nbytes
        return sum(self.blocks(group) * len(group.layers) * nbytes for group in self.groups)

    @property
    def shares_layers(self) -> bool:
        """Whether all layers use the same memory."""
        return self.one_pass and not self.on_disk

    @property
    def tails_nbytes(self) -> int:
        """Bytes of the pages being filled, in memory."""
        if not self.has_tails:
            return 0
        return self.exact_nbytes * self.sequences * (1 if self.shares_layers else self.shape.layers)

    @property
    def ring_nbytes(self) -> int:
        """Bytes for blocks on their way from disk and back: one unit computes while the next ones are read."""
        return GROUPS_AT_ONCE * self.lent_pages * self.block_nbytes if self.on_disk else 0

    @property
    def states_nbytes(self) -> int:
        """Bytes of all sequences' recurrent states, in memory or on disk."""
        if self.state is None:
            return 0
        return self.sequences * (self.state.layer_nbytes if self.shares_layers else self.state.nbytes)

    @property
    def states_memory_nbytes(self) -> int:
        """Bytes of memory for recurrent states: all of them, or those on their way from disk and back."""
        if self.state is None or not self.on_disk:
            return self.states_nbytes
        return GROUPS_AT_ONCE * self.lent_states * self.state.layer_nbytes

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

    def scratch_nbytes(self, rows: int) -> int:
        """Bytes that a micro-batch of `rows` tokens takes while it puts pages together, and while they are stored."""
        if not self.has_tails:
            return 0
        # A long part has a page more than its tokens fill.
        pages = 2 * (rows // PAGE_TOKENS + 1)
        return (pages + STACKED_PAGES) * self.exact_nbytes


def outbox_nbytes(shape: KVShape, rows: int) -> int:
    """Bytes, on the device and in the host's memory, for the new keys and values of two micro-batches of `rows` tokens
    on their way from one to the other: one is computed while the other is copied."""
    return 2 * round_up(2 * rows * shape.heads * shape.head_dim * shape.itemsize, PART_ALIGNMENT)


def layer_groups(windows: Sequence[int]) -> tuple[LayerGroup, ...]:
    """Groups of the layers with equal windows, from the window of each layer (0: none)."""
    found: dict[int, list[int]] = {}
    for layer, window in enumerate(windows):
        found.setdefault(window, []).append(layer)
    return tuple(LayerGroup(tuple(layers), window) for window, layers in sorted(found.items()))
