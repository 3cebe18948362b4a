"""Recurrent layers of a graph: which modules keep a state of a sequence, what it is, and what computing takes.

In: a skeleton as built. Out: a `StateShape`. No family's formulas are repeated here: each mixer's own forward is run
once on the meta device, where nothing is computed, with a cache that notes what it is handed.
"""

import copy
import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tiered.arch.skeleton import Skeleton
from tiered.errors import CheckpointError, UnsupportedFamilyError, shortened
from tiered.plan.state import StateGroup, StateKind, StatePart, StateShape

_UPDATES: Final = frozenset(("update_conv_state", "update_recurrent_state"))
"""What mixers call of a cache: by these names they are known."""
_TOKENS: Final = 16
"""Tokens over which a scan without a grid is measured."""


def is_mixer(module: nn.Module) -> bool:
    """Whether the module's own forward keeps a state in the cache."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and not _UPDATES.isdisjoint(code.co_names)


Forward = Callable[..., torch.Tensor]
"""A mixer's forward, called with the mixer."""


def state_shape(skeleton: Skeleton, native: Callable[[nn.Module], Forward] | None = None) -> StateShape | None:
    """What the recurrent layers of `skeleton` keep of a sequence; None where it has none.

    `native` gives the forward of a mixer by which single tokens are computed where there is a library of kernels; None:
    there is none.

    Raises UnsupportedFamilyError where the family is not listed as one with such layers, or where this version of
    transformers hands their states over in another way, and CheckpointError where the configuration makes no sense.
    """
    measured: dict[object, _Measured] = {}
    layers: dict[tuple[StatePart, ...], list[int]] = {}
    for number, layer in enumerate(skeleton.layers):
        for module in filter(is_mixer, layer.modules()):
            key = type(module), tuple((name, p.shape, p.dtype) for name, p in module.named_parameters())
            if key not in measured:
                measured[key] = _measure(skeleton, module, native)
            layers.setdefault(measured[key].parts, []).append(number)
    if not layers:
        return None
    scan = skeleton.family.scan
    assert scan is not None, "a mixer was measured"
    groups = sorted((StateGroup(tuple(numbers), parts) for parts, numbers in layers.items()), key=lambda g: g.layers)
    return StateShape(
        groups=tuple(groups),
        grid=scan.grid_of(skeleton.config),
        row_nbytes=max(found.row_nbytes for found in measured.values()),
        step_nbytes=max(found.step_nbytes for found in measured.values()),
        native_step_nbytes=max(found.native_step_nbytes for found in measured.values()),
    )


@dataclass(frozen=True)
class _Measured:
    """What one mixer keeps, and what it takes: see `StateShape`."""

    parts: tuple[StatePart, ...]
    row_nbytes: int
    step_nbytes: int
    native_step_nbytes: int


def _measure(skeleton: Skeleton, module: nn.Module, native: Callable[[nn.Module], Forward] | None) -> _Measured:
    family = skeleton.family
    if family.scan is None:
        raise UnsupportedFamilyError(
            f"model family {family.model_type!r}: {type(module).__name__} keeps a recurrent state, expected attention "
            "only; this version of tiered does not know where its prompts may be cut"
        )
    tokens = family.scan.grid_of(skeleton.config).tokens
    tokens = tokens if tokens > 1 else _TOKENS
    mixer = copy.deepcopy(module).to("meta")
    states, own = _States(), type(module).forward
    scan = _peak(skeleton, mixer, own, states, tokens)
    step = _peak(skeleton, mixer, own, states, 1)
    native_step = step if native is None else _peak(skeleton, mixer, native(module), states, 1)
    kept = sum(part.nbytes for part in states.parts)
    # Those of several sequences are put together in memory of their own, and written back.
    return _Measured(states.parts, -(-scan // tokens), step + kept, native_step + kept)


def _peak(skeleton: Skeleton, mixer: nn.Module, forward: Forward, states: "_States", tokens: int) -> int:
    """Bytes that `mixer` takes at once for `tokens` tokens of a sequence, by `forward`."""
    hidden = torch.empty(1, tokens, skeleton.config.hidden_size, dtype=skeleton.model.dtype, device="meta")
    known = [hidden, *mixer.parameters(), *mixer.buffers(), *states.tensors]
    peak = _Peak(known)
    try:
        with torch.no_grad(), peak:
            forward(mixer, hidden, cache=states, attention_mask=None)
    except MemoryError:
        raise
    # Each family has code of its own, which may raise anything where its configuration is unusual.
    except Exception as error:
        path = skeleton.config.name_or_path or skeleton.family.model_type
        raise CheckpointError(
            f"{path}: transformers cannot compute {type(mixer).__name__} as it is described: {shortened(error)}; put "
            "the model's own config.json there"
        ) from error
    states.lay_out()
    return peak.most


class _States:
    """Notes what a mixer keeps: the part of transformers' cache that it uses. From the second time on it has states."""

    def __init__(self) -> None:
        self._tensors: dict[tuple[StateKind, int], torch.Tensor] = {}

    @property
    def tensors(self) -> list[torch.Tensor]:
        return list(self._tensors.values())

    @property
    def parts(self) -> tuple[StatePart, ...]:
        return tuple(
            StatePart(kind, number, tuple(tensor.shape[1:]), str(tensor.dtype).removeprefix("torch."))
            for (kind, number), tensor in sorted(self._tensors.items())
        )

    def lay_out(self) -> None:
        """From here on states lie as they do in memory that is kept for them."""
        self._tensors = {
            key: torch.empty_like(t, memory_format=torch.contiguous_format) for key, t in self._tensors.items()
        }

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        return self._tensors.get(("conv", state_idx))

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        return self._tensors.get(("recurrent", state_idx))

    def is_recording_past(self, layer_idx: int) -> bool:
        return False

    def update_conv_state(
        self, conv_states: torch.Tensor, layer_idx: int, state_idx: int = 0, conv_kernel_size: int | None = None
    ) -> torch.Tensor:
        kept = conv_kernel_size or conv_states.shape[-1]
        self._tensors["conv", state_idx] = conv_states.new_empty((*conv_states.shape[:-1], kept))
        return conv_states

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0
    ) -> torch.Tensor:
        self._tensors["recurrent", state_idx] = recurrent_states
        return recurrent_states


class _Peak(TorchDispatchMode):
    """Adds up the bytes of all tensors that live at once while operations run in its context, but for `known` ones."""

    most: int = 0

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._now = 0
        self._users = {tensor.untyped_storage()._cdata: 1 for tensor in known}
        """Tensors per storage."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            key, nbytes = storage._cdata, storage.nbytes()
            if key not in self._users:
                self._now += nbytes
                self.most = max(self.most, self._now)
            self._users[key] = self._users.get(key, 0) + 1
            weakref.finalize(tensor, self._drop, key, nbytes)
        return result

    def _drop(self, key: int, nbytes: int) -> None:
        self._users[key] -= 1
        if not self._users[key]:
            del self._users[key]
            self._now -= nbytes


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
