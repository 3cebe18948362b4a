"""Runs that nobody made: reports and what the kernel would say of them."""

from typing import Any

from tiered.bench.facts import Machine, StoreFacts
from tiered.bench.limit import Report
from tiered.bench.runs import Run
from tiered.bench.workload import Setting

STORE = StoreFacts("opt-13b int4-g64", 7 << 30, 12_853_000_000, True, 4)
MACHINE = Machine("2 cores (made up), Linux 6", "8 GiB", "ext4 on vda", "tiered 0", False)


def report(**changed: Any) -> dict[str, Any]:
    """100 prompt tokens in 2 s, 9 more of 10 in 3 s; keys of `tiered generate --json` that a table needs."""
    usual = {
        **{"prompt_tokens": 100, "generated_tokens": 10, "prefill_seconds": 2.0, "prefill_bound_seconds": 1.5},
        **{"decode_seconds": 3.0, "tokens_per_second": 3.0, "seconds_per_pass": 1 / 3, "disk_bandwidth": 2e9},
        **{"bound_seconds_per_pass": 0.3, "raw_disk_bandwidth": 2.5e9, "bytes_read": 7_000_000_000},
        **{"kv_bytes_read": 600_000_000, "kv_bytes_written": 400_000_000, "bottleneck": "disk"},
        **{"kernels": "avx512, invariant, 2 threads", "read_mode": "O_DIRECT"},
    }
    return {**usual, **changed}


def usage(exit_code: int = 0, **changed: Any) -> Report:
    """What the kernel says."""
    usual: dict[str, Any] = {
        **{"command": ["tiered"], "method": "cgroup v1 (/sys/fs)", "limited": True, "limit_bytes": 1 << 30},
        **{"exit_code": exit_code, "interrupted": False, "seconds": 9.0, "vm_hwm_bytes": 690 << 20},
        **{"max_rss_bytes": 700 << 20, "cgroup_peak_bytes": 800 << 20, "limit_hits": 0, "oom_kills": 0},
    }
    return Report(**{**usual, **changed})


_USUAL = report()


def run(
    setting: Setting = Setting(prompt_tokens=100, new_tokens=10),  # noqa: B008
    seed: int = 1,
    report: dict[str, Any] | None = _USUAL,
    usage: Report = usage(),  # noqa: B008
) -> Run:
    """A run, which failed where `report` is None."""
    return Run(setting, seed, "tiered generate opt-13b.tiered", report, usage)
