"""OPT in every form that its weights are held in gives the same store; what is missing or wrong is named before."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoConfig

from tests.convert.models import save_model, store_digest
from tests.convert.opt import FORMS, SHAPE, opt_model, write
from tests.quick import ONE_FORM
from tiered.convert import ConvertOptions, ConvertProgress, convert_checkpoint
from tiered.convert.opt import read_opt
from tiered.convert.place import Folder, LocalFiles
from tiered.convert.synthetic import tokenizer_files
from tiered.errors import BudgetError, CheckpointError, ConfigError, TieredError
from tiered.store import Store

pytestmark = ONE_FORM


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model in all forms, and the store of Hugging Face's."""
    folder = tmp_path_factory.mktemp("tiny")
    save_model(folder / "huggingface", opt_model())
    convert_checkpoint(folder / "huggingface", folder / "expected")
    for form in FORMS:
        write(folder / form, opt_model(), form)
    return folder


def copy(tiny: Path, form: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny / form, tmp_path / "source"))


def check_same(store: Path, expected: Path) -> None:
    """Whether two stores differ in what they say of their source, and in the files that are copied, only."""
    found, wanted = store_digest(store), store_digest(expected)
    assert found.keys() == wanted.keys()
    blocks = [name for name in wanted if name.startswith("blocks/")]
    assert len(blocks) == 5 and [found[name] for name in blocks] == [wanted[name] for name in blocks]
    manifests = [json.loads((path / "manifest.json").read_text()) for path in (store, expected)]
    assert manifests[0].pop("source") != manifests[1].pop("source")
    assert manifests[0] == manifests[1]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_store_of_the_hugging_face_checkpoint(form: str, tiny: Path, tmp_path: Path) -> None:
    result = convert_checkpoint(tiny / form, tmp_path / "out")
    assert result.warnings == () and not result.has_tokenizer
    check_same(tmp_path / "out", tiny / "expected")
    made, wanted = (AutoConfig.from_pretrained(path).to_dict() for path in (tmp_path / "out", tiny / "huggingface"))
    beside = ("_name_or_path", "prefix", "transformers_version", "activation_dropout")
    assert {**made, **dict.fromkeys(beside)} == {**wanted, **dict.fromkeys(beside)}
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"], generation["pad_token_id"]) == (2, 2, 1)


@pytest.mark.parametrize("form", ["raw", "resharded", "numpy"])
def test_the_odd_one_with_projections_and_late_norms(form: str, tmp_path: Path) -> None:
    changes = {"word_embed_proj_dim": 32, "do_layer_norm_before": False}
    shape = tmp_path / "odd.toml"
    fields = {**SHAPE.config, **changes}
    shape.write_text("[config]\n" + "".join(f"{name} = {json.dumps(value)}\n" for name, value in fields.items()))
    model = opt_model(**changes)
    convert_checkpoint(save_model(tmp_path / "huggingface", model), tmp_path / "expected")
    write(tmp_path / "source", model, form)
    with pytest.raises(ConfigError, match=r"no OPT of the sizes.*word_embed_proj_dim 32.*--from PATH"):
        convert_checkpoint(tmp_path / "source", tmp_path / "out")
    convert_checkpoint(shape, tmp_path / "out", ConvertOptions(weights=tmp_path / "source"))
    check_same(tmp_path / "out", tmp_path / "expected")


def test_a_name_says_which_model_the_weights_must_be(tiny: Path, tmp_path: Path) -> None:
    for form in ("raw", "numpy", "huggingface"):
        out = tmp_path / form
        with pytest.raises(ConfigError, match=r"not those of opt-125m: .*hidden_size is 64, expected 768"):
            convert_checkpoint("opt-125m", out, ConvertOptions(weights=tiny / form))
        assert not out.exists()
        convert_checkpoint("tiny-opt", out, ConvertOptions(weights=tiny / form))
    assert store_digest(tmp_path / "huggingface") == store_digest(tiny / "expected")
    with pytest.raises(ConfigError, match="no such folder; pass the one"):
        convert_checkpoint("tiny-opt", tmp_path / "out", ConvertOptions(weights=tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match="holds no weights; expected checkpoint_last"):
        convert_checkpoint("tiny-opt", tmp_path / "out", ConvertOptions(weights=tmp_path))


def test_files_that_the_folder_has_are_not_made(tiny: Path, tmp_path: Path) -> None:
    source = copy(tiny, "resharded", tmp_path)
    config = json.loads((tiny / "huggingface" / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "num_attention_heads": 8}))
    (source / "merges.txt").write_text("")
    convert_checkpoint(source, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_attention_heads"] == 8
    assert (tmp_path / "out" / "merges.txt").exists()


def test_one_of_several_checkpoints_is_chosen_by_a_file(tiny: Path, tmp_path: Path) -> None:
    source = copy(tiny, "resharded", tmp_path)
    shutil.copy(tiny / "singleton" / "restored.pt", source)
    with pytest.raises(CheckpointError, match=r"several checkpoints: .*checkpoint_1_8000-model_part-0\.pt \(4 files\)"):
        convert_checkpoint(source, tmp_path / "out")
    for number, name in enumerate(("restored.pt", "checkpoint_1_8000-model_part-2.pt")):
        convert_checkpoint(source / name, tmp_path / f"{number}")
        check_same(tmp_path / f"{number}", tiny / "expected")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: -(path.stat().st_size // 3)])


def move(old: str, new: str) -> Callable[[Path], object]:
    return lambda source: (source / old).rename(source / new)


def duplicate(old: str, new: str) -> Callable[[Path], object]:
    return lambda source: shutil.copy(source / old, source / new)


def remove(*names: str) -> Callable[[Path], object]:
    def change(source: Path) -> None:
        for name in names:
            (source / name).unlink()

    return change


RAW, PART = "checkpoint_last-model_part-{}-shard{}.pt", "checkpoint_1_8000-model_part-{}.pt"


@pytest.mark.parametrize(
    ("form", "damage", "message"),
    [
        (
            "raw",
            remove(RAW.format(1, 1)),
            r"lacks some of the 6 files .*: checkpoint_last-model_part-1-shard1\.pt; put",
        ),
        ("raw", remove(RAW.format(0, 2), RAW.format(1, 2)), r"lacks .*model_part-0-shard2\.pt, .*model_part-1-shard2"),
        (
            "raw",
            remove(*(RAW.format(1, shard) for shard in range(3))),
            r"lacks .*: checkpoint_last-model_part-1-shard0",
        ),
        ("raw", duplicate(RAW.format(0, 1), RAW.format(0, "01")), r"shard01\.pt and .*shard1\.pt have the same number"),
        ("raw", duplicate(RAW.format(0, 1), RAW.format(0, "1 (copy)")), r"several checkpoints: .*shard1 \(copy\)\.pt"),
        (
            "raw",
            duplicate(RAW.format(0, 0), RAW.format(0, 1)),
            r"part-0-shard1\.pt: holds the same weights as .*shard0",
        ),
        (
            "raw",
            duplicate(RAW.format(0, 1), RAW.format(1, 1)),
            r"part-1-shard1\.pt: holds the same weights as .*part-0",
        ),
        ("raw", lambda source: cut(source / RAW.format(1, 2)), r"model_part-1-shard2\.pt: cannot be read as a torch"),
        (
            "raw, many",
            lambda source: cut(source / RAW.format(3, 7)),
            r"model_part-3-shard7\.pt: has no storage of",
        ),
        ("resharded", remove(PART.format(3)), r"lacks some of the 4 files .*: checkpoint_1_8000-model_part-3\.pt"),
        ("resharded", duplicate(PART.format(0), PART.format(4)), r"more than the 4 files .*model_part-4\.pt; remove"),
        ("resharded", duplicate(PART.format(0), PART.format(2)), r"model_part-2\.pt: holds the same weights as"),
        ("resharded", lambda source: (source / PART.format(1)).write_bytes(b""), r"model_part-1\.pt: cannot be read"),
        (
            "singleton",
            lambda source: cut(source / "restored.pt"),
            r"restored\.pt: cannot be read as a torch checkpoint",
        ),
        (
            "raw",
            move(RAW.format(1, 2), RAW.format(1, 10**8)),
            r"lacks some of the 200000002 files .* and 199,999,991 more",
        ),
        ("numpy", remove("decoder.layers.1.fc1.bias"), r"lacks decoder\.layers\.1\.fc1\.bias, which other layers have"),
        ("numpy", lambda source: cut(source / "decoder.layers.2.fc2.weight"), r"layers\.2\.fc2\.weight: has .* bytes"),
        ("numpy", lambda source: (source / "lm_head.weight").write_bytes(b"x"), r"lm_head\.weight: not in numpy's"),
        ("numpy", remove("decoder.layer_norm.weight", "decoder.layer_norm.bias"), "no OPT of the sizes"),
        (
            "numpy",
            lambda source: remove(*(path.name for path in source.glob("decoder.layers.2.*")))(source),
            r"num_hidden_layers 2.*are files missing\?",
        ),
    ],
)
def test_files_that_are_missing_extra_doubled_or_truncated_are_named_before_any_work(
    form: str, damage: Callable[[Path], object], message: str, tiny: Path, tmp_path: Path
) -> None:
    source = copy(tiny, form, tmp_path)
    damage(source)
    with pytest.raises(TieredError, match=message):
        convert_checkpoint(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_shards_whose_middle_is_what_all_parts_have_are_not_doubled(tmp_path: Path) -> None:
    """As shard 41 of OPT-175B's: a third into its slice of every layer are biases and norms."""
    model = opt_model(num_hidden_layers=8, ffn_dim=128, vocab_size=64, max_position_embeddings=64)
    write(tmp_path / "raw", model, "raw", parts=2, shards=60)
    opt = read_opt(LocalFiles(Folder(tmp_path / "raw")), None)
    assert opt is not None and opt.fields["num_hidden_layers"] == 8


def test_shards_of_another_model_are_named(tiny: Path, tmp_path: Path) -> None:
    source = copy(tiny, "raw", tmp_path)
    other = write(tmp_path / "other", opt_model(ffn_dim=96), "raw")
    shutil.copy(other / RAW.format(1, 1), source)
    with pytest.raises(CheckpointError, match=r"model_part-1-shard1\.pt: has other parameters in decoder"):
        convert_checkpoint(source, tmp_path / "out")


@pytest.mark.parametrize(("form", "name"), [("raw", RAW.format(1, 2)), ("numpy", "decoder.layers.2.fc2.weight")])
def test_a_file_that_goes_bad_half_way_is_named_and_the_rest_resumes(
    form: str, name: str, tiny: Path, tmp_path: Path
) -> None:
    source, out = copy(tiny, form, tmp_path), tmp_path / "out"
    aside = tmp_path / "aside"

    def stop(progress: ConvertProgress) -> None:
        if progress.block == "layer-001":
            raise KeyboardInterrupt

    def spoil(progress: object) -> None:
        if (source / name).exists():
            shutil.copy2(source / name, aside)
            (source / name).unlink()

    def spoil_more(progress: object) -> None:
        (source / name).write_bytes(b"")

    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(source, out, progress=stop)
    for damage, message in ((spoil, "gone since the conversion began"), (spoil_more, "it was truncated")):
        with pytest.raises(CheckpointError, match=rf"{re.escape(name)}: .*{message}"):
            convert_checkpoint(source, out, progress=damage)
        shutil.copy2(aside, source / name)
    assert convert_checkpoint(source, out).resumed_blocks
    check_same(out, tiny / "expected")


def test_the_budget_that_is_named_is_enough(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(BudgetError) as caught:
        convert_checkpoint(tiny / "raw", tmp_path / "out", ConvertOptions(ram_bytes=10 << 20))
    convert_checkpoint(tiny / "raw", tmp_path / "out", ConvertOptions(ram_bytes=caught.value.smallest_bytes))
    check_same(tmp_path / "out", tiny / "expected")


def test_a_list_of_md5_is_tested_first(tiny: Path, tmp_path: Path) -> None:
    listed, out = tmp_path / "md5.txt", tmp_path / "out"
    sums = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in sorted((tiny / "raw").iterdir())}

    def convert() -> None:
        listed.write_text("# a comment\n" + "".join(f"{md5} *./{name}\n" for name, md5 in sums.items()))
        convert_checkpoint(tiny / "raw", out, ConvertOptions(md5=listed))

    odd = RAW.format(1, 0)
    good = sums[odd]
    sums[odd] = "0" * 32
    with pytest.raises(CheckpointError, match=rf"{odd}: 1 of 6 files have another MD5 than"):
        convert()
    del sums[odd]
    with pytest.raises(ConfigError, match=rf"md5\.txt: has no checksum of {odd}"):
        convert()
    assert not out.exists()
    sums[odd] = good
    convert()
    assert Store.open(out).manifest.source["kind"] == "folder"
    with pytest.raises(ConfigError, match="no such file"):
        convert_checkpoint(tiny / "raw", out, ConvertOptions(md5=tmp_path / "nowhere", force=True))


def test_another_tokenizer_goes_into_the_store_of_any_form(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for name, content in tokenizer_files(256).items():
        (folder / name).write_bytes(content)
    result = convert_checkpoint(tiny / "numpy", tmp_path / "out", ConvertOptions(tokenizer=folder))
    assert result.has_tokenizer
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
