"""Aligned columns of text: the same on a terminal, in a pipe and in a log."""

from collections.abc import Sequence

_GAP = "  "


def columns(rows: Sequence[Sequence[str]], align: str, indent: str = "") -> list[str]:
    """One line per row. `align` has one letter per column: "<" or ">"."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = (
            cell.rjust(width) if side == ">" else cell.ljust(width)
            for cell, width, side in zip(row, widths, align, strict=True)
        )
        lines.append((indent + _GAP.join(cells)).rstrip())
    return lines
