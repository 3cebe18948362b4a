"""The same logits whatever the cache's tier, the micro-batches, the passes, the neighbours and the threads.

Exactly the same with the native kernels, in every format of the cache. And those of transformers' own forward, over
texts so much longer than windows and micro-batches that the rings of sliding layers go round.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.answers import TOLERANCE, Answers, Tokens, reference_logits, relative_error
from tests.quick import represented
from tests.runtimes import reserved, run_segments
from tests.tiny import randomize
from tests.tiny_configs import TINY, tiny_config
from tiered.cache import SequenceKV
from tiered.convert import ConvertOptions, convert_checkpoint
from tiered.kernels import load_library
from tiered.model import Segment
from tiered.plan import Workload
from tiered.runtime import Options, Runtime
from tiered.store import Store
from tiered.units import GIB

WINDOW: Final = 24
TEXT: Final = 200
"""Tokens whose logits are compared: several pages, the last one not complete."""
CONTEXT: Final = 320
SPLITS: Final[dict[str, list[int]]] = {
    "whole": [TEXT],
    "in two": [70, 130],
    "with decoding": [120, 1, 1, 6, 62, *[1] * 10],
}
"""Tokens of the text in each pass."""
NEIGHBOURS: Final[dict[int, list[int]]] = {0: [33, 1, 1], 1: [90, 1, 70], 4: [1, 1, 1], 5: [64, 64, 1]}
"""Of other sequences: their tokens in each pass, by the pass they enter in. At most two of them run at once."""


class Models:
    """Tiny models with more positions than those of `tests/tiny_configs.py`, and their stores, each made once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.store = cache(self._store)
        self.expected = cache(self._expected)
        self.exact = cache(self._exact)

    def model(self, name: str) -> PreTrainedModel:
        fields = {**tiny_config(name).to_dict(), "max_position_embeddings": 512}
        if "sliding_window" in TINY[name]:
            fields["sliding_window"] = WINDOW
        torch.manual_seed(0)
        made: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields), dtype=torch.float32)
        randomize(made)
        made.eval()
        return made

    def _store(self, name: str, dtype: torch.dtype) -> Store:
        folder = self._folder / f"{name}-{dtype.itemsize}"
        model = self.model(name)
        model.to(dtype=dtype)  # type: ignore[call-arg]  # transformers' decorator hides the signature
        model.save_pretrained(folder)
        output = folder.with_suffix(".tiered")
        convert_checkpoint(folder, output, ConvertOptions(quant="none", compress="none"))
        return Store.open(output)

    def _expected(self, name: str) -> torch.Tensor:
        """What transformers makes of the long text, in float32."""
        return reference_logits(self.model(name), text_of(CONTEXT - 20))

    def _exact(self, name: str, bits: int) -> torch.Tensor:
        """What the engine makes of the text in one pass and one micro-batch, alone, on one thread."""
        with runtime_of(self.store(name, torch.bfloat16), kv_bits=bits) as runtime:
            return logits_of(runtime, text_of(TEXT), [TEXT])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("kv"))


def runtime_of(store: Store, **options: Any) -> Runtime:
    dtype = options.pop("dtype", "bfloat16")
    workload = Workload(sequences=3, max_context=CONTEXT)
    return Runtime(store, workload, Options(**{"dtype": dtype, "ram": 16 * GIB, "threads": 1, **options}))


def text_of(tokens: int) -> list[int]:
    """Random tokens, the same for every model."""
    found: list[int] = torch.randint(3, 160, (tokens,), generator=torch.Generator().manual_seed(5)).tolist()
    return found


class Crowd:
    """Other sequences in the same passes, which come and go."""

    def __init__(self, runtime: Runtime, schedule: dict[int, list[int]]) -> None:
        self._runtime, self._schedule = runtime, schedule
        self._held: dict[int, SequenceKV] = {}

    def segments(self, number: int) -> list[Segment]:
        """The sequences of pass `number`; one without further tokens has left."""
        found = []
        for begin, counts in self._schedule.items():
            if begin in self._held and number == begin + len(counts):
                self._runtime.release(self._held.pop(begin))
        for begin, counts in self._schedule.items():
            if number == begin:
                kv = self._runtime.reserve(sum(counts))
                assert kv is not None
                self._held[begin] = kv
            if begin in self._held:
                ids = [3 + (31 * i + begin) % 150 for i in range(counts[number - begin])]
                found.append(Segment(self._held[begin], ids, keep=1))
        return found

    def leave(self) -> None:
        for kv in self._held.values():
            self._runtime.release(kv)


def logits_of(
    runtime: Runtime, ids: Tokens, split: Sequence[int], schedule: dict[int, list[int]] | None = None
) -> torch.Tensor:
    """Logits [tokens, vocab] of `ids`; `split`: how many of them are in each pass."""
    assert sum(split) == len(ids)
    found = []
    with ExitStack() as stack:
        crowd = Crowd(runtime, schedule or {})
        stack.callback(crowd.leave)
        kv = reserved(stack, runtime, len(ids))
        for number, count in enumerate(split):
            others = crowd.segments(number)
            mine = Segment(kv, list(ids[kv.length : kv.length + count]), keep=count)
            # Now before its neighbours, now behind them.
            place = number % (len(others) + 1)
            found.append(run_segments(runtime, [*others[:place], mine, *others[place:]])[place])
    return torch.cat(found)


SMALL: Final = "disk, micro-batches of 7"
GRID: Final[dict[str, dict[str, Any]]] = {
    SMALL: {"kv": "disk", "micro_batch_rows": 7, "threads": 1},
    "memory, micro-batches of 64, 2 threads": {"kv": "cpu", "micro_batch_rows": 64, "threads": 2},
    "disk, one micro-batch, 2 threads": {"kv": "disk", "micro_batch_rows": None, "threads": 2},
}


BITS: Final = (16, 8, 4)
CELLS: Final = [
    (name, bits, setting)
    for first, name in enumerate(("opt", "gemma3_text", "deepseek_v3", "llama4_text", "gemma4_text"))
    for second, setting in enumerate(GRID)
    for third, bits in enumerate(BITS)
    if (first + second + third) % 3 == 0 or name == "gemma3_text"
]
"""All combinations for the family with windows, whose rings depend on bits, tier and micro-batches together. The other
families differ only in what they compute between pages, and in whose pages a layer reads: each of them meets every
format and every setting once."""


@pytest.mark.parametrize(
    ("name", "bits", "setting"),
    represented(CELLS, [("gemma3_text", 4, SMALL), ("gemma4_text", 8, SMALL)]),
)
def test_logits_are_the_same_bits_however_they_are_computed(
    models: Models, tmp_path: Path, name: str, bits: int, setting: str
) -> None:
    library = load_library()
    if isinstance(library, str):
        pytest.skip(library)
    expected, ids = models.exact(name, bits), text_of(TEXT)
    store = models.store(name, torch.bfloat16)
    with runtime_of(store, kv_bits=bits, kv_folder=tmp_path, **GRID[setting]) as runtime:
        assert runtime.host.kernels.level is not None
        for split in SPLITS.values():
            assert torch.equal(logits_of(runtime, ids, split, NEIGHBOURS), expected)
        assert torch.equal(logits_of(runtime, ids, SPLITS["with decoding"]), expected)
        assert runtime._memory.pool.is_empty
        assert bool(runtime.kv_bytes_written) == bool(runtime.kv_bytes_read) == (GRID[setting]["kv"] == "disk")


def test_fewer_bits_do_change_logits(models: Models) -> None:
    """Or else the tests above would compare nothing."""
    if isinstance(load_library(), str):
        pytest.skip(str(load_library()))
    sixteen, eight, four = (models.exact("llama", bits) for bits in (16, 8, 4))
    errors = [float((x - sixteen).float().norm() / sixteen.float().norm()) for x in (eight, four)]
    assert 0 < errors[0] < errors[1] < 0.5


LONG: Final = [
    ("gemma3_text", "disk"),
    *(
        (name, kv)
        for number, name in enumerate(
            ("gemma3_text", "gemma4_text", "mistral", "cohere2", "bloom", "diffllama", "deepseek_v2", "llama4_text")
        )
        for kv in ("cpu", "disk")[number % 2 :][:1]
    ),
]
"""Either tier holds the same bits, as the test above shows: one of them stands for both."""


@pytest.mark.parametrize(("name", "kv"), represented(LONG, LONG[:1]))
def test_a_text_much_longer_than_windows_gives_what_transformers_gives(
    models: Models, tmp_path: Path, name: str, kv: str
) -> None:
    expected = models.expected(name)
    ids = text_of(len(expected))
    store = models.store(name, torch.float32)
    with runtime_of(store, dtype="float32", micro_batch_rows=16, kv=kv, kv_folder=tmp_path) as runtime:
        if name in ("gemma3_text", "mistral", "cohere2"):
            assert min(ring_pages(runtime)) * 64 * 2 < len(ids)
        found = logits_of(runtime, ids, [150, *[1] * 20, 110, *[1] * 20], NEIGHBOURS)
    assert error_of(found, expected) <= TOLERANCE


def ring_pages(runtime: Runtime) -> list[int]:
    """Pages that the longest sequence has in each group of layers."""
    plan = runtime.plan.cache
    return [plan.pages(group, plan.context) for group in plan.groups]


def error_of(found: torch.Tensor, expected: torch.Tensor) -> float:
    return relative_error(Answers((), (found,)), Answers((), (expected,)))


@pytest.mark.parametrize(("name", "bits"), represented([("bloom", 4), ("diffllama", 8)], []))
def test_families_with_attention_of_their_own_read_what_is_stored_whatever_the_micro_batches(
    models: Models, tmp_path: Path, name: str, bits: int
) -> None:
    store, ids, found = models.store(name, torch.float32), text_of(TEXT), []
    for options in ({"kv": "cpu"}, {"kv": "cpu", "micro_batch_rows": 7}, {"kv": "disk", "micro_batch_rows": 64}):
        with runtime_of(store, dtype="float32", kv_bits=bits, kv_folder=tmp_path, **options) as runtime:
            found += [logits_of(runtime, ids, split, NEIGHBOURS) for split in SPLITS.values()]
    # A float32 that differs in its last digit may, very seldom, be rounded to the next code.
    assert max(error_of(x, found[0]) for x in found[1:]) <= 10 * TOLERANCE
    with runtime_of(store, dtype="float32") as runtime:
        assert error_of(found[0], logits_of(runtime, ids, [TEXT])) > 10 * TOLERANCE
