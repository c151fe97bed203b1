"""The tables for a page: plain words and numbers, in blocks that have names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .bars import HEADS, row
from .claims import Side, lines
from .floors import FLOOR
from .plans import BAR_THREADS
from .ratios import best, compare, comparisons
from .results import Case, Record, Results
from .shapes import TINY
from .task import FIRST, FRESH, LAST, REUSED

__all__ = ["BLOCKS", "Grid"]


@dataclass
class Grid:
    """A table: the first `words` columns are words, the others numbers."""

    title: str
    heads: list[str]
    rows: list[list[str]]
    words: int = 1


class Column(NamedTuple):
    """A column of a table of times: whose, and as what."""

    head: str
    side: Callable[[Record], bool]
    speed: bool = False  # GB/s in place of a time


NAMES = {"forward": "Training forward", "inference": "Inference", "backward": "Backward"}
LAYER = "Through a layer, training forward"


def columns(operation: str, threads: int, layout: str = FIRST) -> list[Column]:
    """Return the columns of an operation in one layout, cybn's first."""

    def side(peer: str, layout: str | None = layout, output: str | None = None) -> Side:
        return Side(peer, layout, output, threads)

    copy = "`np.add`" if operation == "backward" else "`np.copyto`"
    mine = side("cybn", layout, REUSED)
    blocked = Column("oneDNN, its best", side("oneDNN", None))
    return [
        Column(copy, side(FLOOR, None)),
        Column("cybn", mine),
        Column("GB/s", mine, speed=True),
        Column("cybn, fresh", side("cybn", layout, FRESH)),
        Column("PyTorch, fresh", side("PyTorch", layout, FRESH)),
        Column("PyTorch, `out=`", side("PyTorch", layout, REUSED)),
        blocked if layout == FIRST else Column("oneDNN", side("oneDNN")),
        Column("JAX", side("JAX")),
        Column("ONNX Runtime", side("ONNX Runtime")),
        Column("NumPy", side("NumPy")),
    ]


def compact(operation: str, threads: int) -> list[Column]:
    """Return fewer columns, in which the others come with their best layout."""

    def side(peer: str, layout: str | None = None, output: str | None = None) -> Side:
        return Side(peer, layout, output, threads)

    return [
        Column("`np.add`" if operation == "backward" else "`np.copyto`", side(FLOOR)),
        Column("cybn", side("cybn", FIRST, REUSED)),
        Column("cybn, channels-last", side("cybn", LAST, REUSED)),
        *(Column(n, side(n)) for n in ("PyTorch", "oneDNN", "JAX", "ONNX Runtime", "NumPy")),
    ]


def times(
    title: str,
    records: Sequence[Record],
    chosen: Sequence[Column],
    *,
    factor: float = 1e3,
    in_full: bool = False,
) -> list[Grid]:
    """Return a table of times, a shape a row; columns in which nothing was measured are left out.

    Parameters
    ----------
    title : str
        What stands above it.
    records : sequence of Record
        Of one operation, dtype and number of threads.
    chosen : sequence of Column
        The columns.
    factor : float
        1e3 for milliseconds, 1e6 for microseconds.
    in_full : bool
        Whether a row says N too, with all sizes channels-first.
    """
    shapes = {record.shape: "x".join(map(str, record.sizes)) for record in records}
    found = [(column, best(records, column.side)) for column in chosen]
    found = [(column, by_shape) for column, by_shape in found if by_shape]
    rows = [
        [
            sizes if in_full else shape,
            *(_cell(by_shape.get(shape), column, factor) for column, by_shape in found),
        ]
        for shape, sizes in shapes.items()
    ]
    heads = ["shape", *(column.head for column, _ in found)]
    return [Grid(title, heads, rows)] if found and rows else []


def number(value: float) -> str:
    """Return three digits, without an exponent."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 else f"{value:.4f}"


def _cell(record: Record | None, column: Column, factor: float) -> str:
    if record is None or not record.seconds:
        return "-"
    if column.speed:
        return f"{record.least_bytes / record.seconds / 1e9:.0f}"
    return number(record.seconds * factor)


# ---- the blocks ----------------------------------------------------------------------------------


def machine(results: Results) -> list[Grid]:
    """Return what the figures depend on."""
    everything = {**results.machine, **results.peers, "times": results.settings["shown"]}
    return [Grid("", ["", "this run"], [[n, str(v)] for n, v in everything.items()], words=2)]


def bars(results: Results) -> list[Grid]:
    """Return every bar with its figure and verdict."""
    rows = [row(line) for line in lines(results)]
    order = [0, 1, 4, 2, 3, 5, 6]  # words first
    return [Grid("", [HEADS[i] for i in order], [[r[i] for i in order] for r in rows], words=3)]


def missed(results: Results) -> list[Grid]:
    """Return the shapes that miss a bar that each has to meet."""
    rows = [
        [line.bar.name, shape, f"{figure:.3f}"]
        for line in lines(results)
        for shape, figure in line.offenders
    ]
    return [Grid("", ["bar", "shape", "figure"], rows, words=2)] if rows else []


def network(results: Results, layout: str, dtype: str, threads: int, heading: str) -> list[Grid]:
    """Return the times of ResNet-50's layers in milliseconds, a table for each operation."""
    grids = []
    for operation, name in NAMES.items():
        records = results.of(Case("resnet50", operation, dtype, threads))
        grids += times(f"{heading} {name}", records, columns(operation, threads, layout))
    return grids


def one_table(operation: str) -> Callable[[Results], list[Grid]]:
    """Return the block of one operation on ResNet-50's layers, channels-first."""

    def block(results: Results) -> list[Grid]:
        records = results.of(Case("resnet50", operation, "float32", BAR_THREADS))
        return times("", records, columns(operation, BAR_THREADS))

    return block


def ratios(results: Results) -> list[Grid]:
    """Return cybn's time over everybody's on ResNet-50."""
    rows = []
    for operation, name in NAMES.items():
        records = results.of(Case("resnet50", operation, "float32", BAR_THREADS))
        for found in comparisons(records, results.settings["last-level cache"]):
            shape, worst = found.worst
            rows.append([name.lower(), found.name, f"{found.mean:.3f}", f"{worst:.3f}", shape])
    heads = ["operation", "time / time", "geometric mean", "worst", "on"]
    return [Grid("", heads, rows, words=2)] if rows else []


def groups(results: Results) -> list[Grid]:
    """Return the other groups of shapes, in few columns: a table for each operation."""
    grids = []
    for operation, name in NAMES.items():
        case = Case("", operation, "float32", BAR_THREADS)
        records = [
            record
            for record in results.records
            if record.case._replace(group="") == case and record.group not in ("resnet50", TINY)
        ]
        grids += times(f"### {name}", records, compact(operation, BAR_THREADS), in_full=True)
    return grids


def summary(results: Results) -> list[Grid]:
    """Return cybn's time over PyTorch's best, a group a row, an operation and dtype a column."""
    kinds = [(o, d) for d in ("float32", "float64") for o in NAMES]
    rows = []
    for group in dict.fromkeys(record.group for record in results.records):
        threads = 1 if group == TINY else BAR_THREADS
        pair = Side("cybn", FIRST, REUSED, threads), Side("PyTorch", threads=threads)
        found = [compare("", results.of(Case(group, *kind, threads)), *pair) for kind in kinds]
        if any(found):
            rows.append([group, *(f"{f.mean:.2f}" if f else "-" for f in found)])
    heads = ["geometric mean", *(f"{operation}, {dtype}" for operation, dtype in kinds)]
    return [Grid("", heads, rows)] if rows else []


def tiny(results: Results) -> list[Grid]:
    """Return the small calls on one thread in microseconds."""
    grids = []
    for operation, name in (NAMES | {"layer": LAYER}).items():
        records = results.of(Case(TINY, operation, "float32", 1))
        chosen = [column for column in columns(operation, 1) if not column.speed]
        grids += times(f"### {name}", records, chosen, factor=1e6)
    return grids


def memory(results: Results) -> list[Grid]:
    """Return the memory that a training forward takes, in KiB."""
    rows = [
        [f"{p.shape} {p.layout}", *(f"{v / 1024:.0f}" for v in (p.traced, p.touched, p.allowed))]
        for p in results.memory
    ]
    heads = ["training forward, out=", "Python and NumPy", "whole process", "allowed"]
    return [Grid("", heads, rows)] if rows else []


BLOCKS: dict[str, Callable[[Results], list[Grid]]] = {
    "machine": machine,
    "bars": bars,
    "missed": missed,
    **{f"resnet50 {operation}": one_table(operation) for operation in NAMES},
    "resnet50 channels-last": lambda r: network(r, LAST, "float32", BAR_THREADS, "###"),
    "resnet50 one thread": lambda r: network(r, FIRST, "float32", 1, "###"),
    "resnet50 float64": lambda r: network(r, FIRST, "float64", BAR_THREADS, "###"),
    "ratios": ratios,
    "summary": summary,
    "groups": groups,
    "tiny": tiny,
    "memory": memory,
}
