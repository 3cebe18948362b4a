"""`tools/test --quick`: what a change runs first, and what it leaves to the whole run. tests/conftest.py installs it.

Tests marked `slow` are left out: others stand for them. Those marked `inputs(path, ...)` compile, begin processes by
the dozen, or are many of one thing that little else touches; they run only where something below their paths, or their
own file, is not as it was when they last passed here (before that: as in the commit that is checked out). Hypothesis
tries a fifth of its examples in tests that leave their number to the profile, or to `examples`.
"""

import hashlib
import subprocess
from collections.abc import Container, Iterable
from functools import cache
from pathlib import Path
from typing import Any, Final

import pytest
from _pytest.mark import ParameterSet
from hypothesis import HealthCheck, settings

ROOT: Final = Path(__file__).parent.parent
_PASSED: Final = "tiered/inputs"
"""In pytest's cache: per test, the digest of its inputs when it last passed."""

_USUAL: Final = settings.get_profile("default").max_examples
# How long an example takes says nothing here: other workers, and whatever else runs, take the processors.
settings.register_profile("whole", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("quick", settings.get_profile("whole"), max_examples=_USUAL // 5)
settings.load_profile("whole")


def examples(count: int, *suppressed: HealthCheck) -> settings:
    """Settings for so many examples in the whole run, without these checks of Hypothesis."""
    now = settings.default or settings.get_profile("default")
    checks = [*now.suppress_health_check, *suppressed]
    return settings(now, max_examples=max(5, count * now.max_examples // _USUAL), suppress_health_check=checks)


ONE_FORM: Final = pytest.mark.inputs(
    *("tiered/convert", "tiered/quant", "tiered/store", "tiered/arch", "tiered/kernels"),
    *("tests/convert", "tests/tiny.py", "tests/tiny_configs.py", "constraints.txt"),
)
"""For tests of one form of checkpoint, or of where one comes from: what all have in common is tested beside them."""


def represented(values: Iterable[Any], by: Container[Any]) -> list[ParameterSet]:
    """Values of a parameter (tuples: of several) of which --quick leaves out all that are not in `by`."""
    return [
        pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=() if value in by else pytest.mark.slow)
        for value in values
    ]


class Quick:
    """Which tests run, in which order, and what is remembered of those that passed."""

    def __init__(self, config: pytest.Config) -> None:
        self._config, self._cache = config, getattr(config, "cache", None)  # with -p no:cacheprovider there is none
        self._is_quick: bool = config.getoption("--quick")
        self._passed: dict[str, str] = {}
        self._unchanged: dict[str, list[pytest.Item]] = {}
        """By the reason why they are not run."""
        if self._is_quick:
            settings.load_profile("quick")

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        # Files with what takes longest come first, so that no worker is left alone with it at the end.
        dear = {item.path for item in items if item.get_closest_marker("slow") or item.get_closest_marker("inputs")}
        items.sort(key=lambda item: item.path not in dear)
        left_out = {item: None for item in items if self._is_quick and item.get_closest_marker("slow")}
        before: dict[str, str] = self._cache.get(_PASSED, {}) if self._cache else {}
        for item in items:
            if item not in left_out and (marker := item.get_closest_marker("inputs")):
                self._look_at_inputs(item, (*marker.args, str(item.path.relative_to(ROOT))), before)
        # One of all that have one reason says it: each that is skipped would cost what a short test does.
        for same in self._unchanged.values():
            left_out |= dict.fromkeys(same[1:])
        if left_out:
            items[:] = [item for item in items if item not in left_out]
            self._config.hook.pytest_deselected(items=list(left_out))

    def _look_at_inputs(self, item: pytest.Item, paths: tuple[str, ...], before: dict[str, str]) -> None:
        # Properties reach the process that reports, where no test is collected if others run them.
        item.user_properties.append((_PASSED, _digest(paths)))
        known = before.get(item.nodeid)
        if self._is_quick and (_is_as_committed(paths) if known is None else known == _digest(paths)):
            self._unchanged.setdefault(", ".join(paths), []).append(item)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        for paths, (first, *others) in self._unchanged.items():
            if item is first:
                pytest.skip(f"with {len(others)} more, as when they passed: {paths}")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        digest = dict(report.user_properties).get(_PASSED)
        if report.when == "call" and report.passed and digest is not None:
            self._passed[report.nodeid] = str(digest)

    def pytest_sessionfinish(self) -> None:
        if self._passed and self._cache and not hasattr(self._config, "workerinput"):
            self._cache.set(_PASSED, {**self._cache.get(_PASSED, {}), **self._passed})


@cache
def _digest(paths: tuple[str, ...]) -> str:
    """Of every file below `paths`, which are relative to the checkout."""
    found = hashlib.sha256()
    for path in sorted(file for name in paths for file in _files(ROOT / name)):
        found.update(f"{path.relative_to(ROOT)}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return found.hexdigest()


def _files(path: Path) -> list[Path]:
    """`path`, or what is below it and not made from other files."""
    if not path.is_dir():
        return [path]
    return [file for file in path.rglob("*") if file.is_file() and file.suffix not in (".pyc", ".so", ".refusal")]


@cache
def _is_as_committed(paths: tuple[str, ...]) -> bool:
    command = ["git", "status", "--porcelain", "--", *paths]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    return done.returncode == 0 and not done.stdout
