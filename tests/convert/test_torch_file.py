"""What torch.save wrote is found without a tensor being read, and nothing that a pickle names is imported or called."""

import io
import os
import pickle
import random
import sys
import zipfile
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.convert.opt import SHAPE, opt_model, write
from tests.quick import ONE_FORM
from tiered.convert.gather import Gathered, Gatherer
from tiered.convert.opt import read_opt
from tiered.convert.place import Folder, LocalFiles
from tiered.convert.torch_file import TorchTensor, load_torch_file
from tiered.errors import CheckpointError, ReadError, TieredError
from tools.fuzz.mutate import mutate_bytes

pytestmark = ONE_FORM

ZIPPED = pytest.mark.parametrize("zipped", [True, False])


class Harmful:
    """Makes a folder where it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self._proof = proof

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self._proof),)


def save(value: object, path: Path, zipped: bool = True) -> None:
    torch.save(value, path, _use_new_zipfile_serialization=zipped)


def with_pickle(raw: bytes, path: Path) -> Path:
    """A file in torch's zip format with `raw` in place of what is pickled."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", raw)
    return path


def values(tensor: Any, path: Path) -> torch.Tensor:
    assert isinstance(tensor, TorchTensor)
    gathered, gatherer = Gathered.of([tensor.region(path, "it")]), Gatherer()
    panels = [panel.clone() for panel in gatherer.panels(gathered)]
    gatherer.close()
    return torch.cat(panels).view(tensor.shape) if tensor.shape else panels[0]


@ZIPPED
def test_tensors_of_all_types_are_found_where_they_are(zipped: bool, tmp_path: Path) -> None:
    base = torch.randn(64, 48)
    types = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool)
    tensors = {str(dtype): (base * 9).to(dtype) for dtype in types}
    tensors |= {
        "rows": base[3:9],
        "vector": base[5],
        "scalar": torch.tensor(2.5),
        "seen": base.view(-1)[96:192].view(2, 48),
    }
    tensors["parameter"] = torch.nn.Parameter(base)
    path = tmp_path / "it.pt"
    save({"model": OrderedDict(tensors), "args": Namespace(a=torch.Size([2])), "type": torch.float16}, path, zipped)
    found = load_torch_file(path)
    assert found["type"] is torch.float16
    for name, tensor in tensors.items():
        assert torch.equal(values(found["model"][name], path), tensor.detach()), name


def test_values_that_are_not_in_order_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "it.pt"
    save({"a": torch.ones(3, 4).t()}, path)
    with pytest.raises(CheckpointError, match=r"it\.pt: the values of a are not in order"):
        load_torch_file(path)["a"].region(path, "a")


@ZIPPED
def test_code_in_a_pickle_is_passed_over_and_not_run(zipped: bool, tmp_path: Path) -> None:
    path, proof = tmp_path / "it.pt", tmp_path / "proof"
    save({"a": torch.ones(2), "b": Harmful(proof), "c": [Harmful(proof)], "d": {"e": Harmful(proof)}}, path, zipped)
    assert torch.equal(values(load_torch_file(path)["a"], path), torch.ones(2))
    assert not proof.exists()


@pytest.mark.parametrize(
    "raw",
    [
        b"cos\nsystem\n(S'touch PROOF'\ntR.",
        b'cbuiltins\nexec\n(S\'open("PROOF", "w")\'\ntR.',
        b"cbuiltins\ngetattr\n(cos\nsystem\nS'__call__'\ntR(S'touch PROOF'\ntR.",
        b"(S'touch PROOF'\nios\nsystem\n.",
        b"cnever.imported.anywhere\nThing\n)\x81}S'a'\nK\x01sb.",
        b"ccollections\nOrderedDict\n}S'__init__'\ncos\nsystem\nsb.",
        b"ctorch._utils\n_rebuild_tensor_v2\n}S'region'\nK\x01sb.",
        b"ctorch\nHalfStorage\n}S'itemsize'\nK\x01sb.",
        b"ctorch\nSize\n(cos\nsystem\ntR.",
        b"K\x01r\xff\xff\xff\xff.",  # remembered as number 4294967295
        b"B\xff\xff\xff\xff.",
        b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",
        b"\x96\x00\x00\x00\x00\x10\x00\x00\x00.",  # 64 GiB of bytes
        b"\x95\xff\xff\xff\xff\xff\xff\xff\x7f.",
        b"\x82\x01.",
        b"S'x'\nQ.",
        b"(" * 100_000,
        b"",
    ],
)
def test_a_pickle_that_means_harm_does_none(raw: bytes, tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    path = with_pickle(raw.replace(b"PROOF", str(proof).encode()), tmp_path / "it.pt")
    before = set(sys.modules)
    try:
        load_torch_file(path)
    except CheckpointError as error:
        assert "it.pt: cannot be read as a torch checkpoint" in str(error) and "pickled code is never run" in str(error)
    assert (
        not proof.exists()
        and "never" not in sys.modules
        and set(sys.modules) - before <= {"encodings.ascii", "encodings.cp437"}
    )
    assert issubclass(OrderedDict, dict) and TorchTensor.region.__name__ == "region"


@pytest.mark.parametrize(
    ("shape", "stride", "start"),
    [((9,), (1,), 0), ((2,), (1,), 7), ((-2,), (1,), 0), ((2,), (-1,), 4), ((2, 2), (9, 1), 0)],
)
def test_a_tensor_outside_its_storage_is_refused(
    shape: tuple[int, ...], stride: tuple[int, ...], start: int, tmp_path: Path
) -> None:
    raw = b"ctorch._utils\n_rebuild_tensor_v2\n((S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nK\x08tQ"
    raw += pickle.dumps(start, 2)[2:-1] + pickle.dumps(shape, 2)[2:-1] + pickle.dumps(stride, 2)[2:-1] + b"tR."
    path = with_pickle(raw, tmp_path / "it.pt")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/data/0", bytes(32))
    with pytest.raises(CheckpointError, match=r"it\.pt: .*a tensor (of|in)"):
        load_torch_file(path)


def test_a_compressed_or_short_part_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(100)}, buffer)
    for how, message in ((zipfile.ZIP_DEFLATED, "damaged or compressed"), (zipfile.ZIP_STORED, "expected 400")):
        path = tmp_path / "it.pt"
        with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(path, "w") as archive:
            for name in source.namelist():
                content = source.read(name)
                is_data = name.endswith("data/0")
                archive.writestr(name, content[:-8] if is_data else content, how if is_data else zipfile.ZIP_STORED)
        with pytest.raises(CheckpointError, match=message):
            load_torch_file(path)


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"it\.pt: missing"):
        load_torch_file(tmp_path / "it.pt")
    (tmp_path / "it.pt").mkdir()
    with pytest.raises(CheckpointError, match=r"it\.pt: a folder"):
        load_torch_file(tmp_path / "it.pt")


@pytest.mark.parametrize("form", ["raw", "raw, many", "resharded, legacy", "numpy"])
def test_damage_anywhere_ends_in_an_error_that_names_the_checkpoint(form: str, tmp_path: Path) -> None:
    source = write(tmp_path / "source", opt_model(), form)
    files, refused, cases = sorted(source.iterdir()), 0, 12 if "many" in form else 40
    for seed in range(cases):
        chance = random.Random(seed)
        path = chance.choice(files)
        whole = path.read_bytes()
        path.write_bytes(mutate_bytes(chance, whole))
        try:
            opt = read_opt(LocalFiles(Folder(source)), None)
            assert opt is not None and opt.fields["hidden_size"] == SHAPE.config["hidden_size"]
        except TieredError as error:
            refused += 1
            assert isinstance(error, CheckpointError | ReadError), (seed, error)
            assert source.name in str(error), (seed, error)
        path.write_bytes(whole)
    assert refused > cases // 3
