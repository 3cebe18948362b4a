"""Kernels of a device, in plain torch on the processor: numbers, the same bits in any batch, bounds, interruptions."""

import itertools
import math
import sys
import threading
import weakref
from dataclasses import replace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.kernels.attention_cases import (
    TOLERANCE,
    Shape,
    dense,
    random_call,
    relative_error,
    rows_of,
    scatter,
    truth,
    without,
)
from tests.kernels.native_linear import FORMATS, SCHEMES, Case, random_case
from tests.kernels.test_attention import RESTRICTIONS
from tiered.errors import ConfigError, InterruptedRun
from tiered.kernels import (
    AttentionCall,
    CacheFormat,
    CancelFlag,
    DeviceKernels,
    Mode,
    contiguous_pages,
    device_dtype,
    device_kernels,
    device_scratch_nbytes,
    linear_torch,
    reference,
    triton_refusal,
)
from tiered.kernels.attention_fused import attention_fused, serves_fused
from tiered.kernels.attention_torch import attention_nbytes
from tiered.kernels.linear_torch import Sizes, round_activations
from tiered.quant import GroupScheme, QuantizedWeight, Scheme

pytestmark = pytest.mark.inputs("tiered/kernels", "tiered/quant", "tests/kernels")

HOST = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
MODES = list(Mode)
FUSED_TOLERANCE = 5e-3
"""As `TOLERANCE`, where quantized keys and values, and weights of the softmax, are rounded to bf16 too."""
TINY = Sizes(panel_nbytes=1 << 13, tile_nbytes=1 << 12, fixed_rows=4)
"""Weights of tests then have several panels, and a few rows several tiles."""


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_kernels, "HOST_SIZES", TINY)


def made(mode: Mode = Mode.INVARIANT, cancel: CancelFlag | None = None) -> DeviceKernels:
    return DeviceKernels(HOST, mode, cancel, "torch")


def case_of(scheme: Scheme | None, dtype: torch.dtype, out: int = 67, units: int = 5, rows: int = 9) -> Case:
    case = random_case(scheme, out, units, rows, torch.float32)
    # So small that results fit float16.
    return replace(case, x=(case.x.float() / 256).to(dtype))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", FORMATS, ids=str)
@pytest.mark.usefixtures("tiny")
def test_products_agree_with_the_reference(scheme: Scheme | None, dtype: torch.dtype, mode: Mode) -> None:
    case = case_of(scheme, dtype)
    rounded = mode is Mode.FAST and scheme is not None and scheme.bits == 8 and dtype != torch.float32
    for bias in (None, case.bias):
        found = made(mode).linear(case.x, case.weight, bias)
        expected = reference.linear(case.x.float(), case.weight, bias)
        assert found.dtype == dtype and found.shape == expected.shape
        error = (found.float() - expected).norm() / expected.norm()
        assert error < (2e-2 if rounded else ROUNDING[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", FORMATS, ids=str)
def test_a_row_alone_has_the_bits_of_the_row_in_any_batch(scheme: Scheme | None, dtype: torch.dtype) -> None:
    case = case_of(scheme, dtype, out=301, units=1024 // (scheme.group_size if scheme else 32), rows=37)
    kernels = made()
    together = kernels.linear(case.x, case.weight, case.bias)
    for rows in (range(1), range(5, 6), range(36, 37), range(3, 20), range(1, 17), range(20, 37)):
        assert torch.equal(kernels.linear(case.x[rows], case.weight, case.bias), together[rows]), rows
    backwards = kernels.linear(case.x.flip(0), case.weight, case.bias).flip(0)
    assert torch.equal(backwards, together)


def test_what_is_no_number_stays_in_its_row() -> None:
    case = case_of(GroupScheme(4), torch.float32, rows=40)
    kernels = made()
    clean = kernels.linear(case.x, case.weight)
    dirty = case.x.clone()
    dirty[17] = math.nan
    kernels.linear(dirty, case.weight)
    found = kernels.linear(dirty, case.weight)
    others = [row for row in range(40) if row != 17]
    assert bool(found[17].isnan().all()) and torch.equal(found[others], clean[others])
    # Nor does it wait in scratch memory for the next call.
    assert torch.equal(kernels.linear(case.x[:3], case.weight), clean[:3])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_fast_rounds_activations_of_8_bit_weights_by_the_group(group: int, dtype: torch.dtype) -> None:
    case = case_of(GroupScheme(8, group), dtype)
    case.x[:, 3] *= 60
    case.x[2, :group] = 0
    groups = case.x.double().unflatten(1, (-1, group))
    step = groups.abs().amax(-1, keepdim=True) / 127
    rounded = (torch.round(groups / step.masked_fill(step == 0, 1)) * step).flatten(1)
    expected = rounded @ case.plain().double().T
    found = made(Mode.FAST).linear(case.x, case.weight)
    assert (found.double() - expected).norm() / expected.norm() < ROUNDING[dtype] / 2
    codes, scale = round_activations(case.x, group)
    assert codes.dtype == torch.int8 and scale.shape == (9, 5)
    assert float(codes.abs().amax()) == 127 and not codes[2, :group].any() and scale[2, 0] == 0


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.usefixtures("tiny")
def test_weights_are_widened_bit_for_bit(scheme: Scheme, dtype: torch.dtype) -> None:
    weight = random_case(scheme, 70, 3, 1).weight
    assert isinstance(weight, QuantizedWeight)
    for start, stop in ((0, 70), (13, 14), (5, 69)):
        assert torch.equal(made().dequantize(weight, start, stop, dtype), weight.rows(start, stop, dtype))


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 1, 3), (0,), (2, 0)])
@pytest.mark.parametrize("mode", MODES)
def test_x_may_have_any_number_of_dimensions(shape: tuple[int, ...], mode: Mode) -> None:
    case = random_case(GroupScheme(4), 30, 2, 1)
    x = torch.randn(*shape, 128)
    expected = torch.nn.functional.linear(x, case.plain())
    torch.testing.assert_close(made(mode).linear(x, case.weight), expected, rtol=1e-5, atol=1e-3)
    with pytest.raises(ConfigError, match="linear: x of"):
        made(mode).linear(torch.randn(2, 127), case.weight)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.usefixtures("tiny")
def test_a_set_flag_stops_between_panels(mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of(GroupScheme(4), torch.float32, out=640)
    cancel, panels = CancelFlag(), 0
    real = linear_torch.widen_in_torch

    def counted(weight: QuantizedWeight, out: torch.Tensor) -> None:
        nonlocal panels
        panels += 1
        if panels == 2:
            thread = threading.Thread(target=cancel.set)
            thread.start()
            thread.join()
        real(weight, out)

    monkeypatch.setattr(device_kernels, "widen_in_torch", counted)
    kernels = made(mode, cancel)
    with pytest.raises(InterruptedRun):
        kernels.linear(case.x, case.weight)
    assert panels == 2
    with pytest.raises(InterruptedRun):
        kernels.attention(random_call(Shape(1, 1, 2, 2, 70, 64)))
    cancel.clear()
    torch.testing.assert_close(kernels.linear(case.x, case.weight), reference.linear(case.x, case.weight))


class Allocations(TorchDispatchMode):
    """How many bytes operations of torch have allocated at once at most; views count as nothing."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if torch.is_tensor(leaf) and leaf.untyped_storage()._cdata not in given | self._known:
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, nbytes = storage._cdata, storage.nbytes()
        self._known.add(key)
        self.now += nbytes
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._freed, key, nbytes)

    def _freed(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self.now -= nbytes


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_products_stay_within_the_scratch_memory_they_name(bits: int, mode: Mode) -> None:
    scheme = None if bits == 16 else GroupScheme(bits)
    case = case_of(scheme, torch.bfloat16, out=9000, units=32, rows=70)
    with Allocations() as allocations:
        y = made(mode).linear(case.x, case.weight)
    assert 1 << 20 < allocations.most - y.nbytes < device_scratch_nbytes() / 2


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [Shape(1, 1, 16, 8, 5000, 128), Shape(1, 100, 40, 2, 1500, 64)], ids=str)
def test_attention_stays_within_the_scratch_memory_it_names(shape: Shape, mode: Mode) -> None:
    call = random_call(shape, CacheFormat.INT8_CHANNEL, CacheFormat.INT4)
    with Allocations() as allocations:
        found = made(mode).attention(call)
    assert 1 << 20 < allocations.most - found.nbytes < attention_nbytes(HOST) <= reference.scratch_nbytes()


def restricted(seed: int = 0, **more: Any) -> AttentionCall:
    """Two sequences whose queries are in three pages, before 5 of which there is padding."""
    return random_call(Shape(2, 90, 4, 2, 150, 64), seed=seed, **more)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("more", RESTRICTIONS.values(), ids=RESTRICTIONS)
def test_attention_hides_what_it_should(more: dict[str, Any], mode: Mode) -> None:
    call = restricted(**more)
    call = replace(call, query=call.query.float())
    assert relative_error(made(mode).attention(call), truth(call)) < 1e-5


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("keys", list(CacheFormat))
@pytest.mark.parametrize("shape", [Shape(5, 1, 6, 2, 1400, 80), Shape(2, 90, 4, 2, 150, 64)], ids=str)
def test_attention_reads_every_format_of_pages(shape: Shape, keys: CacheFormat, mode: Mode) -> None:
    values = CacheFormat(keys - 2) if keys.per_channel else keys
    call = random_call(shape, keys, values)
    assert relative_error(made(mode).attention(replace(call, query=call.query.float())), truth(call)) < 1e-5
    most = FUSED_TOLERANCE if mode is Mode.FAST else TOLERANCE
    assert relative_error(made(mode).attention(call), truth(call)) < most


@pytest.mark.parametrize("mode", MODES)
def test_masks_and_biases_reach_their_queries(mode: Mode) -> None:
    call = restricted(first=torch.tensor([3, 0]), count=torch.tensor([150, 130]))
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(2, 90, 160, generator=generator) < 0.5
    for heads, queries in ((1, 90), (4, 90), (4, 1)):
        bias = torch.randn(2, heads, queries, 150, generator=generator)
        bias[..., 40:45] = torch.finfo(torch.bfloat16).min
        for seen, added in ((mask, None), (None, bias), (mask[:1], bias[1:])):
            asked = replace(call, query=call.query.float(), causal=False, mask=seen, bias=added)
            assert relative_error(made(mode).attention(asked), truth(asked)) < 1e-5


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("keys", list(CacheFormat))
def test_a_query_reads_its_own_page_as_computed(keys: CacheFormat, mode: Mode) -> None:
    values = CacheFormat(keys - 2) if keys.per_channel else keys
    call = restricted(keys=keys, values=values)
    recent = torch.randn(2, 3, 2, 64, 64, generator=torch.Generator().manual_seed(3)).bfloat16()
    computed = without(scatter(CacheFormat.BF16, [recent], torch.Generator().manual_seed(4)), 0)
    stored = [replace(without(pages, 2), recent=computed) for pages in (call.keys, call.values)]
    found = made(mode).attention(replace(call, keys=stored[0], values=stored[1]))
    for query in (0, 3, 4, 50, 67, 68, 89):
        own, parts = (60 + query) // 64, []
        for pages in (call.keys, call.values):
            whole = torch.stack([dense(pages, s, 192, 2, 64) for s in range(2)])
            if own:
                whole[:, :, own * 64 : own * 64 + 64] = recent[:, own].double()
            parts.append(contiguous_pages(whole))
        alone = replace(rows_of(call, query, query + 1), keys=parts[0], values=parts[1])
        assert relative_error(found[:, query : query + 1], truth(alone)) < (
            FUSED_TOLERANCE if mode is Mode.FAST else TOLERANCE
        )


@pytest.mark.parametrize("shape", [Shape(2, 90, 4, 2, 150, 64), Shape(1, 150, 6, 3, 150, 64)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_kernels_take_heads_and_queries_as_there_is_room(
    shape: Shape, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = random_call(shape, CacheFormat.INT8, CacheFormat.INT4)
    call = replace(call, query=call.query.to(dtype))
    whole = attention_fused(call)
    # One head at a time, and a mask for some hundred of its queries.
    monkeypatch.setattr("tiered.kernels.attention_fused.piece_nbytes", lambda where: 80_000)
    found = attention_fused(call)
    most = 1e-5 if dtype == torch.float32 else FUSED_TOLERANCE
    assert relative_error(found, truth(call)) < most and relative_error(whole, truth(call)) < most


def test_fused_kernels_compute_prompts_and_leave_the_rest_to_ours() -> None:
    assert serves_fused(restricted()) and serves_fused(restricted(window=150))
    assert serves_fused(restricted(first=torch.tensor([60, 0]))), "padding that no query is in"
    others: list[dict[str, Any]] = [{"window": 149}, {"softcap": 3.0}, {"sinks": torch.zeros(4)}, {"causal": False}]
    others += [{"mask": torch.ones(1, 90, 150, dtype=torch.bool)}, {"first": torch.tensor([61, 0])}]
    assert not any(serves_fused(restricted(**more)) for more in others)
    assert not serves_fused(random_call(Shape(2, 1, 4, 2, 150, 64))), "decoding"
    call, none = restricted(), torch.empty(0, dtype=torch.long)
    assert not serves_fused(replace(call, query=call.query[:0], first=none, count=none)), "no sequences"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("more", [{}, {"window": 70}, {"window": 1170}, {"softcap": 3.0}], ids=str)
@pytest.mark.parametrize("slots", [150, 1300])
def test_a_prompt_cut_anywhere_gives_the_bits_of_the_whole(
    slots: int, more: dict[str, Any], dtype: torch.dtype
) -> None:
    call = random_call(Shape(2, 90, 6, 2, slots, 64), CacheFormat.INT4_CHANNEL, CacheFormat.INT8, **more)
    call = replace(call, query=call.query.to(dtype))
    kernels = made()
    whole = kernels.attention(call)
    for cuts in ((0, 1, 2, 31, 90), (0, 45, 90), (0, 64, 89, 90)):
        for start, stop in itertools.pairwise(cuts):
            assert torch.equal(kernels.attention(rows_of(call, start, stop)), whole[:, start:stop]), (start, stop)


def test_neighbours_and_the_places_of_pages_leave_no_trace_in_attention() -> None:
    generator = torch.Generator().manual_seed(5)
    states = torch.randn(3, 2, 256, 64, generator=generator)
    call = random_call(
        Shape(3, 1, 4, 2, 256, 64), first=torch.tensor([0, 37, 150]), count=torch.tensor([256, 200, 170])
    )
    paged = scatter(CacheFormat.BF16, [states.unflatten(2, (4, 64)).transpose(1, 2)], generator)
    kernels = made()
    together = kernels.attention(replace(call, keys=paged, values=paged))
    lying = contiguous_pages(states)
    assert torch.equal(kernels.attention(replace(call, keys=lying, values=lying)), together)
    for s in range(3):
        own = contiguous_pages(states[s : s + 1, :, : int(call.count[s])])
        of = slice(s, s + 1)
        alone = replace(call, query=call.query[of], keys=own, values=own, first=call.first[of], count=call.count[of])
        assert torch.equal(kernels.attention(alone)[0], together[s])


@pytest.mark.parametrize("mode", MODES)
def test_what_no_query_sees_may_be_anything(mode: Mode) -> None:
    call = random_call(Shape(2, 1, 4, 2, 100, 64), first=torch.tensor([70, 3]))
    kernels = made(mode)
    clean = kernels.attention(call)
    for pages, sequence in itertools.product((call.keys, call.values), range(2)):
        for page in range(2):
            numbers = pages.codes.of(pages.table.memory, int(pages.table.offsets[sequence, page]), 2, 64)
            for slot in range(64):
                if not call.first[sequence] <= page * 64 + slot < 100:
                    numbers[:, slot] = math.nan
    assert torch.equal(kernels.attention(call), clean)
    with pytest.raises(AssertionError, match="page 1 is missing"):
        kernels.attention(replace(call, values=without(call.values, 1)))


def test_what_cannot_serve_is_refused_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert made().refusal == "switched off by the name 'torch'"
    with DeviceKernels(HOST) as kernels:
        assert kernels.refusal == "not a CUDA device" and kernels.description == "torch, invariant, cpu"
        assert kernels.serves_attention(torch.zeros(1, 8))
    assert "tiered.kernels.triton_kernels" not in sys.modules
    with pytest.raises(ConfigError, match="'triton': not a CUDA device"):
        DeviceKernels(HOST, name="triton")
    with pytest.raises(ConfigError, match="expected one of auto, triton, torch"):
        DeviceKernels(HOST, name="amx")
    cuda, capability = torch.device("cuda", 0), (7, 5)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda where: capability)
    monkeypatch.setattr(device_kernels, "find_spec", lambda name: None)
    assert "not installed" in str(triton_refusal(cuda))
    monkeypatch.setattr(device_kernels, "find_spec", lambda name: name)
    assert triton_refusal(cuda) is None
    monkeypatch.setattr(device_kernels, "which", lambda name: None)
    assert "C compiler" in str(triton_refusal(cuda))
    capability = (7, 0)
    assert "compute capability 7.0" in str(triton_refusal(cuda))


def test_kernels_that_do_not_run_are_given_up_for_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(name: str) -> None:
        raise OSError("libcuda.so: cannot open\nand so on")

    monkeypatch.setattr(device_kernels, "triton_refusal", lambda where: None)
    monkeypatch.setattr(device_kernels, "import_module", fails)
    case = case_of(GroupScheme(4), torch.bfloat16)
    kernels = DeviceKernels(HOST)
    assert kernels.refusal == "Triton's kernels do not run here: OSError: libcuda.so: cannot open"
    assert torch.equal(kernels.linear(case.x, case.weight), made().linear(case.x, case.weight))
    monkeypatch.setattr(device_kernels, "import_module", lambda name: MagicMock())
    assert DeviceKernels(HOST).refusal == "Triton's kernels give wrong numbers here"


def test_devices_without_bf16_compute_in_fp16() -> None:
    assert device_dtype((7, 5), torch.bfloat16) == torch.float16
    for capability, dtype in (((8, 0), torch.bfloat16), ((7, 5), torch.float32), (None, torch.bfloat16)):
        assert device_dtype(capability, dtype) == dtype


def test_torchs_settings_are_as_they_were_after_a_product() -> None:
    settings = torch.backends.cuda.matmul
    before = settings.allow_fp16_reduced_precision_reduction
    with pytest.raises(ZeroDivisionError), device_kernels._sums_in_float32(torch.device("cuda")):
        assert not settings.allow_fp16_reduced_precision_reduction
        raise ZeroDivisionError
    assert settings.allow_fp16_reduced_precision_reduction == before
