"""tiered: run language models that do not fit in memory, at the speed of the disk.

import tiered

with tiered.load("opt-6.7b.tiered", ram="4GiB") as loaded:
    ...
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tiered.api import LoadedModel, load
    from tiered.errors import TieredError

__all__ = ["LoadedModel", "TieredError", "load"]


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import; `tiered --help` needs neither.
    if name == "TieredError":
        from tiered.errors import TieredError

        return TieredError
    if name in ("load", "LoadedModel"):
        import tiered.api

        return getattr(tiered.api, name)
    raise AttributeError(f"module 'tiered' has no attribute {name!r}")
