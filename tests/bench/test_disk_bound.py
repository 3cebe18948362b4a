"""The largest batch that the disk bounds is looked for with the KV cache where the setting has it."""

from pathlib import Path
from typing import Any

import pytest

from tests.commands import make_store
from tests.plan.plans import model_of
from tests.plan.test_strategies import MACHINE
from tiered.bench import disk_bound
from tiered.bench.workload import Setting
from tiered.errors import ConfigError
from tiered.options import Options
from tiered.plan import Machine


@pytest.mark.parametrize("kv", ["cpu", "disk", "auto"])
def test_the_kv_cache_lies_where_the_setting_has_it(kv: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Options] = []

    def stop(store: Any, options: Options) -> None:
        asked.append(options)
        raise ConfigError("enough seen")

    monkeypatch.setattr(disk_bound, "measure_inputs", stop)
    with pytest.raises(ConfigError, match="enough seen"):
        disk_bound.largest_disk_bound(make_store(tmp_path, "int4"), Setting(kv=kv, kv_bits="8", ram="1GiB"))
    assert (asked[0].kv, asked[0].kv_bits, asked[0].ram) == (kv, 8, 1 << 30)


def test_plans_are_those_of_the_process_that_will_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = Machine(12345, native_steps=False, device_scratch_nbytes=67)
    asked: list[Machine] = []

    def stop(shape: Any, machine: Machine, *_: Any) -> None:
        asked.append(machine)
        raise ConfigError("enough seen")

    monkeypatch.setattr(disk_bound, "measure_inputs", lambda *_: (model_of(), process, None))
    monkeypatch.setattr(disk_bound, "quick_hardware", lambda *_: MACHINE)
    monkeypatch.setattr(disk_bound, "make_plan", stop)
    with pytest.raises(ConfigError, match="enough seen"):
        disk_bound.largest_disk_bound(make_store(tmp_path, "int4"), Setting(ram="1GiB", threads=1))
    assert asked[0].with_memory_of(process) == asked[0] and asked[0].linear is not None
