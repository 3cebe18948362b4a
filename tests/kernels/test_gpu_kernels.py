"""Kernels on a CUDA device, where there is one: the numbers, and the same bits in any batch. `pytest -m gpu` runs them.

The other tests of a device's kernels need none: test_device_kernels.py has the torch path, test_triton.py Triton's.
"""

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from tests.kernels.attention_cases import Shape, random_call, relative_error, rows_of
from tests.kernels.native_linear import FORMATS, SCHEMES, Case, random_case
from tests.kernels.native_linear import relative_error as error_of_product
from tiered.kernels import (
    AttentionCall,
    CacheFormat,
    DeviceKernels,
    Mode,
    Pages,
    attention_reference,
    device_dtype,
    device_scratch_nbytes,
)
from tiered.quant import GroupScheme, QuantizedTensor, QuantizedWeight

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

WHERE = torch.device("cuda", 0)
ROUNDING = 2.5e-3
"""Of a result to bf16, and of weights where they are widened to it; errors are relative to the size of factors."""


@pytest.fixture(params=["triton", "torch"])
def name(request: pytest.FixtureRequest) -> str:
    """Both kinds of kernels; skips, saying why, where Triton's do not run."""
    named: str = request.param
    if named == "triton":
        refusal = DeviceKernels(WHERE).refusal
        if refusal is not None:
            pytest.skip(refusal)
    return named


@pytest.fixture(params=list(Mode))
def kernels(name: str, request: pytest.FixtureRequest) -> Iterator[DeviceKernels]:
    with DeviceKernels(WHERE, request.param, name=name) as made:
        yield made


def dtype() -> torch.dtype:
    return device_dtype(torch.cuda.get_device_capability(WHERE), torch.bfloat16)


def case_of(scheme: GroupScheme | None, rows: int, out: int = 300, in_: int = 1024) -> tuple[Case, Case]:
    """A case on the processor, and the same at the device. Its results fit float16."""
    made = random_case(scheme, out, in_ // (scheme.group_size if scheme else 32), rows, torch.float32)
    host = replace(made, x=(made.x.float() / 1024).to(dtype()))
    assert host.bias is not None
    tensors = tuple(tensor.to(WHERE) for tensor in host.tensors)
    return host, replace(host, tensors=tensors, x=host.x.to(WHERE), bias=host.bias.to(WHERE))


def on_device(pages: Pages) -> Pages:
    """The same pages, whose blocks are at the device; offsets stay at the host."""
    recent = None if pages.recent is None else on_device(pages.recent)
    return replace(pages, table=replace(pages.table, memory=pages.table.memory.to(WHERE)), recent=recent)


def call_on_device(call: AttentionCall) -> AttentionCall:
    return replace(call, query=call.query.to(WHERE), keys=on_device(call.keys), values=on_device(call.values))


@pytest.mark.parametrize("rows", [1, 3, 17, 64, 300])
@pytest.mark.parametrize("scheme", FORMATS, ids=str)
def test_products_are_within_rounding_of_the_truth(
    kernels: DeviceKernels, scheme: GroupScheme | None, rows: int
) -> None:
    host, device = case_of(scheme, rows)
    found = kernels.linear(device.x, device.weight, device.bias)
    assert found.device == WHERE and found.dtype == dtype()
    rounds = kernels.mode is Mode.FAST and scheme is not None and scheme.bits == 8
    assert error_of_product(found.cpu(), host.exact(), host) < ROUNDING * (3 if rounds else 1)


@pytest.mark.parametrize("scheme", FORMATS, ids=str)
def test_a_row_alone_has_the_bits_of_the_row_in_any_batch(name: str, scheme: GroupScheme | None) -> None:
    _, device = case_of(scheme, 600, out=1000, in_=4096)
    kernels = DeviceKernels(WHERE, name=name)
    together = kernels.linear(device.x, device.weight, device.bias)
    for rows in (range(1), range(77, 78), range(599, 600), range(5, 22), range(30, 160), range(100, 600)):
        assert torch.equal(kernels.linear(device.x[rows], device.weight, device.bias), together[rows]), rows


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_weights_are_widened_bit_for_bit(kernels: DeviceKernels, scheme: GroupScheme) -> None:
    host, device = case_of(scheme, 1)
    assert isinstance(device.weight, QuantizedWeight) and isinstance(host.weight, QuantizedWeight)
    for wanted in (torch.float16, torch.bfloat16, torch.float32):
        found = kernels.dequantize(device.weight, 7, 290, wanted).cpu()
        assert torch.equal(found, host.weight.rows(7, 290, wanted))


@pytest.mark.parametrize("keys", list(CacheFormat))
@pytest.mark.parametrize("shape", [Shape(5, 1, 8, 2, 1400, 128), Shape(2, 90, 4, 4, 300, 80)], ids=str)
def test_attention_equals_that_of_the_processor(kernels: DeviceKernels, shape: Shape, keys: CacheFormat) -> None:
    values = CacheFormat(keys - 2) if keys.per_channel else keys
    call = random_call(shape, keys, values)
    call = replace(call, query=call.query.float())
    found = kernels.attention(call_on_device(call))
    assert found.device == WHERE
    assert relative_error(found.cpu(), attention_reference(call).double()) < 1e-5


@pytest.mark.parametrize("shape", [Shape(2, 200, 8, 2, 1500, 128), Shape(1, 90, 4, 4, 200, 64)], ids=str)
def test_a_prompt_cut_anywhere_gives_the_bits_of_the_whole(shape: Shape) -> None:
    call = call_on_device(random_call(shape, CacheFormat.INT4_CHANNEL, CacheFormat.INT8))
    kernels = DeviceKernels(WHERE)
    whole = kernels.attention(call)
    for start, stop in itertools.pairwise((0, 1, 2, 31, 64, shape.q_len)):
        assert torch.equal(kernels.attention(rows_of(call, start, stop)), whole[:, start:stop])
    for s in range(shape.sequences):
        of = slice(s, s + 1)
        pages = [
            replace(side, table=replace(side.table, offsets=side.table.offsets[of]))
            for side in (call.keys, call.values)
        ]
        alone = replace(
            call, query=call.query[of], keys=pages[0], values=pages[1], first=call.first[of], count=call.count[of]
        )
        assert torch.equal(kernels.attention(alone)[0], whole[s])


def test_a_layer_of_ordinary_size_stays_within_the_scratch_memory_that_is_named(kernels: DeviceKernels) -> None:
    scheme = GroupScheme(4)
    parts = (scheme.q_shape, scheme.scale_shape, scheme.zero_shape)
    q, scale, zero = (torch.zeros(shape(11008, 4096), dtype=torch.uint8, device=WHERE) for shape in parts)
    weight = QuantizedWeight(QuantizedTensor(q, scale.half(), zero), scheme)
    x = torch.ones(512, 4096, dtype=dtype(), device=WHERE)
    torch.cuda.reset_peak_memory_stats(WHERE)
    before = torch.cuda.memory_allocated(WHERE)
    y = kernels.linear(x, weight)
    torch.cuda.synchronize(WHERE)
    # cuBLAS has a workspace of its own, which torch allocates once.
    assert torch.cuda.max_memory_allocated(WHERE) - before - y.nbytes < device_scratch_nbytes() + (64 << 20)
