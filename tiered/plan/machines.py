"""Machines by name or path."""

from pathlib import Path

from tiered.plan.hardware import Hardware


def load_hardware(name_or_path: str) -> Hardware:
    """The machine of that file."""
    return Hardware.from_toml(Path(name_or_path).read_text(), name_or_path)


def find_profile(folder: Path) -> Hardware | None:
    """The profile of this machine; None where none has been measured."""
    return None
