"""CUDA, as far as it can be tested without a device: clear refusals, and what streams that are mocks are told."""

import itertools
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from tests.waiting import SECONDS
from tiered.bench.gpu import measure_bus
from tiered.device import Device, Event, open_device
from tiered.device.cuda import CudaDevice
from tiered.errors import BudgetError, ConfigError
from tiered.units import GIB, MIB, PAGE

NOBODYS = 96 * MIB
"""What is added to what is measured: roundings of the allocator, and kernels that are loaded later."""
TOO_OLD = "The NVIDIA driver on your system is too old (found version 11040).\nPlease update your GPU driver"
SUCCESS = 0


class Cuda:
    """What mocks of streams were told, in order, and the device that they pretend."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.count, self.capability = 2, (8, 6)
        self.free, self.total, self.fraction = 20 * GIB, 24 * GIB, 1.0
        self.used: Iterator[int | None] = iter((GIB, GIB + 522 * MIB))
        """Bytes that all processes use, each time that somebody looks; and this one."""
        self.own: int | None = None
        self.reserved, self.peak, self.has_context = 22 * MIB, 5 * GIB, False
        self.streams = itertools.cycle(("in", "out", "computing"))
        self.current = "default"
        self.failing_from: int | None = None
        """Calls to register that are refused, from this number on."""
        self.registered: dict[int, int] = {}
        self.unregistered_at: list[str] = []
        """The current device when memory was unregistered."""
        self.cleared = 0

    def properties(self, index: int) -> SimpleNamespace:
        major, minor = self.capability
        return SimpleNamespace(major=major, minor=minor, name="Mock", uuid="0")

    def register(self, start: int, nbytes: int, flags: int) -> int:
        if self.failing_from is not None and len(self.registered) >= self.failing_from:
            return 2
        self.registered[start] = nbytes
        return SUCCESS

    def make_context(self) -> None:
        self.has_context = True

    def unregister(self, start: int) -> None:
        del self.registered[start]
        self.unregistered_at.append(self.current)

    def reset_peak(self, index: int) -> None:
        self.peak = self.reserved

    def set_fraction(self, fraction: float, index: int) -> None:
        self.fraction = fraction

    @contextmanager
    def stream(self, stream: "Stream") -> Iterator[None]:
        before, self.current = self.current, stream.name
        try:
            yield
        finally:
            self.current = before


class Stream:
    def __init__(self, cuda: Cuda) -> None:
        self._cuda, self.name = cuda, next(cuda.streams)
        self.points: list[Point] = []

    def wait_event(self, event: "Point") -> None:
        self._cuda.calls.append(f"{self.name} waits for {event.name}")

    def synchronize(self) -> None:
        self._cuda.calls.append(f"{self.name} is waited for")


class Point:
    """An event."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda, self.name, self.is_done = cuda, "", False
        self._stream: Stream | None = None

    def record(self, stream: Stream) -> None:
        self.name, self._stream = f"{stream.name}@{len(self._cuda.calls)}", stream
        stream.points.append(self)
        self._cuda.calls.append(f"{stream.name} records {self.name}")

    def query(self) -> bool:
        return self.is_done or self._stream is None  # as one that has not been recorded

    def synchronize(self) -> None:
        self._cuda.calls.append(f"the host waits for {self.name}")
        assert self._stream is not None
        for point in self._stream.points[: self._stream.points.index(self) + 1]:
            point.is_done = True

    def elapsed_time(self, other: "Point") -> float:
        return 2.0


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    """A torch with CUDA, and two devices of 24 GiB."""
    cuda = Cuda()
    runtime = SimpleNamespace(
        cudaHostRegister=cuda.register,
        cudaHostUnregister=cuda.unregister,
        cudaGetErrorString=lambda code: "out of memory",
        cudaError=SimpleNamespace(success=SUCCESS),
    )
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for name, mock in {
        "init": lambda: None,
        "device_count": lambda: cuda.count,
        "get_device_properties": cuda.properties,
        "device": lambda index: cuda.stream(SimpleNamespace(name=f"default of {index}")),  # type: ignore[arg-type]
        "stream": cuda.stream,
        "Stream": lambda where: Stream(cuda),
        "Event": lambda **_: Point(cuda),
        "mem_get_info": lambda where: (cuda.free, cuda.total),
        "memory_reserved": lambda index: cuda.reserved if cuda.has_context else 0,
        "max_memory_reserved": lambda index: cuda.peak,
        "reset_peak_memory_stats": cuda.reset_peak,
        "set_per_process_memory_fraction": cuda.set_fraction,
        "empty_cache": lambda: None,
        "cudart": lambda: runtime,
    }.items():
        monkeypatch.setattr(torch.cuda, name, mock)

    def clear(where: torch.device) -> None:
        cuda.cleared += 1

    monkeypatch.setattr("tiered.device.cuda.clear_error", clear)
    driver = "tiered.device.cuda_driver"
    monkeypatch.setattr(f"{driver}.used_nbytes", lambda properties: next(cuda.used))
    monkeypatch.setattr(f"{driver}.own_nbytes", lambda properties: cuda.own)
    monkeypatch.setattr(f"{driver}._has_context", lambda index: cuda.has_context)
    monkeypatch.setattr(f"{driver}._CONTEXTS", {})
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)
    monkeypatch.setattr(CudaDevice, "_multiply", lambda self, dtype: cuda.make_context())
    monkeypatch.setattr(CudaDevice, "_allocate", lambda self, nbytes: torch.zeros(nbytes, dtype=torch.uint8))
    return cuda


@pytest.mark.inputs("tiered/device")
def test_importing_and_asking_for_the_emulated_device_touches_no_cuda() -> None:
    code = (
        "import sys, torch, tiered.device as d, tiered.device.cuda; d.open_device('emulated', 4096).close(); "
        "assert not torch.cuda.is_initialized() and 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def refused(name: str, told: str, vram: int | None = None) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        open_device(name, vram)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


def test_a_torch_without_cuda_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    refused("cuda", r"--device cuda:0: this torch \(.*\) is built without CUDA; .*--tiers disk,cpu")


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (
            RuntimeError(TOO_OLD),
            r"cuda:0: The NVIDIA driver .* is too old .*; update the driver, or .* 13\.0",
        ),
        (RuntimeError("No CUDA GPUs are available"), "cuda:0: No CUDA GPUs are available; check the driver"),
        (AssertionError("Found no NVIDIA driver on your system."), "Found no NVIDIA driver .*; check the driver"),
    ],
)
def test_why_cuda_cannot_begin_is_told(
    cuda: Cuda, raised: Exception, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise raised

    monkeypatch.setattr(torch.cuda, "init", fail)
    refused("cuda", told)


def test_a_device_that_is_not_there_or_too_old_is_told(cuda: Cuda) -> None:
    refused("cuda:2", "--device cuda:2: no such device; there are: cuda:0, cuda:1")
    cuda.capability = (6, 1)
    refused("cuda:1", r"cuda:1: Mock has compute capability 6\.1, expected 7\.0 or higher")


def test_a_device_whose_memory_others_use_is_told(cuda: Cuda) -> None:
    cuda.free = GIB
    refused("cuda", r"cuda:0: 8 GiB of its memory are to be used, of which only 1\.51 GiB are free", 8 * GIB)


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "cuda:0: it has no memory left"),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors"), "cuda:0: it has no memory left"),
        (RuntimeError("CUDA error: no kernel image is available\nfor execution"), "no kernel image is available for"),
    ],
)
def test_what_goes_wrong_with_the_first_product_is_told(
    cuda: Cuda, raised: Exception, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: CudaDevice, dtype: torch.dtype) -> None:
        raise raised

    monkeypatch.setattr(CudaDevice, "_multiply", fail)
    refused("cuda", told)


def test_memory_is_bounded_by_what_the_context_leaves_and_so_is_the_allocator(cuda: Cuda) -> None:
    device: Device = CudaDevice(0, GIB)
    assert device.context_nbytes == 522 * MIB + NOBODYS and device.description == "Mock, 24 GiB, compute capability 8.6"
    assert cuda.fraction == 1.0  # no plan has been made yet, which may refuse the budget
    memory = device.borrow(100 * MIB + 1, "ring")
    assert memory.nbytes == 100 * MIB + 1 and memory.data_ptr() % PAGE == 0
    # The allocator's own roundings are its to use; kernels that are loaded later are none of it.
    assert cuda.fraction == pytest.approx((GIB - 500 * MIB - 32 * MIB) / (24 * GIB))
    with pytest.raises(BudgetError, match=r"kv: 350 MiB do not fit the 1 GiB .* in use: context 618 MiB, ring 100"):
        device.borrow(350 * MIB, "kv")
    device.release(memory)
    assert device.borrow(350 * MIB, "kv").nbytes == 350 * MIB
    device.close()
    assert cuda.fraction == 1.0


def test_the_peak_is_that_since_the_device_was_opened_or_warmed_up(cuda: Cuda) -> None:
    device = CudaDevice(0, 2 * GIB)
    assert device.peak_nbytes == 522 * MIB
    cuda.peak = 100 * MIB
    assert device.peak_nbytes == 600 * MIB
    cuda.used = itertools.repeat(GIB + 522 * MIB)
    device.warm_up(torch.float16)
    assert device.peak_nbytes == 522 * MIB


def test_a_budget_below_the_context_limits_nothing_before_a_plan_refuses_it(cuda: Cuda) -> None:
    cuda.used = iter((GIB, GIB + 522 * MIB, GIB + 522 * MIB))
    device = CudaDevice(0, 100 * MIB)
    device.warm_up(torch.float16)
    assert cuda.fraction == 1.0
    with pytest.raises(BudgetError, match=r"ring: 4 KiB do not fit the 100 MiB .* context 618 MiB"):
        device.borrow(1, "ring")


def test_what_warming_up_takes_is_part_of_the_context_until_something_is_borrowed(cuda: Cuda) -> None:
    cuda.used = iter((GIB, GIB + 522 * MIB, GIB + 630 * MIB))
    device = CudaDevice(0, 2 * GIB)
    cuda.reserved = 50 * MIB
    device.warm_up(torch.float16)
    assert device.context_nbytes == 630 * MIB + NOBODYS
    device.borrow(100 * MIB, "ring")
    cuda.reserved = 150 * MIB
    device.warm_up(torch.float16)
    assert device.context_nbytes == 630 * MIB + NOBODYS


def test_what_goes_wrong_while_warming_up_is_told(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    device = CudaDevice(0, 2 * GIB)

    def fail(self: CudaDevice, dtype: torch.dtype) -> None:
        raise RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling cublasGemmEx")

    monkeypatch.setattr(CudaDevice, "_multiply", fail)
    with pytest.raises(ConfigError, match=r"--device cuda:0: CUDA error: CUBLAS_STATUS_NOT_SUPPORTED .*doctor"):
        device.warm_up(torch.bfloat16)


def test_a_device_that_is_opened_again_has_the_context_that_it_has_kept(cuda: Cuda) -> None:
    CudaDevice(0, 2 * GIB).close()
    # Others use 1 GiB more by now; what this process has there has grown by 8 MiB.
    cuda.used = iter((2 * GIB + 522 * MIB, 2 * GIB + 530 * MIB))
    assert CudaDevice(0, 2 * GIB).context_nbytes == 530 * MIB + NOBODYS


def test_a_context_that_the_program_has_made_is_what_the_driver_says_of_the_process(cuda: Cuda) -> None:
    cuda.has_context, cuda.used, cuda.own = True, iter((3 * GIB, 3 * GIB)), 700 * MIB
    assert CudaDevice(0, 2 * GIB).context_nbytes == 700 * MIB + NOBODYS


@pytest.mark.parametrize("own", [None, 10 * MIB, 9 * GIB])
def test_where_the_driver_means_another_process_the_context_is_estimated(cuda: Cuda, own: int | None) -> None:
    """By less than this process has for sure, or by more than all have together."""
    cuda.has_context, cuda.used, cuda.own = True, iter((3 * GIB, 3 * GIB)), own
    assert CudaDevice(0, 2 * GIB).context_nbytes == 640 * MIB + 22 * MIB + NOBODYS


def test_an_allocator_that_has_no_more_is_a_budget_that_does_not_suffice(
    cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: CudaDevice, nbytes: int) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(CudaDevice, "_allocate", fail)
    with pytest.raises(BudgetError, match="ring: 4 KiB do not fit"):
        CudaDevice(0, 2 * GIB).borrow(1, "ring")


def test_where_the_driver_does_not_tell_the_context_is_estimated(cuda: Cuda) -> None:
    cuda.used = itertools.repeat(None)
    assert CudaDevice(0, None).context_nbytes == 640 * MIB + 22 * MIB + NOBODYS


def registered(device: CudaDevice, pages: int) -> torch.Tensor:
    """Memory of the host that is known to the device."""
    host = torch.randint(0, 256, ((pages + 1) * PAGE,), dtype=torch.uint8)
    start = -host.data_ptr() % PAGE
    host = host[start : start + pages * PAGE]
    assert device.register(host.data_ptr(), pages * PAGE) is None
    return host


def test_copies_wait_in_their_own_stream_and_computing_waits_for_them(cuda: Cuda) -> None:
    device = CudaDevice(0, GIB)
    memory, host = device.borrow(PAGE, "ring"), registered(device, 1).fill_(7)
    used = device.record()
    arrived = device.copy_in(host, memory, [used])
    device.wait_for(arrived)
    done = device.record()
    left = device.copy_out(memory, host, [done])
    left.wait()
    assert cuda.calls == [
        "computing records computing@0",
        "in waits for computing@0",
        "in records in@2",
        "in records in@3",
        "computing records computing@4",
        "computing waits for in@3",
        "computing records computing@6",
        "computing records computing@7",
        "out waits for computing@7",
        "out records out@9",
        "out records out@10",
        "the host waits for out@10",
    ]
    assert torch.equal(memory, host)


def test_copies_and_allocations_are_given_to_their_streams(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    device, seen = CudaDevice(0, GIB), []
    memory = device.borrow(PAGE, "ring")
    original = torch.Tensor.copy_

    def copy(self: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        seen.append((cuda.current, non_blocking))
        return original(self, source)

    monkeypatch.setattr(torch.Tensor, "copy_", copy)
    device.copy_in(registered(device, 1), memory)
    device.copy_out(memory, registered(device, 1))
    with device.computing():
        seen.append((cuda.current, False))
    assert seen == [("in", True), ("out", True), ("computing", False)]


def test_seconds_are_those_of_the_device(cuda: Cuda) -> None:
    device = CudaDevice(0, GIB)
    arrived: Event = device.copy_in(registered(device, 1), device.borrow(PAGE, "ring"))
    assert arrived.seconds == 0.002 and device.record().seconds == 0.0
    device.wait_for(arrived)
    assert device.stalled_seconds == 0.0  # computing has not come so far
    for _, behind in device._waits:
        behind.is_done = True  # type: ignore[attr-defined]
    assert device.stalled_seconds == device.stalled_seconds == 0.002


def test_large_memory_is_registered_in_pieces_that_no_copy_spans(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiered.device.cuda._REGISTERED_NBYTES", 2 * PAGE)
    device = CudaDevice(1, GIB)
    memory, host = device.borrow(5 * PAGE, "ring"), registered(device, 5)
    address, copied = host.data_ptr(), []
    assert cuda.registered == {address: 2 * PAGE, address + 2 * PAGE: 2 * PAGE, address + 4 * PAGE: PAGE}
    original = torch.Tensor.copy_

    def copy(self: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        copied.append(((source.data_ptr() - address) // PAGE, source.nbytes // PAGE))
        return original(self, source)

    monkeypatch.setattr(torch.Tensor, "copy_", copy)
    device.copy_in(host, memory)
    assert copied == [(0, 2), (2, 2), (4, 1)] and torch.equal(memory, host)
    device.copy_in(host[PAGE : 2 * PAGE], memory[:PAGE])
    assert copied[3:] == [(1, 1)]
    device.unregister(address)
    assert cuda.registered == {} and cuda.unregistered_at == ["default of 1"] * 3


def test_a_refused_registration_says_why_and_leaves_neither_pieces_nor_an_error(
    cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tiered.device.cuda._REGISTERED_NBYTES", 2 * PAGE)
    device, cuda.failing_from = CudaDevice(0, GIB), 1
    assert device.register(16 * PAGE, 4 * PAGE) == "cudaHostRegister of 8 KiB: out of memory"
    assert cuda.registered == {} and cuda.cleared == 1
    device.close()


def test_memory_that_is_given_back_is_kept_by_no_copy(cuda: Cuda) -> None:
    """Or a ring could not be borrowed anew under the allocator's limit."""
    device = CudaDevice(0, GIB)
    ring, host = device.borrow(4 * PAGE, "ring"), registered(device, 4)
    arrived = device.copy_in(host, ring)
    left = device.copy_out(ring[:PAGE], host[:PAGE])
    arrived.wait()
    left.wait()
    storage = weakref.ref(ring.untyped_storage())
    device.release(ring)
    del ring
    assert storage() is None


def test_measuring_the_bus_keeps_no_memory(cuda: Cuda) -> None:
    seen: list[weakref.ref[torch.UntypedStorage]] = []
    host = torch.zeros(2 * PAGE, dtype=torch.uint8)
    start = -host.data_ptr() % PAGE

    class Watched(CudaDevice):
        def borrow(self, nbytes: int, label: str) -> torch.Tensor:
            memory = super().borrow(nbytes, label)
            seen.append(weakref.ref(memory.untyped_storage()))
            return memory

    device = Watched(0, GIB)
    assert measure_bus(device, host[start : start + PAGE], PAGE, seconds=0.0) > 0
    assert [storage() for storage in seen] == [None] and cuda.registered == {}


def test_waits_that_are_over_are_kept_no_longer(cuda: Cuda) -> None:
    device = CudaDevice(0, GIB)
    memory, host = device.borrow(PAGE, "ring"), registered(device, 1)
    for _ in range(5):
        device.wait_for(device.copy_in(host, memory))
        device.record().wait()
    assert len(device._waits) <= 1


def test_memory_that_is_not_registered_is_copied_by_a_thread_that_nobody_waits_for(
    cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, may_copy, original = CudaDevice(0, GIB), threading.Event(), torch.Tensor.copy_
    memory, host = device.borrow(2 * PAGE, "ring"), torch.full((PAGE,), 7, dtype=torch.uint8)
    known = registered(device, 1)

    def copy(self: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        assert may_copy.wait(SECONDS)
        return original(self, source)

    monkeypatch.setattr(torch.Tensor, "copy_", copy)
    staged = device.copy_in(host, memory[:PAGE])
    behind = device.copy_in(known, memory[PAGE:])
    other = device.borrow(PAGE, "kv")  # nothing is held meanwhile
    assert not staged.is_done and not behind.is_done
    may_copy.set()
    device.wait_for(behind)
    assert cuda.calls[-2].startswith("computing waits for in@") and torch.equal(memory, torch.cat([host, known]))
    staged.wait()
    assert staged.is_done
    device.release(other)
    device.close()


def test_what_a_staged_copy_raises_comes_to_whoever_waits_for_it(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    device = CudaDevice(0, GIB)

    def fail(self: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        raise RuntimeError("the bus is broken")

    memory, host = device.borrow(PAGE, "ring"), torch.zeros(PAGE, dtype=torch.uint8)
    monkeypatch.setattr(torch.Tensor, "copy_", fail)
    arrived = device.copy_in(host, memory)
    for wait in (arrived.wait, lambda: device.wait_for(arrived)):
        with pytest.raises(RuntimeError, match="the bus is broken"):
            wait()
    assert arrived.is_done
    device.close()
