"""Passes at a device, and with prompts at a device and decoding at the processor, give what one processor gives."""

from contextlib import ExitStack
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.model.seats import ALL, DECODING, PROMPTS, SeatedRuntime
from tests.quick import represented
from tests.runtimes import reserved, run_segments
from tests.shared import made_once
from tests.tiny import randomize
from tests.tiny_configs import TINY, tiny_config
from tiered.cache import SequenceKV
from tiered.convert import ConvertOptions, convert_checkpoint
from tiered.model import Segment, Segments
from tiered.plan import Bits, Workload
from tiered.runtime import Options, Runtime
from tiered.store import Store
from tiered.units import GIB

TEXTS: Final = {"first": (0, 150), "second": (0, 70), "third": (2, 21), "fourth": (5, 1), "fifth": (5, 131)}
"""Of each sequence: the pass it enters in, and the tokens of its prompt."""
STEPS: Final = 4
"""Tokens that each sequence gets before it leaves."""
ROOM: Final = 3
"""Sequences at once, at most."""
WINDOW: Final = 24
PIECE: Final = 100
"""Tokens of a prompt that a pass takes, at most."""


class Text:
    """A sequence on its way: its prompt in pieces, then one token after the other, chosen greedily."""

    def __init__(self, kv: SequenceKV, prompt: list[int]) -> None:
        self.kv, self._prompt = kv, prompt
        self.tokens: list[int] = []
        self.logits: list[torch.Tensor] = []

    @property
    def is_done(self) -> bool:
        return len(self.tokens) == STEPS

    def segment(self) -> Segment:
        if self.tokens:
            return Segment(self.kv, self.tokens[-1:], 1)
        ids = self._prompt[self.kv.length : self.kv.length + PIECE]
        return Segment(self.kv, ids, int(self.kv.length + len(ids) == len(self._prompt)), len(self._prompt))

    def take(self, logits: torch.Tensor) -> None:
        if len(logits):
            self.logits.append(logits[-1])
            self.tokens.append(int(logits[-1].argmax()))


def run_crowd(runtime: Runtime) -> dict[str, Text]:
    """All of TEXTS, each in the passes in which it may be there."""
    texts: dict[str, Text] = {}
    waiting, number = dict(TEXTS), 0
    running: dict[str, Text] = {}
    while waiting or running:
        for name, (begin, tokens) in list(waiting.items()):
            if begin <= number and len(running) < ROOM:
                del waiting[name]
                kv = runtime.reserve(tokens + STEPS)
                assert kv is not None
                generator = torch.Generator().manual_seed(tokens)
                prompt = torch.randint(3, runtime.vocab_size, (tokens,), generator=generator).tolist()
                running[name] = texts[name] = Text(kv, prompt)
        # Not always in the same order: what is decoded is now before prompts, now behind them.
        names = sorted(running, reverse=bool(number % 2))
        found = run_segments(runtime, [running[name].segment() for name in names])
        for name, logits in zip(names, found, strict=True):
            running[name].take(logits)
            if running[name].is_done:
                runtime.release(running.pop(name).kv)
        number += 1
    return texts


def workload() -> Workload:
    return Workload(ROOM, max(tokens for _, tokens in TEXTS.values()) + STEPS)


@cache
def store_of(name: str) -> Store:
    """A tiny model with positions for texts of several pages."""

    def make_model(folder: Path) -> None:
        fields = {**tiny_config(name).to_dict(), "max_position_embeddings": 512}
        if "sliding_window" in TINY[name]:
            fields["sliding_window"] = WINDOW
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields), dtype=torch.float32)
        randomize(model)
        model.save_pretrained(folder)

    def convert(folder: Path) -> None:
        quant = "none" if name == "bloom" else "int8"
        convert_checkpoint(made_once(f"long-{name}", make_model), folder, ConvertOptions(quant=quant, compress="none"))

    return Store.open(made_once(f"long-{name}.tiered", convert))


@cache
def expected_of(name: str, bits: Bits) -> dict[str, Text]:
    options = Options(dtype="float32", ram=16 * GIB, threads=1, kv_bits=bits)
    with Runtime(store_of(name), workload(), options) as runtime:
        return run_crowd(runtime)


def assert_same(found: dict[str, Text], expected: dict[str, Text], bits: Bits = 16) -> None:
    # What differs in the last place may be quantized to the next code: one processor's results differ as much between
    # sizes of micro-batches. That pages hold the same is for tests/cache.
    tolerance = 1e-5 if bits == 16 else 1e-3
    for name in TEXTS:
        assert found[name].tokens == expected[name].tokens, name
        assert len(found[name].logits) == STEPS
        for a, b in zip(found[name].logits, expected[name].logits, strict=True):
            assert float((a - b).abs().max() / b.abs().max()) < tolerance, name


FAMILIES: Final = ("llama", "gemma3_text", "bloom", "mixtral", "gemma4_text")
KV: Final = (("cpu", 16), ("cpu", 8), ("cpu", 4), ("disk", 16), ("disk", 4))
PLACES: Final = (PROMPTS, ALL, DECODING)
CELLS: Final = [
    *(
        (name, place, kv, bits, rows)
        for first, name in enumerate(FAMILIES)
        for second, place in enumerate(PLACES)
        for third, (kv, bits) in enumerate(KV)
        for rows in ((None, 40)[(first + second + third) % 2],)
        if name == "gemma3_text" or (first + second + third) % 3 == 0
    ),
    *(("deepseek_v3", PROMPTS, "cpu", 8, 40), ("llama4_text", PROMPTS, "disk", 16, 40)),
]
"""Gemma 3 has layers with windows and layers without, as all others have the one or the other. These differ in what
they compute between pages, or in whose pages a layer reads, and meet every place, and every tier and format once."""


@pytest.mark.parametrize(
    ("name", "place", "kv", "bits", "rows"),
    represented(
        CELLS,
        [c for c in CELLS if c[0] == "gemma3_text" and (PLACES.index(c[1]) + KV.index((c[2], c[3]))) % 3 == 0],
    ),
)
def test_sequences_that_come_and_go_get_the_tokens_of_one_processor(
    tmp_path: Path, name: str, place: str, kv: str, bits: Bits, rows: int | None
) -> None:
    options: dict[str, Any] = {"kv": kv, "kv_bits": bits, "micro_batch_rows": rows, "kv_folder": tmp_path}
    with SeatedRuntime(store_of(name), workload(), place, **options) as runtime:
        found = run_crowd(runtime)
        passes = runtime.passes
    assert_same(found, expected_of(name, bits), bits)
    # In passes in which all only decode, nothing is asked of the device if prompts are all it has.
    assert (runtime.device_blocks.passes < passes) == (place == PROMPTS)
    assert runtime.device.copied_out > 0


@pytest.mark.parametrize(
    ("name", "bits"),
    represented(
        [*product(("llama", "gemma3_text", "bloom"), (16, 8, 4)), ("deepseek_v3", 8), ("llama4_text", 16)],
        [("gemma3_text", 16), ("llama", 4), ("deepseek_v3", 8)],
    ),
)
def test_a_cache_at_the_device_gives_the_tokens_of_one_processor(name: str, bits: Bits) -> None:
    with SeatedRuntime(store_of(name), workload(), ALL, on_device=True, kv_bits=bits) as runtime:
        found = run_crowd(runtime)
    assert_same(found, expected_of(name, bits), bits)
    assert not runtime.device.copied_out


def test_prompts_that_begin_attend_at_the_device_and_those_that_go_on_where_their_pages_are() -> None:
    layers, rows, tokens = 3, 40, 130
    with SeatedRuntime(store_of("llama"), workload(), PROMPTS, kv_bits=8, micro_batch_rows=rows) as runtime:
        with ExitStack() as stack:
            kv = reserved(stack, runtime, tokens)
            for start in range(0, tokens, PIECE):
                run_segments(runtime, [Segment(kv, [5] * min(PIECE, tokens - start), 1, tokens)])
        assert runtime.device_kernels.attentions == layers * -(-PIECE // rows)


@pytest.mark.parametrize("place", represented(PLACES, [PROMPTS]))
def test_a_device_may_compute_in_another_precision_than_the_processor(place: str) -> None:
    options: dict[str, Any] = {"dtype": "bfloat16", "micro_batch_rows": 40}
    with SeatedRuntime(store_of("llama"), workload(), place, device_dtype=torch.float16, **options) as runtime:
        found = run_crowd(runtime)
    for name, text in expected_of("llama", 16).items():
        first, exact = found[name].logits[0], text.logits[0]
        assert float((first - exact).norm() / exact.norm()) < 0.03, name


def test_what_a_failed_pass_has_sent_is_not_stored_by_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = expected_of("llama", 16)
    with SeatedRuntime(store_of("llama"), workload(), PROMPTS, micro_batch_rows=40) as runtime:
        with ExitStack() as stack, monkeypatch.context() as patch:
            kv = reserved(stack, runtime, 80)
            patch.setattr(runtime.device_kernels, "attention", failing)
            with pytest.raises(ValueError, match="of the test's own"):
                run_segments(runtime, [Segment(kv, [5] * 80, 1, 80)])
        assert_same(run_crowd(runtime), expected)


def test_what_the_head_of_one_seat_takes_of_another_is_fetched_behind_what_computes_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    depths = []
    finish = Segments.finish
    with SeatedRuntime(store_of("llama"), workload(), PROMPTS) as runtime, ExitStack() as stack:

        def noted(work: Segments, groups: Any) -> Any:
            depths.append(runtime.device.depth)
            return finish(work, groups)

        monkeypatch.setattr(Segments, "finish", noted)
        run_segments(runtime, [Segment(reserved(stack, runtime, 80), [5] * 80, 1, 80)])
    # A copy in another stream would not wait for the last layer.
    assert depths and all(depths)


def failing(call: object) -> torch.Tensor:
    raise ValueError("of the test's own")
