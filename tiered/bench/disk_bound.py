"""The most sequences at once whose decode pass is still bound by the disk, of those whose KV cache fits.

    python -m tiered.bench.disk_bound STORE '{"prompt_tokens": 512, "new_tokens": 32, "ram": "4GiB"}'

In: a store and a setting's values as JSON. Out: the number. Disk and processor are measured, which loads torch, so
`runs.py` calls it as a process of its own.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Final

import click

from tiered.bench.quick import quick_hardware
from tiered.bench.workload import Setting
from tiered.errors import BudgetError, TieredError
from tiered.kernels import Kernels, Mode
from tiered.plan import MAX_BATCHED_TOKENS, Workload, cpu_count, make_plan, parse_bits
from tiered.plan.batch_size import candidates
from tiered.plan.predict import predict
from tiered.plan.strategies import machine_for
from tiered.prepare import measure_inputs
from tiered.runtime import Options
from tiered.store import Store
from tiered.units import parse_size

MOST_SEQUENCES: Final = 256


def largest_disk_bound(path: Path, setting: Setting) -> int:
    """The most sequences whose decode pass is expected to take longer to read than to compute; at least 1."""
    store, mode = Store.open(path), Mode(setting.kernel_mode)
    ram = None if setting.budget is None else parse_size(setting.budget)
    options = Options(ram=ram, kernel_mode=mode, kv=setting.kv, kv_bits=parse_bits(setting.kv_bits))
    shape, unmeasured, budgets = measure_inputs(store, options)
    with Kernels(setting.threads or cpu_count(), mode=mode, name=setting.kernels) as kernels:
        hardware = quick_hardware(path, (shape,), True, kernels)
    machine = machine_for(shape, hardware, mode.value).with_memory_of(unmeasured)
    longest = setting.prompt_tokens + max(2, setting.new_tokens)  # so that there is a pass that decodes
    workload = Workload(1, longest, setting.prompt_tokens, max_batched_tokens=MAX_BATCHED_TOKENS)
    best = 1
    for count in candidates(MOST_SEQUENCES):
        try:
            plan = make_plan(shape, machine, replace(workload, sequences=count), budgets)
        except BudgetError:
            break
        # All prompts in one pass, so that all decode in all others.
        at_once = replace(plan, max_batched_tokens=count * setting.prompt_tokens)
        expected = predict(at_once, shape, machine, replace(workload, sequences=count)).decode
        click.echo(f"batch {count}: {expected.of_a_pass}", err=True)
        if expected.bottleneck != "disk":
            break
        best = count
    return best


def main() -> int:
    """Command line; returns the exit status."""
    path, asked = sys.argv[1:]
    try:
        click.echo(largest_disk_bound(Path(path), Setting(**json.loads(asked))))
    except TieredError as error:
        click.echo(f"tiered: {error}", err=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
