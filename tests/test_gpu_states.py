"""Recurrent layers on a device: the same tokens as the processor's, wherever their states are between two passes.

As in `test_gpu_tier.py` the device is the emulated one, in chaos, or the real one.
"""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from transformers import GenerationConfig

from tests.answers import assert_same
from tests.quick import represented
from tests.runtimes import open_runtime, reserved, run_greedy, run_segments
from tests.test_gpu_tier import ALL, PLENTY, STEPS, Devices, opened, options_for, stream_of_sequences
from tests.test_gpu_tier import devices as devices
from tests.test_gpu_tier import waits as waits
from tests.tiny import Tiny, prompts_for
from tests.tiny_configs import CONTEXT, TINY
from tests.waiting import wait_until
from tiered.arch import load_config
from tiered.errors import BudgetError, DeviceBudgetError, NotSupportedError
from tiered.model import Segment
from tiered.offloaded import OffloadedModel
from tiered.plan import Workload
from tiered.runtime import Options, Runtime
from tiered.units import GIB, MIB

pytestmark = [
    pytest.mark.usefixtures("steady_baseline"),
    pytest.mark.skipif("qwen3_next" not in TINY, reason="transformers hands states on in another way"),
]

CELLS: Final = [
    ("qwen3_next", "gpu", 8, "some"),
    ("falcon_h1", "cpu", 16, "a ring"),
    ("mamba2", "disk", 16, "all"),
    ("lfm2", "disk", 4, "some"),
    ("nemotron_h", "cpu", 8, "some"),
    ("jamba", "gpu", 16, "a ring"),
]
"""Families by what their layers keep, each with another place of the cache."""


@pytest.mark.parametrize(("name", "kv", "bits", "on_device"), represented(CELLS, [CELLS[0]]))
def test_the_tokens_are_the_processor_s(
    tiny: Tiny, devices: Devices, tmp_path: Path, name: str, kv: str, bits: int, on_device: str
) -> None:
    store = tiny.store(name)
    # Of Mamba 2 a prompt then takes several micro-batches of one cell each.
    rows = None if name != "mamba2" else 8
    asked = {"kv": kv, "kv_bits": bits, "micro_batch_rows": rows}
    options = options_for(store, devices, on_device, "a ring", tmp_path, **asked)
    with open_runtime(store, kv="cpu", kv_bits=bits) as runtime:
        expected = run_greedy(runtime, prompts_for(name), STEPS)
    with opened(store, devices, **options) as runtime:
        plan = runtime.plan
        assert plan.device is not None and plan.device.needs.state and bool(plan.needs.state) == (kv != "gpu")
        assert_same(run_greedy(runtime, prompts_for(name), STEPS, end=False), expected)
        assert_same(run_greedy(runtime, prompts_for(name), STEPS), expected)


HYBRID: Final = [("falcon_h1", "disk"), ("qwen3_next", "cpu"), ("mamba2", "cpu")]


@pytest.mark.parametrize(("name", "kv"), represented(HYBRID, [HYBRID[0]]))
def test_prompts_on_the_device_leave_their_states_where_the_processor_goes_on(
    tiny: Tiny, devices: Devices, tmp_path: Path, name: str, kv: str
) -> None:
    store = tiny.store(name)
    asked = {"kv": kv, "prefill_device": "gpu", "decode_device": "cpu"}
    options = options_for(store, devices, "a ring", "some", tmp_path, **asked)
    with open_runtime(store, kv="cpu") as runtime:
        expected = stream_of_sequences(runtime, name)
    with opened(store, devices, **options) as runtime:
        assert_same(stream_of_sequences(runtime, name), expected)


@pytest.mark.parametrize(("kv", "decode"), [("gpu", "gpu"), ("disk", "gpu"), ("cpu", "cpu")])
def test_a_prompt_goes_on_in_later_passes_and_comes_back_to_a_snapshot(
    tiny: Tiny, devices: Devices, tmp_path: Path, kv: str, decode: str
) -> None:
    store, (ids, _) = tiny.store("falcon_h1"), prompts_for("falcon_h1")
    with open_runtime(store, kv="cpu") as runtime, ExitStack() as stack:
        (expected,) = run_segments(runtime, [Segment(reserved(stack, runtime, 40), ids, keep=len(ids))])
    options = {"tiers": ALL, "device": devices.name, "vram": PLENTY, "kv_folder": tmp_path, "kv": kv}
    with opened(store, devices, **options, decode_device=decode) as runtime, ExitStack() as stack:
        sequence = reserved(stack, runtime, 40)
        run_segments(runtime, [Segment(sequence, ids[:8], text_length=len(ids))])
        kept = runtime.snapshot(sequence)
        run_segments(runtime, [Segment(sequence, ids[:5], text_length=len(ids))])
        runtime.restore(sequence, kept)
        rest = Segment(sequence, ids[8:], keep=len(ids) - 8, text_length=len(ids))
        torch.testing.assert_close(run_segments(runtime, [rest])[0], expected[8:], rtol=1e-4, atol=1e-4)


def test_what_a_refusal_names_is_enough_and_says_what_states_take(tiny: Tiny, devices: Devices) -> None:
    store = tiny.store("mamba2")
    options: dict[str, Any] = {"tiers": ALL, "device": devices.name, "ram": PLENTY, "kv": "gpu"}
    with (
        pytest.raises(DeviceBudgetError, match="for recurrent states") as refused,
        open_runtime(store, **options, vram=MIB),
    ):
        pass
    assert refused.value.smallest_bytes is not None
    vram = -(-refused.value.smallest_bytes // MIB) * MIB
    with pytest.raises(BudgetError), open_runtime(store, **options, vram=vram - MIB):
        pass
    with opened(store, devices, **options, vram=vram) as runtime:
        assert_same(run_greedy(runtime, prompts_for("mamba2"), STEPS), tiny.reference("mamba2"))


@pytest.mark.usefixtures("waits")
def test_a_residual_in_float32_waits_as_it_is(tiny: Tiny, devices: Devices) -> None:
    """Layers of Mamba 2 return float32, whatever they compute in."""
    store, ids = tiny.store("mamba2"), torch.tensor([prompts_for("mamba2")[0][:16]] * 2)
    layers = load_config(store.path).num_hidden_layers

    def logits(**options: Any) -> torch.Tensor:
        asked = {"dtype": "bfloat16", "micro_batch_rows": 8, **options}
        runtime = Runtime(store, Workload(2, CONTEXT), Options(ram=PLENTY, threads=1, **asked), has_pool=False)
        with runtime:
            model = OffloadedModel(load_config(store.path), runtime, GenerationConfig(pad_token_id=0))
            found = model(ids, logits_to_keep=1).logits
            device = runtime.plan.device
            if device is not None:
                assert device.waiting is not None
                assert device.waiting.token_nbytes == 4 * load_config(store.path).hidden_size
                runtime.stop_streaming()  # what is copied is counted by and by
                crossed = runtime.host.trace.total("bus").nbytes - runtime.bus_nbytes
                assert crossed >= layers * ids.numel() * device.waiting.token_nbytes
            return found  # type: ignore[no-any-return]

    asked = {"tiers": ALL, "device": devices.name, "vram": PLENTY, "decode_device": "cpu"}
    torch.testing.assert_close(logits(**asked), logits(), rtol=2e-3, atol=2e-3)


def test_padding_that_would_be_computed_by_itself_is_refused_on_the_device(tiny: Tiny, devices: Devices) -> None:
    store, (ids, _) = tiny.store("falcon_h1"), prompts_for("falcon_h1")
    prompts = torch.tensor([ids, [0] * 3 + ids[3:]])
    options = Options(
        dtype="float32", ram=PLENTY, threads=1, tiers=ALL, device=devices.name, vram=GIB, decode_device="cpu"
    )
    runtime = Runtime(store, Workload(2, CONTEXT), options, has_pool=False)
    model = OffloadedModel(load_config(store.path), runtime, GenerationConfig(pad_token_id=0))
    with runtime:
        runtime.plan = replace(runtime.plan, micro_batch_rows=2)
        with pytest.raises(NotSupportedError, match=r"cannot leave out a single one.*vram="):
            model(prompts, attention_mask=(prompts != 0).long(), logits_to_keep=1)
        assert model(prompts, logits_to_keep=1).logits.shape[1] == 1


@pytest.mark.parametrize(
    ("name", "rows"), represented([("gemma3_text", 8), ("falcon_h1", 16), ("qwen3_next", 1000)], [("falcon_h1", 16)])
)
def test_caches_of_transformers_get_whole_prompts_from_the_device(
    tiny: Tiny, devices: Devices, name: str, rows: int
) -> None:
    """Windows drop what the device's micro-batches still see, and states change behind them."""
    store, (ids, _) = tiny.store(name), prompts_for(name)
    prompts = torch.tensor([ids, ids[::-1]])

    def answers(**options: Any) -> tuple[torch.Tensor, ...]:
        runtime = Runtime(
            store, Workload(2, CONTEXT), Options(dtype="float32", ram=PLENTY, threads=1, **options), has_pool=False
        )
        model = OffloadedModel(load_config(store.path), runtime, GenerationConfig(pad_token_id=0))
        with runtime:
            runtime.plan = replace(runtime.plan, micro_batch_rows=rows)
            first = model(prompts, use_cache=True)
            if options:
                assert runtime.passes == 1
                wait_until(lambda: runtime.bus_nbytes >= runtime.plan.tape.total)  # counted by and by
                mine = [each for each in first.past_key_values.layers if getattr(each, "keys", None) is not None]
                assert all(each.keys.untyped_storage().nbytes() == each.keys.nbytes for each in mine)
            later = model(prompts[:, :1], past_key_values=first.past_key_values)
            greedy = model.generate(prompts, max_new_tokens=STEPS, do_sample=False)
        return first.logits, later.logits, greedy

    expected = answers()
    found = answers(tiers=ALL, device=devices.name, vram=GIB, decode_device="cpu")
    for each, right in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(each, right, rtol=1e-4, atol=1e-4)
    assert torch.equal(found[2], expected[2])
