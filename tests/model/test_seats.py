"""Passes at a device, and with prompts at a device and decoding at the processor, give what one processor gives."""

from contextlib import ExitStack
from functools import cache
from itertools import pairwise, product
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.late_device import LateDevice
from tests.model.seats import ALL, DECODING, PROMPTS, DeviceKernels, SeatedRuntime
from tests.quick import represented
from tests.runtimes import reserved, run_segments
from tests.shared import made_once
from tests.tiny import randomize
from tests.tiny_configs import TINY, tiny_config
from tiered import kernels
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


CUTS: Final = (((), 1), ((), 50), ((100,), 0), ((64,), 1), ((30, 31, 64, 129), 50), ((1, 129), 1))
"""Tokens of a prompt of 130 after which passes end, and those of a neighbour in the first of them."""


class OtherSums(DeviceKernels):
    """A device in the invariant mode whose attention has other bits than the processor's, as a real one's has."""

    def __init__(self, device: LateDevice) -> None:
        super().__init__(device)
        self._invariant = kernels.DeviceKernels(torch.device("cpu"), name="torch")

    def linear(self, x: torch.Tensor, weight: Any, bias: torch.Tensor | None = None) -> torch.Tensor:
        self.products += 1
        return self._invariant.linear(x, weight, bias)

    def attention(self, call: kernels.AttentionCall) -> torch.Tensor:
        self.attentions += 1
        return self._invariant.attention(call) * 1.01


def logits_of(runtime: Runtime, cuts: tuple[int, ...] = (), neighbour: int = 0) -> torch.Tensor:
    """Logits [1 + STEPS, vocab] of the last token of a prompt and of some that follow it. Passes end at `cuts`; another
    sequence has `neighbour` tokens in the first and one in each later one, if that is not 0."""
    prompt = torch.randint(3, 90, (130,), generator=torch.Generator().manual_seed(3)).tolist()
    found = []
    with ExitStack() as stack:
        kv, other = reserved(stack, runtime, 130 + STEPS), reserved(stack, runtime, 130)
        for start, stop in pairwise([0, *cuts, 130, *range(131, 131 + STEPS)]):
            segments = [Segment(kv, (prompt + [7] * STEPS)[start:stop], 1, 130 if start < 130 else 0)]
            if neighbour:
                count = 1 if start else neighbour
                segments.insert(0, Segment(other, [9] * count, 1, 0 if start else count))
            logits = run_segments(runtime, segments)[-1][-1]
            if stop >= 130:
                found.append(logits)
    return torch.stack(found)


CUT_CELLS: Final[list[tuple[str, str, str, int, int]]] = [
    *(
        ("llama", place, kv, bits, (200, 40)[(a + b + c) % 2])
        for a, place in enumerate((PROMPTS, ALL))
        for b, kv in enumerate(("cpu", "disk"))
        for c, bits in enumerate((8, 16))
    ),
    *(("gemma3_text", PROMPTS, "cpu", 4, 40), ("gemma3_text", PROMPTS, "disk", 16, 40)),
    *(("gemma4_text", PROMPTS, "cpu", 16, 40), ("gemma4_text", PROMPTS, "disk", 4, 40)),
]
"""Every three of place, cache, bits and rows together."""


@pytest.mark.parametrize(
    ("name", "place", "kv", "bits", "rows"),
    represented(CUT_CELLS, [("llama", PROMPTS, "cpu", 16, 40), ("llama", ALL, "cpu", 8, 40), CUT_CELLS[-1]]),
)
def test_a_prompt_that_a_device_computes_has_the_same_bits_however_passes_cut_it(
    tmp_path: Path, name: str, place: str, kv: str, bits: Bits, rows: int
) -> None:
    options: dict[str, Any] = {"kv": kv, "kv_bits": bits, "micro_batch_rows": rows, "kv_folder": tmp_path}
    runtime = SeatedRuntime(store_of(name), workload(), place, dtype="bfloat16", **options)
    runtime.device_kernels = OtherSums(runtime.device)
    with runtime:
        expected = logits_of(runtime)
        for cuts, neighbour in CUTS:
            assert torch.equal(logits_of(runtime, cuts, neighbour), expected), (cuts, neighbour)


def test_all_parts_of_a_prompt_attend_at_the_device_and_tokens_that_are_decoded_where_their_pages_are() -> None:
    layers, rows, tokens = 3, 40, 130
    with SeatedRuntime(store_of("llama"), workload(), ALL, kv_bits=8, micro_batch_rows=rows) as runtime:
        with ExitStack() as stack:
            kv = reserved(stack, runtime, tokens + STEPS)
            # A part of one token is the prompt's all the same.
            for start, stop in ((0, PIECE), (PIECE, tokens - 1), (tokens - 1, tokens)):
                run_segments(runtime, [Segment(kv, [5] * (stop - start), 1, tokens)])
            prompts = layers * (-(-PIECE // rows) + 1 + 1)
            assert runtime.device_kernels.attentions == prompts
            for _ in range(STEPS):
                run_segments(runtime, [Segment(kv, [5], 1)])
        assert runtime.device_kernels.attentions == prompts


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
