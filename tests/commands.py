"""Running `tiered` as a user does: in a process of its own, or, where only its answer matters, in this one."""

import contextlib
import io
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from unittest import mock

from tests.shared import made_once
from tiered.cli import main
from tiered.convert import ConvertOptions, convert_checkpoint
from tiered.plan.hardware import Hardware

ROOT: Final = Path(__file__).parent.parent
CHECKPOINT: Final = ROOT / "tests/data/models/opt-docs-8m"
TIERED: Final[tuple[str | Path, ...]] = (sys.executable, "-m", "tiered")
LIMIT: Final[tuple[str | Path, ...]] = (sys.executable, str(ROOT / "tools/limit.py"))


_MIXTURE: Final = """
name = "tiny-mixture"
[config]
model_type = "qwen3_moe"
vocab_size = 512
hidden_size = 256
moe_intermediate_size = 512
num_hidden_layers = 4
num_attention_heads = 8
num_key_value_heads = 4
head_dim = 32
num_experts = 32
num_experts_per_tok = 2
max_position_embeddings = 1024
"""
"""27 MiB in 4 bits, nearly all of them experts."""


SLOW_TOKENS: Final = Hardware.from_toml(
    """
    name = "machine"
    source = "made up"
    ram = 64e9
    [disk]
    read = 2e9
    write = 1e9
    [cpu]
    cores = 1
    memory = 50e9
    flops = 1e8
    [gpu]
    name = "emulated"
    vram = 16e9
    host_to_device = 12e9
    device_to_host = 12e9
    memory = 16e6
    flops = 1e13
    """,
    "machine",
)
"""A machine with one thread and an emulated device, to which a prompt is a trifle and a single token is not."""


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str


class TerminalInput(io.StringIO):
    """Standard input that is somebody's keyboard."""

    def isatty(self) -> bool:
        return True


def run_here(*words: str | Path, stdin: io.TextIOBase | str = "") -> Done:
    """The command in this process: spares the seconds that importing torch takes."""
    out, err = io.StringIO(), io.StringIO()
    source = io.TextIOWrapper(io.BytesIO(stdin.encode()), encoding="utf-8") if isinstance(stdin, str) else stdin
    with (
        mock.patch.multiple(sys, argv=["tiered", *map(str, words)], stdin=source),
        # However long it takes here: a line on the way would come among what the command has to say.
        mock.patch("tiered.cli.screen._LINE_SECONDS", math.inf),
        mock.patch.dict(os.environ),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as ended:
            assert isinstance(ended.code, int)
            return Done(ended.code, out.getvalue(), err.getvalue())


def run_apart(words: Sequence[str | Path], seconds: float = 100) -> Done:
    """Any command in a process of its own, with nothing on standard input."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        list(map(str, words)),
        capture_output=True,
        encoding="utf-8",
        stdin=subprocess.DEVNULL,
        timeout=seconds,
        env=environment,
        check=False,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def make_mixture() -> Path:
    """A store of a mixture of experts with random weights, which nobody changes."""

    def make(path: Path) -> None:
        shape = path.with_suffix(".toml")
        shape.write_text(_MIXTURE, encoding="utf-8")
        convert_checkpoint(str(shape), path, ConvertOptions(quant="int4", synthetic=True, compress="none"))

    return made_once("mixture-int4.tiered", make)


def make_store(folder: Path, quant: str = "none", name: str = "opt-docs-8m.tiered") -> Path:
    """The trained checkpoint as a store in `folder`, where it may be changed."""
    # Whether compression pays depends on how fast the disk is just now.
    options = ConvertOptions(quant=quant, compress="none")
    made = made_once(f"opt-docs-8m-{quant}.tiered", lambda path: convert_checkpoint(CHECKPOINT, path, options))
    return Path(shutil.copytree(made, folder / name))


def copy_store(store: Path, folder: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(store, folder / "copy.tiered"))


def smallest_ram(message: str) -> str:
    """The budget that a refusal names, as `--ram` takes it."""
    assert "The smallest budget that works is --ram " in message, message
    return message.partition("The smallest budget that works is --ram ")[2].split()[0].rstrip(";")
