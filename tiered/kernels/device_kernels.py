"""`DeviceKernels`: the operations of `Kernels` on a device's own memory.

In: tensors and views of stored codes that lie at the device. Out: tensors there. Modules do not know which of the two
they hold. Triton's kernels serve where they can (`triton_kernels.py`), and plain torch elsewhere (`linear_torch.py`),
the processor that emulates a device included; `refusal` says why. Triton is imported only to serve.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import import_module
from importlib.util import find_spec
from shutil import which
from types import ModuleType, TracebackType
from typing import Final, Self

import torch

from tiered.errors import ConfigError
from tiered.kernels.attention import AttentionCall
from tiered.kernels.attention_fused import attention_fused, serves_fused
from tiered.kernels.attention_torch import attention_nbytes, attention_reference
from tiered.kernels.by_head import by_head_reference
from tiered.kernels.cancel import CancelFlag
from tiered.kernels.kernels import Mode, as_rows
from tiered.kernels.linear_torch import (
    DEVICE_SIZES,
    HOST_SIZES,
    Weight,
    linear_in_tiles,
    round_activations,
    widen_in_torch,
)
from tiered.quant import GroupScheme, QuantizedTensor, QuantizedWeight, quantize

DEVICE_KERNEL_NAMES: Final = ("auto", "triton", "torch")
_LEAST_CAPABILITY: Final = (7, 5)
_BF16_CAPABILITY: Final = (8, 0)
"""From here on tensor cores take bf16, and Triton uses them at all: below, its products run on plain cores."""
_FEW_ROWS: Final = 64
"""`fast` multiplies more rows than these by cuBLAS, with weights widened once for all of them."""
_FEWEST_ROWS: Final = 4
"""The same where Triton does not use tensor cores."""
_ROUNDED_NBYTES: Final = 8 << 20
"""Of temporaries while activations are rounded to 8 bits."""
_ROUNDING_NBYTES: Final = 16
"""Per activation: float32 copies, and codes."""
_HALVES: Final = (torch.float16, torch.bfloat16)


def device_scratch_nbytes() -> int:
    """An upper bound on what `DeviceKernels` holds at its device besides results, whatever the sizes of layers."""
    products = DEVICE_SIZES.passing_nbytes + _ROUNDED_NBYTES
    return DEVICE_SIZES.kept_nbytes + max(products, attention_nbytes(torch.device("cuda")))


def device_dtype(capability: tuple[int, int] | None, wanted: torch.dtype) -> torch.dtype:
    """The dtype in which a device of this compute capability computes what the graph has in `wanted`.

    float16 for bfloat16 where tensor cores take none (Triton and torch would emulate it). None: no CUDA device.
    """
    lacks = capability is not None and capability < _BF16_CAPABILITY
    return torch.float16 if lacks and wanted == torch.bfloat16 else wanted


def triton_refusal(where: torch.device | None) -> str | None:
    """Why Triton's kernels cannot serve a device (None: any); None if they might. Imports nothing."""
    if where is not None and not _is_interpreting():
        if where.type != "cuda":
            return "not a CUDA device"
        capability = torch.cuda.get_device_capability(where)
        if capability < _LEAST_CAPABILITY:
            least = ".".join(map(str, _LEAST_CAPABILITY))
            return f"compute capability {capability[0]}.{capability[1]}, where Triton's kernels expect {least} or more"
    if find_spec("triton") is None:
        return "Triton is not installed; pip install 'tiered[gpu]'"
    if not any(map(which, (os.environ.get("CC") or "cc", "gcc", "clang"))):
        return "Triton finds no C compiler for what starts its kernels; install gcc, or name one in CC"
    return None


class DeviceKernels:
    """Kernels of one device. A context manager; leaving it gives their memory back.

    For one thread at a time. `name` is one of `DEVICE_KERNEL_NAMES`: the best there is, or one of the two. Raises
    ConfigError where it asks for what cannot serve here. With `Mode.INVARIANT` a row's result is the same bits alone
    and in any batch, as far as a device's matrix product of one shape treats all rows alike. `Mode.FAST` takes the
    fastest kernel for each number of rows; 16-bit activations of 8-bit weights are then rounded to 8 bits per group,
    where integer products of them are faster (and on the processor, which does as such a device would).
    """

    def __init__(
        self,
        where: torch.device,
        mode: Mode = Mode.INVARIANT,
        cancel: CancelFlag | None = None,
        name: str = "auto",
    ) -> None:
        if name not in DEVICE_KERNEL_NAMES:
            raise ConfigError(f"kernels {name!r}: expected one of {', '.join(DEVICE_KERNEL_NAMES)}")
        self.where, self.mode = where, mode
        self._cancel = cancel if cancel is not None else CancelFlag()
        self._sizes = HOST_SIZES if where.type == "cpu" else DEVICE_SIZES
        self._memory: torch.Tensor | None = None
        self._triton: ModuleType | None = None
        self.refusal: str | None = "switched off by the name 'torch'" if name == "torch" else triton_refusal(where)
        """Why plain torch computes; None where Triton's kernels do."""
        if self.refusal is None and name == "auto" and _is_interpreting():
            self.refusal = "TRITON_INTERPRET is set, and bfloat16 is wrong there"
        # Interpreted, they count as what they are written for.
        capability = torch.cuda.get_device_capability(where) if where.type == "cuda" else _BF16_CAPABILITY
        self._has_products = self.refusal is None and capability >= _BF16_CAPABILITY
        """Whether Triton's kernels multiply on tensor cores."""
        if self.refusal is None:
            self._triton, self.refusal = _load(where, self._has_products)
            self._has_products = self._has_products and self._triton is not None
        if self.refusal is not None and name == "triton":
            raise ConfigError(f"kernels 'triton': {self.refusal}; leave the choice to 'auto'")

    @property
    def kind(self) -> str:
        """What computes: one of the names but "auto"."""
        return "torch" if self._triton is None else "triton"

    @property
    def description(self) -> str:
        """What computes, in a few words."""
        return f"{self.kind}, {self.mode.value}, {self.where}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Give the scratch memory back. What has been computed is not waited for."""
        self._memory = None

    def linear(self, x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., in] times weight [out, in] transposed, plus bias [out]: [..., out] in x's dtype.

        `weight` may be of another dtype than x, or quantized. Raises InterruptedRun once the cancel flag is set.
        """
        self._cancel.check()
        out, in_ = weight.shape
        rows = as_rows(x, in_)
        y = x.new_empty((*x.shape[:-1], out))
        if y.numel():
            with _sums_in_float32(self.where):
                self._linear(rows, weight, bias, y.view(-1, out))
        return y

    def dequantize(self, weight: QuantizedWeight, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        """What `weight.rows` returns, bit for bit: rows start..stop as [stop - start, in] of `dtype`."""
        rows = torch.empty(stop - start, weight.shape[1], dtype=dtype, device=weight.codes.q.device)
        step = self._sizes.panel_rows(weight.shape[1], dtype.itemsize)
        for first in range(start, stop, step):
            last = min(stop, first + step)
            self._widen(weight.part(first, last), rows[first - start : last - start])
        return rows

    def attention(self, call: AttentionCall) -> torch.Tensor:
        """[sequences, q_len, q_heads, head_dim] in the query's dtype; 0 for queries that see no key.

        With `Mode.INVARIANT` a query's result is the same bits whatever else is in the call, and however a prompt is
        cut. `Mode.FAST` has torch's fused kernels compute prompts where they can, in the query's own dtype. Raises
        InterruptedRun once the cancel flag is set.
        """
        if self.mode is Mode.FAST and serves_fused(call):
            return attention_fused(call, self._cancel)
        with _sums_in_float32(self.where):
            return attention_reference(call, self._cancel, fixed=self.mode is Mode.INVARIANT)

    def by_head(self, x: torch.Tensor, w: torch.Tensor, transposed: bool) -> torch.Tensor:
        """As `Kernels.by_head`."""
        self._cancel.check()
        with _sums_in_float32(self.where):
            return by_head_reference(x, w, transposed, fixed=self.mode is Mode.INVARIANT)

    @property
    def recurrent(self) -> None:
        """None: recurrent layers compute by their families' own code."""
        return None

    def serves_attention(self, query: torch.Tensor) -> bool:
        """Whether `attention` takes such queries: of any size, at this device."""
        return query.is_floating_point() and query.device.type == self.where.type

    def _linear(self, x: torch.Tensor, weight: Weight, bias: torch.Tensor | None, y: torch.Tensor) -> None:
        """Write the product for x [rows, in] to y [rows, out]."""
        fixed = self.mode is Mode.INVARIANT
        if isinstance(weight, QuantizedWeight) and x.dtype in _HALVES:
            triton = self._triton
            rounds = self._has_products or (triton is None and self.where.type == "cpu")
            if rounds and not fixed and weight.scheme.bits == 8:
                self._linear_of_8_bits(x, weight, bias, y)
                return
            if triton is not None and self._has_products and (fixed or len(x) <= _FEW_ROWS):
                with _current(self.where):
                    triton.linear(x, weight, bias, y, triton.LINEAR if fixed else triton.LINEAR_FEW)
                return
            if triton is not None and not fixed and len(x) <= _FEWEST_ROWS:
                with _current(self.where):
                    triton.linear_by_sums(x, weight, bias, y)
                return
        self._in_tiles(x, weight, bias, y)

    def _in_tiles(self, x: torch.Tensor, weight: Weight, bias: torch.Tensor | None, y: torch.Tensor) -> None:
        sizes = self._sizes
        if self._memory is None:
            self._memory = torch.empty(sizes.kept_nbytes, dtype=torch.uint8, device=self.where)
        linear_in_tiles(
            x,
            weight,
            None if bias is None else bias.to(x.dtype),
            y,
            sizes,
            self._memory,
            self._widen,
            fixed=self.mode is Mode.INVARIANT,
            cancel=self._cancel,
        )

    def _linear_of_8_bits(
        self, x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None, y: torch.Tensor
    ) -> None:
        """The same with activations rounded to 8 bits per group."""
        group = weight.scheme.group_size
        step = max(1, _ROUNDED_NBYTES // (x.shape[1] * _ROUNDING_NBYTES))
        for start in range(0, len(x), step):
            self._cancel.check()
            codes, scale = round_activations(x[start : start + step], group)
            if self._triton is not None:
                with _current(self.where):
                    tiling = self._triton.LINEAR if len(x) > _FEW_ROWS else self._triton.LINEAR_FEW
                    self._triton.linear_int8(codes, scale, weight, bias, y[start : start + step], tiling)
                continue
            # Codes times a scale, and weights, are exact in float32 or nearly so.
            rounded = (codes.unflatten(1, (-1, group)) * scale[..., None]).flatten(1)
            exact = torch.empty(len(rounded), y.shape[1], dtype=torch.float32, device=y.device)
            self._in_tiles(rounded, weight, bias, exact)
            y[start : start + step] = exact

    def _widen(self, weight: QuantizedWeight, out: torch.Tensor) -> None:
        """Fill `out` with what a quantized weight stands for."""
        if self._triton is None or out.dtype not in (*_HALVES, torch.float32):
            widen_in_torch(weight, out)
            return
        with _current(self.where):
            self._triton.dequantize(weight, out)


def _is_interpreting() -> bool:
    """Whether Triton's kernels run in its interpreter, on the processor, which only tests want."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _load(where: torch.device, has_products: bool) -> tuple[ModuleType | None, str | None]:
    """Triton's kernels, once they have run at the device; or else why they cannot serve."""
    scheme, dtype = GroupScheme(4), torch.float16 if _is_interpreting() or not has_products else torch.bfloat16
    codes = quantize(torch.linspace(-1, 1, 64 * 64).view(64, 64), scheme)
    exact = QuantizedWeight(codes, scheme).rows(0, 64, torch.float32)
    weight = QuantizedWeight(QuantizedTensor(*(part.to(where) for part in codes)), scheme)
    x = torch.eye(64, dtype=dtype, device=where)
    widened, product = torch.empty(64, 64, device=where), torch.empty_like(x)
    try:
        kernels = import_module("tiered.kernels.triton_kernels")
        with _current(where):
            kernels.dequantize(weight, widened)
            if has_products:
                kernels.linear(x, weight, None, product, kernels.LINEAR)
        found = widened.cpu(), product.cpu()
    except Exception as error:  # of a compiler, a linker or a driver: whatever it is, it says that they cannot serve
        return None, f"Triton's kernels do not run here: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    if not torch.equal(found[0], exact) or (has_products and not torch.equal(found[1], exact.T.to(dtype))):
        return None, "Triton's kernels give wrong numbers here"
    return kernels, None


def _current(where: torch.device) -> AbstractContextManager[object]:
    """Triton starts kernels at the current device."""
    return torch.cuda.device(where) if where.type == "cuda" else nullcontext()


@contextmanager
def _sums_in_float32(where: torch.device) -> Iterator[None]:
    """cuBLAS adds products of 16-bit numbers in float32: sums of fp16 might overflow.

    Whether it multiplies float32 in TF32 is left to the process, where torch's default is not to.
    """
    if where.type != "cuda":
        yield
        return
    settings = torch.backends.cuda.matmul
    names = "allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction"
    before = [getattr(settings, name) for name in names]
    for name in names:
        setattr(settings, name, False)
    try:
        yield
    finally:
        for name, value in zip(names, before, strict=True):
            setattr(settings, name, value)
