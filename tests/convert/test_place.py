"""A local folder is taken at its word only as far as its own files go: links, pipes and folders are looked at."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commands import run_here
from tests.convert.models import TRAINED, save_model, store_digest, tiny_model
from tests.quick import ONE_FORM
from tiered.convert import ConvertOptions, convert_checkpoint
from tiered.convert.place import Folder
from tiered.errors import CheckpointError
from tiered.store import Store

pytestmark = ONE_FORM

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of the trained checkpoint."""
    return Path(shutil.copytree(TRAINED, tmp_path / "source"))


def elsewhere(path: Path) -> None:
    """Move a file out of its folder and leave a link to it."""
    target = path.parent.parent / "private"
    path.rename(target)
    path.symlink_to(target)


def instead(make: Callable[[Path], object]) -> Callable[[Path], None]:
    """Put something else in the place of a file."""

    def change(path: Path) -> None:
        path.unlink()
        make(path)

    return change


STRANGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "a link out of the folder": (elsewhere, r"a link out of the folder, to .*/private, .* put a copy"),
    "a link to nothing": (instead(lambda path: path.symlink_to("gone")), "a link to gone, which does not exist"),
    "a link to itself": (instead(lambda path: path.symlink_to(path.name)), "a link that leads back to itself"),
    "a pipe": (instead(os.mkfifo), "a named pipe, expected a file"),
    "a folder": (instead(Path.mkdir), "a folder, expected a file"),
    "a device": (instead(lambda path: path.symlink_to("/dev/zero")), "a device, expected a file"),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json"])
@pytest.mark.parametrize(("change", "message"), STRANGE.values(), ids=STRANGE.keys())
def test_what_is_not_the_folders_own_file_is_named(
    change: Callable[[Path], None], message: str, name: str, source: Path, tmp_path: Path
) -> None:
    change(source / name)
    with pytest.raises(CheckpointError, match=rf"source/{name.replace('.', '[.]')}: {message}"):
        convert_checkpoint(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["vocab.txt", "chat_template.jinja"])
def test_files_elsewhere_do_not_get_into_a_store_through_links(name: str, source: Path, tmp_path: Path) -> None:
    (tmp_path / "private").write_text("secret")
    (source / name).symlink_to(tmp_path / "private")
    done = run_here("convert", source, "-o", tmp_path / "out")
    assert done.code == 4 and f"source/{name}: a link out of the folder" in done.err
    assert not (tmp_path / "out").exists()


def test_links_within_the_folder_are_followed_and_hard_links_are_files(source: Path, tmp_path: Path) -> None:
    (source / "data").mkdir()
    (source / "model.safetensors").rename(source / "data" / "weights")
    (source / "model.safetensors").symlink_to("data/weights")
    (source / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    (source / "tokenizer.json").hardlink_to(tmp_path / "tokenizer.json")
    convert_checkpoint(source, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (TRAINED / "tokenizer.json").read_bytes()


def test_what_is_not_a_models_file_is_not_looked_at(source: Path, tmp_path: Path) -> None:
    (source / "notes").symlink_to("gone")
    os.mkfifo(source / "pipe")
    (source / "original").mkdir()
    convert_checkpoint(source, tmp_path / "out")


def cached(folder: Path, shared: bool) -> Path:
    """The trained checkpoint as a snapshot in huggingface_hub's cache, whose blobs may be links to shared ones."""
    repository = folder / "models--facebook--opt-docs"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, path in enumerate(sorted(TRAINED.iterdir())):
        blob = repository / "blobs" / f"{number:064x}"
        if shared:
            (folder / "blobs" / "00").mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder / "blobs" / "00" / blob.name)
            blob.symlink_to(f"../../blobs/00/{blob.name}")
        else:
            shutil.copy(path, blob)
        (snapshot / path.name).symlink_to(f"../../blobs/{blob.name}")
    return snapshot


@pytest.mark.parametrize("shared", [False, True])
def test_a_snapshot_of_the_hubs_cache_is_a_folder_named_after_its_model(
    shared: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = cached(tmp_path / "hub", shared)
    monkeypatch.chdir(tmp_path)
    result = convert_checkpoint(snapshot)
    assert result.store == Path("opt-docs.tiered")
    assert Store.open(result.store).manifest.source["name"] == "opt-docs"
    convert_checkpoint(TRAINED, tmp_path / "out")
    found, expected = store_digest(result.store), store_digest(tmp_path / "out")
    assert {name for name in found if found[name] != expected[name]} == {"manifest.json"}  # which names the source
    # The same cache by another name, as a link to a larger disk makes it.
    (tmp_path / "linked").symlink_to("hub")
    convert_checkpoint(tmp_path / "linked" / snapshot.relative_to(tmp_path / "hub"), tmp_path / "third")


def test_a_snapshots_links_lead_nowhere_but_to_its_blobs(tmp_path: Path) -> None:
    snapshot = cached(tmp_path / "hub", False)
    (tmp_path / "hub" / "private").write_text("secret")
    (snapshot / "vocab.txt").symlink_to("../../../private")
    with pytest.raises(CheckpointError, match=r"vocab\.txt: a link out of the folder"):
        convert_checkpoint(snapshot, tmp_path / "out")


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("models/opt-docs", "opt-docs"),
        (f"models--gpt2/snapshots/{COMMIT}", "gpt2"),
        (f"models--Qwen--Qwen3-0.6B/snapshots/{COMMIT}", "Qwen3-0.6B"),
        ("mine/snapshots/latest", "latest"),
    ],
)
def test_names_of_models(folder: str, name: str, tmp_path: Path) -> None:
    (tmp_path / folder).mkdir(parents=True)
    assert Folder(tmp_path / folder).name == name


def test_a_folder_without_a_tokenizer_converts_and_says_so(tmp_path: Path) -> None:
    save_model(tmp_path / "source", tiny_model("llama"))
    done = run_here("convert", tmp_path / "source", "-o", tmp_path / "my out")
    assert done.code == 0 and f"'tiered convert '{tmp_path / 'my out'}' --tokenizer PATH'" in done.out
    assert f"next: tiered generate '{tmp_path / 'my out'}' --prompt-ids" in done.out  # quoted for the shell
    assert convert_checkpoint(TRAINED, tmp_path / "other", ConvertOptions()).has_tokenizer
