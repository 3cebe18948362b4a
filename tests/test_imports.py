"""Imports point only to a lower rank: walks the AST of every module of the package.

A module may import from a lower rank, from its own top-level package, and `tiered.errors` from anywhere.
Imports inside functions and under TYPE_CHECKING count. `tiered/__init__.py` and `tiered/__main__.py`,
which only gather names for users, are exempt.
"""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

import tiered.errors

RANKS: Final = {
    "configs_path": 0,
    "errors": 0,
    "files": 0,
    "proc": 0,
    "units": 0,
    "process": 1,
    "trace": 1,
    "plan": 1,
    "quant": 1,
    "outcome": 2,
    "kernels": 2,
    "device": 2,
    "store": 2,
    "arch": 2,
    "io": 3,
    "convert": 3,
    "cache": 3,
    "stream": 5,
    "model": 6,
    "generate": 7,
    "options": 7,
    "host": 7,
    "memory": 8,
    "prepare": 8,
    "shapes": 8,
    "opening": 9,
    "runtime": 10,
    "offloaded": 11,
    "bench": 11,
    "jobs": 11,
    "serve": 11,
    "api": 12,
    "cli": 12,
}
# Data that ships with the package, no module.
NO_MODULES: Final = {"configs", "__pycache__"}
EXEMPT: Final = {"__init__", "__main__"}


def violations(package: Path) -> list[str]:
    """One line for each import in `package` that its rank does not allow, and for each unranked module."""
    found = [
        f"{package.name}/{name}: has no rank; give it a rank in tests/test_imports.py and docs/design.md"
        for name in sorted(top_level_modules(package) - set(RANKS))
    ]
    for path in sorted(package.rglob("*.py")):
        owner = path.relative_to(package).with_suffix("").parts[0]
        if owner not in RANKS:
            continue
        for line, target in imports(path, package):
            if target in RANKS and not allowed(owner, target):
                where = path.relative_to(package.parent)
                found.append(
                    f"{where}:{line}: {owner} (rank {RANKS[owner]}) imports {target} (rank {RANKS[target]}); "
                    "a module may import only from a lower rank"
                )
    return found


def allowed(owner: str, target: str) -> bool:
    return target in (owner, "errors") or RANKS[target] < RANKS[owner]


def top_level_modules(package: Path) -> set[str]:
    """Names right under `package` that Python code can be imported from."""
    files = {path.stem for path in package.glob("*.py")}
    folders = {path.parent.name for path in package.glob("*/*.py")}
    return files.union(folders) - EXEMPT - NO_MODULES


def imports(path: Path, package: Path) -> Iterator[tuple[int, str]]:
    """Line and top-level module of each import in `path` from `package` itself."""
    inside = [package.name, *path.relative_to(package).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # One dot means the module's own package, each further dot one package up.
            above = inside[: len(inside) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            # `from tiered import store` names the module in the alias, any other form in the base.
            names = [f"{base}.{alias.name}" if base == package.name else base for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == package.name and len(parts) > 1:
                yield node.lineno, parts[1]


def test_imports_point_to_lower_ranks() -> None:
    found = violations(Path(tiered.errors.__file__).parent)
    assert not found, "\n" + "\n".join(found)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    folder = tmp_path / "tiered"
    (folder / "store").mkdir(parents=True)
    (folder / "__init__.py").write_text("from tiered.cli import main\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    "source",
    [
        "import tiered.stream.loop",
        "from tiered.stream import loop",
        "from tiered import stream",
        "from ..stream import loop",
        "from .. import stream",
        "def late() -> None:\n    from tiered.stream import loop",
        "if TYPE_CHECKING:\n    from tiered.stream import loop",
    ],
)
def test_an_import_from_a_higher_rank_is_caught(package: Path, source: str) -> None:
    (package / "store" / "open.py").write_text(source, encoding="utf-8")
    (found,) = violations(package)
    line = source.count("\n") + 1
    assert found.startswith(f"tiered/store/open.py:{line}: store (rank 2) imports stream (rank 5)")


def test_an_import_from_the_same_rank_is_caught(package: Path) -> None:
    (package / "store" / "open.py").write_text("import tiered.kernels", encoding="utf-8")
    (found,) = violations(package)
    assert "store (rank 2) imports kernels (rank 2)" in found


@pytest.mark.parametrize(
    "source",
    [
        "from tiered.quant import schemes",
        "from . import manifest",
        "import tiered.store.manifest",
        "import os",
    ],
)
def test_lower_ranks_and_the_own_package_are_allowed(package: Path, source: str) -> None:
    (package / "store" / "open.py").write_text(source, encoding="utf-8")
    assert violations(package) == []


def test_errors_may_be_imported_from_rank_zero(package: Path) -> None:
    (package / "units.py").write_text("from tiered.errors import ConfigError", encoding="utf-8")
    assert violations(package) == []


def test_a_module_without_a_rank_asks_for_one(package: Path) -> None:
    (package / "novel.py").touch()
    (found,) = violations(package)
    assert found.startswith("tiered/novel: ")
    assert "give it a rank in tests/test_imports.py and docs/design.md" in found
