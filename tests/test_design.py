"""What docs/design.md says of the code is so: the path of a token and the modules of its table are there."""

import ast
import re
from pathlib import Path
from typing import Final

import pytest

from tests.test_imports import RANKS, top_level_modules

ROOT: Final = Path(__file__).parents[1]
DESIGN: Final = (ROOT / "docs/design.md").read_text(encoding="utf-8")
PATH: Final = DESIGN[DESIGN.index("### One token") : DESIGN.index("## 4. Modules")]


def functions(path: Path) -> set[str]:
    """The functions of a module, and the methods of its classes as Class.method."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            members = (part for part in node.body if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef))
            found |= {f"{node.name}.{member.name}" for member in members}
    return found


@pytest.mark.parametrize("cell", re.findall(r"^\| \d+\. .* \| (.*) \|$", PATH, re.MULTILINE))
def test_the_path_of_a_token_leads_through_functions_that_exist(cell: str) -> None:
    module, *names = re.findall(r"[\w./]+", cell.replace("`", " "))
    known = functions(ROOT / "tiered" / module.removesuffix(":"))
    assert names and set(names) <= known, (names, module)


def test_a_token_can_be_followed_in_at_most_ten_files() -> None:
    assert 5 < len(re.findall(r"^\| \d+\. ", PATH, re.MULTILINE)) <= 10


def test_every_module_has_a_row() -> None:
    table = DESIGN[DESIGN.index("## 4. Modules") : DESIGN.index("## 5.")]
    listed = {
        name for row in re.findall(r"^\| \d+ \| ([^|]*) \|", table, re.MULTILINE) for name in re.findall(r"\w+", row)
    }
    assert top_level_modules(ROOT / "tiered") - {"__init__", "__main__"} <= listed | {"py"}
    assert set(RANKS) - listed <= {"serve"}
