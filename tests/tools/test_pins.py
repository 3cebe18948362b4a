"""What pyproject.toml promises is what the two constraints files pin, and the tool keeps it so."""

import re
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tools import pins


def pinned(end: str) -> dict[str, Version]:
    found = pins.read_pins(pins.FILES[end].read_text(encoding="utf-8"))
    return {canonicalize_name(name): Version(version) for name, version in found.items()}


def required() -> dict[str, Requirement]:
    found = map(Requirement, pins.read_project()["dependencies"])
    return {canonicalize_name(requirement.name): requirement for requirement in found}


def test_every_requirement_has_a_lower_and_an_upper_end() -> None:
    for requirement in required().values():
        assert sorted(specifier.operator for specifier in requirement.specifier) == ["<", ">="], requirement


def test_the_lower_ends_are_the_lowest_pins() -> None:
    for name, requirement in required().items():
        (lower,) = (Version(s.version) for s in requirement.specifier if s.operator == ">=")
        assert pinned("lowest")[name] == lower


def test_the_newest_pins_are_within_the_ranges_and_the_upper_ends_directly_above() -> None:
    for name, requirement in required().items():
        newest = pinned("newest")[name]
        assert newest in requirement.specifier
        (upper,) = (Version(s.version) for s in requirement.specifier if s.operator == "<")
        # The next release, by the parts of a version that the upper end names.
        parts = len(upper.release)
        assert upper.release == (*newest.release[: parts - 1], newest.release[parts - 1] + 1), name


def test_both_files_have_the_same_torch_and_transformers_is_bounded_by_what_was_tested() -> None:
    assert pinned("newest")["torch"] == pinned("lowest")["torch"]
    for name in ("torch", "transformers"):
        (upper,) = (s.version for s in required()[name].specifier if s.operator == "<")
        assert re.fullmatch(r"\d+\.\d+", upper), "minor releases of these break programs"


def test_the_tests_run_on_a_triton_that_the_extra_for_gpus_allows() -> None:
    extras = {
        name: list(map(Requirement, asked)) for name, asked in pins.read_project()["optional-dependencies"].items()
    }
    (allowed,) = extras["gpu"]
    assert pinned("newest")[allowed.name] in allowed.specifier


def test_lower_ends_become_pins() -> None:
    assert pins.lower_ends(["a>=1.2,<2", "b_c>=3"]) == ["a==1.2", "b_c==3"]


def test_new_pins_keep_the_header_and_are_sorted() -> None:
    text = "# one\n# two\nold==1\n"
    written = pins.with_pins(text, {"b": "2", "A": "1.0"})
    assert written == "# one\n# two\nA==1.0\nb==2\n"
    assert pins.read_pins(written) == {"A": "1.0", "b": "2"}


def test_the_tool_resolves_for_the_end_that_is_asked_for(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {end: tmp_path / end for end in pins.FILES}
    calls = []

    def resolve(asked: list[str], held: list[str]) -> dict[str, str]:
        calls.append((asked, held))
        return {"torch": "9.0"}

    monkeypatch.setattr(pins, "FILES", files)
    monkeypatch.setattr(pins, "resolve", resolve)
    for end, chosen in (("newest", []), ("newest", ["torch==9.0"]), ("lowest", [])):
        files[end].write_text("# header\ntorch==2.13.0\ntriton==3.7.1\nclick==8.5.1\n")
        monkeypatch.setattr("sys.argv", ["pins.py", end, *chosen])
        pins.main()
        assert files[end].read_text() == "# header\ntorch==9.0\n"
    (newest, held), (_, chosen), (lowest, low) = calls
    assert held == ["torch==2.13.0", "triton==3.7.1"] and chosen == ["triton==3.7.1", "torch==9.0"]
    assert any(name.startswith("pytest") for name in newest) and not any(name.startswith("pytest") for name in lowest)
    assert len(low) == len(lowest) and all("==" in pin for pin in low)
