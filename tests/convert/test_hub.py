"""Hub ids: files come one by one, and go again when asked to. The hub is a server on this machine."""

import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from safetensors.torch import load_file, save_file

from tests.convert.models import save_bin, save_model, store_digest, tiny_model
from tests.convert.test_kept import checkpoint, model
from tests.convert.test_published import FORMATS
from tests.quick import ONE_FORM
from tiered.convert import ConvertOptions, convert_checkpoint
from tiered.errors import CheckpointError, ConfigError, ReadError
from tiered.store import BlockWriter, Store

pytestmark = ONE_FORM

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "someone/tiny"


class FakeHub:
    """Serves a folder as one repository with one commit, and remembers what was fetched."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fetched: list[str] = []
        self.status: int | None = None
        self.code: str | None = None
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def log_message(self, *_: object) -> None:
                """Tests read no access log."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever)

    def answer(self, request: BaseHTTPRequestHandler, *, body: bool) -> None:
        path = request.path.split("?")[0]
        if self.status is not None:
            self._send(request, b"{}", self.status, {"X-Error-Code": self.code or ""}, body)
        elif path in (
            f"/api/models/{REPO}",
            f"/api/models/{REPO}/revision/main",
            f"/api/models/{REPO}/revision/{COMMIT}",
        ):
            files = [{"rfilename": p.name, "size": p.stat().st_size} for p in sorted(self.folder.iterdir())]
            info = json.dumps({"id": REPO, "modelId": REPO, "sha": COMMIT, "siblings": files}).encode()
            self._send(request, info, 200, {"Content-Type": "application/json"}, body)
        elif path.startswith("/api/"):
            self._send(request, b"{}", 404, {"X-Error-Code": "RevisionNotFound"}, body)
        else:
            name = path.rsplit("/", 1)[-1]
            content = (self.folder / name).read_bytes()
            if body:
                self.fetched.append(name)
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            self._send(request, content, 200, {"ETag": etag, "X-Repo-Commit": COMMIT}, body)

    @staticmethod
    def _send(
        request: BaseHTTPRequestHandler, content: bytes, status: int, headers: dict[str, str], body: bool
    ) -> None:
        request.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            request.send_header(key, value)
        request.end_headers()
        if body:
            request.wfile.write(content)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    return folder


@pytest.fixture
def hub(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    fake = FakeHub(save_model(tmp_path / "repo", tiny_model("llama"), "60KB"))
    template = huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(
        huggingface_hub.constants.ENDPOINT, fake.url
    )
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", fake.url)
    fake.thread.start()
    yield fake
    fake.server.shutdown()
    fake.thread.join()
    fake.server.server_close()


def weights_in(cache: Path) -> set[str]:
    """Weight files that the cache still shows, and the blobs behind them."""
    found = {p.name for p in cache.rglob("snapshots/*/*") if p.suffix in (".safetensors", ".bin")}
    blobs = [p for p in cache.rglob("blobs/*") if p.stat().st_size > 20_000 and p.suffix != ".json"]
    assert len(blobs) == len(found), "blobs and pointers go together"
    return found


def shards(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.safetensors")}


def blocks(digest: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in digest.items() if name != "manifest.json"}


def test_a_hub_id_gives_the_blocks_of_the_folder(hub: FakeHub, cache: Path, tmp_path: Path) -> None:
    convert_checkpoint(REPO, tmp_path / "out", ConvertOptions())
    convert_checkpoint(hub.folder, tmp_path / "local", ConvertOptions())
    assert blocks(store_digest(tmp_path / "out")) == blocks(store_digest(tmp_path / "local"))
    source = Store.open(tmp_path / "out").manifest.source
    assert (source["kind"], source["name"], source["revision"]) == ("hub", REPO, COMMIT)
    assert weights_in(cache) == shards(hub.folder)


def test_known_names_lead_to_the_hub(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = tmp_path / "configs" / "models"
    shapes.mkdir(parents=True)
    (shapes / "tiny.toml").write_text(f'name = "tiny"\nhub_id = "{REPO}"\n[config]\nmodel_type = "llama"\n')
    monkeypatch.setattr("tiered.convert.open.config_dir", lambda: tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    assert convert_checkpoint("tiny").store == Path("tiny.tiered")


def test_downloads_are_deleted_as_soon_as_they_are_converted(hub: FakeHub, cache: Path, tmp_path: Path) -> None:
    held: list[int] = []

    def watch(_: object) -> None:
        held.append(len(weights_in(cache)))

    convert_checkpoint(REPO, tmp_path / "out", ConvertOptions(delete_downloads=True), watch)
    assert weights_in(cache) == set()
    assert sorted(n for n in hub.fetched if n in shards(hub.folder)) == sorted(shards(hub.folder))  # each once
    assert max(held) < len(shards(hub.folder)) / 2
    convert_checkpoint(hub.folder, tmp_path / "local", ConvertOptions())
    assert blocks(store_digest(tmp_path / "out")) == blocks(store_digest(tmp_path / "local"))


def test_files_that_were_there_before_stay(hub: FakeHub, cache: Path, tmp_path: Path) -> None:
    mine = sorted(shards(hub.folder))[2]
    huggingface_hub.hf_hub_download(REPO, mine, revision=COMMIT)
    convert_checkpoint(REPO, tmp_path / "out", ConvertOptions(delete_downloads=True))
    assert weights_in(cache) == {mine}


@pytest.mark.parametrize("other_has_it", [False, True])
def test_what_the_whole_cache_shares_stays_while_another_repository_has_it(
    other_has_it: bool, hub: FakeHub, cache: Path, tmp_path: Path
) -> None:
    """As huggingface_hub shares files: a repository's blob is a link to one that others may link to as well."""
    name = sorted(shards(hub.folder))[2]
    store, other = cache / "blobs" / "00", cache / "models--another--one" / "blobs"
    store.mkdir(parents=True)
    other.mkdir(parents=True)

    def share(_: object) -> None:
        pointers = [path for path in cache.rglob(f"models--*/snapshots/*/{name}") if path.is_symlink()]
        if pointers and not list(store.iterdir()):
            blob = pointers[0].resolve()
            blob.rename(store / "shared")
            blob.symlink_to("../../blobs/00/shared")
            if other_has_it:
                (other / blob.name).symlink_to("../../blobs/00/shared")

    convert_checkpoint(REPO, tmp_path / "out", ConvertOptions(delete_downloads=True), share)
    assert [path.name for path in store.iterdir()] == (["shared"] if other_has_it else [])
    assert all(path.exists() for path in cache.rglob("*") if path.is_symlink())  # none leads nowhere


def test_a_blob_that_another_revision_uses_stays(hub: FakeHub, cache: Path, tmp_path: Path) -> None:
    shared = sorted(shards(hub.folder))[2]
    blob = Path(huggingface_hub.hf_hub_download(REPO, shared, revision=COMMIT)).resolve()
    snapshot = next(cache.glob("models--*/snapshots")) / COMMIT
    snapshot.rename(snapshot.with_name("f" * 40))
    convert_checkpoint(REPO, tmp_path / "out", ConvertOptions(delete_downloads=True))
    assert blob.exists()


@pytest.mark.parametrize("delete", [True, False])
def test_a_stopped_download_resumes_and_fetches_nothing_twice(
    delete: bool, hub: FakeHub, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = BlockWriter.finish

    def failing(self: Any) -> object:
        if self._path.name.startswith("layer-001"):
            raise KeyboardInterrupt
        return finish(self)

    options = ConvertOptions(delete_downloads=delete)
    with monkeypatch.context() as patch:
        patch.setattr(BlockWriter, "finish", failing)
        with pytest.raises(KeyboardInterrupt):
            convert_checkpoint(REPO, tmp_path / "out", options)
    assert convert_checkpoint(REPO, tmp_path / "out", options).resumed_blocks > 0
    weights = [name for name in hub.fetched if name in shards(hub.folder)]
    assert len(weights) == len(set(weights))
    assert weights_in(cache) == (set() if delete else shards(hub.folder))
    convert_checkpoint(REPO, tmp_path / "whole", ConvertOptions())
    assert store_digest(tmp_path / "out") == store_digest(tmp_path / "whole")


def test_a_single_file_is_deleted_too(hub: FakeHub, cache: Path, tmp_path: Path) -> None:
    hub.folder = save_bin(tmp_path / "bin", tiny_model("llama"))
    convert_checkpoint(REPO, tmp_path / "out", ConvertOptions(delete_downloads=True))
    assert hub.fetched.count("pytorch_model.bin") == 1 and weights_in(cache) == set()


def test_offline_uses_the_cache_or_says_what_is_missing(
    hub: FakeHub, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert_checkpoint(REPO, tmp_path / "online", ConvertOptions())
    fetched = list(hub.fetched)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    convert_checkpoint(REPO, tmp_path / "offline", ConvertOptions())
    assert hub.fetched == fetched
    assert store_digest(tmp_path / "offline") == store_digest(tmp_path / "online")
    with pytest.raises(ReadError, match="cannot be reached"):
        convert_checkpoint("someone/other", tmp_path / "other", ConvertOptions())


@pytest.mark.parametrize(
    ("status", "code", "error", "message"),
    [
        (404, "RepoNotFound", ConfigError, "no such repository"),
        (403, "GatedRepo", ConfigError, "HF_TOKEN"),
        (500, None, ReadError, "run the same command again"),
    ],
)
def test_the_hubs_answers_are_explained(
    status: int, code: str | None, error: type[Exception], message: str, hub: FakeHub, tmp_path: Path
) -> None:
    hub.status, hub.code = status, code
    with pytest.raises(error, match=message):
        convert_checkpoint(REPO, tmp_path / "out", ConvertOptions())
    assert not (tmp_path / "out").exists()


def test_an_unknown_revision_is_named(hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no revision 'v9'"):
        convert_checkpoint(REPO, tmp_path / "out", ConvertOptions(revision="v9"))


def test_opt_175b_explains_where_its_weights_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"992 metaseq shards.*--synthetic"):
        convert_checkpoint("opt-175b", tmp_path / "out", ConvertOptions())


def test_what_is_quantized_is_planned_by_its_configuration_until_its_files_come(
    hub: FakeHub, cache: Path, tmp_path: Path
) -> None:
    """A weight's parts may lie in two files; both are fetched for it, and go when nothing needs them any more."""
    made = model(layers=2)
    formats = {f"model.layers.{layer}.mlp.{name}": "gptq" for layer in (0, 1) for name in ("gate_proj", "up_proj")}
    source = checkpoint(tmp_path / "source", made, formats, FORMATS["gptq"]["config"])
    whole = convert_checkpoint(source, tmp_path / "whole", ConvertOptions(compress="none"))
    hub.folder = in_two_files(source)
    options = ConvertOptions(compress="none", delete_downloads=True)
    result = convert_checkpoint(REPO, tmp_path / "out", options)
    assert blocks(store_digest(result.store)) == blocks(store_digest(whole.store))
    assert result.taken == whole.taken and weights_in(cache) == set()


def in_two_files(source: Path) -> Path:
    """The checkpoint `source` in two files with an index, a weight's parts in either."""
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    tensors = load_file(source / "model.safetensors")
    weight_map = {name: names[name.endswith((".scales", ".qzeros")) or "layers.1" in name] for name in tensors}
    for file in names:
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, source / file)
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (source / "model.safetensors").unlink()
    return source


MIXED = {"model.layers.0.mlp.gate_proj": "gptq", "model.layers.1.mlp.gate_proj": "gptq-8bit"}
"""The first in 4 bits in groups of 32, the second in 8 in groups of 64."""


@pytest.mark.parametrize(
    "said",
    [
        {"dynamic": {"-:lm_head": {}, r"+:model\.layers\.1\.": {"bits": 8, "group_size": 64}, ".*": {}}},
        {"dynamic": {r".*\.1\..*gate": {"bits": 8, "group_size": 64}}},
        {"extra_config": {"model.layers.1.mlp.gate_proj": {"bits": 8, "group_size": 64}}},
    ],
)
def test_what_is_said_of_single_modules_counts_before_their_files_come(
    said: dict[str, Any], hub: FakeHub, tmp_path: Path
) -> None:
    source = checkpoint(tmp_path / "source", model(layers=2), MIXED, {**FORMATS["gptq"]["config"], **said})
    whole = convert_checkpoint(source, tmp_path / "whole", ConvertOptions(compress="none"))
    assert {each.form for each in whole.taken} == {"int4-g32", "int8-g64"} and not any(e.added for e in whole.taken)
    hub.folder = in_two_files(source)
    result = convert_checkpoint(REPO, tmp_path / "out", ConvertOptions(compress="none"))
    assert blocks(store_digest(result.store)) == blocks(store_digest(whole.store))


def test_a_module_in_another_form_than_is_said_of_it_is_not_quantized_anew_without_a_word(
    hub: FakeHub, tmp_path: Path
) -> None:
    """Its 8 bits would become the 4 that all modules are said to have."""
    source = checkpoint(tmp_path / "source", model(layers=2), MIXED, FORMATS["gptq"]["config"])
    # Of a folder tensors count, whatever is said.
    whole = convert_checkpoint(source, tmp_path / "whole", ConvertOptions(compress="none"))
    assert not any(each.added for each in whole.taken)
    hub.folder = in_two_files(source)
    with pytest.raises(
        CheckpointError,
        match=r"layers\.1\.mlp\.gate_proj\.weight is int8-g64, expected int4-g32.*download",
    ):
        convert_checkpoint(REPO, tmp_path / "out", ConvertOptions(compress="none"))


def test_asked_for_int4_a_module_in_another_form_than_is_said_of_it_is_quantized_anew(
    hub: FakeHub, tmp_path: Path
) -> None:
    """From a folder it would be, too: its numbers are known, as its zeros are the middle of 8 bits."""
    source = checkpoint(tmp_path / "source", model(layers=2), MIXED, FORMATS["gptq"]["config"])
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.gate_proj.qzeros"].fill_(0x7F7F7F7F)
    save_file(tensors, source / "model.safetensors")
    options = ConvertOptions(quant="int4", compress="none")
    whole = convert_checkpoint(source, tmp_path / "whole", options)
    hub.folder = in_two_files(source)
    result = convert_checkpoint(REPO, tmp_path / "out", replace(options, delete_downloads=True))
    (said,) = [each for each in result.taken if each.method == "gptq int8"]
    (of_folder,) = [each for each in whole.taken if each.method == "gptq int8"]
    assert (said.form, said.weights, of_folder.form) == ("int4-g32", 1, "int4-g64")  # as its neighbours are
    assert 0.01 < said.added <= of_folder.added
    with pytest.raises(CheckpointError, match=r"is int8-g64, expected int4-g32.*or pass --quant int4"):
        convert_checkpoint(REPO, tmp_path / "kept", ConvertOptions(compress="none"))


def test_what_is_not_sure_to_be_known_is_not_quantized_anew(hub: FakeHub, tmp_path: Path) -> None:
    """Only config.json tells whether zeros in 8 bits are one less than they are, and it is wrong of this module."""
    hub.folder = in_two_files(checkpoint(tmp_path / "source", model(layers=2), MIXED, FORMATS["gptq"]["config"]))
    with pytest.raises(
        CheckpointError, match=r"layers\.1\.mlp\.gate_proj\.weight is int8-g64.*cannot be quantized anew"
    ):
        convert_checkpoint(REPO, tmp_path / "out", ConvertOptions(quant="int4", compress="none"))


def test_a_pattern_that_is_none_is_named(hub: FakeHub, tmp_path: Path) -> None:
    config = {**FORMATS["gptq"]["config"], "dynamic": {"+:(": {"bits": 8}}}
    source = checkpoint(tmp_path / "source", model(layers=2), MIXED, config)
    # Of a folder tensors count, whatever is said.
    convert_checkpoint(source, tmp_path / "whole", ConvertOptions(compress="none"))
    hub.folder = in_two_files(source)
    with pytest.raises(CheckpointError, match="dynamic: expected regular expressions"):
        convert_checkpoint(REPO, tmp_path / "out", ConvertOptions(compress="none"))
