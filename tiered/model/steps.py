"""What recurrent layers do beside their products, by the native library instead of transformers' plain torch.

In: a mixer of transformers'. Out: its forward, in which these functions are ours: they are those for which transformers
itself takes other packages' kernels where they are installed, the same in all families. Without them a token takes ten
times what reading and writing its states does, or a thousand times, as a convolution in bfloat16 is a call per channel
where the processor has no such products. What the library does not take is left to transformers' own function.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import FunctionType
from typing import Any, Final, Protocol

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers.activations import ACT2FN

from tiered.kernels.recurrent import Recurrent

Own = Callable[..., Any]
"""The function of transformers' whose place is taken."""


class StepKernels(Protocol):
    """What computes here: all kernels for layers do."""

    @property
    def recurrent(self) -> Recurrent | None:
        """As `Kernels.recurrent`."""


class _Shapes:
    """The library's functions, of shapes."""

    recurrent = Recurrent(lambda name, arguments: None, device="meta")


def native_forward(module: nn.Module) -> Callable[..., torch.Tensor]:
    """`forward_with` the library, for a mixer on the meta device."""
    return forward_with(module, _Shapes())


def forward_with(module: nn.Module, kernels: StepKernels) -> Callable[..., torch.Tensor]:
    """The forward of the mixer `module`'s class, undecorated, with our functions in place of those that it calls.

    Called with the mixer and hidden_states [sequences, tokens, hidden]; gates and activations, too, have the same bits
    of a sequence alone and among others.
    """
    forward = inspect.unwrap(type(module).forward)
    assert isinstance(forward, FunctionType)
    names = forward.__globals__
    ours = {
        name: partial(function, kernels, names[name])
        for name, function in _OURS.items()
        if name in forward.__code__.co_names and name in names  # attributes are among the former, too
    }
    made = FunctionType(
        forward.__code__, {**names, **ours}, forward.__name__, forward.__defaults__, forward.__closure__
    )
    made.__kwdefaults__ = forward.__kwdefaults__

    def run(mixer: nn.Module, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if len(hidden_states) == 1 or hidden_states.device.type != "cpu":
            result: torch.Tensor = made(mixer, hidden_states, *args, **kwargs)
            return result
        with _Apart(len(hidden_states)):
            result = made(mixer, hidden_states, *args, **kwargs)
        return result

    return run


class _Apart(TorchFunctionMode):
    """What _UNEVEN has is computed of each of so many sequences by itself, whoever calls it: a mixer's forward, a norm
    in it, a function of transformers' that is left to it."""

    def __init__(self, sequences: int) -> None:
        super().__init__()
        self._sequences = sequences

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        call = partial(func, **(kwargs or {}))
        if func not in _UNEVEN or not args or not isinstance(args[0], torch.Tensor) or not args[0].ndim:
            return call(*args)
        x, *more = args
        # Sequences come first, perhaps with what follows folded into them. Less than one each: they are apart already.
        each, rest = divmod(len(x), self._sequences)
        if rest or not each:
            return call(*args)
        return torch.cat([call(part, *more) for part in x.split(each)])


def _delta_step(
    kernels: StepKernels,
    own: Own,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """query, key and value [sequences, 1, heads, width], g and beta [sequences, 1, heads]: one token of each sequence,
    and the state, which is `initial_state` itself."""
    recurrent, found = _serving(kernels, kwargs), None
    if recurrent is not None and initial_state is not None and output_final_state and query.shape[1] == 1:
        q, k, v, decay, gate = (each[:, 0] for each in (query, key, value, _each(torch.exp, g), beta))
        found = recurrent.delta_step(initial_state, q, k, v, decay, gate, use_qk_l2norm_in_kernel)
    if found is None:
        result: tuple[torch.Tensor, torch.Tensor | None] = own(
            query,
            key,
            value,
            g=g,
            beta=beta,
            initial_state=initial_state,
            output_final_state=output_final_state,
            use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
            **kwargs,
        )
        return result
    return found[:, None].to(query.dtype), initial_state


def _scan_step(
    kernels: StepKernels,
    own: Own,
    state: torch.Tensor,
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    rate: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    skip: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    **kwargs: Any,
) -> torch.Tensor:
    """One token of each sequence, [sequences, rows...] as hidden_states; state [sequences, rows..., size] is updated.

    dt as hidden_states, rate [rows..., size], b and c [sequences, size] or [sequences, groups, size], skip and dt_bias
    [rows...]: A, B, C and D of transformers. Mamba 2 has one dt and rate of each head, expanded to its rows.
    """
    recurrent, found = _serving(kernels, kwargs), None
    if recurrent is not None and recurrent.takes(state):
        shares = rate.ndim == 3 and rate.stride()[1:] == (0, 0) and dt.stride(-1) == 0
        shares = shares and (dt_bias is None or dt_bias.stride(-1) == 0)
        step = dt[..., :1] if shares else dt
        if dt_bias is not None:
            step = step + (dt_bias[..., :1] if shares else dt_bias).to(dt.dtype)
        step = (_each(functional.softplus, step) if dt_softplus else step).float()
        decay = _each(torch.exp, step * rate[..., :1, 0].float() if shares else step[..., None] * rate.float())
        size, sequences = state.shape[-1], len(state)
        scaled = (step * hidden_states.float()).reshape(sequences, -1)
        columns = (each.reshape(sequences, -1, size) for each in (b, c))
        decay = decay.reshape(sequences, -1, 1 if shares else size)
        found = recurrent.scan_step(state, decay, scaled, *columns)
    if found is None:
        more: dict[str, Any] = {"z": z, "dt_bias": dt_bias, "dt_softplus": dt_softplus, **kwargs}
        result: torch.Tensor = own(state, hidden_states, dt, rate, b, c, skip, **more)
        return result
    out = found.view(hidden_states.shape)
    if skip is not None:
        out = out + hidden_states.float() * skip.float()
    if z is not None:
        out = out * _each(functional.silu, z.float())
    return out.to(hidden_states.dtype)


def _convolve_step(
    kernels: StepKernels,
    own: Own,
    hidden_states: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """hidden_states [sequences, channels, tokens] behind the inputs in conv_state [sequences, channels, kept], which
    is updated."""
    recurrent = _serving(kernels, kwargs)
    found = None if recurrent is None else recurrent.convolve(hidden_states, weight, bias, conv_state)
    if found is None:
        result: torch.Tensor = own(hidden_states, conv_state, weight, bias, activation=activation, **kwargs)
        return result
    return _activated(found, activation)


def _convolve(
    kernels: StepKernels,
    own: Own,
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """hidden_states [sequences, channels, tokens] behind zeros."""
    recurrent = _serving(kernels, kwargs)
    found = None if recurrent is None else recurrent.convolve(hidden_states, weight, bias)
    if found is None:
        result: torch.Tensor = own(hidden_states, weight, bias, activation=activation, **kwargs)
        return result
    return _activated(found, activation)


def _serving(kernels: StepKernels, more: Mapping[str, Any]) -> Recurrent | None:
    """What serves a call with `more` arguments: none where they say that several sequences are in one row. Others mean
    nothing here: layers hand them to all that they call (`use_cache`)."""
    return kernels.recurrent if all(more.get(name) is None for name in _PACKED) else None


def _activated(x: torch.Tensor, activation: str | None) -> torch.Tensor:
    return x if activation is None else _each(ACT2FN[activation], x)


def _each(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """`function`, which makes of each number another, of each sequence by itself: torch computes what is left of its
    vectors in another way than what fills them, and where one sequence ends would decide which of the next that is."""
    return function(x) if len(x) == 1 else torch.cat([function(each) for each in x.split(1)])


_UNEVEN: Final[frozenset[Callable[..., Any]]] = frozenset(
    (torch.sigmoid, torch.Tensor.sigmoid, functional.sigmoid, functional.silu, functional.softplus, functional.gelu)
)
"""Functions of each number of which torch computes what is left of its vectors otherwise than what fills them: where
one sequence ends would decide which of the next that is. `exp` and `tanh` are none, measured."""
_PACKED: Final = ("cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")
_OURS: Final[Mapping[str, Callable[..., Any]]] = {
    "torch_recurrent_gated_delta_rule": _delta_step,
    "mamba2_selective_state_update": _scan_step,
    "mamba_selective_state_update": _scan_step,
    "causal_conv1d_update": _convolve_step,
    "causal_conv1d_fn": _convolve,
}
"""By the names that mixers call them by."""
