"""Local checkpoints of every form become the same store."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.convert.models import (
    FAMILIES,
    TRAINED,
    expected_weights,
    read_store,
    rewrite,
    save_bin,
    save_model,
    store_digest,
    tiny_model,
)
from tests.quick import represented
from tiered.convert import ConvertOptions, ConvertProgress, convert_checkpoint
from tiered.errors import CheckpointError, ConfigError, UnsupportedFamilyError
from tiered.kernels import load_library
from tiered.store import Store, hash_chunk

PLAIN = ConvertOptions(quant="none")
BIAS = "model.decoder.layers.0.fc1.bias"


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("family", represented(FAMILIES, ["llama", "bloom"]))
@pytest.mark.parametrize("form", ["safetensors", "shards", "bin", "bin shards", "legacy", "legacy shards"])
def test_every_form_of_checkpoint_is_stored_bit_for_bit(family: str, form: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    source = tmp_path / "source"
    if "safe" in form or form == "shards":
        save_model(source, model, "60KB" if form == "shards" else "5GB")
        assert (len(list(source.glob("*.safetensors"))) > 1) == (form == "shards")
    else:
        save_bin(source, model, zipped="legacy" not in form, shards=3 if "shards" in form else 1)
    result = convert_checkpoint(source, tmp_path / "out", PLAIN)
    assert result.warnings == () and result.scheme == "none"
    same(read_store(tmp_path / "out"), expected_weights(model))


def test_the_trained_checkpoint_keeps_its_bits(tmp_path: Path) -> None:
    convert_checkpoint(TRAINED, tmp_path / "out", PLAIN)
    expected = load_file(TRAINED / "model.safetensors")
    expected.pop("lm_head.weight", None)
    same(read_store(tmp_path / "out"), expected)
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (TRAINED / name).read_bytes()


@pytest.mark.parametrize(("quant", "error"), [("int4", 0.12), ("int8", 0.01), ("mxfp4-g32", 0.15), ("nf4-g64", 0.12)])
def test_quantized_weights_are_close_and_the_rest_is_exact(quant: str, error: float, tmp_path: Path) -> None:
    convert_checkpoint(TRAINED, tmp_path / "out", ConvertOptions(quant=quant))
    source, found = load_file(TRAINED / "model.safetensors"), read_store(tmp_path / "out")
    quantized = 0
    for name, tensor in found.items():
        expected = source[name]
        if tensor.dtype == expected.dtype:
            assert torch.equal(tensor, expected)
            continue
        quantized += 1
        relative = (tensor - expected.float()).norm() / expected.float().norm()
        assert relative < (0.01 if "embed" in name else error), name
    assert quantized == 6 * 8 + 1
    store = Store.open(tmp_path / "out")
    embed = store.layout(store.blocks["embed"]).weights["model.decoder.embed_tokens.weight"]
    assert embed.scheme is not None and embed.scheme.name == "int8-g64"
    # Rows are read from the file one by one.
    assert embed.parts["q"].offset == min(e.offset for e in embed.parts.values())


def test_the_manifest_describes_the_store(tmp_path: Path) -> None:
    result = convert_checkpoint(TRAINED, tmp_path / "out", ConvertOptions())
    store = Store.open(tmp_path / "out")
    manifest = store.manifest
    assert manifest.source["kind"] == "folder" and manifest.source["name"] == "opt-docs-8m"
    assert manifest.tied and not manifest.synthetic and manifest.distinct_blocks is None
    assert manifest.tape == (*(f"layer-{i:03d}" for i in range(8)), "head")
    assert store.blocks["head"].file == store.blocks["embed"].file
    assert store.blocks["head"].prefix == "model.decoder.embed_tokens."
    assert result.blocks == len(manifest.blocks) == 11
    assert result.nbytes == sum((tmp_path / "out" / f.path).stat().st_size for f in manifest.files)
    for file in manifest.files:
        content = (tmp_path / "out" / file.path).read_bytes()
        assert [chunk.checksum for chunk in file.chunks] == [
            hash_chunk(content[c.offset : c.stop]) for c in file.chunks
        ]
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {"blocks", "manifest.json", "config.json", "generation_config.json"} | {
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_two_conversions_give_the_same_bytes(tmp_path: Path) -> None:
    for out in ("a", "b"):
        convert_checkpoint(TRAINED, tmp_path / out, ConvertOptions())
    assert store_digest(tmp_path / "a") == store_digest(tmp_path / "b")


@pytest.mark.parametrize("quant", ["int4", "int8"])
def test_with_and_without_the_native_library_the_bytes_are_the_same(
    quant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = load_library()
    if isinstance(library, str):
        pytest.skip(library)
    convert_checkpoint(TRAINED, tmp_path / "native", ConvertOptions(quant=quant))
    monkeypatch.setattr("tiered.kernels.kernels.load_library", lambda: "not built")
    convert_checkpoint(TRAINED, tmp_path / "torch", ConvertOptions(quant=quant))
    assert store_digest(tmp_path / "native") == store_digest(tmp_path / "torch")


def test_default_output_is_named_after_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert convert_checkpoint(TRAINED, None, ConvertOptions()).store == Path("opt-docs-8m.tiered")
    assert Store.open(tmp_path / "opt-docs-8m.tiered").name == "opt-docs-8m"


@pytest.mark.parametrize(("family", "prefix"), [("opt", "model."), ("bloom", "transformer."), ("llama", "model.")])
def test_names_without_the_base_prefix_are_found(family: str, prefix: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    source = save_model(tmp_path / "source", model)
    rewrite(source, lambda tensors: {name.removeprefix(prefix): tensor for name, tensor in tensors.items()})
    convert_checkpoint(source, tmp_path / "out", PLAIN)
    same(read_store(tmp_path / "out"), expected_weights(model))


def test_a_duplicate_of_a_tied_head_is_stored_once(tmp_path: Path) -> None:
    model = tiny_model("llama", tied=True)
    source = save_model(tmp_path / "source", model)
    rewrite(source, lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"]})
    result = convert_checkpoint(source, tmp_path / "out", PLAIN)
    assert result.warnings == () and not (tmp_path / "out/blocks/head.safetensors").exists()
    same(read_store(tmp_path / "out"), expected_weights(model))


def test_a_tied_head_that_differs_is_refused(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", tiny_model("llama", tied=True))
    rewrite(source, lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"] + 1})
    with pytest.raises(CheckpointError, match="set tie_word_embeddings to false"):
        convert_checkpoint(source, tmp_path / "out", PLAIN)


def test_a_tied_embedding_saved_under_the_heads_name_is_found(tmp_path: Path) -> None:
    model = tiny_model("llama", tied=True)
    source = save_model(tmp_path / "source", model)
    rewrite(source, lambda t: {n.replace("model.embed_tokens", "lm_head"): x for n, x in t.items()})
    convert_checkpoint(source, tmp_path / "out", PLAIN)
    same(read_store(tmp_path / "out"), expected_weights(model))


def without_head(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n: t for n, t in tensors.items() if "lm_head" not in n and "embed_out" not in n}


def test_an_absent_head_is_the_embedding_where_the_family_ties_by_default(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", tiny_model("bloom", tied=False))
    rewrite(source, without_head)
    result = convert_checkpoint(source, tmp_path / "out", PLAIN)
    assert any("the embedding serves as head" in warning for warning in result.warnings)
    found = read_store(tmp_path / "out")
    assert torch.equal(found["lm_head.weight"], found["transformer.word_embeddings.weight"])


def test_an_absent_head_is_an_error_elsewhere(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", tiny_model("llama", tied=False))
    rewrite(source, without_head)
    with pytest.raises(CheckpointError, match=r"lacks the output projection 'lm_head\.weight'"):
        convert_checkpoint(source, tmp_path / "out", PLAIN)


def test_junk_is_silent_and_the_unknown_is_named(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", tiny_model("llama"))
    junk = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8), "decoder.version": torch.ones(1)}
    rewrite(source, lambda t: {**t, **junk, "model.layers.9.novel.weight": torch.ones(2)})
    (warning,) = convert_checkpoint(source, tmp_path / "out", PLAIN).warnings
    assert "1 tensors" in warning and "model.layers.9.novel.weight" in warning and "inv_freq" not in warning


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", tiny_model("llama"))
    rewrite(source, lambda t: {n: x for n, x in t.items() if "layers.1.mlp" not in n})
    with pytest.raises(CheckpointError, match=r"lacks 3 of the .* model\.layers\.1\.mlp\.gate_proj\.weight"):
        convert_checkpoint(source, tmp_path / "out", PLAIN)
    assert not (tmp_path / "out").exists()


def test_a_misshaped_tensor_is_named_with_both_shapes(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", tiny_model("llama"))
    rewrite(source, lambda t: {**t, "model.norm.weight": torch.ones(65)})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is \[65\], expected \[64\]"):
        convert_checkpoint(source, tmp_path / "out", PLAIN)
    assert not (tmp_path / "out").exists()


def test_an_odd_linear_stays_in_16_bits_and_is_listed(tmp_path: Path) -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)  # down_proj has rows of 96
    source = save_model(tmp_path / "source", model)
    result = convert_checkpoint(source, tmp_path / "out", ConvertOptions())
    odd = tuple(f"model.layers.{i}.mlp.down_proj.weight" for i in range(3))
    assert result.unquantized == odd
    assert tuple(Store.open(tmp_path / "out").manifest.quantization["unquantized"]) == odd
    found = read_store(tmp_path / "out")
    assert all(torch.equal(found[name], model.state_dict()[name]) for name in odd)


def test_an_unsupported_family_writes_nothing(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(UnsupportedFamilyError, match="mamba"):
        convert_checkpoint(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_already_quantized_checkpoint_is_refused(tmp_path: Path) -> None:
    import json

    source = save_model(tmp_path / "source", tiny_model("llama"))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(CheckpointError, match="already quantized"):
        convert_checkpoint(source, tmp_path / "out")


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", tiny_model("llama"))
    bad = "model.layers.2.self_attn.q_proj.weight"
    rewrite(source, lambda t: {**t, bad: t[bad] * float("nan")})
    with pytest.raises(CheckpointError, match=r"layers\.2\.self_attn\.q_proj\.weight: expected finite weights"):
        convert_checkpoint(source, tmp_path / "out")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3.4e38])
@pytest.mark.parametrize(
    ("quant", "name"),
    [
        ("none", "model.decoder.layers.2.fc1.weight"),
        ("none", "model.decoder.embed_tokens.weight"),
        ("int4", "model.decoder.layers.2.final_layer_norm.weight"),
        ("int4", "model.decoder.layers.0.fc1.bias"),
        ("int8", "model.decoder.embed_positions.weight"),
    ],
)
def test_what_is_not_quantized_must_be_finite_too(value: float, quant: str, name: str, tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", tiny_model("opt"))

    def spoil(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors[name].view(-1)[7] = value
        return tensors

    rewrite(source, spoil)
    message = rf"{name.replace('.', '[.]')}: expected finite weights, found 1 among [\d,]+ that are NaN, infinite or"
    with pytest.raises(CheckpointError, match=message):
        convert_checkpoint(source, tmp_path / "out", ConvertOptions(quant=quant))


def test_a_large_value_that_the_compute_dtype_holds_is_no_fault(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", tiny_model("opt"))
    rewrite(source, lambda t: {**t, "model.decoder.layers.0.fc1.bias": torch.full_like(t[BIAS], 3.3e38)})
    convert_checkpoint(source, tmp_path / "out", PLAIN)
    assert read_store(tmp_path / "out")[BIAS].max() > 3e38


def test_doubles_beyond_the_range_of_what_computes_are_named(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", tiny_model("opt"))
    rewrite(source, lambda t: {n: x.double() * 1e300 if n == BIAS else x for n, x in t.items()})
    with pytest.raises(CheckpointError, match=r"fc1\.bias: expected finite weights, .* beyond what bfloat16 holds"):
        convert_checkpoint(source, tmp_path / "out", PLAIN)


def test_a_truncated_file_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", tiny_model("llama"), "60KB")
    victim = sorted(source.glob("*.safetensors"))[1]
    victim.write_bytes(victim.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=victim.name):
        convert_checkpoint(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", tiny_model("llama"), "60KB")
    victim = sorted(source.glob("*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(CheckpointError, match=victim.name):
        convert_checkpoint(source, tmp_path / "out")


def test_shards_without_an_index_are_read_by_their_names(tmp_path: Path) -> None:
    model = tiny_model("llama")
    source = save_model(tmp_path / "source", model, "60KB")
    (source / "model.safetensors.index.json").unlink()
    convert_checkpoint(source, tmp_path / "out", PLAIN)
    same(read_store(tmp_path / "out"), expected_weights(model))
    sorted(source.glob("*.safetensors"))[0].unlink()
    with pytest.raises(CheckpointError, match="shards are there"):
        convert_checkpoint(source, tmp_path / "out2", PLAIN)


def test_a_folder_without_weights_says_what_it_has(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", tiny_model("llama"))
    (source / "model.safetensors").rename(source / "model.msgpack")
    with pytest.raises(CheckpointError, match=r"no weights.*model\.msgpack"):
        convert_checkpoint(source, tmp_path / "out")


def test_half_precision_and_scalars_keep_their_dtype(tmp_path: Path) -> None:
    model = tiny_model("opt", dtype=torch.float16)
    convert_checkpoint(save_model(tmp_path / "source", model), tmp_path / "out", PLAIN)
    assert {t.dtype for t in read_store(tmp_path / "out").values()} == {torch.float16}


def test_progress_counts_up_to_the_whole(tmp_path: Path) -> None:
    seen: list[ConvertProgress] = []
    convert_checkpoint(TRAINED, tmp_path / "out", ConvertOptions(), seen.append)
    done = [event.nbytes_done for event in seen]
    assert done == sorted(done)
    assert done[-1] == seen[-1].nbytes_total
    assert {event.block for event in seen} == {"embed", "outer", *(f"layer-{i:03d}" for i in range(8))}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quant": "int3"}, "int3"),
        ({"compress": "gzip"}, "gzip"),
        ({"group_size": 48}, "48"),
        ({"distinct_blocks": 2}, "--synthetic"),
        ({"synthetic": True, "delete_downloads": True}, "reads no checkpoint"),
    ],
)
def test_bad_options_are_explained(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ConvertOptions(**options)  # type: ignore[arg-type]


def test_tensors_split_over_many_panels_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, panels = tmp_path / "whole", tmp_path / "panels"
    source = save_model(tmp_path / "source", tiny_model("llama"))
    convert_checkpoint(source, whole, ConvertOptions())
    monkeypatch.setattr("tiered.convert.source.PANEL_NBYTES", 1000)
    convert_checkpoint(source, panels, ConvertOptions())
    assert store_digest(whole) == store_digest(panels)


def test_a_file_that_names_a_tensor_twice_over_is_refused(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", tiny_model("llama"))
    for shard in (1, 2):
        save_file({"x": torch.ones(1)}, source / f"model-{shard:05d}-of-00002.safetensors")
    (source / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="x is in both"):
        convert_checkpoint(source, tmp_path / "out")
