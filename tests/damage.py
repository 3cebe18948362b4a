"""Stores that a run finds fault with only in some texts."""

import shutil
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoTokenizer

from tests.commands import copy_store
from tiered.store import Store
from tiered.store.beside import TOKENIZER

ADDED: Final = "<added>"


def poisoned(path: Path, folder: Path, name: str, row: int) -> Store:
    """A copy in `folder`, one row of whose tensor `name`, which is not quantized, is NaN. Its checksum is wrong."""
    store = Store.open(shutil.copytree(path, folder / "poisoned.tiered"))
    units = (unit for layout in store.layouts.values() for unit in layout.units)
    (unit,) = [unit for unit in units if name in unit.weights]
    file = store.path / unit.file.path
    memory = torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8)
    weight: Any = unit.weights[name].view(memory[unit.offset :])
    weight[row] = torch.nan
    file.write_bytes(memory.numpy().tobytes())
    return store


def without_tokenizer(path: Path, folder: Path) -> Path:
    """A copy in `folder` that takes and gives token ids only."""
    copy = Path(shutil.copytree(path, folder / "bare.tiered"))
    for name in TOKENIZER:
        (copy / name).unlink(missing_ok=True)
    return copy


def with_added_token(path: Path, folder: Path) -> Path:
    """A copy in `folder` whose tokenizer has a token more than the model, `ADDED`."""
    copy = copy_store(path, folder)
    tokenizer = AutoTokenizer.from_pretrained(copy)
    tokenizer.add_tokens([f"<filler-{number}>" for number in range(Store.open(copy).vocab_size - len(tokenizer))])
    tokenizer.add_tokens([ADDED])
    tokenizer.save_pretrained(copy)
    return copy
