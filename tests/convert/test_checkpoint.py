"""A checkpoint hands out its blocks one by one, fetches what each is read from and gives back what none waits for."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.convert.models import save_model, tiny_model
from tiered.convert import ConvertOptions
from tiered.convert.blocks import BlockRecipe, RangeRecipe
from tiered.convert.convert import Conversion
from tiered.convert.open import open_checkpoint
from tiered.convert.place import Folder, LocalFiles
from tiered.convert.recipe import StoreRecipe
from tiered.convert.source import WeightSource
from tiered.errors import BudgetError


class Remote(LocalFiles):
    """The files of a folder, whose weights are elsewhere until they are asked for."""

    kind: Any = "hub"

    def __init__(self, place: Folder) -> None:
        super().__init__(place)
        self.fetched: list[str] = []
        self.released: list[str] = []

    def is_here(self, name: str) -> bool:
        return not name.endswith(".safetensors") or (name in self.fetched and name not in self.released)

    def path(self, name: str) -> Path:
        if not self.is_here(name):
            self.fetched.append(name)
        return super().path(name)

    def room_nbytes(self, names: Iterable[str]) -> Mapping[Path, int]:
        return {Path("/elsewhere"): len(set(names))}

    def release(self, name: str) -> None:
        self.released.append(name)

    def fingerprint(self, names: Iterable[str]) -> str:
        return "-".join(sorted(names))


Opened = tuple[Remote, WeightSource, StoreRecipe]


def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Opened:
    """A model in thirteen files or so."""
    place = Folder(save_model(tmp_path / "source", tiny_model("llama"), "30KB"))
    files, wanted = Remote(place), ConvertOptions(**options)
    monkeypatch.setattr(Folder, "open", lambda *_: files)
    return files, *open_checkpoint(place, wanted, Conversion(tmp_path / "out", wanted, None))


def test_files_come_when_a_block_needs_them_and_go_when_none_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, source, recipe = opened(tmp_path, monkeypatch, quant="none")
    assert not files.fetched
    assert source.room_nbytes(recipe.files) == {Path("/elsewhere"): len(files.names) - 3}  # two of json and the index
    told: list[BlockRecipe] = []
    with source.opened(recipe.files, told.append) as blocks:
        seen, most = [], 0
        for block in blocks:
            assert told[-1:] == [block] or block not in told
            for tensor in block.tensors:
                pieces = source.plain(RangeRecipe(tensor))
                assert sum(piece.nbytes for piece in pieces) == tensor.numel * source.dtype(tensor).itemsize
            seen.append(block)
            most = max(most, len(files.fetched) - len(files.released))
        assert set(seen) == set(recipe.files)
        assert 0 < len(files.released) < len(files.fetched), "the last files stay until the store is whole"
    assert most < len(files.fetched)
    assert len(files.fetched) == len(set(files.fetched)), "nothing comes twice"
    assert sorted(files.released) == sorted(files.fetched)


def test_after_an_error_the_files_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, source, recipe = opened(tmp_path, monkeypatch)
    with (
        pytest.raises(KeyboardInterrupt),
        source.opened(recipe.files, lambda _: None) as blocks,
    ):
        next(iter(blocks))
        raise KeyboardInterrupt
    assert files.fetched and not files.released


def test_blocks_that_are_done_need_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, source, _ = opened(tmp_path, monkeypatch)
    with source.opened([], lambda _: None) as blocks:
        assert not list(blocks)
    assert not files.fetched


def test_what_reading_takes_is_asked_for_once_a_file_is_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, source, recipe = opened(tmp_path, monkeypatch, ram_bytes=1 << 40)
    monkeypatch.setattr("tiered.convert.room.process_peak_rss_bytes", lambda: 1 << 41)
    with pytest.raises(BudgetError, match="to read the source"), source.opened(recipe.files, lambda _: None) as blocks:
        next(iter(blocks))
    assert files.fetched
