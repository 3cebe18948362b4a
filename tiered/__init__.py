"""tiered: run language models that do not fit in memory, at the speed of the disk.

import tiered

with tiered.load("opt-6.7b.tiered", ram="4GiB") as loaded:
    ...
"""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tiered.api import LoadedModel, load
    from tiered.errors import TieredError

# Idle OpenMP threads of torch would spin for milliseconds after each operator, on the processors that the native
# kernels and the readers need. OpenMP looks once, when it is loaded: before torch is imported, that is.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

__all__ = ["LoadedModel", "TieredError", "load"]


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import; `tiered --help` needs neither.
    if name == "TieredError":
        from tiered.errors import TieredError

        return TieredError
    if name in ("load", "LoadedModel"):
        from tiered.process import importing

        with importing(is_command=False):
            import tiered.api

        return getattr(tiered.api, name)
    raise AttributeError(f"module 'tiered' has no attribute {name!r}")
