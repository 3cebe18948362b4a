"""Sizes and durations between people and numbers: "8GiB" <-> bytes, 93.2 -> "1 min 33 s"."""

import re
from decimal import Decimal
from typing import Final

from tiered.errors import ConfigError

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30
PAGE: Final = 4096
"""Alignment of file offsets, lengths and memory for O_DIRECT."""
PAGE_TOKENS: Final = 64
"""Tokens in a page of the KV cache."""

_SIZE = re.compile(r"^\s*(\d+(?:\.\d*)?|\.\d+)\s*(?:([kmgt])(i?))?(b?)\s*$", re.IGNORECASE)
_POWERS: Final = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def parse_size(text: str) -> int:
    """Bytes meant by `text`: "8GiB" and "8G" are 8 * 2**30, "8GB" is 8 * 10**9, "4096" is bytes.

    Raises ConfigError where `text` is no size or is not positive.
    """
    match = _SIZE.match(text)
    if match is None:
        raise ConfigError(f"size {text!r}: expected a number with a unit, such as 8GiB, 8G, 512MiB or 8GB")
    number, prefix, binary, byte = match.groups()
    # "8G" follows the convention of memory sizes (ulimit, java, docker): binary; only "8GB" is decimal.
    base = 1000 if byte and prefix and not binary else 1024
    # As a Decimal, exactly: a float has too few digits for some numbers of bytes and cannot hold others at all.
    nbytes = int(Decimal(number) * base ** _POWERS[(prefix or "").lower()])
    if nbytes <= 0:
        raise ConfigError(f"size {text!r}: expected more than zero bytes")
    return nbytes


def parse_option(option: str, text: str, or_none: bool = False) -> int:
    """Bytes meant by the value `text` of a command's `option`, which ConfigError names where it is none; with `or_none`
    "0" is one, too."""
    if or_none and text.strip() == "0":
        return 0
    try:
        return parse_size(text)
    except ConfigError as error:
        raise ConfigError(f"{option}: {error}") from None


def format_size(nbytes: float) -> str:
    """`nbytes` with a binary unit and three significant digits, such as "1.98 GiB"."""
    for unit, divisor in (("TiB", 1 << 40), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(nbytes) >= divisor:
            value = nbytes / divisor
            return f"{value:.0f} {unit}" if abs(value) >= 999.5 else f"{value:.3g} {unit}"
    return f"{int(nbytes)} B"


def format_budget(nbytes: int) -> str:
    """The smallest whole-MiB size that is at least `nbytes`, as an option's value: "413MiB"."""
    return f"{-(-nbytes // MIB)}MiB"


def format_rate(bytes_per_second: float) -> str:
    """Decimal GB/s, as disks are sold: "1.87 GB/s"; or "4.20 MB/s" where that would be next to nothing."""
    units = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
    unit, divisor = next((one for one in units if bytes_per_second >= one[1] / 100), units[-1])
    return f"{bytes_per_second / divisor:.2f} {unit}/s"


def format_seconds(seconds: float) -> str:
    """A duration a person reads at a glance: "840 ms", "12.3 s", "4 min 10 s", "2 h 05 min"."""
    if seconds < 0.9995:
        return f"{seconds * 1e3:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def round_up(value: int, multiple: int) -> int:
    """The least multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple


def round_down(value: int, multiple: int) -> int:
    """The greatest multiple of `multiple` that is at most `value`."""
    return value // multiple * multiple
