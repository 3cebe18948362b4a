"""`Kernels`: the operations on stored weights and caches, by the fastest means this machine has.

In: tensors of torch and views of stored codes. Out: torch tensors. A host owns one `Kernels`, with its threads, and
runtimes hand it to the modules that compute. Where the native library cannot serve (not built, another dtype or
device), the torch reference does, with the same results up to rounding.
"""

import ctypes
from ctypes import c_int64
from enum import Enum
from types import TracebackType
from typing import Final, Literal, Self

import torch

from tiered.errors import CheckpointError, ConfigError, InterruptedRun
from tiered.kernels import quantize_native, reference
from tiered.kernels.attention import AttentionCall
from tiered.kernels.attention_native import NativeCall, serves, shared_out
from tiered.kernels.attention_torch import attention_reference
from tiered.kernels.by_head import by_head_reference
from tiered.kernels.cancel import CancelFlag
from tiered.kernels.library import Dtype, Format, Level, Library, Status, WeightArgument, load_library
from tiered.kernels.published import CodedRows
from tiered.kernels.recurrent import Recurrent
from tiered.quant import E8M0, CodebookScheme, GroupScheme, QuantizedTensor, QuantizedWeight, Scheme, quantize
from tiered.quant.quantize import PANEL_BYTES, out_of_range

_DTYPES: Final = {torch.bfloat16: Dtype.BF16, torch.float32: Dtype.F32}
_SCALES: Final = {torch.float16: Dtype.F16, torch.float32: Dtype.F32, E8M0: Dtype.E8M0}
_DENSE_MULTIPLE: Final = 32
"""`in` of an unquantized weight must be a multiple of this for the native kernels."""


class Mode(Enum):
    """Which kernels may serve."""

    INVARIANT = "invariant"
    """A row's result is the same bits alone, in any batch, at any number of threads."""
    FAST = "fast"
    """The fastest kernel for each number of rows, which may round activations to 8 bits per group."""


_THREAD_SCRATCH_NBYTES: Final = 2 << 20
"""Bytes of one native thread at most: sums of a panel of rows for 256 tokens, and widened weights."""
_NUMBERS_NBYTES: Final = 256 << 10
"""Of numbers that codes stand for, made to be quantized natively: they stay in a core's cache."""
_PACKED_NBYTES: Final = 4.5
"""Bytes per activation packed for a native kernel: float32 below AMX, or 16 bits, sums and rounded-up blocks."""


def scratch_nbytes(threads: int) -> int:
    """An upper bound on what a kernel holds besides its result and its packed activations."""
    return max(reference.scratch_nbytes(), threads * _THREAD_SCRATCH_NBYTES)


def packed_row_nbytes(in_features: int) -> int:
    """An upper bound on what a kernel holds per row of activations besides its result."""
    return int(in_features * _PACKED_NBYTES) + 4096


KERNEL_NAMES: Final = ("auto", "torch", *(level.name.lower() for level in Level))
"""What `Kernels(name=...)` accepts: the best there is, the torch reference, or one instruction set."""


class Kernels:
    """Kernels with their threads. A context manager; leaving it ends the threads.

    For one thread at a time. Raises ConfigError where `name` asks for what this machine cannot run.
    """

    def __init__(
        self, threads: int, cancel: CancelFlag | None = None, mode: Mode = Mode.INVARIANT, name: str = "auto"
    ) -> None:
        if name not in KERNEL_NAMES:
            raise ConfigError(f"kernels {name!r}: expected one of {', '.join(KERNEL_NAMES)}")
        self.threads, self.mode = threads, mode
        self.refusal: str | None = None
        """Why the torch reference computes; None where the native library does."""
        self.level: Level | None = None
        self._cancel = cancel if cancel is not None else CancelFlag()
        self._library: Library | None = None
        self._context: int | None = None
        library = "switched off by the name 'torch'" if name == "torch" else load_library()
        if isinstance(library, str):
            if name not in ("auto", "torch"):
                raise ConfigError(f"kernels {name!r}: {library}")
            self.refusal = library
            return
        level = library.best_level() if name == "auto" else Level[name.upper()]
        refusal = library.refusal(level)
        if refusal is not None:
            raise ConfigError(f"kernels {name!r}: {refusal}; name another, or leave it to 'auto'")
        self._context = library.tk_create(threads, int(level))
        if self._context is None:
            raise ConfigError(f"kernels: {threads} threads could not be started; lower --threads")
        self._library, self.level = library, level

    @property
    def description(self) -> str:
        """What computes, in a few words."""
        by = "torch" if self.level is None else f"{self.level.name.lower()}, {self.mode.value}"
        return f"{by}, {self.threads} thread{'' if self.threads == 1 else 's'}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the threads and give their memory back; the torch reference serves afterwards."""
        if self._library is not None and self._context is not None:
            self._library.tk_destroy(self._context)
        self._library = self._context = None
        self.refusal = self.refusal or "closed"

    def linear(
        self, x: torch.Tensor, weight: torch.Tensor | QuantizedWeight, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x [..., in] times weight [out, in] transposed, plus bias [out]: [..., out] in x's dtype.

        `weight` may be of another dtype than x, or quantized. Raises InterruptedRun once the cancel flag is set.
        """
        argument = self._native_weight(x, weight)
        if argument is None:
            return reference.linear(x, weight, bias, self._cancel, self.dequantize)
        assert self._library is not None
        out, in_ = argument.out, argument.in_
        rows = as_rows(x, in_)
        if bias is not None and bias.dtype not in _DTYPES:
            bias = bias.to(torch.float32)
        y = x.new_empty((*x.shape[:-1], out))
        status = self._library.tk_linear(
            self._context,
            argument,
            rows.data_ptr(),
            rows.shape[0],
            rows.stride(0),
            None if bias is None else bias.data_ptr(),
            Dtype.BF16 if bias is None else _DTYPES[bias.dtype],
            y.data_ptr(),
            out,
            Dtype.BF16,
            0 if self.mode is Mode.INVARIANT else 1,
            self._cancel.address,
        )
        _check(status)
        return y

    def dequantize(self, weight: QuantizedWeight, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        """What `weight.rows` returns, bit for bit: rows start..stop as [stop - start, in] of `dtype`."""
        if self._library is None or weight.codes.q.device.type != "cpu":
            return weight.rows(start, stop, dtype)
        rows = torch.empty(stop - start, weight.shape[1], dtype=dtype if dtype in _DTYPES else torch.float32)
        argument = quantized_argument(weight)
        _check(
            self._library.tk_dequantize(
                self._context, argument, start, stop - start, rows.data_ptr(), _DTYPES[rows.dtype]
            )
        )
        return rows.to(dtype)

    def attention(self, call: AttentionCall) -> torch.Tensor:
        """[sequences, q_len, q_heads, head_dim] in the query's dtype; 0 for queries that see no key.

        With the native library a result is a function of its query and of the keys it sees, in their order, bit for
        bit: padding, micro-batches, neighbours and other branches of a tree leave no trace. Raises InterruptedRun once
        the cancel flag is set.
        """
        if not self.serves_attention(call.query):
            return attention_reference(call, self._cancel)
        call, pieces = shared_out(call)
        out = torch.empty(call.query.shape, dtype=call.query.dtype)
        native = NativeCall(call, out)
        self._call("tk_attention", native.arguments)
        return out.unflatten(0, (-1, pieces)).transpose(1, 2).flatten(2, 3) if pieces > 1 else out

    def by_head(self, x: torch.Tensor, w: torch.Tensor, transposed: bool) -> torch.Tensor:
        """x [tokens, heads, rows] times w [heads, rows, in], in x's dtype: [tokens, heads, in]. Not `transposed`: x
        [tokens, heads, in] times every w transposed: [tokens, heads, rows].

        With the native library (x of bfloat16, w of float32) a result is the same bits whatever else is computed with
        it. Raises InterruptedRun once the cancel flag is set.
        """
        self._cancel.check()
        if self._library is None or x.dtype != torch.bfloat16 or w.dtype != torch.float32 or x.device.type != "cpu":
            return by_head_reference(x, w, transposed)
        heads, rows, in_ = w.shape
        x = x if x.stride(-1) == 1 else x.contiguous()
        y = x.new_empty(len(x), heads, in_ if transposed else rows)
        strides = [(c_int64 * 2)(*tensor.stride()[:2]) for tensor in (x, y)]
        assert w.stride()[1:] == (in_, 1), "matrices of heads have gaps inside"
        matrix = w.data_ptr(), heads, rows, in_, w.stride(0), int(transposed)
        of_x, of_y = (x.data_ptr(), len(x), strides[0]), (y.data_ptr(), strides[1])
        _check(self._library.tk_by_head(self._context, *matrix, *of_x, *of_y, self._cancel.address))
        return y

    @property
    def recurrent(self) -> Recurrent | None:
        """Computes what recurrent layers do beside their products; None: the families' own code does."""
        return None if self._library is None else Recurrent(self._call)

    def quantize(
        self,
        weight: torch.Tensor | CodedRows,
        scheme: Scheme,
        *,
        clip: Literal["mse", "minmax"] = "mse",
        name: str = "weight",
        out: torch.Tensor | None = None,
    ) -> QuantizedTensor:
        """Returns and raises what `tiered.quant.quantize` does, bit for bit, of the weight or of the numbers that its
        codes stand for; InterruptedRun once the flag is set. What the native library makes is in the memory `out`, u8,
        if that is large enough."""
        self._cancel.check()
        if self._library is None or not quantize_native.serves(weight, scheme, clip):
            if isinstance(weight, CodedRows):
                return self._quantize_numbers(weight, scheme, clip, name, out)
            return quantize(weight.detach(), scheme, clip=clip, name=name)
        rows, columns = weight.shape
        codes = quantize_native.empty_codes(rows, columns, scheme, out)
        call = quantize_native.QuantizeCall(weight, scheme, clip, codes)
        status = self._library.tk_quantize(self._context, *call.arguments, self._cancel.address)
        if status == Status.NOT_FINITE:
            raise out_of_range(weight.numbers() if isinstance(weight, CodedRows) else weight.detach(), scheme, name)
        _check(status)
        return codes

    def _quantize_numbers(
        self, weight: CodedRows, scheme: Scheme, clip: Literal["mse", "minmax"], name: str, out: torch.Tensor | None
    ) -> QuantizedTensor:
        """`quantize` of codes that the native library does not look up as it quantizes: a few rows at a time are
        numbers, by whatever quantizes these."""
        rows, columns = weight.shape
        codes = quantize_native.empty_codes(rows, columns, scheme, out)
        is_native = self.quantizes(torch.float32, scheme)
        step = max(1, (_NUMBERS_NBYTES if is_native else PANEL_BYTES) // (4 * columns))
        room = torch.empty(4 * columns * min(step, rows), dtype=torch.uint8)
        for start in range(0, rows, step):
            some = slice(start, start + step)
            try:
                found = self.quantize(weight.rows(some).numbers(room), scheme, clip=clip, name=name)
            except CheckpointError:  # which counts these rows only
                raise out_of_range(weight.numbers(), scheme, name) from None
            for part, made in zip(codes, found, strict=True):
                part[some] = made
        return codes

    def quantizes(self, dtype: torch.dtype, scheme: Scheme) -> bool:
        """Whether `quantize` runs natively on weights of `dtype`, on all threads and without temporaries."""
        return self._library is not None and dtype in quantize_native.DTYPES and isinstance(scheme, GroupScheme)

    def serves_attention(self, query: torch.Tensor) -> bool:
        """Whether the native library computes attention for such queries [..., head_dim]; else the reference does."""
        return self._library is not None and serves(self.level, query)

    def _call(self, name: str, arguments: ctypes.Structure) -> None:
        """Call the library's function `name`, which takes a structure. Raises InterruptedRun once the flag is set."""
        assert self._library is not None
        _check(getattr(self._library, name)(self._context, ctypes.byref(arguments), self._cancel.address))

    def _native_weight(self, x: torch.Tensor, weight: torch.Tensor | QuantizedWeight) -> WeightArgument | None:
        """`weight` as the library takes it; None where it cannot serve."""
        if self._library is None or x.dtype != torch.bfloat16 or x.device.type != "cpu" or x.shape[-1] == 0:
            return None
        if isinstance(weight, QuantizedWeight):
            return quantized_argument(weight)
        out, in_ = weight.shape
        if weight.dtype != torch.bfloat16 or in_ % _DENSE_MULTIPLE or not weight.is_contiguous():
            return None
        return WeightArgument(Format.DENSE_BF16, 0, out, in_, weight.data_ptr(), None, None)


def quantized_argument(weight: QuantizedWeight) -> WeightArgument:
    """`weight` as the library takes it; the weight's memory must outlive it."""
    known: WeightArgument | None = weight.prepared.get("native")
    if known is not None:
        return known
    q, scale, zero = weight.codes
    assert q.is_contiguous() and scale.is_contiguous() and zero.is_contiguous()
    scheme = weight.scheme
    shape, pointers = (scheme.group_size, *weight.shape), (q.data_ptr(), scale.data_ptr())
    if isinstance(scheme, CodebookScheme):
        values = scheme.values.table(q.device).data_ptr()  # which is kept for good
        argument = WeightArgument(Format.CODEBOOK, *shape, *pointers, None, values, _SCALES[scheme.scale_dtype])
    else:
        argument = WeightArgument(Format.INT4 if scheme.bits == 4 else Format.INT8, *shape, *pointers, zero.data_ptr())
    weight.prepared["native"] = argument
    return argument


def as_rows(x: torch.Tensor, in_: int) -> torch.Tensor:
    """x as a matrix [rows, in] whose rows are contiguous; copied only where it must be."""
    if x.shape[-1] != in_:
        raise ConfigError(f"linear: x of {list(x.shape)}, expected [..., {in_}]")
    rows = x.reshape(-1, in_)
    return rows if rows.stride(-1) == 1 and (rows.shape[0] < 2 or rows.stride(0) >= in_) else rows.contiguous()


def _check(status: int) -> None:
    if status == Status.OK:
        return
    if status == Status.CANCELLED:
        raise InterruptedRun("interrupted")
    if status == Status.NO_MEMORY:
        raise MemoryError("a native kernel could not get its scratch memory")
    raise AssertionError(f"a native kernel refused its arguments: {Status(status).name}")
