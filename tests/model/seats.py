"""A runtime whose passes compute at the seat of a device, wholly or in part: what tests of two seats share."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import TracebackType
from typing import Any, Final, Self, cast

import torch

from tests.late_device import LateDevice
from tests.store.make import load_unit
from tiered.arch import build_skeleton, load_config
from tiered.cache import Outbox
from tiered.device import Lease
from tiered.kernels import AttentionCall, Kernels
from tiered.model import Engine, Seat, Seats, registered_attention
from tiered.opening import Parts
from tiered.plan import Workload
from tiered.plan.kv import outbox_nbytes
from tiered.process import Held
from tiered.quant import QuantizedWeight
from tiered.runtime import Options, Runtime
from tiered.store import Store
from tiered.stream import NO_EXPERTS, Brought, ExpertUse, Loan, Streamer, Streams
from tiered.units import GIB

ALL: Final = "all at the device"
PROMPTS: Final = "prompts at the device"
DECODING: Final = "decoding at the device"


class DeviceKernels(Kernels):
    """Kernels that compute only what a device is given, by plain torch, and count it."""

    def __init__(self, device: LateDevice) -> None:
        super().__init__(1, name="torch")
        self._device = device
        self.products = self.attentions = 0

    def linear(
        self, x: torch.Tensor, weight: torch.Tensor | QuantizedWeight, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        assert self._device.depth, "computed outside of the device's context"
        self.products += 1
        return super().linear(x, weight, bias)

    def attention(self, call: AttentionCall) -> torch.Tensor:
        assert self._device.depth, "computed outside of the device's context"
        self.attentions += 1
        return super().attention(call)


class DeviceBlocks:
    """Lends the blocks of `store` from memory of its own, and checks that it is asked for all of them in their order.

    As `Streamer` does, to a device that shares nothing with the processor.
    """

    wait_seconds, unseen_stalls, bus_nbytes, bus_seconds = 0.0, 0.0, 0, 0.0

    def __init__(self, store: Store) -> None:
        family = str(store.manifest.architecture["model_type"])
        self._loans: list[Loan] = []
        for block, units in zip(store.tape, store.units_of_pass(on_demand=False), strict=True):
            bring = self._bring(store, len(self._loans))
            self._loans.append(Loan(block.name, block.prefix, units, (), family, bring, _kept))
        self._next = -1
        self.passes = 0

    def _bring(self, store: Store, number: int) -> Callable[[int], Brought]:
        def bring(unit: int) -> Brought:
            memory = load_unit(store.path, self._loans[number].units[unit])
            return Brought(self._loans[number].views(unit, memory), memory)

        return bring

    @property
    def expert_use(self) -> ExpertUse:
        return NO_EXPERTS

    def begin(self, is_last: bool = False, on_wait: Callable[[float, float], None] | None = None) -> None:
        assert self._next == -1, "the last pass has not lent all blocks"
        self._next, self.passes = 0, self.passes + 1

    @contextlib.contextmanager
    def lend(self, block: int, is_held: bool = False) -> Iterator[Loan]:
        assert block == self._next, f"block {block} is lent when {self._next} is next"
        loan = self._loans[block]
        loan.is_held = is_held
        try:
            yield loan
        finally:
            loan.close()
        self._next = block + 1 if block + 1 < len(self._loans) else -1

    async def __aenter__(self) -> Self:
        self._next = -1
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        pass

    async def rewind(self) -> None:
        """The next pass begins anew."""
        self._next = -1


def _kept(numbers: object) -> None:
    raise AssertionError("what stays is not given back")


class SeatedRuntime(Runtime):
    """`place`: what the device computes, and the processor does not.

    `on_device`: the KV cache is at the device; else `outbox_rows` tokens of a micro-batch find room on their way to it.
    `device_dtype`: what the device computes in, if that is not what the processor does.
    """

    def __init__(
        self,
        store: Store,
        workload: Workload,
        place: str,
        on_device: bool = False,
        outbox_rows: int | None = None,
        device_dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(store, workload, Options(**{"dtype": "float32", "ram": 16 * GIB, "threads": 1, **options}))
        self._place, self._on_device, self._outbox_rows = place, on_device, outbox_rows
        self._device_dtype = device_dtype
        self.device = LateDevice()
        self.device_blocks = DeviceBlocks(store)
        self.device_kernels = DeviceKernels(self.device)

    def _open(self, stack: contextlib.ExitStack, held: Held) -> Parts:
        parts = super()._open(stack, held)
        attention = stack.enter_context(registered_attention(self.device_kernels, self.host.kernels))
        dtype = self._device_dtype or parts.dtype
        skeleton = build_skeleton(load_config(self.store.path), dtype)
        seat = Seat.take(skeleton, dtype, self.device_kernels, attention, self.device)
        pool, engine = parts.memory.pool, parts.engine
        if self._on_device:
            pool.plan = replace(pool.plan, on_device=True)
        else:
            nbytes = outbox_nbytes(pool.plan.groups, self._outbox_rows or parts.chosen.plan.micro_batch_rows)
            pool.outbox = Outbox(Lease(self.device, nbytes, "kv"), torch.empty(nbytes, dtype=torch.uint8))
        own = engine.seats.decode
        prefill, decode = {ALL: (seat, seat), PROMPTS: (seat, own), DECODING: (own, seat)}[self._place]
        engine = Engine(Seats(prefill, decode), engine.embedding, self.host.cancel, self.host.trace, pool.outbox)
        return replace(parts, engine=engine)

    def _make_streams(self) -> Streams:
        streams = super()._make_streams()
        # The processor's streamer reads beside it, as that of a run with two seats does.
        return replace(streams, device_blocks=cast(Streamer, self.device_blocks))
