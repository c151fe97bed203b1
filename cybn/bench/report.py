"""The tables on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from .bars import HEADS, row
from .claims import lines
from .floors import FLOOR
from .ratios import Comparison, comparisons, over_one_thread, summed_over_layers
from .results import Case, Record, Results
from .shapes import TINY
from .task import FIRST, FRESH, LAST, REUSED

__all__ = ["show_bars", "show_machine", "show_results"]

_WIDTH = 132  # of a table at most, where the output is no terminal


def console() -> Console:
    """Return a console wide enough for the tables, whatever the output is."""
    plain = Console()
    return plain if plain.is_terminal and plain.width >= 100 else Console(width=_WIDTH)


def show_machine(results: Results) -> None:
    """Print what the figures depend on."""
    out = console()
    for name, value in (results.machine | results.peers).items():
        out.print(f"{name:23} {value}", highlight=False, markup=False, soft_wrap=True)
    for line in results.missing:
        out.print(line, highlight=False, markup=False)


def show_results(results: Results) -> None:
    """Print a table of times and one of ratios for each case, then what it comes to."""
    out = console()
    out.print(f"\nTimes are the {results.settings['shown']}.", highlight=False)
    for case in results.cases():
        records = results.of(case)
        out.print(times(case, records))
        if case.group != TINY:
            out.print(beside_the_floor(records))
        found = comparisons(records, results.settings["last-level cache"])
        threads = over_one_thread(results, case)
        out.print(ratios([*found, threads] if threads else found))
    for line in resnet50_lines(results):
        out.print(line, highlight=False)
    for line in implementations(results.records):
        out.print(line, highlight=False)
    for record in results.failures():
        what = f"{record.contestant}, {record.operation}, {record.shape}, {record.dtype}"
        out.print(f"not timed: {what}: {record.error}", highlight=False, markup=False)
    sys.stdout.flush()


def show_bars(results: Results) -> None:
    """Print every bar of which something was measured, then the shapes that miss one."""
    out = console()
    found = lines(results)
    table = Table(
        title="Bars: time / time, at most", box=SIMPLE_HEAD, title_justify="left", pad_edge=False
    )
    for head in HEADS:
        number = head in ("figure", "at most", "worst")
        table.add_column(head, justify="right" if number else "left", no_wrap=number)
    for line in found:
        if line.figures:
            style = {"met": "green", "missed": "bold red"}.get(line.verdict, "")
            table.add_row(*row(line), style=style)
    out.print(table)
    for line in found:
        if line.offenders:
            out.print(f"missed: {line.bar.name}", highlight=False)
        for shape, figure in line.offenders:
            out.print(
                f"  {figure:7.3f}{line.bar.unit and ' '}{line.bar.unit}  {shape}", highlight=False
            )
    count = {v: sum(line.verdict == v for line in found) for v in ("met", "missed")}
    rest = sum(bool(line.bar.bound) for line in found) - sum(count.values())
    out.print(
        f"{count['met']} bars met, {count['missed']} missed, {rest} not measured or not in full",
        highlight=False,
    )
    sys.stdout.flush()


def times(case: Case, records: Sequence[Record]) -> Table:
    """Return the time of each contestant (row) on each shape (column)."""
    unit, factor = ("us", 1e6) if case.group == TINY else ("ms", 1e3)
    threads = f"{case.threads} thread{'s' if case.threads > 1 else ''}"
    title = f"{case.group}: {case.operation}, {case.dtype}, {threads}; {unit} for a call"
    table = Table(title=title, box=SIMPLE_HEAD, title_justify="left", pad_edge=False)
    table.add_column("", no_wrap=True)
    shapes = list(dict.fromkeys(record.shape for record in records))
    for shape in shapes:
        table.add_column(shape.replace("x", "\nx", 1), justify="right", no_wrap=True)
    for name in dict.fromkeys(record.contestant for record in records):
        row = {r.shape: r.seconds for r in records if r.contestant == name}
        cells = [_number(row.get(shape), factor) for shape in shapes]
        table.add_row(name, *cells, style="bold" if name.startswith("cybn") else "")
    return table


def beside_the_floor(records: Sequence[Record]) -> Table:
    """Return GB/s of the floor and of cybn, at the least traffic, for each shape."""
    table = Table(title="GB/s at the least traffic", box=SIMPLE_HEAD, title_justify="left")
    names = [f"cybn {layout} {output}" for layout in (FIRST, LAST) for output in (REUSED, FRESH)]
    present = [n for n in (FLOOR, *names) if any(r.contestant == n for r in records)]
    table.add_column("shape", no_wrap=True)
    for name in present:
        table.add_column("\n".join(name.split()), justify="right", no_wrap=True)
    for shape in dict.fromkeys(record.shape for record in records):
        row = {r.contestant: r for r in records if r.shape == shape}
        table.add_row(shape, *(_speed(row.get(name)) for name in present))
    return table


def ratios(found: Sequence[Comparison]) -> Table:
    """Return cybn's time over every other's: geometric mean, worst shape."""
    table = Table(
        title="time / time; below 1, cybn is ahead", box=SIMPLE_HEAD, title_justify="left"
    )
    table.add_column("", no_wrap=True)
    for name in ("geometric mean", "times as fast", "worst", "on"):
        table.add_column(name, justify="right", no_wrap=True)
    for comparison in found:
        shape, worst = comparison.worst
        mean = comparison.mean
        table.add_row(comparison.name, f"{mean:.3f}", f"{1 / mean:.2f}", f"{worst:.3f}", shape)
    return table


def resnet50_lines(results: Results) -> list[str]:
    """Say what forward and backward of all layers of ResNet-50 take, against PyTorch."""
    lines = []
    for dtype, threads in dict.fromkeys((r.dtype, r.threads) for r in results.records):
        for layout in (FIRST, LAST):
            ours, theirs = (
                summed_over_layers(results, dtype, threads, peer, layout, FRESH)
                for peer in ("cybn", "PyTorch")
            )
            if ours is not None and theirs is not None:
                lines.append(
                    f"53 layers of ResNet-50, forward + backward, {layout}, {dtype}, {threads} "
                    f"threads, fresh: cybn {ours * 1e3:.0f} ms, PyTorch {theirs * 1e3:.0f} ms, "
                    f"ratio {ours / theirs:.3f}"
                )
    return lines


def implementations(records: Sequence[Record]) -> list[str]:
    """Say what each contestant's note says, once."""
    notes = dict.fromkeys((r.contestant, r.operation, r.note) for r in records if r.note)
    return [f"{name}, {operation}: {note}" for name, operation, note in notes]


def _number(seconds: float | None, factor: float) -> str:
    return "-" if seconds is None else f"{seconds * factor:.3g}"


def _speed(record: Record | None) -> str:
    if record is None or not record.seconds:
        return "-"
    return f"{record.least_bytes / record.seconds / 1e9:.1f}"
