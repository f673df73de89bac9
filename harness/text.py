"""Words in columns and sizes, for the tables that a person reads on a terminal. Free of torch."""

import math
from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]], rule: bool = False) -> str:
    """Rows of words in columns two spaces apart, one row a line; with ``rule`` a line of dashes under the first.

    A row may have fewer words than the first. Its last word may be long: it widens no column.
    """
    columns = range(len(rows[0]))
    widths = [max((len(row[place]) for row in rows if place < len(row) - 1), default=0) for place in columns]
    if rule:
        widths[-1] = max(len(row[-1]) for row in rows if len(row) == len(widths))
        rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    padded = ([*map(str.ljust, row[:-1], widths), row[-1]] for row in rows)
    return "\n".join("  ".join(row).rstrip() for row in padded)


def human(nbytes: float) -> str:
    """Bytes as people write them, in powers of 1000."""
    if nbytes < 1000:
        return f"{nbytes:.0f} bytes"
    power = min(4, int(math.log10(nbytes)) // 3)
    return f"{nbytes / 1000**power:.3g} {('kB', 'MB', 'GB', 'TB')[power - 1]}"
