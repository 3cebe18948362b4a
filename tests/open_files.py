"""Which files this process has open: threads of other tests, and of pytest itself, open and close some of theirs."""

import contextlib
from pathlib import Path


def open_below(folder: Path) -> list[str]:
    """The paths of those below `folder`, deleted ones among them, sorted."""
    found = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile, as is that of this listing
            found.append(str(descriptor.readlink()))
    return sorted(path for path in found if path.startswith(f"{folder.resolve()}/"))
