"""A mounted checkpoint converts like the files that it shows."""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.convert.models import store_digest
from tests.convert.opt import SHAPE
from tiered.convert import ConvertOptions, convert_checkpoint
from tiered.errors import ConfigError
from tools.made_checkpoint import MadeModel

try:
    from tools import fuse_checkpoint
except SystemExit as missing:
    pytest.skip(str(missing), allow_module_level=True)


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "mount"
    place.mkdir()
    tree = fuse_checkpoint.both_forms(MadeModel.of_shape(SHAPE, 2), "short", 2, 11, 200_000)
    with ExitStack() as stack:
        try:
            stack.enter_context(fuse_checkpoint.mounted(fuse_checkpoint.MadeFolder(tree), place))
        except RuntimeError as error:
            pytest.skip(f"FUSE cannot be mounted: {error}")
        yield place


def test_a_mounted_checkpoint_converts_like_its_files(mount: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(mount, tmp_path / "copied"))
    assert len(list((copied / "raw").iterdir())) == 22
    with pytest.raises(ConfigError, match=r"no OPT of the sizes .*--from PATH"):
        convert_checkpoint(mount / "raw", tmp_path / "out")
    sources = {"raw": mount / "raw", "copied": copied / "raw", "huggingface": mount / "huggingface"}
    stores = {}
    for name, weights in sources.items():
        convert_checkpoint(mount / "shape.toml", tmp_path / f"{name}.tiered", ConvertOptions(weights=weights))
        stores[name] = store_digest(tmp_path / f"{name}.tiered")
    blocks = [name for name in stores["raw"] if name.startswith("blocks/")]
    assert stores["raw"] == stores["copied"] and len(blocks) == 4
    assert [stores["raw"][name] for name in blocks] == [stores["huggingface"][name] for name in blocks]
    with pytest.raises(OSError, match="Read-only"):
        (mount / "raw" / "new").touch()
    with pytest.raises(FileNotFoundError):
        (mount / "none").stat()


def test_it_says_what_was_read(mount: Path) -> None:
    assert (mount / "shape.toml").read_text().startswith('name = "short"\n[config]\n')
    assert (mount / "shape.toml").stat().st_size == len((mount / "shape.toml").read_bytes())
