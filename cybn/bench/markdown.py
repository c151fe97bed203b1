"""The tables of a run in Markdown, and putting them into pages.

A page says where a block goes and what it is called::

    <!-- bench: bars -->
    whatever stands here is replaced
    <!-- end of bench -->

A file that does not exist yet gets every block, with its marks, one after the other.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from . import BenchError
from .results import Results
from .tables import BLOCKS, Grid

__all__ = ["check_page", "render", "write_page"]

_START = re.compile(r"^<!-- bench: (.+) -->$", re.M)  # marks are lines of their own
_MARKED = re.compile(r"^(<!-- bench: (.+) -->\n)((?:.*\n)*?)(<!-- end of bench -->)$", re.M)


def check_page(path: Path) -> None:
    """Find out before a long run whether a page can be written.

    Raises
    ------
    BenchError
        If the page has no marks, or one of an unknown block, or one without an end, or no folder.
    """
    if not path.exists():
        if not path.parent.is_dir():
            raise BenchError(f"{path.parent}, where {path.name} would go, is no folder")
        return
    text = path.read_text(encoding="utf-8")
    names = _START.findall(text)
    if not names:
        raise BenchError(
            f"{path} has no place for tables; put <!-- bench: NAME --> and <!-- end of bench --> "
            f"on lines of their own, where NAME is one of {', '.join(BLOCKS)}"
        )
    for name in names:
        if name not in BLOCKS:
            raise BenchError(f"{path} asks for {name!r}; there are {', '.join(BLOCKS)}")
    if names != [found[2] for found in _MARKED.finditer(text)]:
        raise BenchError(f"{path} has a <!-- bench: NAME --> without its <!-- end of bench -->")


def write_page(results: Results, path: Path) -> None:
    """Fill the marked places of a page, or write a new one with all blocks.

    Parameters
    ----------
    results : Results
        Of one machine.
    path : Path
        The page.
    """
    check_page(path)
    if path.exists():
        text = path.read_text(encoding="utf-8")
    else:
        places = [f"<!-- bench: {name} -->\n<!-- end of bench -->\n" for name in BLOCKS]
        text = "# Figures of one run of `cybn bench`\n\n" + "\n".join(places)

    def filled(found: re.Match[str]) -> str:
        return f"{found[1]}\n{render(BLOCKS[found[2]](results))}\n{found[4]}"

    path.write_text(_MARKED.sub(filled, text), encoding="utf-8")


def render(grids: Sequence[Grid]) -> str:
    """Return tables in Markdown, each under its title."""
    return "\n".join(_one(grid) for grid in grids) or "Not measured in this run.\n"


def _one(grid: Grid) -> str:
    left = grid.words
    rule = ["---" if i < left else "---:" for i in range(len(grid.heads))]
    rows = [grid.heads, rule, *grid.rows]
    body = "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
    return "\n\n".join(filter(None, [grid.title, body])) + "\n"
