"""Models use the native steps of recurrent layers, and what torch computes in a mixer has the same bits alone and among
others."""

import copy
from collections.abc import Callable
from typing import Any, Final

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from tests.quick import represented
from tests.runtimes import open_runtime, run_greedy
from tests.tiny import Tiny, prompts_for
from tests.tiny_configs import TINY, tiny_config
from tiered.arch import is_mixer
from tiered.kernels import Kernels, load_library
from tiered.model.steps import forward_with

pytestmark = pytest.mark.skipif("qwen3_next" not in TINY, reason="transformers hands states on in another way")

DELTA: Final = {"delta_step", "convolve"}
SCAN: Final = {"scan_step", "convolve"}
CONV: Final = {"convolve"}
CALLS: Final[dict[str, set[str]]] = {
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), DELTA),
    **dict.fromkeys(("granitemoehybrid", "falcon_h1", "bamba", "mamba2", "nemotron_h", "jamba"), SCAN),
    **dict.fromkeys(("lfm2", "lfm2_moe"), CONV),
}
"""What the mixers of a family call of `Recurrent`."""
SEQUENCES: Final = 3


class Recorder:
    """In the place of `Recurrent`: notes what is called, and whether the library computed it."""

    def __init__(self, inner: Any, found: list[tuple[str, bool]]) -> None:
        self._inner, self._found = inner, found

    def takes(self, state: torch.Tensor) -> bool:
        return bool(self._inner.takes(state))

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = getattr(self._inner, name)(*args, **kwargs)
            self._found.append((name, result is not None))
            return result

        return call


@pytest.fixture(autouse=True)
def _native() -> None:
    if isinstance(load_library(), str):
        pytest.skip(str(load_library()))


@pytest.mark.parametrize("name", represented(CALLS, ["qwen3_next", "falcon_h1", "jamba", "lfm2"]))
def test_a_model_s_recurrent_layers_compute_in_the_native_library(
    tiny: Tiny, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names are found in transformers' code: one that is called otherwise there would go unnoticed, and be slow."""
    found: list[tuple[str, bool]] = []
    own: Any = vars(Kernels)["recurrent"]
    monkeypatch.setattr(Kernels, "recurrent", property(lambda kernels: Recorder(own.fget(kernels), found)))
    config = tiny_config(name)
    with torch.device("meta"):
        layers = sum(is_mixer(module) for module in AutoModelForCausalLM.from_config(config).modules())
    with open_runtime(tiny.store(name)) as runtime:
        run_greedy(runtime, prompts_for(name)[:1], steps=2)
    calls = [call for call, _ in found]
    prompt, decoding = calls[: -layers * len(CALLS[name])], calls[-layers * len(CALLS[name]) :]
    assert CONV <= {*prompt} <= CALLS[name] and len(prompt) % layers == 0  # of each cell; a last token may be a step
    assert {*decoding} == CALLS[name]
    assert all(is_ours for _, is_ours in found)


@pytest.mark.slow
def test_every_family_with_recurrent_layers_is_listed() -> None:
    with torch.device("meta"):
        assert CALLS.keys() == {name for name in TINY if _has_mixers(name)}


def _has_mixers(name: str) -> bool:
    return any(map(is_mixer, AutoModelForCausalLM.from_config(tiny_config(name)).modules()))


class RowByRow(nn.Module):
    """A linear layer of the same bits whatever else it computes, as the runtime's are."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.linear(each) for each in x.split(1)])


class States:
    """What a mixer asks of a cache."""

    def __init__(self, conv: torch.Tensor, recurrent: torch.Tensor) -> None:
        self.conv, self.recurrent = conv, recurrent

    def get_conv_state(self, *_: Any, **__: Any) -> torch.Tensor:
        return self.conv

    def get_recurrent_state(self, *_: Any, **__: Any) -> torch.Tensor:
        return self.recurrent

    def update_recurrent_state(self, state: torch.Tensor, *_: Any, **__: Any) -> None:
        self.recurrent = state

    def is_recording_past(self, *_: Any) -> bool:
        return False


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5_text", "mamba2"])
def test_a_mixer_makes_the_same_of_a_sequence_alone_and_among_others(name: str, dtype: torch.dtype) -> None:
    """With 24 heads: of so many numbers torch computes the last eight in another way than those before them."""
    config = copy.deepcopy(tiny_config(name))
    heads = {"num_heads": 24, "head_dim": 8, "expand": 3} if name == "mamba2" else {"linear_num_value_heads": 24}
    for field, value in heads.items():
        setattr(config, field, value)
    torch.manual_seed(3)
    mixer = next(filter(is_mixer, AutoModelForCausalLM.from_config(config).modules())).to(dtype)
    for part, child in list(mixer.named_children()):
        if isinstance(child, nn.Linear):
            setattr(mixer, part, RowByRow(child))
    channels, kept = mixer.conv1d.weight.shape[0], mixer.conv1d.weight.shape[-1]
    fields = ("head_dim", "state_size") if name == "mamba2" else ("linear_key_head_dim", "linear_value_head_dim")
    sizes = [getattr(config, field) for field in fields]
    conv = torch.randn(SEQUENCES, channels, kept).to(dtype)
    states, hidden = torch.randn(SEQUENCES, 24, *sizes), torch.randn(SEQUENCES, 20, 1, config.hidden_size).to(dtype)
    with Kernels(1) as kernels, torch.no_grad():
        forward = forward_with(mixer, kernels)

        def run(sequences: slice) -> tuple[torch.Tensor, torch.Tensor]:
            cache = States(conv[sequences].clone(), states[sequences].clone())
            found = [forward(mixer, hidden[sequences, token], cache=cache) for token in range(hidden.shape[1])]
            return torch.stack(found, 1), cache.recurrent

        together, left = run(slice(None))
        for sequence in range(SEQUENCES):
            alone, own = run(slice(sequence, sequence + 1))
            assert torch.equal(own, left[sequence : sequence + 1])
            assert torch.equal(alone, together[sequence : sequence + 1])
