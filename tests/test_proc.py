"""Reading /proc: this process's memory, and what a kernel may leave out."""

from pathlib import Path

import pytest

import tiered.proc as module
from tiered.proc import keyed_kib, process_peak_rss_bytes, process_rss_bytes
from tiered.units import MIB


def test_this_process_has_memory() -> None:
    assert 10 * MIB < process_rss_bytes() <= process_peak_rss_bytes()


def test_a_field_is_found_by_its_whole_name(tmp_path: Path) -> None:
    path = tmp_path / "status"
    path.write_text("RssAnonymous:\t 5 kB\nRssAnon:\t  7 kB\n")
    assert keyed_kib(path, "RssAnon") == 7
    with pytest.raises(KeyError, match="has no VmRSS"):
        keyed_kib(path, "VmRSS")


def test_without_a_peak_the_present_size_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "status"
    path.write_text("VmRSS:\t  3 kB\n")
    monkeypatch.setattr(module, "keyed_kib", lambda _, key: keyed_kib(path, key))
    assert process_peak_rss_bytes() == 3 * 1024
