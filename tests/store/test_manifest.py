"""The manifest: what it says is read back, whatever is damaged in it is refused with the file's name."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tiered.errors import StoreError
from tiered.store import CHUNK_NBYTES, BlockInfo, FileInfo, Manifest, UnitInfo

PATH = Path("somewhere/manifest.json")
EMBED = FileInfo(
    "blocks/embed.safetensors", 8192, ("0123456789abcdef", "f" * 16), (UnitInfo("embed", "dense", 4096, 4096),)
)
LAYER = FileInfo(
    "blocks/layer-000.safetensors",
    12288 + CHUNK_NBYTES + 4096,
    ("a" * 16, "b" * 16, "c" * 16, "d" * 16),
    (UnitInfo("small", "small", 8192, 4096), UnitInfo("fc1", "dense", 12288, CHUNK_NBYTES + 4096)),
)
MANIFEST = Manifest(
    source={"kind": "folder", "name": "opt", "revision": None, "fingerprint": "ff"},
    architecture={"model_type": "opt", "layers": 2, "embed": "embed.weight", "head": "head.weight"},
    quantization={"layers": "int4-g64", "embed": "int8-g64", "head": "int8-g64", "clip": "mse", "unquantized": []},
    files=(EMBED, LAYER),
    blocks=(
        BlockInfo("embed", "embed", EMBED, "model.embed."),
        BlockInfo("layer-000", "layer", LAYER, "model.layers.0."),
        BlockInfo("layer-001", "layer", LAYER, "model.layers.0."),
        BlockInfo("head", "head", EMBED, "model.embed."),
    ),
    tape=("layer-000", "layer-001", "head"),
    tied=True,
    synthetic=True,
    distinct_blocks=1,
)
VALUE: dict[str, Any] = json.loads(MANIFEST.to_json())


def parse(value: Any) -> Manifest:
    return Manifest.from_json(json.dumps(value), PATH)


def test_a_manifest_reads_back_equal() -> None:
    assert Manifest.from_json(MANIFEST.to_json(), PATH) == MANIFEST


def test_equal_manifests_give_equal_bytes() -> None:
    assert Manifest.from_json(MANIFEST.to_json(), PATH).to_json() == MANIFEST.to_json()


def test_blocks_that_share_a_file_stay_blocks_of_their_own() -> None:
    found = parse(VALUE)
    assert found.blocks[1].file is found.blocks[2].file
    assert found.blocks[1] != found.blocks[2]


@pytest.mark.parametrize("text", ["", "{", "[1", "\0", "{}}", "[" * 100_000], ids=lambda text: text[:4])
def test_what_is_no_json_is_damaged(text: str) -> None:
    with pytest.raises(StoreError, match=r"somewhere/manifest\.json: not valid JSON .*convert it again"):
        Manifest.from_json(text, PATH)


@pytest.mark.parametrize("value", [[], 5, None, {}, {"format": "other"}, {"manifest_version": 3}])
def test_another_program_s_manifest_is_foreign(value: Any) -> None:
    with pytest.raises(StoreError, match=r"somewhere/manifest\.json: not a tiered store's manifest"):
        parse(value)


@pytest.mark.parametrize("version", [0, 3, "2", None, True, 2.0])
def test_another_version_is_told_with_both(version: Any) -> None:
    with pytest.raises(StoreError, match=rf"format version {version!r}, this tiered reads version 2; convert the mod"):
        parse({**VALUE, "version": version})


def test_version_1_is_told_with_the_command_that_upgrades_it() -> None:
    with pytest.raises(StoreError, match=r"version 1, this tiered reads version 2; 'tiered convert somewhere' upgrad"):
        parse({**VALUE, "version": 1})


@pytest.mark.parametrize("key", [key for key in VALUE if key not in ("format", "version")])
def test_every_field_is_needed_by_name(key: str) -> None:
    value = {k: v for k, v in VALUE.items() if k != key}
    with pytest.raises(StoreError, match=rf"somewhere/manifest\.json: lacks '{key}'"):
        parse(value)


@pytest.mark.parametrize("key", ["files", "blocks"])
def test_every_field_of_a_file_or_block_is_needed_by_name(key: str) -> None:
    for field in VALUE[key][0]:
        value = copy.deepcopy(VALUE)
        del value[key][0][field]
        with pytest.raises(StoreError, match=rf"somewhere/manifest\.json: lacks '{field}'"):
            parse(value)


WRONG: dict[str, Any] = {
    "null": None,
    "number": 5,
    "fraction": 1.5,
    "infinity": float("inf"),
    "text": "text",
    "list": [5],
    "object": {"a": 1},
    "nested": [[1]],
    "negative": -4096,
    "true": True,
}
RIGHT = {  # what of WRONG a field may be
    "synthetic": {"true"},
    "tied": {"true"},
    "distinct_blocks": {"null", "number"},
    "source": {"object"},
    "architecture": {"object"},
    "quantization": {"object"},
    "prefix": {"text"},
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("key", [key for key in VALUE if key not in ("format", "version")])
def test_a_field_of_another_kind_is_refused(key: str, wrong: str) -> None:
    if wrong not in RIGHT.get(key, ()):
        with pytest.raises(StoreError, match=r"somewhere/manifest\.json: .*; the store is damaged, convert it again"):
            parse({**VALUE, key: WRONG[wrong]})


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize(("key", "field"), [(k, f) for k in ("files", "blocks") for f in VALUE[k][0]])
def test_a_field_of_a_file_or_block_of_another_kind_is_refused(key: str, field: str, wrong: str) -> None:
    if wrong not in RIGHT.get(field, ()):
        value = copy.deepcopy(VALUE)
        value[key][0][field] = WRONG[wrong]
        with pytest.raises(StoreError, match=r"somewhere/manifest\.json: .*; the store is damaged, convert it again"):
            parse(value)


@pytest.mark.parametrize("path", ["/etc/passwd", "../other/x", "blocks/../../x", "", ".", "a\0b"])
def test_files_outside_the_store_are_refused(path: str) -> None:
    value = copy.deepcopy(VALUE)
    value["files"][0]["path"] = path
    for block in (0, 3):
        value["blocks"][block]["file"] = path
    with pytest.raises(StoreError, match=r"manifest\.json: .*outside the store"):
        parse(value)


@pytest.mark.parametrize("nbytes", [0, 4095, 4097, -4096])
def test_a_size_that_is_no_multiple_of_a_page_is_refused(nbytes: int) -> None:
    value = copy.deepcopy(VALUE)
    value["files"][0]["nbytes"] = nbytes
    with pytest.raises(StoreError, match=rf"embed\.safetensors: {nbytes} bytes, expected a multiple of 4096"):
        parse(value)


def test_chunks_are_those_of_the_header_and_of_each_unit() -> None:
    found = [(chunk.offset, chunk.nbytes, chunk.checksum[0]) for chunk in LAYER.chunks]
    assert found == [(0, 8192, "a"), (8192, 4096, "b"), (12288, CHUNK_NBYTES, "c"), (12288 + CHUNK_NBYTES, 4096, "d")]
    assert list(LAYER.unit_chunks()) == [range(1, 2), range(2, 4)]
    assert (LAYER.header_nbytes, LAYER.units_nbytes) == (8192, CHUNK_NBYTES + 8192)


UNITS: dict[str, tuple[Any, str]] = {
    "a gap before it": (lambda units: units[1].update(offset=16384), "unit fc1 starts at byte 16384, expected 12288"),
    "an overlap": (lambda units: units[1].update(offset=8192), "unit fc1 starts at byte 8192, expected 12288"),
    "no header": (lambda units: units[0].update(offset=0), "unit small starts at byte 0, expected 4096"),
    "a start off a page": (
        lambda units: units[0].update(offset=8200),
        "unit small starts at byte 8200, expected 12288",
    ),
    "a start below 0": (lambda units: units[0].update(offset=-4096), "unit small starts at byte -4096, expected 4096"),
    "no bytes": (lambda units: units[0].update(nbytes=0, xxh3_64=[]), "unit small has 0 bytes, expected a multiple"),
    "a size off a page": (lambda units: units[0].update(nbytes=4000), "unit small has 4000 bytes, expected a multiple"),
    "fewer bytes": (lambda units: units[1].update(nbytes=4096), "unit fc1: 4096 bytes with 2 checksums is impossible"),
    "more bytes": (lambda units: units[1].update(nbytes=CHUNK_NBYTES + 8192), "its units end at byte"),
    "a checksum too few": (
        lambda units: units[1]["xxh3_64"].pop(),
        "unit fc1: .* bytes with 1 checksums is impossible",
    ),
    "a checksum that is none": (
        lambda units: units[0].update(xxh3_64=["?"]),
        "unit small: checksum '.', expected 16 hex",
    ),
    "another kind": (
        lambda units: units[0].update(kind="large"),
        "unit small is 'large', expected one of small, dense",
    ),
    "one name twice": (lambda units: units[1].update(name="small"), "several units are named small"),
    "one unit less": (lambda units: units.pop(), "its units end at byte 12288, the file at"),
    "none at all": (lambda units: units.clear(), "header: .* bytes with 1 checksums is impossible"),
    "no object": (lambda units: units.append(5), "expected an object with name, found 5"),
}


@pytest.mark.parametrize("what", UNITS)
def test_units_that_do_not_make_the_file_are_refused_by_name(what: str) -> None:
    change, told = UNITS[what]
    value = copy.deepcopy(VALUE)
    change(value["files"][1]["units"])
    with pytest.raises(StoreError, match=rf"manifest\.json: .*{told}.*; the store is damaged, convert it again"):
        parse(value)


@pytest.mark.parametrize("key", ["name", "kind", "offset", "nbytes", "xxh3_64"])
def test_every_field_of_a_unit_is_needed_by_name(key: str) -> None:
    value = copy.deepcopy(VALUE)
    del value["files"][1]["units"][0][key]
    with pytest.raises(StoreError, match=rf"somewhere/manifest\.json: lacks '{key}'"):
        parse(value)
    for wrong in WRONG.values():
        if (key, wrong) != ("name", "text"):
            value["files"][1]["units"][0][key] = wrong
            with pytest.raises(StoreError, match=r"somewhere/manifest\.json: .*; the store is damaged, convert it ag"):
                parse(value)


@pytest.mark.parametrize("checksum", ["", "x" * 16, "0" * 15, "0" * 17, "\ud800", "A" * 16, "0" * 15 + "\n"])
def test_a_checksum_is_16_hexadecimal_digits(checksum: str) -> None:
    value = copy.deepcopy(VALUE)
    value["files"][0]["xxh3_64"] = [checksum]
    with pytest.raises(StoreError, match="expected 16 hexadecimal digits"):
        parse(value)


def test_another_chunk_size_is_refused() -> None:
    with pytest.raises(StoreError, match="checksum_chunk_nbytes"):
        parse({**VALUE, "checksum_chunk_nbytes": 1 << 20})


def test_an_empty_tape_is_refused() -> None:
    with pytest.raises(StoreError, match="tape is empty"):
        parse({**VALUE, "tape": []})


def test_a_tape_of_unknown_blocks_is_refused_with_their_names() -> None:
    with pytest.raises(StoreError, match=r"tape names unknown blocks \['layer-002'\]"):
        parse({**VALUE, "tape": [*VALUE["tape"], "layer-002"]})


@pytest.mark.parametrize("tape", ["layer-000 layer-001", "layer-001 layer-000 head", "layer-000 head"])
def test_a_tape_is_every_layer_in_order_and_the_head(tape: str) -> None:
    with pytest.raises(StoreError, match="expected every layer in order, then the head"):
        parse({**VALUE, "tape": tape.split()})


def test_what_is_not_quantized_is_a_list() -> None:
    with pytest.raises(StoreError, match="unquantized is 3, expected a list"):
        parse({**VALUE, "quantization": {**VALUE["quantization"], "unquantized": 3}})


def test_a_block_of_an_unlisted_file_is_refused_with_its_name() -> None:
    value = copy.deepcopy(VALUE)
    value["blocks"][1]["file"] = "blocks/other.safetensors"
    with pytest.raises(StoreError, match=r"layer-000.*blocks/other\.safetensors"):
        parse(value)


def test_two_blocks_of_one_name_are_refused() -> None:
    value = copy.deepcopy(VALUE)
    value["blocks"][2]["name"] = "layer-000"
    with pytest.raises(StoreError, match="layer-000"):
        parse({**value, "tape": ["layer-000", "head"]})


def test_a_store_without_embeddings_is_refused() -> None:
    with pytest.raises(StoreError, match="embed"):
        parse({**VALUE, "blocks": VALUE["blocks"][1:]})


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)


@given(key=st.sampled_from(sorted(VALUE)), value=JSON)
def test_any_value_in_any_field_is_refused_or_consistent(key: str, value: Any) -> None:
    try:
        found = parse({**VALUE, key: value})
    except StoreError as error:
        assert str(PATH) in str(error)
    else:
        assert found.tape and {*found.tape} <= {block.name for block in found.blocks}


@given(at=st.integers(0), byte=st.integers(1, 127))
def test_any_changed_character_is_refused_or_consistent(at: int, byte: int) -> None:
    text = MANIFEST.to_json()
    at %= len(text)
    try:
        found = Manifest.from_json(text[:at] + chr(byte) + text[at + 1 :], PATH)
    except StoreError as error:
        assert str(PATH) in str(error)
    else:
        assert found.tape and {*found.tape} <= {block.name for block in found.blocks}


def test_a_plain_weight_is_a_view_of_its_dtype() -> None:
    from tiered.store import TensorEntry, Weight

    memory = torch.arange(256, dtype=torch.uint8)
    entry = TensorEntry("a", torch.int16, (2, 3), 64, 12)
    weight = Weight("a", (2, 3), None, {"": entry})
    found = weight.view(memory)
    assert isinstance(found, torch.Tensor)
    assert found.tolist() == memory[64:76].view(torch.int16).view(2, 3).tolist()
    assert found.data_ptr() == memory.data_ptr() + 64 and weight.nbytes == 12
