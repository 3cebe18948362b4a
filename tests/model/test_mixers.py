"""Recurrent layers inside packed micro-batches: the same bits however a text is cut, alone and among others.

Parity with transformers is that of every family of the table (`test_families.py`).
"""

import copy
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from transformers import GenerationConfig

from tests.answers import assert_same
from tests.model.test_kv_grid import Models, logits_of, runtime_of, text_of
from tests.model.test_parity_grid import budget_for
from tests.plan.plans import model_of
from tests.quick import represented
from tests.runtimes import open_runtime, reserved, run_greedy, run_segments
from tests.tiny import Tiny, prompts_for
from tests.tiny_configs import CONTEXT, TINY, tiny_config
from tiered.arch import build_skeleton, load_config, mixers, state_shape
from tiered.errors import BudgetError, CheckpointError, ConfigError, NotSupportedError
from tiered.kernels import load_library
from tiered.model import Segment
from tiered.model.steps import native_forward
from tiered.offloaded import OffloadedModel
from tiered.plan import Workload
from tiered.plan.workspace import workspace_for
from tiered.runtime import Options, Runtime
from tiered.units import GIB, MIB

PROMPT: Final = 129
"""Tokens: one more than the cells of any of these models' grids."""
DECODED: Final = 6
NEIGHBOURS: Final[dict[int, list[int]]] = {0: [33, 1, 1], 1: [90, 1, 1], 3: [1, 1, 1], 5: [64, 1]}
"""Of other sequences: their tokens in each pass, by the pass they enter in."""
CUTS: Final[dict[str, list[list[int]]]] = {
    "qwen3_next": [[64, 64, 1], [64, 65]],
    "lfm2": [[64, 64, 1], [50, 79]],
    "falcon_h1": [[64, 64, 1], [8, 120, 1], [40, 89]],
    "mamba2": [[64, 64, 1], [40, 89]],
    "jamba": [],
}
"""Tokens of the prompt in each pass, instead of all in one."""
HYBRIDS: Final = (
    *("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "lfm2", "lfm2_moe", "granitemoehybrid", "falcon_h1", "bamba"),
    *("nemotron_h", "jamba"),
)
"""Families with layers of both kinds."""
UNSTEADY: Final = ("qwen3_next", "qwen3_5_moe_text", "granitemoehybrid")
"""Mixtures whose plan wants some KiB more when a runtime opens than when the budget is looked for, and whose layers are
smaller than what would make up for it: without a ring."""
ON_DISK: Final = ("falcon_h1", "mamba2")
"""Pages and states in each layer; states only."""


pytestmark = pytest.mark.skipif("qwen3_next" not in TINY, reason="transformers hands states on in another way")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    if isinstance(load_library(), str):
        pytest.skip(str(load_library()))
    return Models(tmp_path_factory.mktemp("mixers"))


@pytest.mark.parametrize("name", represented(CUTS, ["qwen3_next", "falcon_h1"]))
def test_a_text_has_the_same_bits_however_it_is_cut_and_beside_any_others(
    models: Models, tmp_path: Path, name: str
) -> None:
    store, ids = models.store(name, torch.bfloat16), text_of(PROMPT + DECODED)
    steps = [1] * DECODED
    with runtime_of(store) as runtime:
        assert runtime.host.kernels.level is not None
        expected = logits_of(runtime, ids, [PROMPT, *steps])
        assert torch.equal(logits_of(runtime, ids, [PROMPT, *steps], NEIGHBOURS), expected)
        for cut in CUTS[name]:
            assert torch.equal(logits_of(runtime, ids, [*cut, *steps], NEIGHBOURS), expected), cut
        assert runtime._memory.pool.is_empty
    if name in ON_DISK:
        with runtime_of(store, kv="disk", kv_folder=tmp_path, micro_batch_rows=64) as runtime:
            assert torch.equal(logits_of(runtime, ids, [*CUTS[name][0], *steps], NEIGHBOURS), expected)
            assert runtime.kv_bytes_read


@pytest.mark.usefixtures("steady_baseline")
@pytest.mark.parametrize("name", represented(HYBRIDS, ()))
def test_pages_in_8_bits_on_disk_beside_streamed_weights_change_no_bit(
    models: Models, tmp_path: Path, name: str
) -> None:
    store, ids, split = models.store(name, torch.bfloat16), text_of(PROMPT + DECODED), [PROMPT, *[1] * DECODED]
    with runtime_of(store, kv_bits=8) as runtime:
        expected = logits_of(runtime, ids, split, NEIGHBOURS)
    with runtime_of(store) as runtime:
        assert not torch.equal(logits_of(runtime, ids, split, NEIGHBOURS), expected)
    options: dict[str, Any] = {"kv": "disk", "kv_bits": 8, "kv_folder": tmp_path}
    with runtime_of(store, **options) as runtime:  # after which the process is as large as it will be
        assert torch.equal(logits_of(runtime, ids, split, NEIGHBOURS), expected)
        assert runtime.kv_bytes_written and runtime.kv_bytes_read
    if name in UNSTEADY:
        return
    ram = budget_for(store, "ring of two blocks", runtime_of, **options)
    with runtime_of(store, ram=ram, **options) as runtime:
        assert runtime.plan.streamed_nbytes and not runtime.plan.placement.resident
        assert torch.equal(logits_of(runtime, ids, split, NEIGHBOURS), expected)
        assert runtime.kv_bytes_written and runtime.kv_bytes_read
        assert runtime._memory.pool.is_empty


@pytest.mark.parametrize("kv", ["cpu", "disk"])
def test_a_sequence_comes_back_to_a_snapshot_as_if_nothing_had_been_computed_since(
    models: Models, tmp_path: Path, kv: str
) -> None:
    ids = text_of(70)
    with (
        runtime_of(models.store("falcon_h1", torch.bfloat16), kv=kv, kv_bits=8, kv_folder=tmp_path) as runtime,
        ExitStack() as stack,
    ):
        kvs = [reserved(stack, runtime, len(ids)) for _ in range(2)]
        run_segments(runtime, [Segment(each, ids[:62]) for each in kvs])
        kept = runtime.snapshot(kvs[0])
        # Across the end of a page, which is then stored in 8 bits.
        wrong = run_segments(runtime, [Segment(kvs[0], text_of(5)[::-1], keep=5)])
        runtime.restore(kvs[0], kept)
        found, expected = run_segments(runtime, [Segment(each, ids[62:67], keep=5) for each in kvs])
        assert torch.equal(found, expected)
        assert not torch.equal(found, wrong[0])
        runtime.restore(kvs[0], kept)
        kvs[0].length += runtime.plan.cache.tokens_at_once + 1
        with pytest.raises(ConfigError, match="or at most"):
            runtime.restore(kvs[0], kept)


@pytest.mark.usefixtures("steady_baseline")
@pytest.mark.parametrize("name", ["qwen3_5_text", "falcon_h1"])
def test_streamed_weights_stay_for_all_scans_of_their_layer(tiny: Tiny, name: str) -> None:
    store = tiny.store(name)
    with open_runtime(store, ram=budget_for(store, "ring of two blocks")) as runtime:
        assert runtime.plan.streamed_nbytes and runtime.plan.held.layers
        assert_same(run_greedy(runtime, prompts_for(name), steps=6), tiny.reference(name))
    with pytest.raises(BudgetError, match="for recurrent states"), open_runtime(store, ram=MIB):
        pass


def test_what_recurrent_layers_cannot_do_is_refused_by_name(tiny: Tiny) -> None:
    with (
        pytest.raises(ConfigError, match="compute 21 tokens of a prompt together"),
        open_runtime(tiny.store("jamba"), micro_batch_rows=20),
    ):
        pass
    with open_runtime(tiny.store("jamba")) as runtime, ExitStack() as stack:
        kv = reserved(stack, runtime, 30)
        run_segments(runtime, [Segment(kv, [5] * 10)])
        with pytest.raises(ConfigError, match="compute prompts whole"):
            run_segments(runtime, [Segment(kv, [5] * 10)])


@pytest.mark.parametrize("name", ["qwen3_next", "mamba2"])
def test_transformers_own_generate_gives_what_it_gives_of_the_model_in_memory(tiny: Tiny, name: str) -> None:
    store, (long, short) = tiny.store(name), prompts_for(name)
    options = Options(dtype="float32", ram=16 * GIB, threads=1)
    runtime = Runtime(store, Workload(2, CONTEXT), options, has_pool=False)
    model = OffloadedModel(load_config(store.path), runtime, GenerationConfig(pad_token_id=0))
    ids = torch.tensor([long, [0] * (len(long) - len(short)) + short])
    asked: dict[str, Any] = {"attention_mask": (ids != 0).long(), "max_new_tokens": 6, "do_sample": False}
    expected = tiny.model(name).generate(ids, **asked)  # type: ignore[operator]  # only exists on classes that mix it in
    with runtime:
        assert torch.equal(model.generate(ids, **asked), expected)
        with pytest.raises(ValueError, match="not supported with stateful models"):
            model.generate(ids[:1], max_new_tokens=6, prompt_lookup_num_tokens=3)


def test_padding_that_would_be_computed_by_itself_is_refused(tiny: Tiny) -> None:
    """Nothing keeps a single token out of the states."""
    store, (long, short) = tiny.store("falcon_h1"), prompts_for("falcon_h1")
    options = Options(dtype="float32", ram=16 * GIB, threads=1)
    runtime = Runtime(store, Workload(2, CONTEXT), options, has_pool=False)
    model = OffloadedModel(load_config(store.path), runtime, GenerationConfig(pad_token_id=0))
    ids = torch.tensor([long, [0] * (len(long) - len(short)) + short])
    expected = tiny.model("falcon_h1")(ids, attention_mask=(ids != 0).long()).logits[:, -1]
    with runtime:
        runtime.plan = replace(runtime.plan, micro_batch_rows=4)
        found = model(ids, attention_mask=(ids != 0).long(), logits_to_keep=1).logits[:, 0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        runtime.plan = replace(runtime.plan, micro_batch_rows=2)
        with pytest.raises(NotSupportedError, match=r"with padding: .*cannot leave out a single one.*ram="):
            model(ids, attention_mask=(ids != 0).long(), logits_to_keep=1)
        assert model(ids[:, -3:], logits_to_keep=1).logits.shape[1] == 1


@pytest.mark.parametrize("name", ["qwen3_next", "mamba2", "falcon_h1"])
def test_steps_by_the_library_take_the_states_and_little_more(name: str) -> None:
    """Transformers' own code makes several tensors as large as the states; the library makes none."""
    shape = state_shape(build_skeleton(tiny_config(name)), native_forward)
    assert shape is not None
    recurrent = max(part.nbytes for part in shape.groups[0].parts if part.kind == "recurrent")
    assert shape.layer_nbytes <= shape.native_step_nbytes < shape.layer_nbytes + recurrent <= shape.step_nbytes


@pytest.mark.parametrize("name", ["qwen3_next", "mamba2", "falcon_h1"])
@pytest.mark.parametrize("tokens", [2, 7, 65])
def test_a_scan_takes_no_more_than_is_planned_for_its_tokens(name: str, tokens: int) -> None:
    skeleton = build_skeleton(tiny_config(name))
    shape = state_shape(skeleton)
    mixer = next(module for layer in skeleton.layers for module in layer.modules() if mixers.is_mixer(module))
    assert shape is not None
    # Behind the beginning of a text, where there is a state to begin with.
    states, meta = mixers._States(), copy.deepcopy(mixer).to("meta")
    peaks = [mixers._peak(skeleton, meta, type(mixer).forward, states, tokens) for _ in range(2)]
    with_state, without = (
        workspace_for(model_of(state=state), 0, tokens, 1, 128, GIB, is_device=True).nbytes for state in (shape, None)
    )
    assert max(peaks) <= with_state - without


@pytest.mark.parametrize(("field", "value"), [("chunk_size", 0), ("time_step_limit", [1.0])])
def test_a_configuration_that_no_scan_can_follow_is_refused(field: str, value: Any) -> None:
    config = tiny_config("mamba2")
    setattr(config, field, value)
    with pytest.raises(CheckpointError, match="put the model's own"):
        state_shape(build_skeleton(config))


def test_a_second_part_of_a_prompt_that_must_be_whole_is_refused(tiny: Tiny) -> None:
    store, (prompt, _) = tiny.store("jamba"), prompts_for("jamba")
    options = Options(dtype="float32", ram=16 * GIB, threads=1)
    runtime = Runtime(store, Workload(1, CONTEXT), options, has_pool=False)
    model = OffloadedModel(load_config(store.path), runtime, GenerationConfig(pad_token_id=0))
    with runtime:
        first = model(torch.tensor([prompt]), use_cache=True)
        with pytest.raises(NotSupportedError, match="'jamba' compute prompts whole"):
            model(torch.tensor([prompt]), cache=first.cache)
