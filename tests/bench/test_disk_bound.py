"""The largest batch that the disk bounds is looked for with the KV cache where the setting has it."""

from pathlib import Path
from typing import Any

import pytest

from tests.commands import make_store
from tiered.bench import disk_bound
from tiered.bench.workload import Setting
from tiered.errors import ConfigError
from tiered.options import Options


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
