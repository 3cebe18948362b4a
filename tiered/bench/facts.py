"""What a table needs to know besides its runs: the store, and the machine with its disk.

Both are asked of `tiered inspect --json` and `tiered doctor --json`, processes of their own, as they load torch.
"""

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiered.bench.runs import TIERED
from tiered.errors import TieredError
from tiered.plan import system
from tiered.units import format_rate, format_size


@dataclass(frozen=True)
class StoreFacts:
    """One store."""

    model: str
    """Name and scheme: "opt-13b int4-g64"."""
    nbytes: int
    """Of all blocks, as a run reads them: a synthetic layer that stands for several counts for each of them."""
    parameters: int
    synthetic: bool
    distinct_blocks: int | None
    """Layer files of a synthetic store that repeats them."""

    def line(self) -> str:
        """For people."""
        made = "synthetic weights" if self.synthetic else "converted weights"
        if self.distinct_blocks is not None:
            made += f", {self.distinct_blocks} distinct layers that are read as all of them"
        return f"{self.model}: {format_size(self.nbytes)}, {format_count(self.parameters)} parameters, {made}"


def format_count(parameters: int) -> str:
    """ "12.9 B", "125 M": as models are named."""
    return f"{parameters / 1e9:.3g} B" if parameters >= 0.9995e9 else f"{parameters / 1e6:.3g} M"


@dataclass(frozen=True)
class Machine:
    """Where it was measured."""

    name: str
    """In one line; it goes into every line of results."""
    memory: str
    disk: str
    software: str
    is_memory_disk: bool
    """Whether the store lies in memory."""

    def lines(self) -> dict[str, str]:
        """For people, by what they are about."""
        return {"machine": self.name, "memory": self.memory, "disk": self.disk, "software": self.software}


def machine_name() -> str:
    """Processors and kernel: "2 cores (AMD EPYC), Linux 6.1.0"."""
    cpu = system.cpu()
    return f"{cpu.allowed} cores ({cpu.model}), Linux {platform.release()}"


def store_facts(store: Path) -> StoreFacts:
    """What `tiered inspect` says of `store`; raises TieredError with its exit code's message on standard error."""
    return _store(_asked("inspect", store))


def _store(found: Mapping[str, Any]) -> StoreFacts:
    quantization, source = found["quantization"], str(found["source"].get("name") or found["name"])
    compress = quantization.get("compress", "none")
    scheme = quantization.get("layers") or "16-bit"
    scheme += "" if compress == "none" else f" {compress}"
    model = f"{Path(source).name} {scheme}"
    return StoreFacts(model, found["model_bytes"], found["parameters"], found["synthetic"], found["distinct_blocks"])


def machine_facts(store: Path) -> Machine:
    """What `tiered doctor` says of this machine and of the disk of `store`."""
    return _machine(_asked("doctor", store))


def _machine(found: Mapping[str, Any]) -> Machine:
    software, memory, disk = found["software"], found["memory"], found["disk"]
    kind = {True: "rotating by its own account", False: "not rotating"}.get(disk.get("rotational"), "of unknown kind")
    parts = [f"{disk.get('file_system')} on {disk.get('device') or disk.get('source')}, {kind}"]
    parts.append(f"read with {disk.get('read_mode')}")
    if disk.get("bandwidth"):
        parts.append(f"{format_rate(disk['bandwidth'])} raw before the runs")
    if disk.get("read_ahead"):
        parts.append(f"read ahead {format_size(disk['read_ahead'])}")
    swap = f"swap {format_size(memory['swap'])}" if memory["swap"] else "no swap"
    huge = f"huge pages: {memory['huge_pages']}"
    return Machine(
        machine_name(),
        f"{format_size(memory['MemTotal'])}, {format_size(memory['MemAvailable'])} available; {swap}; {huge}",
        ", ".join(parts),
        ", ".join(f"{name} {software[name]}" for name in ("tiered", "python", "torch", "transformers")),
        disk.get("file_system") in system.MEMORY_FILE_SYSTEMS,
    )


def _asked(command: str, store: Path) -> dict[str, Any]:
    words = [*TIERED, command, str(store), "--json"]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, env=os.environ, check=False)
    if done.returncode:
        raise TieredError(f"{store}: 'tiered {command}' ended with exit status {done.returncode}; it says why above")
    found: dict[str, Any] = json.loads(done.stdout)
    return found
