"""A GGUF file converts like the checkpoint that it was made from: the same model, bit for bit what gguf reads there."""

import importlib.util
import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tests.answers import assert_same, reference_answers, relative_error
from tests.convert.models import read_store
from tests.quick import represented
from tests.runtimes import open_runtime, run_greedy
from tests.tiny import load_stored_weights, prompts_for, randomize
from tests.tiny_configs import tiny_config
from tiered.arch import build_skeleton, load_config, text_config
from tiered.convert import convert_checkpoint
from tiered.convert.gguf import parts_of, read_gguf
from tiered.convert.gguf_tokenizer import tokenizer_of
from tiered.convert.names import map_names
from tiered.convert.open import resolve_checkpoint
from tiered.convert.place import Folder, LocalFiles
from tiered.errors import CheckpointError, ConfigError, TieredError
from tiered.quant import GroupScheme, dequantize, quantize
from tiered.shapes import outline
from tiered.store import Store
from tools.gguf_form import Written, add_merges, add_tokenizer, write_gguf

NEW_TOKENIZERS = pytest.mark.skipif(
    importlib.util.find_spec("transformers.integrations.gguf") is None,
    reason="transformers before 5.24 makes other tokenizers of GGUF files",
)
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LINEAR = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied-biased": {"rope_parameters": LLAMA3},
    "mixtral": {"sliding_window": None},
    "qwen2": {},
    "qwen2-sliding-yarn": {"use_sliding_window": False, "layer_types": ["full_attention"] * 3},
    "qwen2_moe": {"mlp_only_layers": []},
    "qwen3": {},
    "qwen3_moe": {},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {"rope_parameters": LINEAR},
    "phi3": {},
    "phi3-longrope": {},
}
"""Tiny models, and what of them is not as in `tests.tiny_configs`."""


def made(name: str, **fields: Any) -> PreTrainedModel:
    config = tiny_config(name)
    for key, value in fields.items():
        setattr(config, key, value)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    randomize(model)
    model.eval()
    return model


def opened(path: Path) -> Any:
    files = LocalFiles(Folder(path.parent, path.name))
    return read_gguf(files, parts_of(path.name, files.names))


@pytest.mark.parametrize("name", represented(MODELS, ["llama", "qwen2_moe", "gemma3_text", "phi3-longrope"]))
def test_an_architecture_is_the_model_that_it_was_made_from(name: str, tmp_path: Path) -> None:
    model = made(name, **MODELS[name])
    write_gguf(tmp_path / "model.gguf", model)
    read = opened(tmp_path / "model.gguf")
    skeleton = build_skeleton(text_config(dict(read.config)))
    sources = map_names(skeleton, read.index.file_of)
    assert not sources.warnings and sources.duplicate_head is None
    state = {}
    for tensor, parts in sources.sources.items():
        panels = [panel for part in parts for panel in read.index.reader.panels(read.first, part)]
        state[tensor] = torch.cat(panels).view(model.state_dict()[tensor].shape)
    read.index.reader.close()
    if skeleton.tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    again = AutoModelForCausalLM.from_config(text_config(dict(read.config))).eval()
    again.load_state_dict(state)
    ids = torch.randint(3, 160, (1, 40), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        wanted, found = model(ids).logits, again(ids).logits
    assert torch.allclose(found, wanted, atol=2e-5 * float(wanted.abs().max()))


KINDS = {
    "embed_tokens": Type.IQ4_NL,
    "lm_head": Type.Q4_0,
    "0.self_attn.q_proj": Type.Q4_0,
    "0.self_attn.k_proj": Type.Q8_0,
    "0.self_attn.v_proj": Type.Q5_0,
    "0.self_attn.o_proj": Type.IQ4_NL,
    "0.mlp.gate_proj": Type.MXFP4,
    "0.mlp.up_proj": Type.BF16,
    "0.mlp.down_proj": Type.Q6_K,
    "1.self_attn.q_proj": Type.Q5_0,
    "1.self_attn.k_proj": Type.MXFP4,
    "1.self_attn.v_proj": Type.Q4_1,
    "1.self_attn.o_proj": Type.Q5_1,
    "1.mlp.gate_proj": Type.F16,
    "1.mlp.up_proj": Type.Q8_0,
    "1.mlp.down_proj": Type.Q4_K,
}
KEPT = {
    Type.Q4_0: "int4-g32",
    Type.Q5_0: "int8-g32",
    Type.Q8_0: "int8-g32",
    Type.IQ4_NL: "iq4nl-g32",
    Type.MXFP4: "mxfp4-g32",
}


def mixed(name: str) -> Type:
    return next((kind for part, kind in KINDS.items() if part in name), Type.Q8_0)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """A model with weights of every type, its tokenizer, in three parts among other files."""
    folder = tmp_path_factory.mktemp("mixed")
    model = made("llama", intermediate_size=256, num_hidden_layers=2)
    found = write_gguf(folder / "tiny.gguf", model, mixed, change=add_tokenizer, parts=8)
    (folder / "config.json").write_text('{"model_type": "another"}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "mmproj-tiny.gguf").write_bytes(b"what it sees with")
    return found


@pytest.fixture(scope="module")
def kept(written: Written, tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("kept") / "out"
    convert_checkpoint(written.path.parent, store)
    return store


def test_what_a_store_can_hold_is_kept_bit_for_bit_and_the_rest_is_quantized_from_it(
    written: Written, kept: Path
) -> None:
    found = read_store(kept)
    schemes = {name: w.scheme for layout in Store.open(kept).layouts.values() for name, w in layout.weights.items()}
    for name, kind in written.types.items():
        scheme, values = schemes[name], written.values[name]
        if kind in KEPT:
            assert scheme is not None and scheme.name == KEPT[kind], name
            assert torch.equal(found[name], values), name
        elif kind in (Type.F32, Type.F16, Type.BF16):
            assert scheme is None and torch.equal(found[name].float(), values), name
        else:
            assert scheme == GroupScheme(8), name
            assert torch.equal(found[name], dequantize(*quantize(values, scheme), scheme)), name
    assert len(found) == len(written.types)


def test_what_is_kept_computes_what_transformers_computes_with_the_same_numbers(kept: Path) -> None:
    """Scales of Q4_0 may be negative, which those that are made here never are."""
    store = Store.open(kept)
    config = load_config(kept)
    config.eos_token_id = None
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    load_stored_weights(model, store)
    expected = reference_answers(model, prompts_for("llama"), 4)
    with open_runtime(store) as runtime:
        assert_same(run_greedy(runtime, prompts_for("llama"), 4), expected)
    with open_runtime(store, dtype="bfloat16") as runtime:
        assert relative_error(run_greedy(runtime, prompts_for("llama"), 1), expected.first(1)) < 0.03


def test_rows_of_any_range_in_panels_of_any_size_are_those_of_the_whole(
    written: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries and keys lie in another order in the file: a range need not end where a head does."""
    read = opened(first_part(written))
    reader = read.index.reader
    monkeypatch.setattr("tiered.convert.gguf_reader.PANEL_NBYTES", 2048)
    for number, part in enumerate(("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "self_attn.v_proj") * 2):
        name = f"model.layers.{number // 4}.{part}.weight"
        stored, rows = reader.tensors(read.first)[name], range(5, 27)
        panels = list(reader.panels(read.first, name, rows))
        assert len(panels) > 1
        wanted = written.values[name][5:27]
        assert torch.equal(torch.cat(panels).float(), wanted), name
        if stored.scheme is not None:
            q, scale, zero = (torch.cat(parts) for parts in zip(*reader.packed(read.first, name, rows), strict=True))
            assert torch.equal(dequantize(q, scale, zero, stored.scheme), wanted), name
    reader.close()


def test_weights_are_those_that_transformers_reads(tmp_path: Path) -> None:
    model = made("llama", num_hidden_layers=1)
    kinds = {"q_proj": Type.Q8_0, "k_proj": Type.Q4_0, "down_proj": Type.IQ4_NL, "up_proj": Type.F16}
    write_gguf(
        tmp_path / "model.gguf", model, lambda name: kinds.get(name.split(".")[-2], Type.Q4_1), change=add_tokenizer
    )
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf").state_dict()
    read = opened(tmp_path / "model.gguf")
    for name, tensor in wanted.items():
        found = torch.cat(list(read.index.reader.panels(read.first, name)))
        assert torch.equal(found, tensor.float()), name
    read.index.reader.close()


def first_part(written: Written) -> Path:
    return next(written.path.parent.glob("tiny-00001-of-*.gguf"))


def test_the_shape_of_a_file_is_known_before_it_is_converted(written: Written) -> None:
    found = outline(str(first_part(written)), ("int4",))
    assert found.shapes["int4"].layers == opened(first_part(written)).config["num_hidden_layers"]
    assert "quantized already (GGUF); without --quant they are taken as they are" in found.notes[0]


@NEW_TOKENIZERS
def test_tokenizer_template_and_special_tokens_come_from_the_file_and_nothing_from_beside_it(kept: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(kept)
    ids = tokenizer("the cat")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id == 1 and tokenizer.decode(ids, skip_special_tokens=True) == "the cat"
    assert "▁the" in tokenizer.convert_ids_to_tokens(ids)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "the"}], return_dict=False)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert chat[-1] == end and len(chat) <= 3, "a token of the template is one token"
    config = text_config(json.loads((kept / "config.json").read_text()))
    assert config.model_type == "llama" and config.head_dim == 16
    assert json.loads((kept / "generation_config.json").read_text()) == {"bos_token_id": 1, "eos_token_id": [2, end]}


@NEW_TOKENIZERS
@pytest.mark.parametrize(("split", "expected"), [("llama-bpe", [1, 30]), ("qwen2", [25, 10, 17, 14, 7])])
def test_words_are_whole_and_texts_begin_as_the_models_own_tokenizer_does_it(
    split: str, expected: list[int], tmp_path: Path
) -> None:
    model = made("llama", num_hidden_layers=1)
    write_gguf(tmp_path / "model.gguf", model, change=lambda writer: add_merges(writer, split))
    read = opened(tmp_path / "model.gguf")
    for name, content in tokenizer_of(read.first, read.metadata, 160).items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "config.json").write_bytes(read.files["config.json"])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("whole")["input_ids"] == expected
    assert len(tokenizer) == 31, "no tokens that the model does not know"
    with pytest.raises(CheckpointError, match="1 to 10 tokens, found 31"):
        tokenizer_of(read.first, read.metadata, 10)


def test_a_model_is_called_by_its_file_and_its_parts_are_one(written: Written, tmp_path: Path) -> None:
    part = first_part(written)
    assert resolve_checkpoint(part).name == "tiny"
    assert resolve_checkpoint(part.parent).name == part.parent.name
    (tmp_path / part.name).write_bytes(part.read_bytes())
    with pytest.raises(CheckpointError, match=r"tiny-00002-of-\d{5}\.gguf.*download them beside it"):
        convert_checkpoint(tmp_path, tmp_path / "out")
    (tmp_path / "other.gguf").write_bytes(part.read_bytes())
    with pytest.raises(CheckpointError, match=r"several models in GGUF \(other\.gguf, tiny-.*pass the file"):
        convert_checkpoint(tmp_path, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"is part 0 of .* by its own header"):
        convert_checkpoint(tmp_path / "other.gguf", tmp_path / "out")


ARCHITECTURE = b"general.architecture" + struct.pack("<IQ", 8, 5)
NORM = b"output_norm.weight" + struct.pack("<IQ", 1, 64)
Change = Callable[[bytes], bytes]
DAMAGE: dict[str, tuple[Change, str]] = {
    "empty": (lambda _: b"", "not a GGUF file"),
    "another format": (lambda data: b"GGML" + data[4:], "not a GGUF file"),
    "version 1": (lambda data: data[:4] + struct.pack("<I", 1) + data[8:], "GGUF version 1, expected"),
    "big-endian": (lambda data: data[:4] + struct.pack(">I", 3) + data[8:], "big-endian, expected"),
    "cut off in its header": (lambda data: data[:700], "ends inside its header, at byte 700"),
    "cut off": (lambda data: data[:-5000], "ends at byte .*, the file has"),
    "a count beyond reason": (lambda data: data[:8] + b"\xff" * 8 + data[16:], "claims 18,446,744,073,709,551,615"),
    "a string beyond the file": (
        lambda data: data.replace(ARCHITECTURE, ARCHITECTURE[:-8] + struct.pack("<Q", 1 << 22)),
        "ends inside its header",
    ),
    "an unknown architecture": (
        lambda data: data.replace(ARCHITECTURE + b"llama", ARCHITECTURE + b"mamba"),
        "architecture 'mamba'; read are llama",
    ),
    "an unknown type": (
        lambda data: data.replace(NORM + struct.pack("<I", 0), NORM + struct.pack("<I", 99)),
        "output_norm.weight is of type number 99",
    ),
    "a type of integers": (
        lambda data: data.replace(NORM + struct.pack("<I", 0), NORM + struct.pack("<I", 24)),
        "output_norm.weight is of type I8",
    ),
    "metadata that is missing": (
        lambda data: data.replace(b"llama.embedding_length", b"llama.embedding_lengtx"),
        "llama.embedding_length is missing",
    ),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "model.gguf"
    write_gguf(path, made("llama", num_hidden_layers=1))
    return path.read_bytes()


@pytest.mark.parametrize("case", DAMAGE)
def test_what_cannot_be_read_is_one_error_that_names_the_file(case: str, whole: bytes, tmp_path: Path) -> None:
    change, expected = DAMAGE[case]
    path = tmp_path / "model.gguf"
    path.write_bytes(change(whole))
    assert path.read_bytes() != whole
    with pytest.raises(TieredError, match=rf"^{path}: .*{expected}"):
        convert_checkpoint(path, tmp_path / "out")


ADDED: dict[str, tuple[Callable[[gguf.GGUFWriter], None], str]] = {
    "an entry that may matter": (lambda writer: writer.add_logit_scale(0.5), "llama.logit_scale is not known here"),
    "a tensor without a place": (
        lambda writer: writer.add_tensor("blk.0.attn_sinks.weight", torch.ones(4).numpy()),
        "holds blk.0.attn_sinks.weight",
    ),
    "a bias that such a model has not": (
        lambda writer: writer.add_tensor("blk.0.attn_k.bias", torch.ones(32).numpy()),
        "no place in the model.*self_attn.k_proj.bias",
    ),
    "a layer too many": (
        lambda writer: writer.add_tensor("blk.1.attn_norm.weight", torch.ones(64).numpy()),
        "no place in the model.*layers.1.input_layernorm",
    ),
    "attention to what follows": (lambda writer: writer.add_causal_attention(False), "attention.causal is False"),
    "frequencies of its own": (
        lambda writer: writer.add_tensor("rope_freqs.weight", torch.arange(1.0, 9.0).numpy()),
        "rope_freqs.weight scales rotary frequencies in another way",
    ),
    "another scaling": (lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE), "is 'longrope'"),
    "no weights of a model": (lambda writer: writer.add_type("adapter"), "holds no model"),
    "text split by rules of its own": (lambda writer: add_merges(writer, "mine"), "ggml.pre is 'mine'.*--tokenizer"),
}


@NEW_TOKENIZERS
@pytest.mark.parametrize("case", ADDED)
def test_what_would_make_it_another_model_is_refused_by_its_name(case: str, tmp_path: Path) -> None:
    change, expected = ADDED[case]
    write_gguf(tmp_path / "model.gguf", made("llama", num_hidden_layers=1), change=change)
    with pytest.raises(CheckpointError, match=expected):
        convert_checkpoint(tmp_path / "model.gguf", tmp_path / "out")


def test_packages_that_are_missing_are_named(whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(whole)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "gguf", None)
        with pytest.raises(ConfigError, match=r"takes the package gguf,.*pip install 'gguf"):
            convert_checkpoint(path, tmp_path / "out")
    write_gguf(path, made("llama", num_hidden_layers=1), change=add_tokenizer)
    monkeypatch.setitem(sys.modules, "transformers.integrations.gguf.gguf_tokenizer_mapping", None)
    with pytest.raises(ConfigError, match=r"takes transformers 5\.24 or newer.*--tokenizer"):
        convert_checkpoint(path, tmp_path / "out")


def test_a_scale_that_is_no_number_is_refused(tmp_path: Path) -> None:
    written = write_gguf(tmp_path / "model.gguf", made("llama", num_hidden_layers=1), lambda _: Type.Q8_0)
    read = opened(written.path)
    name = "model.layers.0.mlp.down_proj.weight"
    stored = next(t for t in gguf.GGUFReader(written.path).tensors if t.name == "blk.0.ffn_down.weight")
    with written.path.open("r+b") as file:
        file.seek(stored.data_offset)
        file.write(struct.pack("<e", float("inf")))
    for read_as in (read.index.reader.packed, lambda *a: map(quantized, read.index.reader.panels(*a))):
        with pytest.raises(CheckpointError, match="finite"):
            list(read_as(read.first, name))
    read.index.reader.close()


def quantized(panel: torch.Tensor) -> Any:
    return quantize(panel, GroupScheme(8, 32))
