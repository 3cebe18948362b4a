"""What can only be checked on a real device, in less than ten minutes, without a network: tools/gpu-check.

    tools/gpu-check                     all parts
    tools/gpu-check --parts bus,tiers   some of them

It needs torch with CUDA, triton and the packages of pyproject.toml; what is missing is named first. Each part is a
process of its own, prints as it goes, and is ended where it takes too long; one that fails hides none of the others.
At the end a table says what passed, in Markdown, for docs/benchmarks/gpu.md.

    facts    the device, driver, versions
    kernels  int4 and int8 against float64, few rows and many, the same bits alone and in a batch; GB/s; prompts'
             attention by fused kernels and by our own
    bus      copies from registered memory beside copies from memory that torch has pinned, in both directions
    tests    the tests that run on an emulated device elsewhere, here on this one: pytest -m gpu
    tiers    greedy tokens of a small model over tiers and places of the KV cache, beside those of the processor; with
             hidden states that wait in memory, and memory that goes back while the processor decodes
    streams  a model larger than the device's budget: seconds per pass beside bytes over the measured bandwidth of the
             bus, and of the disk where the host's memory is short, too
"""

import argparse
import importlib
import importlib.util
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tools.checks import say

NEEDED: Final = (
    *("torch", "triton", "transformers", "safetensors", "tokenizers", "huggingface_hub", "accelerate", "click"),
    *("numpy", "psutil", "sentencepiece", "tomli_w", "xxhash", "zstandard", "pytest"),
)
SECONDS: Final = {"facts": 30, "kernels": 110, "bus": 40, "tests": 140, "tiers": 100, "streams": 150}
"""How long each part may take: all together less than ten minutes, whatever hangs."""
PARTS: Final = {
    **dict.fromkeys(("facts", "tests"), "tools.gpu_check"),
    **dict.fromkeys(("kernels", "bus"), "tools.gpu_rates"),
    **dict.fromkeys(("tiers", "streams"), "tools.gpu_runs"),
}
"""Where the function of each part is. What it needs is imported in its own process."""


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(SECONDS), help="comma-separated (default: all)")
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()), help="where stores go")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run is not None:
        return function_of(arguments.run)(arguments.dir)
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        say(f"not installed: {', '.join(missing)}; parts that need them will fail")
    wanted = arguments.parts.split(",")
    if unknown := set(wanted) - set(SECONDS):
        parser.error(f"unknown parts {', '.join(sorted(unknown))}; known: {', '.join(SECONDS)}")
    results = [run_part(name, arguments.dir) for name in wanted]
    print("\n| part | result | seconds |\n|---|---|---|")
    for result in results:
        print(f"| {result.name} | {result.verdict} | {result.seconds:.0f} |")
    return 0 if all(result.verdict == "passed" for result in results) else 1


@dataclass(frozen=True)
class Result:
    """How a part ended."""

    name: str
    verdict: str
    seconds: float


def function_of(name: str) -> Callable[[Path], int]:
    """What does a part, and returns how many checks have failed."""
    part: Callable[[Path], int] = getattr(importlib.import_module(PARTS[name]), name)
    return part


def run_part(name: str, folder: Path) -> Result:
    """Run a part as a process of its own."""
    print(f"\n## {name}\n", flush=True)
    start = time.monotonic()
    command = [sys.executable, "-u", "-m", "tools.gpu_check", "--run", name, "--dir", str(folder)]
    try:
        code = subprocess.run(command, timeout=SECONDS[name], check=False).returncode
        verdict = "passed" if code == 0 else f"failed ({code})"
    except subprocess.TimeoutExpired:
        verdict = f"ended after {SECONDS[name]} s"
    return Result(name, verdict, time.monotonic() - start)


def facts(folder: Path) -> int:
    """What there is."""
    import torch

    say(f"torch {torch.__version__}, CUDA {torch.version.cuda}")
    from tiered.device import open_device

    device = open_device("cuda", None)
    say(f"{device.name}: {device.description}; {device.context_nbytes / 2**20:.0f} MiB of context")
    device.close()
    return subprocess.run([sys.executable, "-m", "tiered", "doctor"], check=False).returncode


def tests(folder: Path) -> int:
    """The suite's own tests of devices, on this one."""
    words = ("-m", "gpu", "-q", "-p", "no:cacheprovider", "--basetemp", str(folder / "t"))
    return subprocess.run([sys.executable, "-m", "pytest", *words], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
