"""`tiered doctor`: looks at everything, wherever it is pointed, and never fails."""

import json
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import tiered.kernels.kernels
from tiered.cli import doctor_kernels
from tiered.cli.commands import doctor as command
from tiered.cli.doctor_findings import Examination, Fact
from tiered.cli.doctor_gpu import gpu_facts
from tiered.convert import ConvertOptions, convert_checkpoint
from tiered.io import probe_mode
from tiered.kernels import Level, Library, load_library
from tiered.plan import memory_limits
from tiered.plan import system as machine

pytestmark = pytest.mark.inputs(
    *(f"tiered/{name}" for name in ("bench", "cli", "device", "io", "kernels", "plan", "store"))
)

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


def test_figures_are_the_libraries(tmp_path: Path) -> None:
    found = doctor_json(tmp_path)
    assert set(found["memory"]["limits"]) == {limit.name for limit in memory_limits()}
    assert found["memory"]["binding_limit"] in found["memory"]["limits"]
    assert found["memory"]["MemTotal"] == machine.meminfo("MemTotal")
    assert found["cpu"]["features"] == list(machine.cpu().features)
    assert found["gpu"]["used"] is False


def test_a_gpu_that_is_not_there_is_told_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    found = Examination()
    found.add("gpu", gpu_facts)
    said = found.to_json()
    assert said["gpu"]["used"] is False and said["gpu"]["seen_by_torch"] == 0
    (off,) = [off for off in found.off if off.feature == "GPU"]
    assert off.why and "CUDA device" in off.turn_on
    assert "--device emulated" in next(fact.text for fact in found.sections["gpu"] if fact.label == "used")


def test_a_gpu_is_described_with_what_it_computes_in(monkeypatch: pytest.MonkeyPatch) -> None:
    made = SimpleNamespace(name="Tesla T4", total_memory=15 << 30, major=7, minor=5)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: made)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    found = Examination()
    found.add("gpu", gpu_facts)
    said = found.to_json()["gpu"]
    assert said["cuda:0"] == {"name": "Tesla T4", "memory": 15 << 30, "compute_capability": "7.5"}
    assert said["used"] is True
    assert any("15 GiB, compute capability 7.5, computes in float16" in fact.text for fact in found.sections["gpu"])
    assert said["triton"] is (not [off for off in found.off if off.feature == "Triton kernels"])


def test_each_switched_off_feature_is_told_once_with_a_remedy(tmp_path: Path) -> None:
    off = doctor_json(tmp_path)["switched_off"]
    names = [item["feature"] for item in off]
    assert "GPU" in names
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


def test_the_kernels_in_use_are_named_with_their_library_and_speed(tmp_path: Path) -> None:
    library = load_library()
    if isinstance(library, str):
        pytest.skip(library)
    found = doctor_json(tmp_path)
    kernels, best = found["kernels"], library.best_level()
    assert Path(kernels["library"]).is_file()
    assert kernels["linear"] == doctor_kernels.level_name(best)
    for rows in ("int4_1_row", "int4_64_rows"):
        assert kernels[rows]["bytes_per_second"] > 0
    for level in Level:
        name = doctor_kernels.level_name(level)
        assert kernels[name] is (library.refusal(level) is None)
        off = [item for item in found["switched_off"] if item["feature"].removesuffix(" kernels") == name]
        assert len(off) == (level > best)


def test_without_the_native_library_the_reason_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    why = "libtiered_kernels.so was not built: no C++ compiler"
    monkeypatch.setattr(doctor_kernels, "load_library", lambda: why)
    monkeypatch.setattr(tiered.kernels.kernels, "load_library", lambda: why)
    text = doctor(tmp_path)
    assert f"torch reference; {why}" in text
    assert "install g++ or clang++" in text
    assert "probe failed" not in text
    (off,) = [item for item in doctor_json(tmp_path)["switched_off"] if item["feature"] == "native kernels"]
    assert off["why"] == why


@pytest.mark.parametrize(
    ("refusal", "remedy"),
    [
        ("the processor has no AMX (TILE, BF16)", "a processor"),
        ("the operating system does not save AMX tiles", "an operating system or hypervisor"),
        ("the kernel refuses AMX tiles to this process (Linux 5.16 and arch_prctl are needed)", "Linux 5.16"),
    ],
)
def test_a_better_level_that_is_refused_is_switched_off_once(refusal: str, remedy: str) -> None:
    class Refusing(Library):
        def __init__(self) -> None:
            pass

        def refusal(self, level: Level) -> str | None:
            return refusal if level is Level.AMX else None

    found = Examination()
    facts = {fact.label: fact for fact in doctor_kernels.level_facts(found, Refusing(), Level.AVX512)}
    assert facts["AMX"].text == f"no: {refusal}"
    assert facts["AVX-512"].text == "in use" and facts["AVX2"].text == "can run"
    (off,) = found.off
    assert (off.feature, off.why) == ("AMX kernels", refusal) and remedy in off.turn_on

    told = Examination()
    told.switch_off("AMX", "said by the section on the processor", "that section's remedy")
    assert list(doctor_kernels.level_facts(told, Refusing(), Level.AVX512)) == list(facts.values())
    assert len(told.off) == 1


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
