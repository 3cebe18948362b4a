"""The KV cache as one micro-batch sees it, behind transformers' interface: what its tokens add, the pages they read.

    parts = consecutive tokens of some sequences, side by side
    update(keys, values, layer) -> the new states stored, and what attention needs to find all of them

What a query reads depends on positions alone: complete pages before its own as they are stored, its own page as it was
computed. So a result depends neither on micro-batches, nor on passes, nor on neighbours.

Where a device computes and the cache is in the host's memory, new states go there (`outbox.py`). Queries of tokens that
are decoded follow them; those of prompts attend where they are computed (`beginning.py`), in whichever pass they come,
so that a prompt's bits do not depend on where passes cut it.

Two kinds: `PackedKV` for families that take their attention function from transformers' registry, and `GatheredKV`
(`gathered.py`) for families with attention code of their own, which get their keys and values in one piece.
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from tiered.cache.beginning import Beginning, OwnRead, States, brought
from tiered.cache.blocks import LentBlocks, Part
from tiered.cache.outbox import Outbox
from tiered.cache.state import BundleStates, Trip
from tiered.cache.writer import BlockWriter, TailWriter, Writer
from tiered.errors import ConfigError
from tiered.kernels.attention import PAGE_TOKENS, BlockTable, Pages


class PositionLayer(CacheLayerMixin):
    """A cache layer that only knows how many tokens came before, which is all that masks and positions need."""

    is_sliding = False

    def __init__(self, length: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._length = length
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        raise AssertionError("a position layer holds no states")

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        raise AssertionError("a position layer holds no states")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._length + query_length, 0

    def get_seq_length(self) -> int:
        return self._length

    def get_max_length(self) -> int:
        return -1


class PositionCache(Cache):
    """Stands for a cache of `length` tokens while masks and positions of a micro-batch are computed.

    All micro-batches of a pass are recorded before any layer has run, when the real cache has not grown yet.
    """

    def __init__(self, length: int, layers: int) -> None:
        super().__init__(layers=[PositionLayer(length) for _ in range(layers)])


class MicroBatchKV(PositionCache):
    """What both kinds share: storing new keys and values, and finding the pages to read.

    `parts[i]` lies within part `numbers[i]` of `blocks`; `length` is the number of earlier tokens that masks are made
    for. `outbox`: the way from the device that computes to a pool in the host's memory; None where they are together.
    """

    def __init__(
        self, blocks: LentBlocks, parts: Sequence[Part], numbers: Sequence[int], length: int, outbox: Outbox | None
    ) -> None:
        super().__init__(length, blocks.pool.plan.layers)
        self.pool, self.blocks, self.outbox = blocks.pool, blocks, outbox
        self.parts, self.numbers = tuple(parts), tuple(numbers)
        self._tails = TailWriter(blocks, parts, numbers) if self.pool.plan.has_tails else None
        self._writer: Writer = self._tails or BlockWriter(blocks, parts)
        self.states: list[BundleStates] = []
        """For recurrent layers: sequences that are computed together, in the order of their tokens."""

    def _states_of(self, bundles: Sequence[Sequence[int]]) -> list[BundleStates]:
        """For each of `bundles`, which are parts with equally many tokens."""
        if self.pool.states is None:
            return []
        found, row = [], 0
        for bundle in bundles:
            parts, numbers = [self.parts[i] for i in bundle], [self.numbers[i] for i in bundle]
            find = functools.partial(self.blocks.state_rows, numbers=numbers)
            fresh = [index for index, part in enumerate(parts) if part.start == 0]
            trip = self._trip(parts[0], numbers[0], range(row, row + len(parts)))
            found.append(BundleStates(find, len(parts), parts[0].count, fresh, trip))
            row += len(parts)
        return found

    def _trip(self, part: Part, number: int, rows: range) -> Trip | None:
        """How the states of a bundle, whose first part is part `number` of the blocks or within it, come to the device
        that computes. A part that several micro-batches share has these for itself, and the same row in each."""
        if self.outbox is None:
            return None
        assert self.pool.away is not None, "the device has no memory for states that are elsewhere"
        whole = self.blocks.parts[number]
        return Trip(self.pool.away, rows, part.start > whole.start, part.stop < whole.stop)

    def check(self, layer: int) -> None:
        """Called when `layer` has computed. Raises ConfigError if it did not read its keys from the cache."""

    def store(self, layer: int, keys: torch.Tensor, values: torch.Tensor, is_read: bool) -> None:
        """Store states [heads, tokens, head_dim] of all parts: now if the cache `is_read` next, else in time."""
        if self.outbox is None:
            self._writer.store(layer, keys, values)
            return
        dtype = self.pool.layouts[self.pool.group(layer)].dtype
        self.outbox.send(keys, values, dtype, functools.partial(self._writer.store, layer))
        if is_read:
            self.outbox.flush()

    def call(self, group: int, bundle: Sequence[int], queries: Sequence[Part]) -> "PagedCall":
        """The call of attention for `queries`, equally many tokens of each of the parts `bundle`."""
        blocks = self.blocks.maps[group]
        counts = [(part.stop - 1) // PAGE_TOKENS + 1 for part in queries]
        pages = max(counts)
        rows = zip(bundle, counts, strict=True)
        offsets = [blocks.offsets(self.numbers[number], count) + [-1] * (pages - count) for number, count in rows]
        return PagedCall(
            first=torch.tensor([blocks.kept.first_seen(part.start) for part in queries]),
            count=torch.tensor([part.stop for part in queries]),
            tokens=queries[0].count,
            offsets=torch.tensor(offsets),
            recent=None if self._tails is None else self._recent(group, self._tails, bundle, pages),
            reads_fresh=self._is_fresh(bundle[0]),
        )

    def _is_fresh(self, number: int) -> bool:
        """Whether queries of part `number` read their own pages in fresh memory."""
        return self._tails is not None and self._tails.is_fresh(self.parts[number], self.numbers[number])

    def _recent(self, group: int, tails: TailWriter, bundle: Sequence[int], pages: int) -> torch.Tensor:
        """[parts, pages]: offsets of the pages that queries of parts `bundle` read as they were computed; else -1."""
        nbytes = self.pool.exact[group].block_nbytes
        offsets = torch.full((len(bundle), pages), -1)
        for row, number in enumerate(bundle):
            part = self.parts[number]
            if self._is_fresh(number):
                fresh = tails.fresh_pages(part)[: pages - part.first_page]
                offsets[row, part.first_page :] = torch.tensor(fresh) * nbytes
            else:
                offsets[row, part.first_page] = part.kv.tail * nbytes
        return offsets

    def pages(self, call: "PagedCall", layer: int) -> tuple[Pages, Pages]:
        """The keys and values that `call` reads in `layer`."""
        group, table, recent = self.pool.group(layer), BlockTable(self.blocks.memory(layer), call.offsets), None
        if self._tails is not None and call.recent is not None:
            memory = self._tails.fresh(group) if call.reads_fresh else self.pool.tails(layer)
            recent = self.pool.exact[group].pages(BlockTable(memory, call.recent))
        return self.pool.layouts[group].pages(table, recent)


@dataclass(frozen=True, eq=False)
class PagedCall:
    """One call of attention: sequences with equally many tokens, and where their pages are in each layer of a group.

    `first` and `count` are those of `PagedRead`. All tensors are in the host's memory, wherever the pages are.
    """

    first: torch.Tensor
    count: torch.Tensor
    tokens: int
    """Tokens of each sequence in the micro-batch."""
    offsets: torch.Tensor
    """[sequences, pages] int64: offsets of the pages' blocks; -1: there is none."""
    recent: torch.Tensor | None
    """[sequences, pages] int64: offsets of the pages that are read as they were computed; -1: there is none. None where
    blocks hold all pages as they were computed."""
    reads_fresh: bool
    """Whether the pages of `recent` are in fresh memory (`TailWriter.fresh`); else they are in the tails."""


@dataclass(frozen=True, eq=False)
class PagedRead:
    """What one call of the attention kernel takes from the cache."""

    start: int
    stop: int
    """Its queries are tokens `start` to `stop` - 1 of the micro-batch."""
    first: torch.Tensor
    """[sequences] int64. A sequence's keys are its slots first to count - 1."""
    count: torch.Tensor
    """[sequences] int64."""
    window: int
    keys: Pages
    values: Pages
    away: torch.dtype | None = None
    """The cache's dtype, if the pages are in the host's memory and the queries in a device's."""
    past: BlockTable | None = None
    """The pages of earlier passes, if these are in the host's memory, and all else in a device's."""
    block_nbytes: int = 0
    """Bytes of each of their blocks."""

    def pages(self) -> tuple[Pages, Pages]:
        """Keys and values, all where the queries are, or `away`. Pages of the past are copied there: memory for them is
        taken as long as the result lives."""
        if self.past is None:
            return self.keys, self.values
        table = brought(self.keys.table, self.past, self.block_nbytes)
        return replace(self.keys, table=table), replace(self.values, table=table)


class PagedKeys(torch.Tensor):
    """The new keys of a micro-batch, as a family's code hands them from the cache to its attention function.

    They only carry `kv` and `layer`, by which the attention function finds all keys and values in the pages. Any
    operation on them gives a plain tensor, and attention would then see the new keys only: `PackedKV.check` detects it.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    kv: "PackedKV"
    layer: int

    @classmethod
    def of(cls, keys: torch.Tensor, kv: "PackedKV", layer: int) -> Self:
        made = keys.as_subclass(cls)
        made.kv, made.layer = kv, layer
        return made


class PackedKV(MicroBatchKV):
    """Parts side by side in one row [1, tokens], without padding. Those of one token come first."""

    def __init__(
        self, blocks: LentBlocks, parts: Sequence[Part], numbers: Sequence[int], outbox: Outbox | None = None
    ) -> None:
        super().__init__(blocks, parts, numbers, 0, outbox)
        bundles, groups = self._bundles(), range(len(blocks.maps))
        self.states = self._states_of(bundles)
        cut = [[(bundle, piece) for bundle in bundles for piece in self._pieces(group, bundle)] for group in groups]
        self._grouped = [[self.call(group, *each) for each in cut[group]] for group in groups]
        """For each group of layers, the attention calls."""
        self._own: list[list[OwnRead | None]] = [[None] * len(each) for each in cut]
        """The same, what each call reads where it is computed; None: it reads the cache."""
        if outbox is not None:
            self._own = [[self._beginning(group, *each) for each in cut[group]] for group in groups]
        self._states: dict[int, tuple[States, dict[int, States]]] = {}
        """New states of layers whose queries still read them where they were computed, if that is not at the pool; and
        by number of the part those before it in its page."""
        self._stored: int | None = None
        self.is_recorded = False
        """Masks and positions have been made: whoever asks for a length now is a layer."""

    def get_seq_length(self, layer_idx: int | None = None) -> Any:
        """0 while masks are made, which know of no past; for a layer, what added to the number of each token in the
        row is its position: a tensor [tokens]."""
        if layer_idx is None or not self.is_recorded:
            return 0
        positions = itertools.chain.from_iterable(range(part.start, part.stop) for part in self.parts)
        offsets = torch.tensor([position - token for token, position in enumerate(positions)])
        return offsets.to(self.pool.where if self.outbox is None else self.outbox.where)

    def _bundles(self) -> list[list[int]]:
        """Numbers of parts that share a call: parts of one token, and every other part by itself; neighbours."""
        singles = list(itertools.takewhile(lambda number: self.parts[number].count == 1, range(len(self.parts))))
        runs = [(alone, list(numbers)) for alone, numbers in itertools.groupby(singles, self._is_alone)]
        alike = [each for alone, run in runs for each in ([[number] for number in run] if alone else [run])]
        return alike + [[number] for number in range(len(singles), len(self.parts))]

    def _pieces(self, group: int, bundle: Sequence[int]) -> list[list[Part]]:
        """The tokens of a call's parts, cut where a chunk of the group ends: queries of a call see one chunk."""
        parts, kept = [self.parts[number] for number in bundle], self.blocks.maps[group].kept
        if not kept.chunked or len(parts) > 1:
            return [parts]
        (part,) = parts
        cuts = range(kept.first_seen(part.start) + kept.window, part.stop, kept.window)
        bounds = itertools.pairwise((part.start, *cuts, part.stop))
        return [[Part(part.kv, start, stop - start)] for start, stop in bounds]

    def _is_alone(self, number: int) -> bool:
        """Whether part `number`, of one token, has a call of its own."""
        return self._is_fresh(number) or self._attends_here(number)

    def _attends_here(self, number: int) -> bool:
        """Whether queries of part `number` attend where they are computed, though the pool is elsewhere: those of
        prompts, whatever a pass, or a micro-batch, has of them."""
        whole = self.blocks.parts[self.numbers[number]]
        return self.outbox is not None and (whole.is_prompt or whole.count > 1 or not whole.start)

    def _beginning(self, group: int, bundle: Sequence[int], queries: Sequence[Part]) -> OwnRead | None:
        """What a call for `queries` of the parts `bundle` reads where it is computed."""
        if not self._attends_here(bundle[0]):
            return None
        (number,), (query,), layout = bundle, queries, self.pool.layouts[group]
        whole, place = self.blocks.parts[self.numbers[number]], (group, self.numbers[number])
        # Shared by the micro-batches that its tokens are in.
        made = self.blocks.beginnings.setdefault(place, Beginning(layout, whole.start, whole.count))
        first = self.blocks.maps[group].kept.first_seen(query.start) // PAGE_TOKENS
        offsets = self.blocks.maps[group].offsets(self.numbers[number], whole.first_page)
        offsets[: min(first, whole.first_page)] = [-1] * min(first, whole.first_page)
        past = torch.tensor([offsets]) if max(offsets, default=-1) >= 0 else None
        return OwnRead(made, query.start, number, past)

    def _before(self, layer: int) -> dict[int, States]:
        """By number of the part that attends where it is computed, and goes on inside a page: the states before it in
        that page [1, heads, tokens, width], fetched from the pool, which must not have stored the part yet."""
        found: dict[int, States] = {}
        group = self.pool.group(layer)
        for own in self._own[group]:
            if own is None:
                continue
            part, whole = self.parts[own.number], self.blocks.parts[self.numbers[own.number]]
            count = part.start % PAGE_TOKENS
            if part.start > whole.start or own.start > part.start or not count:
                continue
            if self._tails is None:
                kept = self.pool.layouts[group].dense(self.blocks.memory(layer))
                row = whole.kv.block(group, whole.first_page)
            else:
                kept, row = self.pool.exact[group].dense(self.pool.tails(layer)), whole.kv.tail
            assert self.outbox is not None
            keys, values = (x[row, None, :, :count].to(self.outbox.where, copy=True) for x in kept)
            found[own.number] = keys, values
        return found

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store states [1, heads, tokens, width]; returns `PagedKeys`, by which attention finds the pages.

        Raises ConfigError where they are not as wide as the cache was planned for.
        """
        group = self.pool.group(layer_idx)
        shape, keys, values = self.pool.layouts[group].shape, key_states, value_states
        if not shape.value_dim:
            # What has positions follows what has none, in one page.
            keys = torch.cat([key_states, value_states], dim=-1)
            values = keys[..., :0]
        found, expected = (
            (keys.shape[1], keys.shape[3], values.shape[3]),
            (shape.heads, shape.head_dim, shape.value_dim),
        )
        if found != expected:
            raise ConfigError(
                f"layer {layer_idx}: heads and widths of keys and values are {found}, the cache was planned for "
                f"{expected}; this family needs another version of transformers"
            )
        if self.outbox is not None:
            self._states[layer_idx] = (keys, values), self._before(layer_idx)
        self.store(layer_idx, keys[0], values[0], is_read=None in self._own[group])
        self._stored = layer_idx
        return PagedKeys.of(key_states, self, layer_idx), value_states

    def reads(self, layer: int) -> list[PagedRead]:
        """What attention to the keys of `layer` reads; `update` must have stored the layer's new states before. Layers
        that have none of their own ask again."""
        group = self.pool.group(layer)
        is_read_again = bool(self.pool.plan.groups[group].readers)
        is_right = self._stored == layer or (self._stored is None and is_read_again)
        assert is_right, f"layer {layer} attends, layer {self._stored} has stored"
        self._stored, states = None, self._states.get(layer)
        if not is_read_again:
            self._states.pop(layer, None)
        layout = self.pool.layouts[group]
        window, away = self.blocks.maps[group].kept.window, None if self.outbox is None else layout.dtype
        found, token = [], 0
        for call, own in zip(self._grouped[group], self._own[group], strict=True):
            sequences = len(call.count)
            stop = token + call.tokens * sequences
            if own is None:
                keys, values = self.pages(call, layer)
                found.append(PagedRead(token, stop, call.first, call.count, window, keys, values, away))
            else:
                assert states is not None
                new, before = states
                k, v = (x[:, :, token:stop].to(layout.dtype) for x in new)  # [1, heads, tokens, width]
                is_first = own.start == self.blocks.parts[self.numbers[own.number]].start
                keys, values = own.beginning.add(own.start, k, v, before.get(own.number) if is_first else None)
                past = None if own.past is None else BlockTable(self.blocks.memory(layer), own.past)
                read = PagedRead(token, stop, call.first, call.count, window, keys, values)
                found.append(replace(read, past=past, block_nbytes=layout.block_nbytes))
            token = stop
        return found

    def check(self, layer: int) -> None:
        """Raises ConfigError if the layer stored states, but its attention did not call `reads`."""
        if self._stored is not None:
            raise ConfigError(
                f"layer {layer}: this family's attention does not ask for its keys by pages; "
                "list it in tiered/arch/families.py as one with attention of its own"
            )
