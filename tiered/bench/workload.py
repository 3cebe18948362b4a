"""What a benchmark runs: the files of configs/workloads, and the settings that they or a command line stand for.

In: a name in configs/workloads, or a TOML file. Out: parts; a part stands for every combination of its values, each of
which is a `Setting`. Called by `tiered bench` and tools/bench_workload.py. Imports no torch.

    shape = "opt-13b"            # optional: the synthetic model that it is meant for
    quant = "int4"               # optional, of that model; and so is distinct_blocks
    [[part]]
    name = "a"
    prompt_tokens = 512          # every value may be a list: then all combinations run
    new_tokens = 32
    batch = [1, 8]               # or "disk-bound": the most sequences for which the disk is still what bounds a pass
    memory = ["4GiB", "8GiB"]    # optional: limits that the kernel enforces
"""

import itertools
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final

from tiered.configs_path import config_dir
from tiered.errors import ConfigError, CorruptError
from tiered.files import MOST_JSON_NBYTES, read_whole
from tiered.plan import KVTier
from tiered.units import MIB, parse_size

SPARE: Final = 128 * MIB
"""What a limit leaves above the budget, where only the limit is given."""
DISK_BOUND: Final = "disk-bound"
CHOICES: Final = {
    "compress": ("none", "planes"),
    "kernels": ("auto", "torch", "scalar", "avx2", "avx512", "amx"),
    "kernel_mode": ("invariant", "fast"),
    "kv": ("auto", "cpu", "disk"),
    "kv_bits": ("16", "8", "4", "auto"),
}
_QUANTS: Final = ("int4", "int8", "none")
_MOST: Final = {"batch": 1 << 16, "prompt_tokens": 1 << 24, "new_tokens": 1 << 24, "threads": 4096}
_MOST_DISTINCT: Final = 500


@dataclass(frozen=True)
class Setting:
    """One combination of values: what runs of `tiered generate` are told. None: its own default."""

    part: str = ""
    memory: str | None = None
    """Limit of the process, page cache included, as it is written."""
    ram: str | None = None
    """Budget, as it is written."""
    compress: str = "none"
    """Of a synthetic store."""
    batch: int | str = 1
    prompt_tokens: int = 512
    new_tokens: int = 32
    kernels: str = "auto"
    kernel_mode: str = "invariant"
    kv: KVTier = "auto"
    kv_bits: str = "16"
    threads: int | None = None

    def __post_init__(self) -> None:
        limit = self.limit_bytes
        if limit is not None and limit <= SPARE:
            raise ConfigError(f"memory {self.memory}: expected more than {SPARE // MIB}MiB, which no model fits in")
        if limit is not None and self.ram is not None and parse_size(self.ram) > limit:
            raise ConfigError(
                f"ram {self.ram} with memory {self.memory}: a process that uses its budget would be killed; "
                "lower the budget or raise the limit"
            )

    @property
    def limit_bytes(self) -> int | None:
        """The limit in bytes."""
        return None if self.memory is None else parse_size(self.memory)

    @property
    def budget(self) -> str | None:
        """The budget as `--ram` takes it: the one given, else what the limit leaves."""
        limit = self.limit_bytes
        if self.ram is not None or limit is None:
            return self.ram
        return f"{(limit - SPARE) // MIB}MiB"

    @property
    def values(self) -> dict[str, Any]:
        """What runs are told, by axis; without the part's name."""
        return {axis: getattr(self, axis) for axis in AXES}


AXES: Final = tuple(one.name for one in fields(Setting) if one.name != "part")
"""What may have several values."""


@dataclass(frozen=True)
class Part:
    """Values by axis; an axis that is not there has the default of `Setting`."""

    name: str = ""
    values: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def settings(self) -> Iterator[Setting]:
        """Every combination, the last axis fastest."""
        for combination in itertools.product(*self.values.values()):
            yield Setting(self.name, **dict(zip(self.values, combination, strict=True)))

    def with_values(self, values: Mapping[str, tuple[Any, ...]]) -> "Part":
        """A part in which `values` replace those of the same axes."""
        return Part(self.name, {**self.values, **values})


@dataclass(frozen=True)
class BenchWorkload:
    """A file of configs/workloads."""

    name: str
    parts: tuple[Part, ...]
    shape: str | None = None
    quant: str = "int4"
    distinct_blocks: int | None = None


def load_workload(named: str) -> BenchWorkload:
    """The workload of that name in configs/workloads, or in the file `named`; raises ConfigError."""
    folder = config_dir() / "workloads"
    is_file = named.endswith(".toml") or "/" in named
    path = Path(named) if is_file else folder / f"{named}.toml"
    if not is_file and not path.is_file():
        names = ", ".join(sorted(found.stem for found in folder.glob("*.toml")))
        raise ConfigError(f"workload {named!r}: there is none of this name; there are {names}; or name a .toml file")
    try:
        table = tomllib.loads(read_whole(path, CorruptError, MOST_JSON_NBYTES).decode("utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file; name one, or one of configs/workloads") from None
    except CorruptError as error:
        raise ConfigError(str(error)) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: expected TOML: {error}") from None
    return parse_workload(table, str(path), path.stem)


def parse_workload(table: Mapping[str, Any], where: str, name: str) -> BenchWorkload:
    """A workload from what its file holds; `where` names it in errors. Raises ConfigError."""
    _check_keys(table, ("shape", "quant", "distinct_blocks", "part"), where)
    entries = table.get("part")
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError(f"{where}: expected one or more tables [[part]], found {entries!r}")
    parts = tuple(_part(entry, f"{where}, part {number}") for number, entry in enumerate(entries, 1))
    names = [part.name for part in parts]
    if repeated := next((one for one in names if names.count(one) > 1), None):
        raise ConfigError(f"{where}: several parts are named {repeated!r}; give each a name of its own")
    quant = table.get("quant", "int4")
    if quant not in _QUANTS:
        raise ConfigError(f"{where}: quant = {quant!r}, expected one of {', '.join(_QUANTS)}")
    shape = table.get("shape")
    if shape is not None and (not isinstance(shape, str) or not shape):
        raise ConfigError(f"{where}: shape = {shape!r}, expected a name in configs/models or a .toml file")
    distinct = table.get("distinct_blocks")
    if distinct is not None:
        _check_number("distinct_blocks", distinct, _MOST_DISTINCT, where)
    return BenchWorkload(name, parts, shape, quant, distinct)


def _part(entry: Mapping[str, Any], where: str) -> Part:
    _check_keys(entry, ("name", *AXES), where)
    name = entry.get("name")
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{where}: name = {name!r}, expected a text")
    for key in ("batch", "prompt_tokens", "new_tokens"):
        if key not in entry:
            raise ConfigError(f"{where}: has no {key!r}, expected a number or a list of them")
    values: dict[str, tuple[Any, ...]] = {}
    for axis in AXES:
        if axis in entry:
            found = entry[axis] if isinstance(entry[axis], list) else [entry[axis]]
            values[axis] = checked(axis, found, where)
    part = Part(name, values)
    try:
        list(part.settings())
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    return part


def checked(axis: str, found: list[Any], where: str) -> tuple[Any, ...]:
    """The values of an axis; `where` names them in errors. Raises ConfigError."""
    if not found:
        raise ConfigError(f"{where}: {axis} = [], expected at least one value")
    for value in found:
        if axis in CHOICES and value not in CHOICES[axis]:
            raise ConfigError(f"{where}: {axis} = {value!r}, expected one of {', '.join(CHOICES[axis])}")
        if axis in _MOST and not (axis == "batch" and value == DISK_BOUND):
            _check_number(axis, value, _MOST[axis], where)
        if axis in ("memory", "ram"):
            if not isinstance(value, str):
                raise ConfigError(f'{where}: {axis} = {value!r}, expected a size in quotes, such as "4GiB"')
            try:
                parse_size(value)
            except ConfigError as error:
                raise ConfigError(f"{where}: {axis}: {error}") from None
        if found.count(value) > 1:
            raise ConfigError(f"{where}: {axis} has {value!r} more than once; repetitions are --repeat")
    return tuple(found)


def _check_number(key: str, value: Any, most: int, where: str) -> None:
    if type(value) is not int or not 1 <= value <= most:
        also = f', or "{DISK_BOUND}"' if key == "batch" else ""
        raise ConfigError(f"{where}: {key} = {value!r}, expected a whole number from 1 to {most}{also}")


def _check_keys(table: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    if unknown := sorted(set(table) - set(known)):
        raise ConfigError(f"{where}: unknown {', '.join(map(repr, unknown))}; known are {', '.join(known)}")
