"""What becomes of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def records_of(benchmarks: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the records of a run: who did what, and the median of its turns in seconds."""
    return [
        {**one["extra_info"], "seconds": one["stats"]["median"]}
        for one in benchmarks
        if one["extra_info"].get("group")
    ]


def text_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in plain text."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    lines = [map(str.ljust, row, widths) for row in (heads, *rows)]
    return "".join("  ".join(line).rstrip() + "\n" for line in lines)
