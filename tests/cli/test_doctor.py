"""`tiered doctor`: looks at everything, wherever it is pointed, and never fails."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tiered.cli.doctor import command
from tiered.cli.findings import Examination, Fact
from tiered.convert import ConvertOptions, convert_checkpoint
from tiered.io import probe_mode
from tiered.plan import hardware as machine
from tiered.plan import memory_limits

SHM = Path("/dev/shm")


def doctor(*arguments: str | Path) -> str:
    result = CliRunner().invoke(command, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def doctor_json(*arguments: str | Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(doctor(*arguments, "--json"))
    return found


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("doctor") / "tiny.tiered"
    convert_checkpoint("tiny-opt", path, ConvertOptions(synthetic=True))
    return path


def test_every_section_is_there(tmp_path: Path) -> None:
    text = doctor(tmp_path)
    lines = text.splitlines()
    for title in ("software", "cpu", "kernels", "memory", "cgroups", "disk", "gpu", "switched off", "warnings"):
        assert title in lines
    assert "probe failed" not in text
    assert "torch reference; native kernels are not part of this version" in text
    assert "this version computes on the CPU only" in text


def test_figures_are_the_libraries(tmp_path: Path) -> None:
    found = doctor_json(tmp_path)
    assert set(found["memory"]["limits"]) == {limit.name for limit in memory_limits()}
    assert found["memory"]["binding_limit"] in found["memory"]["limits"]
    assert found["memory"]["MemTotal"] == machine.meminfo("MemTotal")
    assert found["cpu"]["features"] == list(machine.cpu().features)
    assert found["gpu"]["used"] is False


def test_each_switched_off_feature_is_told_once_with_a_remedy(tmp_path: Path) -> None:
    off = doctor_json(tmp_path)["switched_off"]
    names = [item["feature"] for item in off]
    assert {"native linear kernels", "GPU"} <= set(names)
    assert len(names) == len(set(names))
    assert all(item["why"] and item["turn_on"] for item in off)


def test_a_folder_is_probed_without_a_trace(tmp_path: Path) -> None:
    found = doctor_json(tmp_path)["disk"]
    sample = tmp_path / "sample"
    sample.write_bytes(bytes(4096))
    assert found["read_mode"] == probe_mode(sample).mode.value
    assert found["is_a_store"] is False
    assert found["bandwidth"] is None
    assert [path.name for path in tmp_path.iterdir()] == ["sample"]


def test_a_store_is_measured(store: Path) -> None:
    before = sorted((path, path.stat().st_mtime_ns) for path in store.rglob("*"))
    found = doctor_json(store)["disk"]
    assert found["is_a_store"] is True
    assert found["bandwidth"] > 0
    assert sorted((path, path.stat().st_mtime_ns) for path in store.rglob("*")) == before


def test_a_disk_test_cleans_up(tmp_path: Path) -> None:
    found = doctor_json(tmp_path, "--disk-test")["disk"]
    assert found["write_bandwidth"] > 0 and found["read_bandwidth"] > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not SHM.is_dir(), reason="no /dev/shm here")
def test_memory_file_systems_are_recognized() -> None:
    found = doctor_json(SHM)
    assert found["disk"]["file_system"] == "tmpfs"
    assert found["disk"]["device"] is None
    assert any("lies in memory" in warning for warning in found["warnings"])


@pytest.mark.parametrize("path", ["/proc", "/nonexistent/folder", "/etc/hostname", "/"])
def test_odd_paths_are_no_reason_to_fail(path: str) -> None:
    assert doctor(path).splitlines()[0] == "software"


def test_a_probe_that_fails_says_why() -> None:
    def broken(found: Examination) -> Iterable[Fact]:
        yield Fact("first", "fine", 1)
        raise OSError(5, "Input/output error")

    found = Examination()
    found.add("disk", broken)
    found.add("gpu", lambda _: [Fact("used", "no", False)])
    assert found.to_json()["disk"]["first"] == 1
    assert "Input/output error" in found.to_json()["disk"]["disk_probe_failed"]["error"]
    assert found.to_json()["gpu"] == {"used": False}
