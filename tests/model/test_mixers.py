"""Recurrent layers inside packed micro-batches: the same bits however a text is cut, alone and among others.

Parity with transformers is that of every family of the table (`test_families.py`).
"""

from pathlib import Path
from typing import Final

import pytest
import torch

from tests.model.test_kv_grid import Models, logits_of, runtime_of, text_of
from tests.quick import represented
from tiered.kernels import load_library

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
ON_DISK: Final = ("falcon_h1", "mamba2")
"""Pages and states in each layer; states only."""


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
