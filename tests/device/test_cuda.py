"""CUDA, as far as it can be tested without a device: clear refusals, and what streams that are mocks are told."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from tiered.device import Device, Event, open_device
from tiered.device.cuda import CudaDevice
from tiered.errors import BudgetError, ConfigError
from tiered.units import GIB, MIB, PAGE

TOO_OLD = "The NVIDIA driver on your system is too old (found version 11040).\nPlease update your GPU driver"
SUCCESS = 0


class Cuda:
    """What mocks of streams were told, in order, and the device that they pretend."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.count, self.capability = 2, (8, 6)
        self.free, self.total, self.fraction = 20 * GIB, 24 * GIB, 1.0
        self.used = iter((GIB, GIB + 500 * MIB))
        self.streams = iter(("in", "out", "computing"))
        self.current = "default"
        self.failing_from: int | None = None
        """Calls to register that are refused, from this number on."""
        self.registered: dict[int, int] = {}
        self.cleared = 0

    def properties(self, index: int) -> SimpleNamespace:
        major, minor = self.capability
        return SimpleNamespace(major=major, minor=minor, name="Mock", uuid="0")

    def register(self, start: int, nbytes: int, flags: int) -> int:
        if self.failing_from is not None and len(self.registered) >= self.failing_from:
            return 2
        self.registered[start] = nbytes
        return SUCCESS

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

    def wait_event(self, event: "Point") -> None:
        self._cuda.calls.append(f"{self.name} waits for {event.name}")

    def synchronize(self) -> None:
        self._cuda.calls.append(f"{self.name} is waited for")


class Point:
    """An event."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda, self.name, self.is_done = cuda, "", False

    def record(self, stream: Stream) -> None:
        self.name = f"{stream.name}@{len(self._cuda.calls)}"
        self._cuda.calls.append(f"{stream.name} records {self.name}")

    def query(self) -> bool:
        return self.is_done

    def synchronize(self) -> None:
        self._cuda.calls.append(f"the host waits for {self.name}")

    def elapsed_time(self, other: "Point") -> float:
        return 2.0


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    """A torch with CUDA, and two devices of 24 GiB."""
    cuda = Cuda()
    runtime = SimpleNamespace(
        cudaHostRegister=cuda.register,
        cudaHostUnregister=cuda.registered.pop,
        cudaGetErrorString=lambda code: "out of memory",
        cudaError=SimpleNamespace(success=SUCCESS),
    )
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for name, mock in {
        "init": lambda: None,
        "device_count": lambda: cuda.count,
        "get_device_properties": cuda.properties,
        "device": lambda index: cuda.stream(SimpleNamespace(name="default")),  # type: ignore[arg-type]
        "stream": cuda.stream,
        "Stream": lambda where: Stream(cuda),
        "Event": lambda **_: Point(cuda),
        "mem_get_info": lambda where: (cuda.free, cuda.total),
        "memory_reserved": lambda index: 22 * MIB,
        "max_memory_reserved": lambda index: 100 * MIB,
        "set_per_process_memory_fraction": cuda.set_fraction,
        "empty_cache": lambda: None,
        "cudart": lambda: runtime,
    }.items():
        monkeypatch.setattr(torch.cuda, name, mock)

    def clear(where: torch.device) -> None:
        cuda.cleared += 1

    monkeypatch.setattr("tiered.device.cuda.clear_error", clear)
    monkeypatch.setattr("tiered.device.cuda.used_nbytes", lambda properties: next(cuda.used))
    monkeypatch.setattr(CudaDevice, "_multiply", lambda self: None)
    monkeypatch.setattr(CudaDevice, "_allocate", lambda self, nbytes: torch.zeros(nbytes, dtype=torch.uint8))
    return cuda


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
    refused("cuda", r"cuda:0: 8 GiB of its memory are to be used, of which only 1\.49 GiB are free", 8 * GIB)


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
    def fail(self: CudaDevice) -> None:
        raise raised

    monkeypatch.setattr(CudaDevice, "_multiply", fail)
    refused("cuda", told)


def test_memory_is_bounded_by_what_the_context_leaves_and_so_is_the_allocator(cuda: Cuda) -> None:
    device: Device = CudaDevice(0, 2 * GIB)
    assert device.context_nbytes == 500 * MIB and device.description == "Mock, 24 GiB, compute capability 8.6"
    assert cuda.fraction == pytest.approx((2 * GIB - 500 * MIB + 22 * MIB) / (24 * GIB))
    memory = device.borrow(100 * MIB + 1, "ring")
    assert memory.nbytes == 100 * MIB + 1 and memory.data_ptr() % PAGE == 0
    with pytest.raises(BudgetError, match=r"kv: 1\.4\d* GiB do not fit the 2 GiB .* in use: context 500 MiB, ring 100"):
        device.borrow(1450 * MIB, "kv")
    device.release(memory)
    assert device.borrow(1450 * MIB, "kv").nbytes == 1450 * MIB
    assert device.peak_nbytes == 500 * MIB - 22 * MIB + 100 * MIB
    device.close()
    assert cuda.fraction == 1.0


def test_an_allocator_that_has_no_more_is_a_budget_that_does_not_suffice(
    cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: CudaDevice, nbytes: int) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(CudaDevice, "_allocate", fail)
    with pytest.raises(BudgetError, match="ring: 4 KiB do not fit"):
        CudaDevice(0, 2 * GIB).borrow(1, "ring")


def test_where_the_driver_does_not_tell_the_context_is_estimated(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiered.device.cuda.used_nbytes", lambda properties: None)
    assert CudaDevice(0, None).context_nbytes == 640 * MIB


def test_copies_wait_in_their_own_stream_and_computing_waits_for_them(cuda: Cuda) -> None:
    device = CudaDevice(0, GIB)
    memory, host = device.borrow(PAGE, "ring"), torch.full((PAGE,), 7, dtype=torch.uint8)
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
    device.copy_in(torch.zeros(PAGE, dtype=torch.uint8), memory)
    device.copy_out(memory, torch.zeros(PAGE, dtype=torch.uint8))
    with device.computing():
        seen.append((cuda.current, False))
    assert seen == [("in", True), ("out", True), ("computing", False)]


def test_seconds_are_those_of_the_device(cuda: Cuda) -> None:
    device = CudaDevice(0, GIB)
    arrived: Event = device.copy_in(torch.zeros(PAGE, dtype=torch.uint8), device.borrow(PAGE, "ring"))
    assert arrived.seconds == 0.002 and device.record().seconds == 0.0
    device.wait_for(arrived)
    assert device.stalled_seconds == 0.0  # computing has not come so far
    for _, behind in device._waits:
        behind.is_done = True  # type: ignore[attr-defined]
    assert device.stalled_seconds == device.stalled_seconds == 0.002


def test_large_memory_is_registered_in_pieces_that_no_copy_spans(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiered.device.cuda._REGISTERED_NBYTES", 2 * PAGE)
    device = CudaDevice(0, GIB)
    memory, host = device.borrow(5 * PAGE, "ring"), torch.randint(0, 256, (6 * PAGE,), dtype=torch.uint8)
    start = -host.data_ptr() % PAGE
    host = host[start : start + 5 * PAGE]
    address = host.data_ptr()
    assert device.register(address, 5 * PAGE) is None
    assert cuda.registered == {address: 2 * PAGE, address + 2 * PAGE: 2 * PAGE, address + 4 * PAGE: PAGE}
    assert list(device._parts(host)) == [slice(0, 2 * PAGE), slice(2 * PAGE, 4 * PAGE), slice(4 * PAGE, 5 * PAGE)]
    assert list(device._parts(host[PAGE : 2 * PAGE])) == [slice(0, PAGE)]
    device.copy_in(host, memory)
    assert torch.equal(memory, host)
    device.unregister(address)
    assert cuda.registered == {}


def test_a_refused_registration_says_why_and_leaves_neither_pieces_nor_an_error(
    cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tiered.device.cuda._REGISTERED_NBYTES", 2 * PAGE)
    device, cuda.failing_from = CudaDevice(0, GIB), 1
    assert device.register(16 * PAGE, 4 * PAGE) == "cudaHostRegister of 8 KiB: out of memory"
    assert cuda.registered == {} and cuda.cleared == 1
    device.close()
