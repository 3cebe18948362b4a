"""What stands in for the hub gives the store of the files that it serves, and these go again."""

import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest

from tests.convert.models import store_digest
from tests.convert.opt import SHAPE
from tiered.convert import ConvertOptions, convert_checkpoint
from tiered.errors import ConfigError
from tiered.shapes import outline
from tools.hub_stand_in import COMMIT, Hub
from tools.made_checkpoint import MadeModel


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    constants = huggingface_hub.constants
    with Hub("someone/tiny", MadeModel.of_shape(SHAPE, 2).huggingface(200_000)) as hub:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        thread = threading.Thread(target=hub.serve_forever)
        thread.start()
        yield hub
        hub.shutdown()
        thread.join()


def test_what_is_fetched_is_the_model_and_goes_again(hub: Hub, tmp_path: Path) -> None:
    convert_checkpoint(hub.repo_id, tmp_path / "out", ConvertOptions(delete_downloads=True))
    (tmp_path / "files").mkdir()
    for name, file in hub.files.items():
        (tmp_path / "files" / name).write_bytes(file.read(0, file.nbytes))
    convert_checkpoint(tmp_path / "files", tmp_path / "local")
    found, wanted = store_digest(tmp_path / "out"), store_digest(tmp_path / "local")
    assert {**found, "manifest.json": ""} == {**wanted, "manifest.json": ""}
    weights = sorted(name for name in hub.files if name.endswith(".safetensors"))
    assert len(weights) > 1 and sorted(name for name in hub.fetched if name in weights) == weights
    assert COMMIT in (tmp_path / "out" / "manifest.json").read_text()
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_other_repositories_are_not_there(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such repository"):
        convert_checkpoint("someone/else", tmp_path / "out")


def test_headers_come_by_range_and_no_weights(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    for name, file in hub.files.items():
        (tmp_path / "files" / name).write_bytes(file.read(0, file.nbytes))
    found = outline(hub.repo_id)
    assert found == outline(str(tmp_path / "files"))
    assert not [name for name in hub.fetched if name.endswith((".safetensors", "tokenizer.json"))]
    parts = {name for name, _ in hub.ranges}
    assert parts == {name for name in hub.files if name.endswith(".safetensors")} and len(parts) > 1
    assert max(nbytes for _, nbytes in hub.ranges) <= 100_001


def test_a_range_past_the_end_is_refused_and_the_size_named(hub: Hub) -> None:
    name, file = next(iter(hub.files.items()))
    headers = {"Range": f"bytes={file.nbytes}-{file.nbytes + 9}"}
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(urllib.request.Request(f"{hub.url}/{hub.repo_id}/resolve/main/{name}", headers=headers))
    refused.value.close()
    assert refused.value.code == 416 and refused.value.headers["Content-Range"] == f"bytes */{file.nbytes}"
    assert not hub.ranges
