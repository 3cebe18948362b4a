"""Native quantization: the bits of `tiered.quant.quantize`, its errors, at every level and number of threads."""

import ctypes
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.native_linear import context, require, seconds_until_ended
from tests.quick import examples
from tests.warm import call_warm
from tiered.convert.workers import one_torch_thread
from tiered.errors import CheckpointError, ConfigError, InterruptedRun
from tiered.kernels import CancelFlag, CodedRows, Kernels, Level
from tiered.kernels.library import Dtype, LookupArgument, Status
from tiered.quant import GroupScheme, QuantizedTensor, quantize
from tiered.quant.published import widened

pytestmark = pytest.mark.inputs("tiered/kernels", "tiered/quant", "tests/kernels")

Clip = Literal["mse", "minmax"]
CLIPS: tuple[Clip, ...] = ("mse", "minmax")
SCHEMES = [GroupScheme(bits, group_size) for bits in (4, 8) for group_size in (32, 64, 128)]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LEVELS = pytest.mark.parametrize("level", Level, ids=lambda level: level.name)

# Zeros of both signs, the least numbers of every dtype, halves of the least scale, what just fits a scale and what
# just does not, and what is no number.
SPECIAL = [0.0, -0.0, 1e-45, -1e-45, 1e-40, 2.0**-126, 2.0**-25, 2.0**-24, -(2.0**-24), 1.5 * 2**-24, 6.1e-5]
SPECIAL += [0.5, -0.5, 1.0, -1.0, 1.5, -2.5, 7.5, 15.0, -15.0, 255.0, 65504.0 * 15, -65504.0 * 15, 65504.0 * 255]
NO_NUMBERS = [float("nan"), float("inf"), float("-inf"), 3e38, -3e38]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The reference on small weights: with more threads it is slower."""
    with one_torch_thread():
        yield


def kernels(level: Level, threads: int = 1, cancel: CancelFlag | None = None) -> Kernels:
    require(level)
    return Kernels(threads, cancel, name=level.name.lower())


def weights(rows: int, columns: int, seed: int = 0, magnitude: float = 0.02) -> torch.Tensor:
    """Heavy-tailed; one row in five has one sign only, one is zero."""
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    values *= (1 + values.abs()) * magnitude
    values[1::5] = values[1::5].abs()
    values[2::5] = -values[2::5].abs()
    values[3::5] = 0
    return values


def outcome(call: Callable[[], QuantizedTensor]) -> list[list[int]] | str:
    """The bytes of q, scale and zero, or the error's message."""
    try:
        return [tensor.view(torch.uint8).flatten().tolist() for tensor in call()]
    except (CheckpointError, ConfigError) as error:
        return str(error)


def assert_equal(found: QuantizedTensor, expected: QuantizedTensor) -> None:
    for name, one, other in zip(found._fields, found, expected, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape, name
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8)), name


@LEVELS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_every_bit_is_the_references(scheme: GroupScheme, dtype: torch.dtype, level: Level) -> None:
    with kernels(level) as native:
        assert native.quantizes(dtype, scheme)
        for rows, groups in ((1, 1), (1, 16), (3, 5), (7, 9), (33, 2), (64, 33)):
            for clip in CLIPS:
                for magnitude in (0.02, 1e-6, 1e-8, 300.0):
                    weight = weights(rows, groups * scheme.group_size, rows, magnitude).to(dtype)
                    assert_equal(native.quantize(weight, scheme, clip=clip), quantize(weight, scheme, clip=clip))


def coded_rows(kind: str, rows: int, columns: int) -> CodedRows:
    """Codes of a table of this `kind`, all of them where there is room, with scales of either sign."""
    generator = torch.Generator().manual_seed(rows)
    table_of, per = kind.split("/")
    count = 16 if table_of == "nibbles" else 256
    codes = torch.randperm(count * (1 + rows * columns // count), generator=generator)[: rows * columns] % count
    if table_of.startswith("float8"):
        table = torch.arange(256).to(torch.uint8).view(getattr(torch, table_of)).float()
        codes[~table[codes].isfinite()] = 1
    else:
        table = torch.randn(count, generator=generator) if table_of == "nibbles" else torch.arange(256.0)
    codes = codes.to(torch.uint8).view(rows, columns)
    if count == 16:
        codes = codes[:, ::2] | codes[:, 1::2] << 4
    groups: int | torch.Tensor = columns if per in ("row", "any") else int(per)
    if per == "any":
        groups = torch.randint(0, 5, (columns,), generator=generator)
    n = 5 if isinstance(groups, torch.Tensor) else -(-columns // groups)
    scale = torch.randn(rows, n, generator=generator) / 100
    zero = torch.randint(0, 256, (rows, n), generator=generator).float() if table_of == "integers" else None
    return CodedRows(codes, table, scale, zero, groups)


CODED = ["float8_e4m3fn/128", "float8_e4m3fn/row", "float8_e4m3fn/32", "float8_e5m2/128", "float8_e4m3fnuz/64"]
CODED += ["nibbles/16", "nibbles/32", "integers/128", "integers/row", "float8_e4m3fn/96", "integers/any"]


@LEVELS
@pytest.mark.parametrize("kind", CODED)
def test_codes_are_quantized_as_the_numbers_that_they_stand_for(kind: str, level: Level) -> None:
    """Looked up group by group, or, where no native kernel takes such groups, made numbers first."""
    with kernels(level) as native, Kernels(1, name="torch") as reference:
        for scheme in SCHEMES:
            for rows, columns in ((1, 128), (3, 384), (19, 128)):
                coded = coded_rows(kind, rows, columns)
                numbers = widened(coded.codes, coded.table, coded.scale, coded.zero, coded.groups)
                expected = quantize(numbers, scheme)
                assert_equal(native.quantize(coded, scheme), expected)
                assert_equal(reference.quantize(coded, scheme), expected)
                some = slice(rows // 2, None, 3)
                found = native.quantize(coded.rows(some), scheme)
                assert_equal(found, QuantizedTensor(*(part[some] for part in expected)))


@LEVELS
@pytest.mark.parametrize("kind", ["integers/any", "float8_e4m3fn/96"])  # act-order; groups of no power of two
def test_codes_in_any_groups_are_quantized_natively(kind: str, level: Level, monkeypatch: pytest.MonkeyPatch) -> None:
    coded, scheme = coded_rows(kind, 700, 384), GroupScheme(4)
    expected = quantize(coded.numbers(), scheme)

    def fail(*_: object, **__: object) -> None:
        pytest.fail("the reference quantizes")

    monkeypatch.setattr("tiered.kernels.kernels.quantize", fail)
    out = torch.zeros(700 * 384, dtype=torch.uint8)
    with kernels(level) as native:
        found = native.quantize(coded, scheme, out=out)
    assert_equal(found, expected)
    assert found.q.data_ptr() == out.data_ptr()


@LEVELS
@pytest.mark.parametrize("kind", ["float8_e4m3fn/128", "float8_e4m3fn/96"])
def test_errors_of_codes_count_all_of_their_numbers(kind: str, level: Level) -> None:
    coded, scheme = coded_rows(kind, 700, 384), GroupScheme(8)
    coded.codes.view(-1)[[5, 200_000]] = 0xFF
    with kernels(level) as native:
        found = outcome(partial(native.quantize, coded, scheme))
    assert isinstance(found, str) and "found 2 of 268,800 that are NaN" in found


@LEVELS
def test_a_code_or_a_scale_that_is_no_number_is_the_references_error(level: Level) -> None:
    for place in (0, 5000):
        coded, scheme = coded_rows("float8_e4m3fn/128", 40, 512), GroupScheme(8)
        coded.codes.view(-1)[place] = 0xFF
        with kernels(level) as native:
            found = outcome(partial(native.quantize, coded, scheme, name="fc1.weight"))
        assert isinstance(found, str) and "found 1 of 20,480 that are NaN" in found
        assert found == outcome(partial(quantize, coded.numbers(), scheme, name="fc1.weight"))
    coded = coded_rows("float8_e4m3fn/128", 40, 512)
    coded.scale[7, 1] = torch.inf
    with kernels(level) as native:
        assert "that are NaN or infinite" in str(outcome(partial(native.quantize, coded, GroupScheme(8))))


def test_scales_of_other_groups_than_the_columns_have_are_an_error() -> None:
    codes, table = torch.zeros(4, 256, dtype=torch.uint8), torch.ones(256)
    for scale in (torch.ones(4, 3), torch.ones(3, 2), torch.ones(4, 1)):
        with pytest.raises(ValueError, match="4 rows and 2 groups"):
            CodedRows(codes, table, scale, None, 128)
    with pytest.raises(ValueError, match="found"):
        CodedRows(codes, table, torch.ones(4, 2), torch.ones(4, 1), 128)


@LEVELS
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_errors_are_added_in_the_documented_order(group_size: int, level: Level) -> None:
    """Groups in which rounding, and so the order of additions, decides between two clip factors.

    All factors give the least scale, and zeros of 8 or 7; each of them cuts off one of two opposite weights, by as much
    as the other does the other. In any other order of additions some 100 of the 2000 choices change.
    """
    generator = torch.Generator().manual_seed(0)
    steps = torch.rand(2000, group_size, generator=generator) * 14 - 7
    peak = 7.5 + torch.rand(2000, generator=generator) * 0.15
    places = torch.rand(2000, group_size, generator=generator).argsort(1)[:, :2]
    weight = steps.scatter(1, places, torch.stack([peak, -peak], 1)) * 2.0**-24
    expected = quantize(weight, GroupScheme(4, group_size))
    assert expected.zero.unique().tolist() == [7, 8]
    with kernels(level) as native:
        assert_equal(native.quantize(weight, GroupScheme(4, group_size)), expected)


@LEVELS
@examples(150)
@given(
    values=st.lists(st.sampled_from(SPECIAL) | st.floats(-9e5, 9e5, width=32), min_size=1, max_size=40),
    broken=st.lists(st.tuples(st.integers(0, 10_000), st.sampled_from(NO_NUMBERS)), max_size=2),
    scheme=st.sampled_from(SCHEMES),
    dtype=st.sampled_from(DTYPES),
    clip=st.sampled_from(CLIPS),
    groups=st.integers(1, 21),
)
def test_no_values_make_a_difference(
    values: list[float],
    broken: list[tuple[int, float]],
    scheme: GroupScheme,
    dtype: torch.dtype,
    clip: Clip,
    groups: int,
    level: Level,
) -> None:
    numel = groups * scheme.group_size
    flat = torch.tensor(values).repeat(-(-numel // len(values)))[:numel]
    for place, value in broken:
        flat[place % numel] = value
    weight = flat.view(-1, scheme.group_size * (3 if groups % 3 == 0 else 1)).to(dtype)
    with kernels(level) as native:
        found = outcome(lambda: native.quantize(weight, scheme, clip=clip, name="fc1.weight"))
    assert found == outcome(lambda: quantize(weight, scheme, clip=clip, name="fc1.weight"))


@LEVELS
@pytest.mark.parametrize("value", [*NO_NUMBERS, 65504.0 * 15.01])
def test_one_bad_weight_anywhere_is_the_references_error(value: float, level: Level) -> None:
    for place in (0, 63, 64 * 17 + 5, -1):
        weight, scheme = weights(40, 512), GroupScheme(4)
        weight.view(-1)[place] = value
        with kernels(level, 2) as native:
            found = outcome(partial(native.quantize, weight, scheme, name="fc1.weight"))
        assert isinstance(found, str) and found.startswith("fc1.weight: expected")
        assert found == outcome(partial(quantize, weight, scheme, name="fc1.weight"))


@LEVELS
@pytest.mark.parametrize("scheme", [GroupScheme(4), GroupScheme(8, 32)], ids=lambda scheme: scheme.name)
def test_threads_change_nothing(scheme: GroupScheme, level: Level) -> None:
    weight = weights(400, 1024).bfloat16()
    expected = quantize(weight, scheme)
    for threads in (1, 2, 3):
        with kernels(level, threads) as native:
            assert_equal(native.quantize(weight, scheme), expected)


@LEVELS
def test_a_slice_is_quantized_as_its_copy(level: Level) -> None:
    scheme, wide = GroupScheme(4, 32), weights(50, 320)
    slices = [wide[5:], wide[:, 64:160], wide[3:4, 32:64], wide[::3], wide.t()[:, :32], wide[:1].expand(7, 320)]
    slices += [torch.nn.Parameter(wide), wide.double()]
    with kernels(level) as native:
        for part in slices:
            assert_equal(native.quantize(part, scheme), quantize(part.detach().clone(), scheme))


@LEVELS
def test_bad_arguments_are_the_references_errors(level: Level) -> None:
    calls: list[tuple[torch.Tensor, str]] = [
        (weights(2, 64), "median"),
        (weights(2, 100), "mse"),
        (torch.zeros(0, 64), "mse"),
        (torch.zeros(2, 64, dtype=torch.int64), "mse"),
        (torch.zeros(64), "mse"),
    ]
    with kernels(level) as native:
        for weight, clip in calls:
            found = outcome(lambda: native.quantize(weight, GroupScheme(4), clip=clip))  # type: ignore[arg-type] # noqa: B023
            assert isinstance(found, str)
            assert found == outcome(lambda: quantize(weight, GroupScheme(4), clip=clip))  # type: ignore[arg-type] # noqa: B023


def test_without_the_library_torch_quantizes() -> None:
    weight, scheme = weights(5, 128), GroupScheme(4)
    with Kernels(1, name="torch") as reference:
        assert not reference.quantizes(weight.dtype, scheme)
        assert_equal(reference.quantize(weight, scheme), quantize(weight, scheme))


@LEVELS
def test_a_set_flag_ends_it_at_once(level: Level) -> None:
    flag, weight = CancelFlag(), weights(8, 128)
    with kernels(level, 2, flag) as native:
        flag.set()
        with pytest.raises(InterruptedRun):
            native.quantize(weight, GroupScheme(4))
        flag.clear()
        assert_equal(native.quantize(weight, GroupScheme(4)), quantize(weight, GroupScheme(4)))


@pytest.mark.parametrize("threads", [1, 2])
def test_a_flag_set_on_the_way_ends_it_soon(threads: int) -> None:
    flag = CancelFlag()
    weight = torch.zeros(20_000, 4096, dtype=torch.bfloat16)  # 0.6 s on one thread of the portable kernel, at least
    with kernels(Level.SCALAR, threads, flag) as native:
        assert seconds_until_ended(lambda: native.quantize(weight, GroupScheme(4)), flag) < 0.4


@LEVELS
def test_arguments_that_make_no_sense_are_refused(level: Level) -> None:
    library = require(level)
    w, q, scale, zero = torch.zeros(2, 64), *QuantizedTensor(*map(torch.zeros, ((2, 32), (2, 1), (2, 1))))
    good = (w.data_ptr(), Dtype.F32, 2, 64, 64, 4, 64, 1, q.data_ptr(), scale.data_ptr(), zero.data_ptr(), None, None)
    with context(level, 1) as made:
        assert library.tk_quantize(made, *good) == Status.OK
        table, ones = torch.zeros(256), torch.ones(2)
        lookup = LookupArgument(table.data_ptr(), ones.data_ptr(), None, 1, 64)
        codes = (q.data_ptr(), Dtype.CODE8, 2, 64, 64, *good[5:11])
        assert library.tk_quantize(made, *codes, lookup, None) == Status.OK
        assert library.tk_quantize(made, *good[:11], lookup, None) == Status.BAD_ARGUMENT
        assert library.tk_quantize(made, *codes, None, None) == Status.BAD_ARGUMENT
        for groups, group in ((2, 64), (3, 32), (8, 8), (0, 64), (2, 48)):
            lookup = LookupArgument(table.data_ptr(), ones.data_ptr(), None, groups, group)
            assert library.tk_quantize(made, *codes, lookup, None) == Status.BAD_ARGUMENT, (groups, group)
        changes = [(0, None), (1, 7), (2, -1), (3, 96), (3, 0), (4, 63), (5, 3), (6, 16), (7, 2), (8, None), (10, None)]
        for index, value in changes:
            bad = (*good[:index], value, *good[index + 1 :])
            assert library.tk_quantize(made, *bad) == Status.BAD_ARGUMENT, index
        assert library.tk_quantize(made, None, Dtype.F32, 0, *good[3:]) == Status.OK


GUARDED = """
import ctypes, mmap
import torch
from tiered.kernels.library import load_library
from tiered.kernels.quantize_native import DTYPES
from tiered.quant import GroupScheme, quantize

libc = ctypes.CDLL(None, use_errno=True)
kept = []

def guarded(nbytes):
    "The address of `nbytes` bytes whose next one cannot be touched."
    room = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, room + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert libc.mprotect(ctypes.c_void_p(start + room), mmap.PAGESIZE, 0) == 0
    kept.append(memory)
    return start + room - nbytes

library = load_library()
made = library.tk_create(2, level)
for bits in (4, 8):
    for group in (32, 64, 128):
        scheme = GroupScheme(bits, group)
        for dtype in DTYPES:
            for rows, groups, gap in ((1, 1, 0), (1, 17, 0), (5, 3, 7), (67, 1, 0)):
                wide = torch.randn(rows, groups * group + gap).to(dtype)
                weight = wide[:, : groups * group]
                expected = quantize(weight, scheme)
                nbytes = (wide.numel() - gap) * wide.itemsize  # the last row's gap is not ours to read
                source = guarded(nbytes)
                ctypes.memmove(source, wide.data_ptr(), nbytes)
                outputs = [guarded(part.nbytes) for part in expected]
                what = (source, DTYPES[dtype], rows, groups * group, wide.shape[1], bits, group, 1)
                assert library.tk_quantize(made, *what, *outputs, None, None) == 0
                for part, output in zip(expected, outputs):
                    assert ctypes.string_at(output, part.nbytes) == part.view(torch.uint8).numpy().tobytes()
print("done")
"""


@LEVELS
def test_nothing_is_touched_past_a_buffers_end(level: Level, tmp_path: Path) -> None:
    require(level)
    done = call_warm(tmp_path, exec, GUARDED, {"level": int(level)})
    assert (done.code, done.out) == (0, "done\n"), done.err


@LEVELS
def test_buffers_need_no_alignment(level: Level) -> None:
    library, scheme, weight = require(level), GroupScheme(4), weights(3, 192).bfloat16()
    expected = quantize(weight, scheme)
    source = ctypes.create_string_buffer(weight.nbytes + 1)
    ctypes.memmove(ctypes.addressof(source) + 1, weight.data_ptr(), weight.nbytes)
    outputs = [ctypes.create_string_buffer(part.nbytes + 1) for part in expected]
    addresses = [ctypes.addressof(output) + 1 for output in outputs]
    with context(level, 1) as made:
        what = (ctypes.addressof(source) + 1, Dtype.BF16, 3, 192, 192, 4, 64, 1)
        assert library.tk_quantize(made, *what, *addresses, None, None) == Status.OK
    for part, output in zip(expected, outputs, strict=True):
        assert output.raw[1 : 1 + part.nbytes] == part.view(torch.uint8).numpy().tobytes()
