"""Where the shapes, machines and workloads that ship with the package lie.

In: nothing. Out: the folder `configs` with its `models`, `hardware` and `workloads`. Called by whoever
takes a configuration by name. A wheel carries the folder inside the package, a checkout beside it.
"""

from pathlib import Path

from tiered.errors import ConfigError


def config_dir() -> Path:
    """The folder `configs` of this installation; raises ConfigError where neither place has one."""
    return first_config_dir(Path(__file__).parent)


def first_config_dir(package: Path) -> Path:
    """The folder `configs` in the package folder `package`, or else beside it."""
    candidates = (package / "configs", package.parent / "configs")
    for candidate in candidates:
        if (candidate / "models").is_dir():
            return candidate
    looked = " and ".join(str(candidate) for candidate in candidates)
    raise ConfigError(f"configs: expected a folder with 'models' at {looked}, found none; reinstall the package tiered")
