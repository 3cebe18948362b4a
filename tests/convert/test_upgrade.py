"""A store of version 1 becomes what converting anew gives, wherever it is stopped; its checksums are believed first."""

import itertools
import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.commands import run_here
from tests.convert.models import TRAINED, read_store, save_model, store_digest, tiny_model
from tests.convert.test_resume import Killed
from tests.convert.version1 import make_old, old_manifest
from tests.quick import ONE_FORM
from tests.warm import WarmProcess
from tiered.convert import ConvertOptions, ConvertProgress, convert_checkpoint, stored, upgrade
from tiered.convert.block import _records
from tiered.errors import BudgetError, ConfigError, DiskFullError, StoreError
from tiered.store import PAGE, Store, hash_chunk
from tiered.store.block import read_layout
from tiered.store.manifest import MANIFEST_NAME
from tiered.store.open import UPGRADE_NAME

pytestmark = ONE_FORM

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "int4": ("llama", {}),
    "int8": ("opt", {"quant": "int8"}),
    "unquantized": ("gpt_neox", {"quant": "none"}),
    "compressed": ("opt", {"quant": "none", "compress": "planes"}),
    "groups of 32": ("granitemoe", {"group_size": 32}),
    "minmax": ("mixtral", {"clip": "minmax"}),
    "linear layers of a class of their own": ("falcon", {}),
}


def fresh(folder: Path, name: str) -> Path:
    """The store that case `name` converts to."""
    family, options = CASES[name]
    dtype = torch.bfloat16 if name == "compressed" else torch.float32
    source = save_model(folder / "source", tiny_model(family, tied=family != "llama", dtype=dtype))
    return convert_checkpoint(source, folder / "fresh", ConvertOptions(**options)).store


@pytest.fixture(autouse=True, scope="module")
def small_tensors_are_compressed() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tiered.convert.compression._LEAST_VALUES", 1)
        yield


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A store with three layers, and the same in version 1."""
    folder = tmp_path_factory.mktemp("upgrade")
    new = fresh(folder, "compressed")
    return new, make_old(shutil.copytree(new, folder / "old"))


@pytest.fixture
def old(stores: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of version 1, to upgrade."""
    return shutil.copytree(stores[1], tmp_path / "old.tiered")


@pytest.mark.parametrize("name", CASES)
def test_the_result_is_what_converting_anew_gives(name: str, tmp_path: Path) -> None:
    new = fresh(tmp_path, name)
    expected, weights = store_digest(new), read_store(new)
    old = make_old(shutil.copytree(new, tmp_path / "old"))
    assert store_digest(old).keys() == expected.keys() and store_digest(old) != expected
    result = convert_checkpoint(old)
    assert store_digest(old) == expected
    assert (result.upgraded_from, result.resumed_blocks, result.nbytes) == (1, 0, sum(_sizes(old)))
    assert read_store(old).keys() == weights.keys()
    again = convert_checkpoint(old)
    assert again.upgraded_from == 2 and store_digest(old) == expected


@pytest.mark.parametrize("distinct", [None, 1, 2])
def test_so_is_a_synthetic_one_whose_layers_repeat(distinct: int | None, tmp_path: Path) -> None:
    options = ConvertOptions(synthetic=True, distinct_blocks=distinct)
    new = convert_checkpoint("tiny-llama", tmp_path / "new", options).store
    old = make_old(shutil.copytree(new, tmp_path / "old"))
    convert_checkpoint(old)
    assert store_digest(old) == store_digest(new)


@pytest.mark.parametrize("compress", ["none", "planes"])
def test_a_trained_model_s_store_of_several_units(compress: str, tmp_path: Path) -> None:
    new = convert_checkpoint(TRAINED, tmp_path / "new", ConvertOptions(quant="none", compress=compress)).store
    old = make_old(shutil.copytree(new, tmp_path / "old"))
    assert convert_checkpoint(str(old)).has_tokenizer
    assert store_digest(old) == store_digest(new)


@pytest.mark.slow
def test_stopped_before_or_after_any_durable_write_the_result_is_the_same(
    stores: tuple[Path, Path], tmp_path: Path
) -> None:
    expected = store_digest(stores[0])
    for kill_after in (False, True):
        step = 0
        while True:
            step += 1
            old = shutil.copytree(stores[1], tmp_path / f"{kill_after}-{step}")
            with pytest.MonkeyPatch.context() as patch:
                count_to_kill(patch, step, kill_after)
                try:
                    convert_checkpoint(old)
                    break
                except Killed:
                    pass
            if is_new(old):
                assert store_digest_but(old, UPGRADE_NAME) == expected
            else:
                with pytest.raises(StoreError, match="tiered convert"):
                    Store.open(old)
            convert_checkpoint(old)
            assert store_digest(old) == expected, (kill_after, step)
        # upgrade.json, each of five blocks and its entry, the manifest; and the removal at the end
        assert step > 12


def upgrade_slowly(folder: Path) -> None:
    """Waits at each report of progress, so that a kill can fall anywhere, and for a minute before a store is whole."""
    reports = itertools.count()
    convert_checkpoint(folder, progress=lambda _: time.sleep(0.02 if next(reports) < 12 else 60))


def test_killed_at_random_moments_it_goes_on(stores: tuple[Path, Path], old: Path) -> None:
    dice, kills = random.Random(4), 0
    for _ in range(4):
        with WarmProcess(upgrade_slowly, (old,), [os.devnull] * 3) as child:
            while not (old / UPGRADE_NAME).exists() and child.poll() is None:
                time.sleep(0.002)
            time.sleep(dice.uniform(0.1, 0.8))
            child.send_signal(signal.SIGKILL)
            kills += child.wait(60) == -signal.SIGKILL
    assert kills >= 1
    convert_checkpoint(old)
    assert store_digest(old) == store_digest(stores[0])


def count_to_kill(patch: pytest.MonkeyPatch, step: int, kill_after: bool) -> None:
    """Stop at rename or removal number `step`: before it, or right after it."""
    calls = 0

    def stopping(original: Any) -> Any:
        def call(self: Path, *args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == step and not kill_after:
                raise Killed
            result = original(self, *args, **options)
            if calls == step:
                raise Killed
            return result

        return call

    patch.setattr(Path, "replace", stopping(Path.replace))
    patch.setattr(Path, "unlink", stopping(Path.unlink))


def is_new(folder: Path) -> bool:
    return '"version": 2,' in (folder / MANIFEST_NAME).read_text(encoding="utf-8")


def store_digest_but(folder: Path, name: str) -> dict[str, str]:
    return {path: digest for path, digest in store_digest(folder).items() if path != name}


def stop_at(block: str) -> Any:
    def report(now: ConvertProgress) -> None:
        if now.block == block:
            raise Killed

    return report


def test_an_unfinished_upgrade_is_told_and_what_is_done_is_not_done_again(old: Path) -> None:
    with pytest.raises(
        StoreError, match=rf"version 1, this tiered reads version 2; 'tiered convert {old}' upgrades it"
    ):
        Store.open(old)
    with pytest.raises(Killed):
        convert_checkpoint(old, progress=stop_at("layer-001"))
    for command in ("inspect", "verify"):
        done = run_here(command, old)
        assert done.code == 4
        assert f"the upgrade to format version 2 has not finished; run 'tiered convert {old}' again" in done.err
    seen: list[ConvertProgress] = []
    result = convert_checkpoint(old, progress=seen.append)
    assert result.resumed_blocks == 3  # embed, outer and the first layer
    assert {now.block for now in seen} == {"layer-001", "layer-002"}
    assert seen[0].nbytes_skipped > 0 and seen[-1].nbytes_done == seen[-1].nbytes_total


def test_a_finished_block_that_is_damaged_before_the_upgrade_goes_on_keeps_its_checksum(old: Path) -> None:
    with pytest.raises(Killed):
        convert_checkpoint(old, progress=stop_at("layer-002"))
    flip(old / "blocks/layer-000.safetensors", -100)
    convert_checkpoint(old)
    done = run_here("verify", old)
    assert done.code == 4 and "blocks/layer-000.safetensors: chunk" in done.out


def test_a_block_in_units_of_another_version_that_nothing_tells_is_named(old: Path) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr("tiered.convert.blocks.RANGE_NBYTES", 8192)
        convert_checkpoint(old, progress=stop_at("layer-001"))
    entered = json.loads((old / UPGRADE_NAME).read_text(encoding="utf-8"))
    kept = [file for file in entered["files"] if "layer-000" not in file["path"]]
    (old / UPGRADE_NAME).write_text(json.dumps({"files": kept}), encoding="utf-8")
    with pytest.raises(StoreError, match=r"layer-000\.safetensors: upgraded already, .* go on with that version"):
        convert_checkpoint(old)
    (old / UPGRADE_NAME).write_text(json.dumps(entered), encoding="utf-8")
    convert_checkpoint(old)  # what is entered is known
    Store.open(old)


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("position", [-5000, 20, 0.5])
def test_a_damaged_block_is_named_and_not_passed_on(position: float, old: Path) -> None:
    path = old / "blocks/layer-001.safetensors"
    before = path.stat().st_size
    flip(path, int(before * position) if position == 0.5 else int(position))
    with pytest.raises(StoreError, match=r"layer-001\.safetensors: .*convert the model again"):
        convert_checkpoint(old)
    assert path.stat().st_size == before
    with pytest.raises(StoreError, match=r"has not finished|upgrades it in place"):
        Store.open(old)


def test_a_damaged_header_that_still_parses_is_found_by_its_checksum(old: Path) -> None:
    path = old / "blocks/layer-001.safetensors"
    content = path.read_bytes()
    assert b'"pt"' in content
    path.write_bytes(content.replace(b'"pt"', b'"xt"', 1))
    with pytest.raises(StoreError, match=r"layer-001\.safetensors: chunk 0 .* is corrupt: expected xxh3"):
        convert_checkpoint(old)


def test_a_block_cut_off_or_missing_is_named(old: Path) -> None:
    os.truncate(old / "blocks/layer-002.safetensors", 8192)
    with pytest.raises(StoreError, match=r"layer-002\.safetensors: expected .* bytes, found 8,192"):
        convert_checkpoint(old)
    (old / "blocks/layer-002.safetensors").unlink()
    with pytest.raises(StoreError, match=r"layer-002\.safetensors: missing"):
        convert_checkpoint(old)


def test_a_configuration_of_another_model_is_refused_before_anything_is_written(old: Path) -> None:
    before = store_digest(old)
    path = old / "config.json"
    config = path.read_text(encoding="utf-8")
    for change in ('"num_hidden_layers": 2', '"num_hidden_layers": 4'):
        path.write_text(config.replace('"num_hidden_layers": 3', change), encoding="utf-8")
        with pytest.raises(StoreError, match=r"manifest\.json: lists other files than config\.json has blocks"):
            convert_checkpoint(old)
    path.write_text(config.replace('"ffn_dim": 128', '"ffn_dim": 192'), encoding="utf-8")
    with pytest.raises(StoreError, match=r"holds other tensors than config\.json and manifest\.json describe"):
        convert_checkpoint(old)
    path.write_text(config, encoding="utf-8")
    assert store_digest(old) == before


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("quantization", {"layers": "int3"}, r"does not fit config\.json \(quantization bits 3"),
        ("quantization", {"layers": "int4-g64"}, "holds other tensors than"),
        ("distinct_blocks", 2, r"does not fit config\.json \(--distinct-blocks"),
        ("files", [], "there is no block|its file .* is not among the files"),
        ("version", 3, "version 3, this tiered reads version 2"),
    ],
)
def test_a_damaged_manifest_is_refused_before_anything_is_written(key: str, value: Any, told: str, old: Path) -> None:
    manifest = json.loads((old / MANIFEST_NAME).read_text(encoding="utf-8"))
    (old / MANIFEST_NAME).write_text(json.dumps({**manifest, key: value}), encoding="utf-8")
    before = store_digest(old)
    with pytest.raises(StoreError, match=rf"(manifest\.json|safetensors): .*({told})"):
        convert_checkpoint(old)
    assert store_digest(old) == before


def test_rows_that_become_records_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes, scales and zeros of a few rows at a time come from three places of the file."""
    model = tiny_model("llama", tied=False)
    model.resize_token_embeddings(4000)
    new = convert_checkpoint(save_model(tmp_path / "source", model), tmp_path / "new").store
    old = make_old(shutil.copytree(new, tmp_path / "old"))
    manifest = old_manifest(old)
    for module in ("tiered.store.file", "tiered.convert.stored"):
        monkeypatch.setattr(f"{module}.CHUNK_NBYTES", PAGE)
    monkeypatch.setattr("tiered.convert.blocks.RECORDS_NBYTES", PAGE // 3)
    reads: Counter[int] = Counter()
    read_chunk = stored._Chunks._read_chunk

    def counted(self: stored._Chunks, number: int, memory: Any) -> None:
        reads[number] += 1
        read_chunk(self, number, memory)

    monkeypatch.setattr(stored._Chunks, "_read_chunk", counted)
    block = next(block for block in upgrade._recipe_of(old, manifest).files if block.role == "embed")
    content = (old / block.path).read_bytes()
    checksums = tuple(hash_chunk(content[start : start + PAGE]) for start in range(0, len(content), PAGE))
    file = next(replace(file, checksums=checksums) for file in manifest.files if file.path == block.path)
    with stored.StoredBlock(old, read_layout(old, file, 1)) as source:
        (tensor,) = block.tensors
        assert tensor.scheme is not None and (rows := tensor.row_layout(torch.float32)) is not None
        assert sum(map(len, _records(rows, tensor, source))) == 4000 * rows.nbytes
    assert len(reads) == len(file.chunks) > 60
    assert sum(reads.values()) <= len(file.chunks) + 3  # where one place ends and another begins


def test_only_its_budget_can_be_chosen(old: Path) -> None:
    for options in (ConvertOptions(quant="int8"), ConvertOptions(force=True), ConvertOptions(compress="none")):
        with pytest.raises(ConfigError, match="a store, which is upgraded with the weights that it has; drop all opt"):
            convert_checkpoint(old, options=options)
    with pytest.raises(ConfigError, match="a store, which is upgraded where it is; drop -o"):
        convert_checkpoint(old, old.with_name("other"))
    with pytest.raises(BudgetError, match="pass at least --ram"):
        convert_checkpoint(old, options=ConvertOptions(ram_bytes=100 << 20))


def test_without_room_for_a_block_it_is_refused_at_once(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed: list[int] = []

    def refuse(folder: Path, nbytes: int) -> None:
        needed.append(nbytes)
        raise DiskFullError("full")

    monkeypatch.setattr(upgrade, "check_space", refuse)
    before = store_digest(old)
    with pytest.raises(DiskFullError):
        convert_checkpoint(old)
    assert needed[0] >= max(file.nbytes for file in old_manifest(old).files) and store_digest(old) == before


def test_a_conversion_may_not_run_beside_it(old: Path) -> None:
    def report(now: ConvertProgress) -> None:
        with pytest.raises(ConfigError, match="another conversion is writing to it"):
            convert_checkpoint(old)
        raise Killed

    with pytest.raises(Killed):
        convert_checkpoint(old, progress=report)


def test_a_new_conversion_leaves_nothing_of_an_unfinished_upgrade(old: Path, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        convert_checkpoint(old, progress=stop_at("layer-001"))
    source = save_model(tmp_path / "source", tiny_model("llama"))
    with pytest.raises(ConfigError, match="already a finished store; replace it with --force"):
        convert_checkpoint(source, old)
    convert_checkpoint(source, old, ConvertOptions(force=True))
    convert_checkpoint(source, tmp_path / "other")
    assert store_digest(old) == store_digest(tmp_path / "other")


def test_the_command_says_what_it_did(old: Path) -> None:
    done = run_here("convert", old)
    assert done.code == 0, done.err
    assert f"{old}: upgraded to format version 2, 6 blocks" in done.out and "next: tiered generate" in done.out
    assert done.err == ""
    done = run_here("convert", old)
    assert done.code == 0 and done.out == f"{old}: is of format version 2, nothing to do\n"


@given(st.binary(max_size=60) | st.sampled_from([b'{"files": 5}', b'{"files": [{}]}', b"[]", b"{}"]))
def test_a_damaged_progress_file_counts_for_nothing(content: bytes) -> None:
    folder = Path(f"/dev/shm/tiered-upgrade-{os.getpid()}")
    folder.mkdir(exist_ok=True)
    try:
        (folder / UPGRADE_NAME).write_bytes(content)
        assert upgrade._entered(folder) == {}
    finally:
        shutil.rmtree(folder)


def _sizes(folder: Path) -> list[int]:
    return [path.stat().st_size for path in (folder / "blocks").iterdir()]
