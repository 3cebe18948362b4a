"""Move the pins: resolve the requirements of pyproject.toml anew, and write a constraints file.

    python tools/pins.py newest                      constraints.txt: the newest releases within the ranges
    python tools/pins.py newest torch==2.14.0 triton==3.8.0
                                                     with some of them chosen; these two are else left as they are
    python tools/pins.py lowest                      constraints-lowest.txt: the lower ends of the ranges

To take a new release of transformers: raise the upper end of its range, run this, then `tools/test`. To give an old
one up, or take one back in: move the lower end, run this, then `tools/test --lowest`. Needs the package index.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parent.parent
FILES: Final = {"newest": ROOT / "constraints.txt", "lowest": ROOT / "constraints-lowest.txt"}
HELD: Final = ("torch", "triton")
"""Not moved unless asked to: builds differ, and take gigabytes; and each torch has a Triton that it is made with."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Resolve the requirements anew and write the pins.")
    parser.add_argument("end", choices=FILES, help="of the ranges in pyproject.toml")
    parser.add_argument("chosen", nargs="*", metavar="NAME==VERSION", help="pins to hold to")
    arguments = parser.parse_args()
    path, project = FILES[arguments.end], read_project()
    old = read_pins(path.read_text(encoding="utf-8"))
    asked = requirements(project, arguments.end)
    if arguments.end == "lowest":
        held = lower_ends(asked)
    else:
        held = [f"{name}=={version}" for name, version in old.items() if name in HELD]
    names = {name_of(pin) for pin in arguments.chosen}
    new = resolve(asked, [pin for pin in held if name_of(pin) not in names] + arguments.chosen)
    path.write_text(with_pins(path.read_text(encoding="utf-8"), new), encoding="utf-8")
    for name in sorted(old.keys() | new.keys(), key=str.lower):
        if old.get(name) != new.get(name):
            print(f"{name}  {old.get(name, 'not pinned')} -> {new.get(name, 'not needed')}")


def read_project() -> dict[str, Any]:
    """The table [project] of pyproject.toml."""
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project


def requirements(project: Mapping[str, Any], end: str) -> list[str]:
    """What to resolve; the programs that only check the code are pinned for "newest" alone."""
    return [*project["dependencies"], *(project["optional-dependencies"]["dev"] if end == "newest" else [])]


def lower_ends(asked: Sequence[str]) -> list[str]:
    """Pins at the lower end of each range."""
    return [re.sub(r">=([\w.]+).*", r"==\1", requirement) for requirement in asked]


def name_of(pin: str) -> str:
    return pin.partition("==")[0]


def read_pins(text: str) -> dict[str, str]:
    """Versions by name in the text of a constraints file."""
    lines = (line.strip().partition("==") for line in text.splitlines())
    return {name: version for name, equals, version in lines if equals and not name.startswith("#")}


def with_pins(text: str, pins: Mapping[str, str]) -> str:
    """The text of a constraints file with other pins below its header."""
    header = [line for line in text.splitlines() if line.startswith("#")]
    return "\n".join([*header, *(f"{name}=={pins[name]}" for name in sorted(pins, key=str.lower))]) + "\n"


def resolve(asked: Sequence[str], held: Sequence[str]) -> dict[str, str]:
    """The versions that pip would install for `asked` into an empty environment, with the pins `held`."""
    with tempfile.TemporaryDirectory() as folder:
        constraints, report = Path(folder) / "constraints.txt", Path(folder) / "report.json"
        constraints.write_text("\n".join(held) + "\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
        command += ["--disable-pip-version-check", "--report", str(report), "-c", str(constraints), *asked]
        done = subprocess.run(command, check=False)
        if done.returncode:
            sys.exit(f"pins: pip finds no versions that go together (exit status {done.returncode}); see above")
        found = [item["metadata"] for item in json.loads(report.read_text(encoding="utf-8"))["install"]]
    # A local build tag (2.13.0+cpu) satisfies the pin without it.
    return {metadata["name"]: metadata["version"].partition("+")[0] for metadata in found}


if __name__ == "__main__":
    main()
