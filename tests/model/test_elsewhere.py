"""No family leaves a tensor at the host where all others are at another torch device, nor waits for a number of it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from tests.tiny_configs import LENGTH_DEPENDENT, TINY
from tiered.arch import FAMILIES

ROOT: Final = Path(__file__).parents[2]
BY_LIST: Final = "index with a list, which a device without numbers cannot make a tensor of"
BY_CHOICE: Final = "have code of their own for experts, which asks for the choices' numbers"
BY_LENGTH: Final = "frequencies depend on where texts end, which are numbers"
BY_TIME: Final = "scans take long without numbers, too: two others with recurrent layers stand for it"
UNTRIED: Final = {
    "falcon": BY_LIST,
    "falcon-new": BY_LIST,
    "dbrx": BY_CHOICE,
    "jetmoe": BY_CHOICE,
    **dict.fromkeys(LENGTH_DEPENDENT, BY_LENGTH),
    **{
        name: BY_TIME
        for name, fields in TINY.items()
        if FAMILIES[fields.get("model_type", name)].scan is not None and name not in ("qwen3_next", "falcon_h1")
    },
}
"""Models that cannot be tried without numbers, and why."""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_family_computes_with_all_its_tensors_elsewhere() -> None:
    names = [name for name in TINY | LENGTH_DEPENDENT if name not in UNTRIED]
    # A process of its own, as the device can be set up only once.
    command = [sys.executable, "-m", "tests.model.elsewhere", *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    found = dict(json.loads(line) for line in done.stdout.splitlines())
    # Or else nothing would be found of the others either.
    assert found.pop("gptj, left").partition(":")[0] == "FakeTensorDeviceMismatchError"
    assert found == dict.fromkeys(names)
