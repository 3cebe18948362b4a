"""Recurrent layers by the native library: what transformers computes, and the same bits alone and among others."""

import importlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final

import pytest
import torch

from tests.tiny_configs import TINY
from tiered.errors import InterruptedRun
from tiered.kernels import CancelFlag, Kernels, Level, load_library
from tiered.kernels.kernels import KERNEL_NAMES
from tiered.model import steps

pytestmark = pytest.mark.skipif("qwen3_next" not in TINY, reason="transformers hands states on in another way")

SEQUENCES: Final = 3
LEVELS: Final = [name for name in KERNEL_NAMES if name not in ("auto", "torch", "amx")]
"""AMX adds nothing here to AVX-512."""


@pytest.fixture(params=LEVELS)
def kernels(request: pytest.FixtureRequest) -> Iterator[Kernels]:
    library = load_library()
    refusal = library if isinstance(library, str) else library.refusal(Level[request.param.upper()])
    if refusal is not None:
        pytest.skip(str(refusal))
    with Kernels(2, name=request.param) as kernels:
        yield kernels


def transformers_own(family: str, name: str) -> Callable[..., Any]:
    found: Callable[..., Any] = getattr(
        importlib.import_module(f"transformers.models.{family}.modeling_{family}"), name
    )
    return found


def numbers(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def slots(*shape: int) -> torch.Tensor:
    """States of sequences, with gaps between them."""
    size = torch.Size(shape).numel()
    found: torch.Tensor = numbers(SEQUENCES, size + 16, seed=0)[:, :size].unflatten(1, shape)
    return found


def never(*_: Any, **__: Any) -> None:
    raise AssertionError("the library left it to transformers")


# Widths that no vector divides, and such as models have.
@pytest.mark.parametrize(("keys", "values"), [(5, 3), (24, 40), (128, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_of_the_delta_rule_is_that_of_transformers(
    kernels: Kernels, keys: int, values: int, dtype: torch.dtype
) -> None:
    heads, key_heads = 4, 2
    query, key = (numbers(SEQUENCES, 1, key_heads, keys, seed=seed, dtype=dtype) for seed in (1, 2))
    value = numbers(SEQUENCES, 1, heads, values, seed=3, dtype=dtype)
    decay, beta = -numbers(SEQUENCES, 1, heads, seed=4).abs(), numbers(SEQUENCES, 1, heads, seed=5).sigmoid()
    state = slots(heads, keys, values)
    own = transformers_own("qwen3_next", "torch_recurrent_gated_delta_rule")
    given: dict[str, Any] = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
    expected, left = own(query, key, value, g=decay, beta=beta, initial_state=state.clone(), **given)
    found, last = steps._delta_step(kernels, never, query, key, value, decay, beta, initial_state=state, **given)
    assert last is state
    assert found.dtype == dtype
    torch.testing.assert_close(state, left, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, expected, rtol=1e-5 if dtype == torch.float32 else 2**-8, atol=1e-5)
    given["initial_state"] = alone = slots(heads, keys, values)[1:2]
    query, key, value, decay, beta = (each[1:2] for each in (query, key, value, decay, beta))
    assert torch.equal(steps._delta_step(kernels, never, query, key, value, decay, beta, **given)[0], found[1:2])
    assert torch.equal(alone, state[1:2])


@pytest.mark.parametrize(("heads", "rows", "size", "groups"), [(4, 3, 5, 2), (8, 16, 24, 1), (32, 64, 128, 8)])
def test_a_step_of_mamba_2_is_that_of_transformers(
    kernels: Kernels, heads: int, rows: int, size: int, groups: int
) -> None:
    hidden = numbers(SEQUENCES, heads, rows, seed=1)
    dt = numbers(SEQUENCES, heads, seed=2)[..., None].expand(-1, -1, rows)
    rate = -numbers(heads, seed=3).exp()[:, None, None].expand(-1, rows, size)
    b, c = (numbers(SEQUENCES, groups, size, seed=seed) for seed in (4, 5))
    skip, bias = (numbers(heads, seed=seed)[:, None].expand(-1, rows) for seed in (6, 7))
    own = transformers_own("mamba2", "mamba2_selective_state_update")
    _compare_scans(kernels, own, slots(heads, rows, size), (hidden, dt, rate, b, c, skip), {"dt_bias": bias})


@pytest.mark.parametrize(("rows", "size"), [(7, 5), (100, 16)])
def test_a_step_of_mamba_1_is_that_of_transformers(kernels: Kernels, rows: int, size: int) -> None:
    hidden, dt, gate = (numbers(SEQUENCES, rows, seed=seed) for seed in (1, 2, 3))
    rate, skip, bias = -numbers(rows, size, seed=4).exp(), numbers(rows, seed=5), numbers(rows, seed=6)
    b, c = (numbers(SEQUENCES, size, seed=seed) for seed in (7, 8))
    own = transformers_own("jamba", "mamba_selective_state_update")
    more = {"z": gate, "dt_bias": bias}
    _compare_scans(kernels, own, slots(rows, size), (hidden, dt, rate, b, c, skip), more)


def _compare_scans(
    kernels: Kernels,
    own: Callable[..., Any],
    state: torch.Tensor,
    inputs: tuple[torch.Tensor, ...],
    more: dict[str, Any],
) -> None:
    """A step of ours and of transformers', and of one sequence alone."""
    hidden, dt, rate, b, c, skip = inputs
    more = {"dt_softplus": True, **more}
    before, left = state.clone(), state.clone()
    expected = own(left, *inputs, **more)
    found = steps._scan_step(kernels, never, state, hidden, dt, rate, b, c, skip, **more)
    torch.testing.assert_close(state, left, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)
    alone = before[1:2]
    hidden, dt, b, c = (each[1:2] for each in (hidden, dt, b, c))
    less = {name: each[1:2] if name == "z" else each for name, each in more.items()}
    assert torch.equal(steps._scan_step(kernels, never, alone, hidden, dt, rate, b, c, skip, **less), found[1:2])
    assert torch.equal(alone, state[1:2])


@pytest.mark.parametrize("kept", [2, 3, 4, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_convolution_is_that_of_transformers_in_one_piece_and_token_by_token(
    kernels: Kernels, kept: int, dtype: torch.dtype, has_bias: bool
) -> None:
    channels, tokens = 37, 131
    x = numbers(SEQUENCES, tokens, channels, seed=1, dtype=dtype).transpose(1, 2)
    weight = numbers(channels, kept, seed=2, dtype=dtype)
    bias = numbers(channels, seed=3, dtype=dtype) if has_bias else None
    expected = transformers_own("mamba2", "causal_conv1d_fn")(x, weight, bias, activation="silu")
    found = steps._convolve(kernels, never, x, weight, bias, activation="silu")
    near: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2**-6, "atol": 2**-6}
    torch.testing.assert_close(found, expected, **near)
    # Of so many channels torch computes the last activations in another way than the others.
    plain = steps._convolve(kernels, never, x, weight, bias)
    memory = torch.zeros(SEQUENCES, channels * kept + 8, dtype=dtype)
    state = memory[:, 8:].view(SEQUENCES, channels, kept)
    assert state.data_ptr() == memory[:, 8:].data_ptr()
    for start, stop in ((0, 3), (3, 4), (4, 5), (5, 6), (6, 130), (130, 131)):
        part = steps._convolve_step(kernels, never, x[..., start:stop], state, weight, bias)
        assert torch.equal(part, plain[..., start:stop])
    assert torch.equal(state, x[..., -kept:])
    assert not memory[:, :8].any()


def test_what_the_library_does_not_take_is_left_to_transformers(kernels: Kernels) -> None:
    assert kernels.recurrent is not None
    half = slots(4, 8).half()
    assert kernels.recurrent.scan_step(half, *[half] * 4) is None
    x, weight = numbers(1, 4, 9, seed=1), numbers(4, 70, seed=2)
    assert kernels.recurrent.convolve(x, weight) is None
    assert kernels.recurrent.convolve(x.half(), weight[:, :4].half()) is None
    assert kernels.recurrent.convolve(x, weight[:, :4], state=numbers(1, 4, 3, seed=3)) is None
    with Kernels(1, name="torch") as plain:
        assert plain.recurrent is None


CUTS: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
    lambda x: x[:-1],
    lambda x: x[..., :-1],
    lambda x: x[:, :0],
)


def delta_inputs(heads: int = 4, key_heads: int = 2, keys: int = 5, values: int = 3) -> list[torch.Tensor]:
    shapes = ((key_heads, keys), (key_heads, keys), (heads, values), (heads,), (heads,))
    return [slots(heads, keys, values), *(numbers(SEQUENCES, *shape, seed=1) for shape in shapes)]


def scan_inputs(rows: int = 6, size: int = 5, groups: int = 2) -> list[torch.Tensor]:
    shapes = ((rows, size), (rows,), (groups, size), (groups, size))
    return [slots(rows, size), *(numbers(SEQUENCES, *shape, seed=1) for shape in shapes)]


def test_tensors_that_do_not_fit_together_never_reach_the_library(kernels: Kernels) -> None:
    recurrent = kernels.recurrent
    assert recurrent is not None
    delta_step: Callable[..., Any] = partial(recurrent.delta_step, is_normalized=True)
    assert delta_step(*delta_inputs()) is not None
    assert recurrent.scan_step(*scan_inputs()) is not None
    for step, inputs in ((delta_step, delta_inputs), (recurrent.scan_step, scan_inputs)):
        for place in range(1, len(inputs())):
            for change in CUTS:
                given = inputs()
                before = given[0].clone()
                given[place] = change(given[place])
                assert step(*given) is None, (place, given[place].shape)
                assert torch.equal(given[0], before)
    assert delta_step(*delta_inputs(heads=5)) is None
    assert recurrent.scan_step(*scan_inputs(rows=7)) is None
    x, weight = numbers(2, 4, 9, seed=1), numbers(4, 3, seed=2)
    assert recurrent.convolve(x, weight[:3]) is None and recurrent.convolve(x, weight, weight[:3, 0]) is None


def test_what_says_more_than_ours_know_is_left_to_transformers(kernels: Kernels) -> None:
    own: list[str] = []

    def left(name: str) -> Callable[..., Any]:
        def note(*_: Any, **__: Any) -> None:
            own.append(name)

        return note

    some = torch.zeros(1)
    x, weight = numbers(1, 4, 9, seed=1), numbers(4, 3, seed=2)
    steps._convolve(kernels, left("convolve"), x, weight, seq_idx=some)
    steps._convolve(kernels, never, x, weight, seq_idx=None)
    state, _, x, b, c = scan_inputs(groups=1)
    rate, b, c = -numbers(6, 5, seed=3).exp(), b[:, 0], c[:, 0]
    steps._scan_step(kernels, left("scan"), state, x, x, rate, b, c, seq_idx=some)
    steps._scan_step(kernels, never, state, x, x, rate, b, c, seq_idx=None, use_cache=True)
    state, query, key, value, decay, beta = delta_inputs()
    given: dict[str, Any] = {"initial_state": state, "output_final_state": True}
    query, key, value, decay, beta = (each[:, None] for each in (query, key, value, decay, beta))
    steps._delta_step(kernels, left("delta"), query, key, value, decay, beta, **given, cu_seqlens=some)
    steps._delta_step(kernels, never, query, key, value, decay, beta, **given, cu_seqlens=None)
    assert own == ["convolve", "scan", "delta"]


@pytest.mark.parametrize("name", ["delta_step", "scan_step", "convolve"])
def test_a_raised_flag_interrupts(name: str) -> None:
    if isinstance(load_library(), str):
        pytest.skip(str(load_library()))
    cancel = CancelFlag()
    with Kernels(2, cancel) as kernels:
        assert kernels.recurrent is not None
        given: dict[str, list[Any]] = {
            "delta_step": [*delta_inputs(), True],
            "scan_step": scan_inputs(),
            "convolve": [numbers(1, 4, 9, seed=1), numbers(4, 3, seed=2)],
        }
        cancel.set()
        with pytest.raises(InterruptedRun):
            getattr(kernels.recurrent, name)(*given[name])
        cancel.clear()
        assert getattr(kernels.recurrent, name)(*given[name]) is not None
