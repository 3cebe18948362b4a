"""Every family's record, layers and head with all tensors at another torch device, to find what is left at the host's.

A program of its own: `python -m tests.model.elsewhere`. The device "emu" has shapes and no numbers (a fake tensor's
operations raise where tensors of two devices meet, and where somebody asks for a number), and can be set up only once
per process. Prints a line of JSON per tiny model: its name, and what was raised, or null; and one for a model of which
a table was left at the host on purpose.
"""

import gc
import json
import sys
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from types import NoneType
from typing import Any, Final
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from transformers.cache_utils import DynamicCache

from tests.model.loans import GivenLoan
from tests.tiny_configs import LENGTH_DEPENDENT, TINY, tiny_config
from tiered.arch import BlockTensors, build_skeleton, chunked_layers, kv_sources, layer_windows, state_shape
from tiered.cache import AwayStates, Bits, CachePlan, KVPool, Outbox, PagedKeys, kv_shapes, layer_groups
from tiered.device import Lease
from tiered.kernels import AttentionCall, Kernels, Pages
from tiered.model import ForwardBatch, ForwardWork, Seat, Seats, Segment, Segments, Work, registered_attention
from tiered.model.work import Embedded
from tiered.plan.kv import outbox_nbytes
from tiered.plan.passes import MicroBatchLimits
from tiered.plan.state import ANYWHERE, StateShape
from tiered.stream import AnyWeight, FetchedRows

WHERE: Final = torch.device("privateuseone:0")
HOST: Final = torch.device("cpu")
IDS: Final = list(range(3, 83))
BY_CACHE: Final = ("llama", "gemma3_text", "bloom", "deepseek_v3", "llama4_text", "qwen3_next")
"""Tried with other kinds of cache, over more than a page: one of each kind of attention, and one with states."""
CACHES: Final[tuple[tuple[Bits, bool], ...]] = ((4, False), (16, True), (4, True))
"""Their bits, and whether they are at the host."""
LEFT_BEHIND: Final = "gptj"
"""Has a table of positions outside its layers."""
CHOSEN: Final = [1, 2]
"""The experts of every token, as there are no numbers to choose by."""


class KernelsAt(Kernels):
    """Torch's linear layers; attention that looks where everything is, and computes nothing."""

    def __init__(self, where: torch.device) -> None:
        super().__init__(1, name="torch")
        self._where = where

    def attention(self, call: AttentionCall) -> torch.Tensor:
        for pages in (call.keys, call.values):
            for each in (pages, pages.recent):
                assert each is None or (each.table.memory.device, each.table.offsets.device) == (self._where, HOST)
        assert call.first.device == call.count.device == HOST
        assert call.query.device == self._where
        return torch.empty_like(call.query)


class _Device:
    """What seats and outboxes need of a device; it is its own event."""

    where, name = WHERE, "emu"

    def borrow(self, nbytes: int, label: str) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=WHERE)

    def computing(self) -> nullcontext[None]:
        return nullcontext()

    def uses(self, memory: torch.Tensor, writes: bool = False) -> None:
        assert memory.device == WHERE

    def record(self) -> "_Device":
        return self

    def copy_in(self, source: torch.Tensor, target: torch.Tensor, after: object) -> "_Device":
        return self.copy_out(target, source, after)

    def copy_out(self, source: torch.Tensor, target: torch.Tensor, after: object) -> "_Device":
        assert (source.device, target.device) == (WHERE, HOST)
        return self

    def wait(self) -> None:
        pass

    def wait_for(self, event: object) -> None:
        pass


def check(name: str) -> None:
    """Run a tiny model over segments, and over a batch of transformers' kind."""
    skeleton = build_skeleton(tiny_config(name))
    blocks, state = list(skeleton.blocks()), state_shape(skeleton)
    kernels = KernelsAt(WHERE)
    with registered_attention(kernels, KernelsAt(HOST)) as attention, _nothing_but_shapes(skeleton.model):
        seat = Seat.take(skeleton, torch.float32, kernels, attention, _Device())  # type: ignore[arg-type]
        for block in blocks:
            if block.role == "outer":
                seat.model.set_outer({item.name: torch.empty(item.shape) for item in block.parameters})
        works = [_segments(seat, 16, False, 11, state), _forward(seat)]
        if name in BY_CACHE:
            works += [_segments(seat, bits, is_away, 70, state) for bits, is_away in CACHES]
        for work in works:
            _run(work, seat, blocks)


def _segments(seat: Seat, bits: Bits, is_away: bool, prompt: int, state: StateShape | None) -> Work:
    """Sequences that decode beside a prompt of so many tokens, with their cache where the model is or at the host."""
    config = seat.model.skeleton.config
    windows, gathered = layer_windows(config), seat.model.skeleton.family.gathers
    shapes, context = kv_shapes(config, torch.float32), len(IDS)
    groups = layer_groups(windows, shapes, chunked_layers(config), kv_sources(config))
    plan = CachePlan(
        len(windows), bits, False, groups, 3, context, 3 * context, 128, on_device=not is_away, state=state
    )
    outbox = away = None
    if is_away:
        nbytes = outbox_nbytes(groups, 128)
        device: Any = _Device()
        outbox = Outbox(Lease(device, nbytes, "kv"), torch.empty(nbytes, dtype=torch.uint8, device=HOST))
        if state is not None:
            rows = Lease(device, 3 * state.layer_nbytes, "states")
            away = AwayStates(outbox, rows, state.layer_nbytes)
    memory, states = (
        torch.empty(nbytes, dtype=torch.uint8, device=HOST if is_away else WHERE)
        for nbytes in (plan.pool_nbytes, plan.states_nbytes)
    )
    pool = KVPool(plan, memory, outbox, states, away)
    segments = []
    # Two that decode: of a tensor with a single number a fake tensor knows the number, and would compute with it.
    for number, (length, tokens) in enumerate(((5, 1), (63, 1), (0, prompt))):
        kv = pool.reserve(context)
        assert kv is not None
        kv.length = length
        segments.append(Segment(kv, IDS[number : number + tokens], 1))
    grid = ANYWHERE if state is None else state.grid
    limits = MicroBatchLimits(128, gathered, gathered_rows=2, within_pages=bits != 16, grid=grid)
    return Segments(segments, pool, limits, 4, Seats(seat, seat), _expect_host)


def _forward(seat: Seat) -> Work:
    cache = DynamicCache(config=seat.model.skeleton.config)
    for layer in cache.layers:
        if hasattr(layer, "_sliding_window_tensor"):
            # Its number would be known, and moved by the device's own operations, of which there are none.
            layer._sliding_window_tensor = torch.empty((), dtype=torch.long, device=WHERE)
    batch = ForwardBatch(
        torch.tensor([IDS[:6], IDS[6:12]]),
        cache,
        torch.ones(2, 6, dtype=torch.int64),
        torch.arange(6).expand(2, 6),
        logits_to_keep=2,
    )
    return ForwardWork([batch], 64, len(seat.model.layers), Seats(seat, seat))


def _expect_host(number: int, index: int, logits: torch.Tensor) -> None:
    assert logits.device == HOST


def _run(work: Work, seat: Seat, blocks: Sequence[BlockTensors]) -> None:
    model = seat.model
    loans = [_loan(block) for block in blocks if block.role == "layer"]
    modules = {name: model.skeleton.model.get_submodule(table.module) for name, table in model.skeleton.tables.items()}
    tables = {name: _fetched(module) for name, module in modules.items()}
    groups = work.record(Embedded({"embed": _fetched(model.skeleton.embedding)} | tables, torch.float32))
    tried = set()
    for number, (layer, loan) in enumerate(zip(model.layers, loans, strict=True)):
        if (kind := _kind(seat, number)) in tried:
            continue
        tried.add(kind)
        with model.lend(layer, loan):
            for group in groups:
                for micro_batch in group.micro_batches:
                    call = micro_batch.calls[number]
                    output = layer(micro_batch.hidden, *call.args, **call.kwargs)
                    micro_batch.hidden = output[0] if isinstance(output, tuple) else output
                    assert micro_batch.hidden.device == WHERE
    tied = {"weight": torch.empty(model.head.out_features, model.head.in_features, device=WHERE)}
    head = next((_loan(block) for block in blocks if block.role == "head"), GivenLoan(tied))
    with model.lend(model.head, head):
        for logits in work.finish(groups):
            assert logits.device == HOST


def _kind(seat: Seat, number: int) -> Hashable:
    """Equal for layers that do the same: their modules, what those were told (but for their number), and what they
    attend to. Where their tensors are, the first says for all; operations without numbers take a millisecond each."""
    config = seat.model.skeleton.config
    told = [
        (name, type(module), attribute, value)
        for name, module in seat.model.layers[number].named_modules()
        for attribute, value in vars(module).items()
        if isinstance(value, (int, float, str, NoneType)) and not (type(value) is int and value == number)
    ]
    types = getattr(config, "layer_types", None)
    return layer_windows(config)[number], types and types[number], tuple(told)


def _fetched(table: nn.Module) -> FetchedRows:
    assert isinstance(table, nn.Embedding)
    width = table.embedding_dim
    return FetchedRows(IDS, lambda positions, dtype: torch.empty(len(positions), width, dtype=dtype))


def _loan(block: BlockTensors) -> GivenLoan:
    weights: dict[str, AnyWeight | list[AnyWeight]] = {}
    for item in block.parameters:
        weight = torch.empty(item.shape, device=WHERE)
        weights[item.name.removeprefix(block.prefix)] = list(weight) if item.is_linear and weight.ndim == 3 else weight
    return GivenLoan(weights)


class _FakeLayerOutput(FakeTensor):
    """As `_LayerOutput`, which cannot be made of a fake tensor."""

    def __getitem__(self, index: Any) -> Any:
        return self if isinstance(index, int) and index == 0 else super().__getitem__(index)


class _FakePagedKeys(FakeTensor, PagedKeys):
    pass


@contextmanager
def _nothing_but_shapes(model: nn.Module) -> Iterator[None]:
    """Tensors of `model` and those made in this context have no numbers; what the host must know is made up."""

    def tolist(tensor: FakeTensor) -> Any:
        if tensor.ndim == 1 and tensor.device == HOST:
            return [0] * len(tensor)  # offsets
        return [CHOSEN] * tensor.shape[0] if tensor.device == WHERE and tensor.ndim == 2 else original(tensor)

    def gather(pages: Pages, part: object, out: torch.Tensor) -> None:
        assert pages.table.memory.device == out.device
        out.zero_()

    def like(kind: type[FakeTensor], tensor: torch.Tensor) -> Any:
        with unset_fake_temporarily():
            shape = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        return kind(mode, shape, tensor.device)

    def paged_keys(keys: torch.Tensor, kv: Any, layer: int) -> torch.Tensor:
        made = like(_FakePagedKeys, keys)
        made.kv, made.layer = kv, layer
        return made  # type: ignore[no-any-return]

    def tensor(data: Any, *, device: Any = None, **kwargs: Any) -> torch.Tensor:
        made = from_data(data, **kwargs)
        return made if device is None else torch.empty(made.shape, dtype=made.dtype, device=device)

    original, from_data, mode = FakeTensor.tolist, torch.tensor, FakeTensorMode()
    for module in model.modules():
        for tensors in (module._buffers, vars(module)):
            real = {n: x for n, x in tensors.items() if isinstance(x, torch.Tensor) and not x.is_meta}
            tensors.update({name: mode.from_tensor(tensor) for name, tensor in real.items()})
    with (
        mode,
        mock.patch("tiered.model.record._LayerOutput.of", partial(like, _FakeLayerOutput)),
        mock.patch("tiered.cache.micro_batch.PagedKeys.of", paged_keys),
        mock.patch.object(FakeTensor, "tolist", tolist),
        mock.patch.object(torch, "tensor", tensor),
        mock.patch("tiered.cache.gathered._gather", gather),
        torch.no_grad(),
    ):
        yield


def main() -> None:
    _setup_privateuseone_for_python_backend("emu")
    gc.freeze()  # what has been imported is no garbage
    for name in sys.argv[1:] or [*TINY, *LENGTH_DEPENDENT]:
        found = _raised_by(name)
        print(json.dumps([name, found]), flush=True)
    with mock.patch("tiered.model.bind._move_tables", lambda model, where: None):
        found = _raised_by(LEFT_BEHIND)
    print(json.dumps([f"{LEFT_BEHIND}, left", found]), flush=True)


def _raised_by(name: str) -> str | None:
    try:
        check(name)
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


if __name__ == "__main__":
    main()
