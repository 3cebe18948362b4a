"""The Python API behaves as transformers documents its models, on weights that are streamed."""

import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
    WatermarkingConfig,
)

import tiered
from tests.quick import represented
from tiered.api import LoadedModel
from tiered.convert import ConvertOptions, convert_checkpoint
from tiered.errors import BudgetError, ConfigError, NotSupportedError, StoreError

CHECKPOINT = Path(__file__).parent / "data/models/opt-docs-8m"
PROMPT = "The function returns"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("api") / "opt-docs-8m.tiered"
    convert_checkpoint(CHECKPOINT, path, ConvertOptions(quant="none"))
    return path


@pytest.fixture(scope="module")
def loaded(store: Path) -> Iterator[LoadedModel]:
    with tiered.load(store, dtype="float32", context=256, sequences=4) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def reference() -> Any:
    return AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)


@pytest.mark.parametrize(
    "arguments",
    represented(
        [
            {"do_sample": False},
            {"do_sample": True, "top_k": 20, "temperature": 0.8},
            {"do_sample": False, "num_beams": 4},
            {"do_sample": True, "num_return_sequences": 3},
            {"do_sample": False, "cache_implementation": "static"},
            {"do_sample": False, "prompt_lookup_num_tokens": 3},
            {"do_sample": False, "use_cache": False},
            {"do_sample": False, "repetition_penalty": 1.3, "return_dict_in_generate": True, "output_scores": True},
        ],
        [{"do_sample": False}, {"do_sample": False, "num_beams": 4}, {"do_sample": True, "num_return_sequences": 3}],
    ),
    ids=lambda arguments: ",".join(f"{key}={value}" for key, value in arguments.items()),
)
def test_generate_gives_the_tokens_that_the_model_in_memory_gives(
    loaded: LoadedModel, reference: Any, arguments: dict[str, Any]
) -> None:
    inputs = loaded.tokenizer(PROMPT, return_tensors="pt")
    results = []
    for model in (loaded.model, reference):
        torch.manual_seed(0)
        result = model.generate(**inputs, max_new_tokens=12, **arguments)
        results.append(getattr(result, "sequences", result))
    assert torch.equal(*results)


def _words(loaded: LoadedModel, text: str) -> list[int]:
    ids: list[int] = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


KEYWORDS: dict[str, Callable[[LoadedModel, Any], dict[str, Any]]] = {
    "stop strings": lambda at, _: {"stop_strings": ["the"], "tokenizer": at.tokenizer},
    "stop strings, beams": lambda at, _: {"stop_strings": ["the"], "tokenizer": at.tokenizer, "num_beams": 3},
    "stop strings, lookup": lambda at, _: {
        "stop_strings": "the",
        "tokenizer": at.tokenizer,
        "prompt_lookup_num_tokens": 3,
    },
    "token healing": lambda at, _: {"token_healing": True, "tokenizer": at.tokenizer},
    "assistant in memory": lambda _, reference: {"assistant_model": reference},
    "the model as its own assistant": lambda at, _: {"assistant_model": at.model},
    "streamer": lambda at, _: {"streamer": TextStreamer(at.tokenizer)},
    "allowed tokens": lambda *_: {"prefix_allowed_tokens_fn": lambda row, ids: [300, 301, 302]},
    "bad words": lambda at, _: {"bad_words_ids": [_words(at, "the"), _words(at, " value of")]},
    "suppressed tokens": lambda *_: {"suppress_tokens": [268], "begin_suppress_tokens": [264]},
    "bias": lambda *_: {"sequence_bias": [[[264], -5.0]]},
    "repetition": lambda *_: {"no_repeat_ngram_size": 2, "encoder_repetition_penalty": 1.2},
    "scores": lambda *_: {
        **{"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
        "renormalize_logits": True,
    },
    "guidance": lambda at, _: {
        "guidance_scale": 1.5,
        "negative_prompt_ids": at.tokenizer("To install", return_tensors="pt")["input_ids"],
    },
    "lengths and time": lambda *_: {"min_new_tokens": 5, "max_time": 1000.0, "eos_token_id": 202},
    "beams": lambda *_: {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5, "early_stopping": True},
    "cutoffs": lambda *_: {"do_sample": True, "typical_p": 0.5, "epsilon_cutoff": 1e-3, "eta_cutoff": 1e-3, "top_k": 0},
    "watermark": lambda *_: {"watermarking_config": WatermarkingConfig(bias=2.5, context_width=1)},
    "prompt in chunks": lambda *_: {"prefill_chunk_size": 2},
    "positions": lambda at, _: {"position_ids": torch.arange(len(at.tokenizer(PROMPT)["input_ids"]))[None]},
    "not synchronized": lambda *_: {"synced_gpus": False},
}


@pytest.mark.parametrize(
    "name",
    represented(KEYWORDS, ["stop strings, beams", "scores", "cutoffs", "the model as its own assistant", "positions"]),
)
def test_every_keyword_of_generate_means_what_it_means_for_the_model_in_memory(
    loaded: LoadedModel, reference: Any, name: str
) -> None:
    inputs = loaded.tokenizer(PROMPT, return_tensors="pt")
    results = []
    for model in (loaded.model, reference):
        torch.manual_seed(0)
        asked = {"max_new_tokens": 12, "do_sample": False, **KEYWORDS[name](loaded, reference)}
        # As its own assistant each model is its own.
        asked |= {"assistant_model": model} if asked.get("assistant_model") is loaded.model else {}
        result = model.generate(**inputs, **asked)
        results.append(getattr(result, "sequences", result))
    assert torch.equal(*results)


def test_keywords_of_generate_that_streamed_weights_cannot_honour_are_refused(loaded: LoadedModel) -> None:
    inputs, passes = loaded.tokenizer(PROMPT, return_tensors="pt"), loaded.runtime.passes
    for name in ("assistant_early_exit", "output_attentions", "output_hidden_states"):
        arguments: dict[str, Any] = {"max_new_tokens": 2, "return_dict_in_generate": True, name: 2}
        with pytest.raises(NotSupportedError, match=name):
            loaded.model.generate(**inputs, **arguments)
    with pytest.raises(ValueError, match="max_new_token"):
        loaded.model.generate(**inputs, max_new_token=2)
    assert loaded.runtime.passes == passes


def test_a_padded_batch_gives_the_tokens_that_the_model_in_memory_gives(loaded: LoadedModel, reference: Any) -> None:
    loaded.tokenizer.padding_side = "left"
    inputs = loaded.tokenizer([PROMPT, "To install the package, run the following"], padding=True, return_tensors="pt")
    outputs = [m.generate(**inputs, max_new_tokens=10, do_sample=False) for m in (loaded.model, reference)]
    assert torch.equal(*outputs)


def test_logits_of_every_position_equal_those_of_the_model_in_memory(loaded: LoadedModel, reference: Any) -> None:
    inputs = loaded.tokenizer(PROMPT, return_tensors="pt")
    expected = reference(**inputs).logits
    found = loaded.model(**inputs).logits
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_a_prompt_longer_than_a_micro_batch_is_one_pass(store: Path, reference: Any) -> None:
    ids = torch.randint(3, 4000, (1, 100), generator=torch.Generator().manual_seed(0))
    with tiered.load(store, dtype="float32", context=128) as loaded:
        object.__setattr__(loaded.runtime.plan, "micro_batch_rows", 16)
        found = loaded.model(ids, logits_to_keep=1).logits
        assert loaded.runtime.passes == 1
        expected = reference(ids, logits_to_keep=1).logits
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_by_either_name_continues_where_it_ended(loaded: LoadedModel, reference: Any, name: str) -> None:
    inputs = loaded.tokenizer(PROMPT, return_tensors="pt")
    cache = DynamicCache(config=loaded.model.config)
    arguments: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8, "return_dict_in_generate": True, name: cache}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = loaded.model.generate(**inputs, **arguments)
        assert cache.get_seq_length() == first.sequences.shape[1] - 1
        assert first.cache is cache is first.past_key_values
        second = loaded.model.generate(first.sequences, **arguments)
        assert torch.equal(second.sequences, reference.generate(**inputs, max_new_tokens=16, do_sample=False))
        step = loaded.model(second.sequences[:, -1:], **{name: cache})
    assert step.cache is cache is step.past_key_values
    expected = reference(second.sequences).logits[:, -1:]
    assert (step.logits - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_two_caches_are_refused(loaded: LoadedModel) -> None:
    caches: dict[str, Any] = {name: DynamicCache(config=loaded.model.config) for name in ("cache", "past_key_values")}
    ids = torch.tensor([[5, 6]])
    for call in (loaded.model, loaded.model.generate):
        with pytest.raises(ConfigError, match="cache and past_key_values"):
            call(ids, **caches)


def test_streamers_criteria_and_processors_are_called(loaded: LoadedModel, capsys: pytest.CaptureFixture[str]) -> None:
    class StopAtSix(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 6)

    class OnlyToken(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            forced = torch.full_like(scores, float("-inf"))
            forced[:, 300] = 0
            return forced

    inputs = loaded.tokenizer(PROMPT, return_tensors="pt")
    output = loaded.model.generate(
        **inputs,
        max_new_tokens=50,
        do_sample=False,
        streamer=TextStreamer(loaded.tokenizer),
        stopping_criteria=StoppingCriteriaList([StopAtSix()]),
        logits_processor=LogitsProcessorList([OnlyToken()]),
    )
    assert output.shape[1] == 6
    assert set(output[0, inputs["input_ids"].shape[1] :].tolist()) == {300}
    assert "The function returns" in capsys.readouterr().out


def test_what_offloaded_weights_cannot_do_raises_with_the_reason(loaded: LoadedModel) -> None:
    model = loaded.model
    ids = torch.tensor([[5, 6]])
    calls: dict[str, Callable[[], Any]] = {
        "to": lambda: model.to("cpu"),
        "half": model.half,
        "state_dict": model.state_dict,
        "save_pretrained": lambda: model.save_pretrained("x"),
        "train": model.train,
        "resize": lambda: model.resize_token_embeddings(10),
        "labels": lambda: model(ids, labels=ids),
        "embeddings": lambda: model(inputs_embeds=torch.zeros(1, 2, 256)),
        "attentions": lambda: model(ids, output_attentions=True),
    }
    for name, call in calls.items():
        with pytest.raises(NotSupportedError, match=r".{40}"):
            call()
            pytest.fail(f"{name} did not raise")
    assert model.train(False) is model


def test_device_dtype_and_size_are_those_of_the_run(loaded: LoadedModel, reference: Any) -> None:
    assert loaded.model.device == torch.device("cpu")
    assert loaded.model.dtype == torch.float32
    assert loaded.model.num_parameters() == reference.num_parameters()


def test_more_context_than_planned_is_refused_before_the_first_pass(loaded: LoadedModel) -> None:
    passes = loaded.runtime.passes
    inputs = loaded.tokenizer(PROMPT, return_tensors="pt")
    with pytest.raises(BudgetError, match="context="):
        loaded.model.generate(**inputs, max_new_tokens=2000)
    with pytest.raises(BudgetError, match="context="):
        loaded.model.generate(**inputs, max_length=2000)
    assert loaded.runtime.passes == passes


def test_sizes_of_a_device_are_texts_or_bytes(store: Path) -> None:
    made = tiered.load(
        store,
        tiers="disk,cpu,gpu",
        device="emulated",
        vram="150MiB",
        resident_gpu="1MiB",
        resident_cpu="0",
    )
    options = made.runtime.options
    assert (options.vram, options.resident_gpu, options.resident_cpu) == (150 << 20, 1 << 20, 0)


def test_bad_arguments_and_stores_are_named(store: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="bogus"):
        tiered.load(store, ram="bogus")
    with pytest.raises(ConfigError, match="sometimes"):
        tiered.load(store, verify="sometimes")
    with pytest.raises(ConfigError, match="gpu"):
        tiered.load(store, tiers="disk,gpu,cpu")
    with pytest.raises(ConfigError, match="--vram is for a GPU"):
        tiered.load(store, vram="1GiB")
    on_device: dict[str, Any] = {"tiers": "disk,cpu,gpu", "device": "emulated"}
    with pytest.raises(ConfigError, match="vram True"):
        tiered.load(store, **on_device, vram=True)
    with pytest.raises(ConfigError, match="resident_gpu: size 'lots'"):
        tiered.load(store, **on_device, vram="150MiB", resident_gpu="lots")
    with pytest.raises(StoreError, match="no such store"):
        tiered.load(tmp_path / "nothing")
    with pytest.raises(BudgetError, match="smallest budget"), tiered.load(store, ram="10MiB"):
        pass
    with pytest.raises(ConfigError, match=r"with tiered\.load"):
        _ = tiered.load(store).model


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[-1]], "token -1 is not in the vocabulary"),
        ([[4096]], "token 4096 is not in the vocabulary"),
        ([5, 6], r"expected integers \[rows, tokens\]"),
        ([[]], r"expected integers \[rows, tokens\]"),
    ],
)
def test_ids_that_are_none_are_refused(loaded: LoadedModel, ids: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        loaded.model(torch.tensor(ids))


def test_a_sequence_longer_than_planned_is_refused_however_few_there_are(loaded: LoadedModel) -> None:
    with pytest.raises(BudgetError, match="1 sequences of 300 tokens"):
        loaded.model(torch.ones(1, 300, dtype=torch.long))


@pytest.mark.slow
def test_logits_that_do_not_fit_the_budget_are_refused(store: Path) -> None:
    with (
        pytest.raises(BudgetError, match="smallest") as refused,
        tiered.load(store, ram="1MiB", dtype="float32", context=2000),
    ):
        pass
    assert refused.value.smallest_bytes is not None
    ids = torch.ones(1, 2000, dtype=torch.long)
    with tiered.load(store, ram=refused.value.smallest_bytes, dtype="float32", context=2000) as loaded:
        with pytest.raises(BudgetError, match="logits_to_keep"):
            loaded.model(ids)
        assert loaded.model(ids, logits_to_keep=1).logits.shape == (1, 1, 4096)


def test_a_closed_model_says_so_and_can_be_opened_again(store: Path) -> None:
    opened = tiered.load(store, context=64)
    ids = torch.tensor([[5, 6]])
    with opened:
        model = opened.model
        first = model(ids).logits
    with pytest.raises(ConfigError, match="closed"):
        model(ids)
    with opened:
        assert torch.equal(opened.model(ids).logits, first)


def test_impossible_arguments_are_named(store: Path) -> None:
    impossible: tuple[dict[str, Any], ...] = (
        {"ram": 0},
        {"threads": 0},
        {"sequences": 0},
        {"context": 0},
        {"context": 99999},
    )
    for arguments in impossible:
        name = next(iter(arguments))
        with pytest.raises(ConfigError, match=name):
            tiered.load(store, **arguments)


def test_a_store_whose_configuration_was_changed_is_refused(store: Path, tmp_path: Path) -> None:
    copy = tmp_path / "changed.tiered"
    shutil.copytree(store, copy)
    config = copy / "config.json"
    for change in ('"num_hidden_layers": 8', '"ffn_dim": 1024', '"vocab_size": 4096'):
        config.write_text((store / "config.json").read_text().replace(change, change[:-1] + "5"))
        with pytest.raises(StoreError, match=r"config\.json"), tiered.load(copy):
            pass
    (copy / "generation_config.json").write_text("{")
    config.write_text((store / "config.json").read_text())
    with pytest.raises(StoreError, match=r"generation_config\.json"), tiered.load(copy):
        pass
    (copy / "tokenizer.json").unlink()
    with pytest.raises(StoreError, match="no tokenizer"), tiered.load(copy):
        pass
