"""One run as a picture: GB/s beside the floor, and everybody's time against cybn's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from .floors import FLOOR
from .ratios import geometric_mean
from .results import Case, Record, Results
from .task import FIRST, FRESH, LAST, REUSED

__all__ = ["draw"]

# Okabe and Ito's colours, which do not depend on colour vision.
COLOURS = {
    "cybn": "#0072B2",
    "PyTorch": "#D55E00",
    "oneDNN": "#009E73",
    "JAX": "#CC79A7",
    "ONNX Runtime": "#E69F00",
    "NumPy": "#777777",
}
MARKERS = {FIRST: "o", LAST: "s"}


def draw(results: Results, path: Path) -> None:
    """Draw the main cases of a run: ResNet-50 if it is there, with the most threads.

    Parameters
    ----------
    results : Results
        Of one run.
    path : Path
        The file to write; its ending says what kind.
    """
    cases = main_cases(results)
    figure = Figure(figsize=(5.2 * len(cases) + 1, 10.5), layout="constrained")
    grid = figure.subplots(2, len(cases), squeeze=False)
    for above, below, case in zip(grid[0], grid[1], cases, strict=True):
        records = [record for record in results.of(case) if record.seconds is not None]
        draw_speeds(above, case, records, results.settings["last-level cache"])
        draw_times(below, records)
    figure.legend(
        *grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=9
    )
    first = cases[0]
    machine = results.machine
    figure.suptitle(
        f"cybn {machine['cybn']} on {machine['cpu']}: {first.group}, {first.dtype}, "
        f"{first.threads} thread{'s' if first.threads > 1 else ''}"
    )
    figure.savefig(path, dpi=120)


def main_cases(results: Results) -> list[Case]:
    """Return one case for each operation: of the first group, dtype, and the most threads."""
    cases = results.cases()
    if not cases:
        raise ValueError("nothing was measured, there is nothing to draw")
    group = "resnet50" if any(c.group == "resnet50" for c in cases) else cases[0].group
    dtype = next(c.dtype for c in cases if c.group == group)
    chosen = [c for c in cases if (c.group, c.dtype) == (group, dtype)]
    most = max(c.threads for c in chosen)
    return [c for c in chosen if c.threads == most]


def draw_speeds(axes: Axes, case: Case, records: Sequence[Record], cache: int) -> None:
    """Draw GB/s over the shapes, the largest at the left, beside the floor."""
    floors = sorted(
        (r for r in records if r.peer == FLOOR), key=lambda r: r.least_bytes, reverse=True
    )
    shapes = [record.shape for record in floors]
    axes.plot(shapes, speeds(floors, shapes), color="black", drawstyle="steps-mid", label="floor")
    for layout in (FIRST, LAST):
        for output in (REUSED, FRESH):
            mine = [r for r in records if (r.peer, r.layout, r.output) == ("cybn", layout, output)]
            if mine:
                axes.plot(
                    [r.shape for r in mine],
                    speeds(mine, [r.shape for r in mine]),
                    linestyle="none",
                    marker=MARKERS[layout],
                    color=COLOURS["cybn"],
                    fillstyle="full" if output == REUSED else "none",
                    label=f"cybn {layout}, output {output}",
                )
    beyond = sum(record.nbytes > cache for record in floors)
    if 0 < beyond < len(shapes):
        axes.axvline(beyond - 0.5, color="#777777", linestyle=":", linewidth=1)
        axes.annotate(
            "< memory | cache >",
            (beyond - 0.5, 1.0),
            ha="center",
            va="bottom",
            xycoords=("data", "axes fraction"),
            fontsize=8,
            color="#555555",
        )
    axes.set_ylim(bottom=0)
    axes.set_ylabel("GB/s, at the least traffic")
    axes.set_title(case.operation, pad=18)
    axes.tick_params(axis="x", labelrotation=60)
    tidy(axes)


def speeds(records: Sequence[Record], shapes: Sequence[str]) -> list[float]:
    """Return GB/s in the order of `shapes`."""
    found = {r.shape: r.least_bytes / (r.seconds or 1) / 1e9 for r in records}
    return [found[shape] for shape in shapes]


def draw_times(axes: Axes, records: Sequence[Record]) -> None:
    """Draw every other's time over cybn's: bars are geometric means, dots are shapes."""
    rows: dict[tuple[str, str, str], list[float]] = {}
    for record in records:
        if record.peer not in ("cybn", FLOOR):
            layout = LAST if record.layout == LAST else FIRST
            mine = [
                r.seconds
                for r in records
                if (r.peer, r.shape, r.layout, r.output)
                == ("cybn", record.shape, layout, record.output)
            ]
            if mine and mine[0] and record.seconds:
                key = (record.peer, record.layout, record.output)
                rows.setdefault(key, []).append(record.seconds / mine[0])
    for place, ((peer, layout, _), values) in enumerate(rows.items()):
        hatch = {FIRST: "", LAST: "//"}.get(layout, "..")
        colour = COLOURS.get(peer, "black")
        mean = geometric_mean(values)
        axes.barh(place, mean - 1, left=1, color=colour, alpha=0.55, hatch=hatch, edgecolor=colour)
        axes.plot(values, [place] * len(values), ".", color="black", markersize=4)
        axes.annotate(
            f"{mean:.1f}",
            (1.0, place),
            xycoords=("axes fraction", "data"),
            va="center",
            xytext=(4, 0),
            textcoords="offset points",
            fontsize=9,
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.axvline(1, color=COLOURS["cybn"], linewidth=2)
    axes.set_yticks(range(len(rows)), [" ".join(key) for key in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(
        "time / cybn's time, same layout and output\nbars: geometric mean; dots: shapes"
    )
    tidy(axes)


def tidy(axes: Axes) -> None:
    """Take away what is not needed."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
