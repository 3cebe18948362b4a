"""A checkpoint's files on the hub. (Being written.)"""

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol


class Ledger(Protocol):
    @property
    def downloaded(self) -> frozenset[str]: ...

    def enter_download(self, name: str) -> None: ...


class HubFiles:
    kind = "hub"

    def __init__(self, repo_id: str, revision: str | None, ledger: Ledger, *, delete: bool) -> None:
        raise NotImplementedError

    name = ""
    revision: str | None = None
    names: frozenset[str] = frozenset()

    def nbytes(self, name: str) -> int | None: ...

    def is_here(self, name: str) -> bool: ...

    def path(self, name: str) -> Path: ...

    def release(self, name: str) -> None: ...

    def fingerprint(self, names: Iterable[str]) -> str: ...
