"""Record and replay: the base model's forward without its layers.

transformers' own forward computes what goes with embeddings (positions, masks, rotary tables), calls the layers, and
finishes with norm and head. Stand-ins take the layers' place. While recording, each notes the arguments it was
called with and the last one aborts; while replaying, they pass the final hidden states through, so that the model's
own norm, projection, head and soft caps run on it. No family's code is repeated here.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn
from transformers.cache_utils import Cache

from tiered.arch import Skeleton, StandIn
from tiered.errors import UnsupportedFamilyError
from tiered.model.rotary import stand_in_for_rotaries

CACHE_NAMES: Final = ("cache", "past_key_values")
"""Names of a cache among transformers' arguments and results; the second is that of versions before 5.24."""

_NO_POSITIONS: Final = torch.zeros(0, dtype=torch.int64)
"""Of which logits are wanted while recording, which ends before any are computed."""


@dataclass(frozen=True)
class LayerCall:
    """What the base model passes to one layer besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True)
class Recording:
    """The start of a forward: hidden states that enter the first layer, and every layer's other arguments."""

    hidden: torch.Tensor  # [rows, tokens, hidden]
    calls: tuple[LayerCall, ...]


class _Recorded(Exception):
    """Unwinds the base model's forward after its last layer has been called."""


def cache_name(function: Callable[..., Any]) -> str | None:
    """The name of the parameter by which `function` takes a cache; None if its signature has neither name.

    Many forwards ignore unknown names: given a cache by the wrong name, they would compute with one of their own and
    raise no error.
    """
    parameters = inspect.signature(function).parameters
    return next((name for name in CACHE_NAMES if name in parameters), None)


class Recorder:
    """Owns the stand-ins of one skeleton. The layers themselves are kept by the caller."""

    def __init__(self, skeleton: Skeleton) -> None:
        self._skeleton, self._model = skeleton, skeleton.model
        self._model_type = skeleton.family.model_type
        self._calls: list[LayerCall] = []
        self._first_hidden: torch.Tensor | None = None
        self._final: torch.Tensor | None = None
        self._width = int(skeleton.embedding.embedding_dim)
        layers = list(skeleton.layers)
        path, _, name = skeleton.family.layers.rpartition(".")
        stand_ins = nn.ModuleList(_StandIn(self, index, layer) for index, layer in enumerate(layers))
        setattr(skeleton.model.get_submodule(path), name, stand_ins)
        self._count = len(layers)
        self._rotaries = stand_in_for_rotaries(skeleton.model)
        parameters = inspect.signature(skeleton.model.forward).parameters
        self._accepts_positions, self._keeps = "position_ids" in parameters, "logits_to_keep" in parameters
        taken = cache_name(skeleton.model.forward)
        if taken is None:
            raise self._unsupported(f"takes no cache by any name that tiered knows ({' or '.join(CACHE_NAMES)})")
        self._cache_name = taken

    def record(self, last_positions: torch.Tensor | None = None, *, cache: Cache, **kwargs: Any) -> Recording:
        """Run the model's forward (with `inputs_embeds`, and what it takes of tables) up to its last layer.

        `last_positions` is that of `WholeTextRotary`. Every layer's call in the result holds `cache`; raises
        UnsupportedFamilyError where transformers calls a layer without it.
        """
        self._calls, self._first_hidden, self._final = [], None, None
        self._show_ends(last_positions)
        # A family without positions (ALiBi) takes none, and would pass them on to its layers.
        given = {name: value for name, value in kwargs.items() if name != "position_ids" or self._accepts_positions}
        given[self._cache_name] = cache
        if self._keeps:
            # A number would have some families drop positions before their last layers; indices do not.
            given["logits_to_keep"] = _NO_POSITIONS
        try:
            self._model(**given)
        except _Recorded:
            assert self._first_hidden is not None
            for index, call in enumerate(self._calls):
                if not any(value is cache for value in (*call.args, *call.kwargs.values())):
                    raise self._unsupported(f"hands layer {index} another cache than it was given") from None
            recording = Recording(self._first_hidden, tuple(self._calls))
            self._calls, self._first_hidden = [], None
            return recording
        finally:
            self._show_ends(None)
        raise AssertionError("the base model did not call its last layer")

    def replay(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [rows, tokens, vocab] of final hidden states [rows, tokens, hidden]."""
        self._final = hidden
        try:
            # Embeddings of the right shape, whose values are not used: neither table nor cache is touched again.
            stand_in = hidden.new_zeros((*hidden.shape[:2], self._width))
            zeros = self._skeleton.table_zeros(stand_in)
            logits: torch.Tensor = self._model(inputs_embeds=stand_in, use_cache=False, **zeros).logits
            return logits
        finally:
            self._final = None

    def on_layer(self, index: int, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Called by stand-in `index` in its layer's place."""
        if self._final is not None:
            hidden = self._final
        else:
            if index == 0:
                self._first_hidden = hidden
            self._calls.append(LayerCall(args, kwargs))
            if index == self._count - 1:
                raise _Recorded
        return _LayerOutput.of(hidden)

    def _unsupported(self, what: str) -> UnsupportedFamilyError:
        return UnsupportedFamilyError(
            f"model family {self._model_type!r}: this version of transformers {what}; "
            "install a version of transformers within tiered's range"
        )

    def _show_ends(self, last_positions: torch.Tensor | None) -> None:
        for rotary in self._rotaries:
            rotary.last_positions = last_positions


class _LayerOutput(torch.Tensor):
    """Hidden states that also serve as a tuple (hidden, weights): their element 0 is the whole tensor.

    Layers return hidden states or such a tuple, by family and transformers' version, and the base model takes what they
    return, its element 0, or both elements. Any other operation gives a plain tensor.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def of(cls, hidden: torch.Tensor) -> "_LayerOutput":
        return hidden.as_subclass(cls)

    def __iter__(self) -> Iterator[Any]:
        return iter((self[0], None))

    def __getitem__(self, index: Any) -> torch.Tensor:
        plain = self.as_subclass(torch.Tensor)
        return plain if isinstance(index, int) and index == 0 else plain[index]


class _StandIn(StandIn):
    """A layer's stand-in; attributes the base model asks for (an attention type, say) are the layer's own."""

    def __init__(self, recorder: Recorder, index: int, layer: nn.Module) -> None:
        super().__init__(layer)
        self._recorder, self._index = recorder, index

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return self._recorder.on_layer(self._index, hidden_states, args, kwargs)
