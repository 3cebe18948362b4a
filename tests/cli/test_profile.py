"""`tiered profile`: shows what was measured, keeps it, draws it; what cannot be kept is refused before measuring."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from tests.commands import Done, make_store, run_here
from tiered.cli import profile as command
from tiered.plan import ComputeRate
from tiered.plan.hardware import AttendedRate, GpuRates, Hardware
from tiered.plan.machines import find_profile, load_hardware, profile_path


@dataclass
class Measuring:
    """Stands for a minute of measurements."""

    found: Hardware
    calls: list[tuple[Path, list[Path], int]] = field(default_factory=list)
    error: BaseException | None = None

    def measure(self, folder: Path, files: Sequence[Path], threads: int, say: Any) -> Hardware:
        say("measuring")
        self.calls.append((folder, list(files), threads))
        if self.error is not None:
            raise self.error
        return self.found


@pytest.fixture
def measuring(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Measuring:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    measuring = Measuring(load_hardware("t4-208gb"))
    monkeypatch.setattr(command, "measure_hardware", measuring.measure)
    return measuring


def ended_well(*words: str | Path) -> Done:
    done = run_here("profile", *words)
    assert done.code == 0, done.err
    return done


def test_the_current_folder_is_measured_shown_and_kept(measuring: Measuring) -> None:
    out = ended_well("--threads", "3").out
    ((folder, files, threads),) = measuring.calls
    assert (folder.resolve(), files, threads) == (Path.cwd(), [], 3)
    assert find_profile(Path()) == measuring.found
    assert str(profile_path(Path())) in out
    for text in ("2.00 GB/s  read in file order", "64.00 GB/s", "16 bits", "NVIDIA T4", "26.0 TFLOP/s"):
        assert text in out
    assert list(Path.cwd().iterdir()) == []


def test_attention_is_shown_by_bits_and_by_queries_that_share_a_key(measuring: Measuring) -> None:
    rate = ComputeRate((1, 4), (1e-10, 2e-10))
    cpu = replace(measuring.found.cpu, quantize=5e8, attended=(AttendedRate(16, rate), AttendedRate(4, rate)))
    measuring.found = replace(measuring.found, cpu=cpu)
    out = ended_well().out
    table = [line.split() for line in out.partition("queries to a key")[2].splitlines()[:3]]
    assert table == [["16", "bits", "4", "bits"], ["1", "10.00", "10.00"], ["4", "5.00", "5.00"]]
    assert "0.50 GB/s  of new keys and values quantized" in out


def test_a_stores_files_are_read(measuring: Measuring, tmp_path: Path) -> None:
    store = make_store(tmp_path, "int4")
    ended_well(store)
    ((folder, files, _),) = measuring.calls
    assert folder == store and files and all(file.is_relative_to(store) for file in files)


def test_what_is_no_store_is_refused(measuring: Measuring, tmp_path: Path) -> None:
    assert run_here("profile", tmp_path).code == 4
    assert run_here("profile", tmp_path, "--dir", tmp_path).code == 2
    assert measuring.calls == []


def test_a_program_gets_the_tables(measuring: Measuring) -> None:
    found = json.loads(ended_well("--json").out)
    assert found.pop("profile") == str(profile_path(Path()))
    assert found == measuring.found.to_tables()


def test_a_profile_can_go_elsewhere(measuring: Measuring, tmp_path: Path) -> None:
    done = ended_well("-o", "mine.toml", "--dir", tmp_path)
    assert load_hardware("mine.toml") == measuring.found and "mine.toml" in done.out
    assert measuring.calls[0][0] == tmp_path
    assert find_profile(tmp_path) is None


@pytest.mark.parametrize(
    "words", [("-o", "gone/mine.toml"), ("--plot", "gone/plot.png"), ("--plot", "plot.xyz"), ("--plot", "plot.gif")]
)
def test_what_cannot_be_written_is_refused_before_measuring(words: tuple[str, str], measuring: Measuring) -> None:
    done = run_here("profile", *words)
    assert done.code == 2 and words[1] in done.err
    assert measuring.calls == []


def test_a_cache_folder_that_cannot_be_written_to_is_told_before_measuring(
    measuring: Measuring, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    done = run_here("profile")
    assert done.code == 2 and "cannot be written: Not a directory; name another file" in done.err
    assert measuring.calls == []


def test_a_missing_matplotlib_is_told_before_measuring(measuring: Measuring, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiered.bench.plot.importlib.util.find_spec", lambda _: None)
    done = run_here("profile", "--plot", "plot.png")
    assert done.code == 2 and "pip install matplotlib" in done.err
    assert measuring.calls == []


def test_an_interruption_keeps_the_old_profile(measuring: Measuring) -> None:
    ended_well()
    path = profile_path(Path())
    before = path.read_bytes()
    measuring.error, measuring.found = KeyboardInterrupt(), load_hardware("epyc-7742")
    assert run_here("profile").code == 130
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_a_disturbed_profile_takes_no_calm_ones_place(measuring: Measuring) -> None:
    calm = measuring.found
    measuring.found = replace(calm, source=f"{calm.source}; other programs took 40% of the processors meanwhile")
    assert "measure again when nothing else does" in ended_well().out
    assert find_profile(Path()) == measuring.found
    measuring.found = calm
    ended_well()
    measuring.found = replace(calm, source=f"{calm.source}; other programs took 40% of the processors meanwhile")
    done = run_here("profile")
    assert done.code == 1 and "read in file order" in done.out and "kept in" not in done.out
    assert "again when nothing else runs, or write to another file with -o" in done.err
    assert find_profile(Path()) == calm
    ended_well("-o", "disturbed.toml")
    assert load_hardware("disturbed.toml") == measuring.found


@pytest.mark.parametrize("name", ["t4-208gb", "vm-small"])
def test_a_plot_is_drawn(name: str, measuring: Measuring) -> None:
    pytest.importorskip("matplotlib")
    measuring.found = load_hardware(name)
    ended_well("--plot", "plot.svg")
    text = Path("plot.svg").read_text(encoding="utf-8")
    assert "<svg" in text and len(text) > 10_000


def test_doctor_tells_of_the_profile_or_how_to_make_one(measuring: Measuring) -> None:
    assert "tiered profile --dir ." in run_here("doctor").out
    ended_well()
    found = json.loads(run_here("doctor", "--json").out)["profile"]
    assert (found["disk_read"], found["source"]) == (measuring.found.disk.read, measuring.found.source)
    profile_path(Path()).write_text("[disk", encoding="utf-8")
    damaged = json.loads(run_here("doctor", "--json").out)
    assert any("measure it again: tiered profile --dir ." in warning for warning in damaged["warnings"])


def test_figures_of_a_gpu_are_shown(measuring: Measuring) -> None:
    lines = "\n".join(command.lines(measuring.found))
    assert isinstance(measuring.found.gpu, GpuRates) and "15 GiB" in lines
    assert "none" in "\n".join(command.lines(load_hardware("epyc-7742")))
