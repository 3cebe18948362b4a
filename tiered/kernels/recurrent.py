"""What layers do that keep a state of fixed size of a sequence, by the native library.

In: torch tensors in the host's memory; states are updated where they lie. Out: results, of steps in float32, of
convolutions in their inputs' dtype; or None where the library does not serve such tensors, or they do not fit together,
and nothing has changed. A sequence has the same bits alone and among others. Called by the layers, in the place of
functions of transformers' (`model/steps.py`).
"""

import ctypes
from collections.abc import Callable, Sequence
from ctypes import c_float, c_int32, c_int64, c_void_p
from typing import Final

import torch

from tiered.kernels.library import Dtype

_MOST_KEPT: Final = 64
"""Inputs of a convolution."""
_CONVOLVED: Final = {torch.bfloat16: Dtype.BF16, torch.float32: Dtype.F32}


class DeltaArguments(ctypes.Structure):
    """tk_delta_args of tiered_kernels.h."""

    _fields_ = (
        *((name, c_int64) for name in ("sequences", "heads", "key_heads", "keys", "values")),
        *(("state", c_void_p), ("state_stride", c_int64)),
        *((name, c_void_p) for name in ("q", "k", "v", "decay", "beta", "out")),
        *(("scaling", c_float), ("normalized", c_int32)),
    )


class ScanArguments(ctypes.Structure):
    """tk_scan_args of tiered_kernels.h."""

    _fields_ = (
        *((name, c_int64) for name in ("sequences", "rows", "size", "decay_rows", "decay_size", "group_rows")),
        *(("state", c_void_p), ("state_stride", c_int64)),
        *((name, c_void_p) for name in ("decay", "x", "b", "c", "out")),
    )


class ConvArguments(ctypes.Structure):
    """tk_conv_args of tiered_kernels.h."""

    _fields_ = (
        *((name, c_int64) for name in ("sequences", "channels", "tokens", "kept")),
        *(("state", c_void_p), ("state_stride", c_int64), ("x", c_void_p), ("x_stride", c_int64 * 3)),
        *(("weight", c_void_p), ("bias", c_void_p), ("out", c_void_p), ("dtype", c_int32)),
    )


class Recurrent:
    """The library's functions for recurrent layers. All raise InterruptedRun, states undefined, once the cancel flag is
    set."""

    def __init__(self, call: Callable[[str, ctypes.Structure], None], device: str = "cpu") -> None:
        """`call` runs a function of the library, by its name. `device`: of all tensors; on "meta", where there is
        nothing to compute with, results have their shapes."""
        self._call, self._device = call, device

    def takes(self, state: torch.Tensor) -> bool:
        """Whether steps update a state such as this, where it lies."""
        return self._is_state(state)

    def delta_step(
        self,
        state: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        decay: torch.Tensor,
        beta: torch.Tensor,
        is_normalized: bool,
    ) -> torch.Tensor | None:
        """A token of each sequence through the gated delta rule: [sequences, heads, values].

        state [sequences, heads, keys, values]; query and key [sequences, key_heads, keys], which are divided by their
        lengths if `is_normalized`; value [sequences, heads, values]; decay, by which the state is multiplied first, and
        beta [sequences, heads].
        """
        if not self._is_state(state) or state.ndim != 4:
            return None
        sequences, heads, keys, values = state.shape
        of_keys = (sequences, query.shape[1] if query.ndim == 3 else 0, keys)
        expected = (of_keys, of_keys, (sequences, heads, values), (sequences, heads), (sequences, heads))
        if not self._have(expected, query, key, value, decay, beta) or not of_keys[1] or heads % of_keys[1]:
            return None
        given = [each.float().contiguous() for each in (query, key, value, decay, beta)]
        out = torch.empty(sequences, heads, values, device=self._device)
        arguments = DeltaArguments(
            *(sequences, heads, query.shape[1], keys, values),
            *(state.data_ptr(), state.stride(0)),
            *(each.data_ptr() for each in (*given, out)),
            *(keys**-0.5, int(is_normalized)),
        )
        self._call("tk_delta_step", arguments)
        return out

    def scan_step(
        self, state: torch.Tensor, decay: torch.Tensor, x: torch.Tensor, b: torch.Tensor, c: torch.Tensor
    ) -> torch.Tensor | None:
        """A token of each sequence through a state space model: of each row the sum of state * c [sequences, rows],
        after the state has become decay * state + x * b.

        state [sequences, ..., size], with `rows` rows of `size`; x [sequences, rows]; b and c [sequences, groups,
        size]; decay [sequences, n, 1 or size]. Neighbouring rows share what there is less of.
        """
        if not self._is_state(state):
            return None
        sequences, size = len(state), state.shape[-1]
        rows = state[0].numel() // size
        parts, groups = (each.shape[1] if each.ndim == 3 else 0 for each in (decay, b))
        of_groups = (sequences, groups, size)
        expected = ((sequences, parts, 1 if decay.shape[-1] == 1 else size), (sequences, rows), of_groups, of_groups)
        if not self._have(expected, decay, x, b, c) or not parts or not groups or rows % parts or rows % groups:
            return None
        given = [each.float().contiguous() for each in (decay, x, b, c)]
        out = torch.empty(sequences, rows, device=self._device)
        arguments = ScanArguments(
            *(sequences, rows, size, rows // decay.shape[1], decay.shape[2], rows // b.shape[1]),
            *(state.data_ptr(), state.stride(0)),
            *(each.data_ptr() for each in (*given, out)),
        )
        self._call("tk_scan_step", arguments)
        return out

    def convolve(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        state: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """x [sequences, channels, tokens], each channel convolved with its row of weight [channels, kept], plus bias
        [channels]: [sequences, channels, tokens] in x's dtype.

        Before x come the inputs that `state` [sequences, channels, kept] has, and will have of x; None: zeros. A number
        is the same bits whatever else is computed with it.
        """
        kept = weight.shape[-1]
        channels = x.shape[1:2]
        if x.ndim != 3 or weight.shape != (*channels, kept) or (bias is not None and bias.shape != channels):
            return None
        given = [x, *(each.contiguous() for each in (weight, bias) if each is not None)]
        if x.dtype not in _CONVOLVED or any(
            each.dtype != x.dtype or each.device.type != self._device for each in given
        ):
            return None
        if not 0 < kept <= _MOST_KEPT or (
            state is not None and not self._is_state(state, x.dtype, (*x.shape[:2], kept))
        ):
            return None
        out = x.new_empty(x.shape)
        arguments = ConvArguments(
            *(*x.shape, kept),
            *((None, 0) if state is None else (state.data_ptr(), state.stride(0))),
            *(x.data_ptr(), (c_int64 * 3)(*x.stride())),
            *(given[1].data_ptr(), None if bias is None else given[2].data_ptr()),
            *(out.data_ptr(), _CONVOLVED[x.dtype]),
        )
        self._call("tk_conv", arguments)
        return out

    def _is_state(
        self, state: torch.Tensor, dtype: torch.dtype = torch.float32, shape: tuple[int, ...] | None = None
    ) -> bool:
        """Whether the library can update `state` [sequences, ...], of this dtype and shape, where it lies."""
        if (
            state.dtype != dtype
            or state.device.type != self._device
            or state.numel() == 0
            or shape not in (None, state.shape)
        ):
            return False
        return state[0].is_contiguous() and (len(state) == 1 or state.stride(0) >= state[0].numel())

    def _have(self, shapes: Sequence[Sequence[int]], *given: torch.Tensor) -> bool:
        """Whether the tensors have these shapes, in the host's memory: the library reads as much as they say."""
        return all(
            each.shape == shape and each.device.type == self._device for each, shape in zip(given, shapes, strict=True)
        )
