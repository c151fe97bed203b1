"""One run as a picture: GB/s beside the floor, and everybody's time against cybn's."""

from __future__ import annotations

from pathlib import Path
from statistics import geometric_mean
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from .bars import Record
from .peers.floor import FLOOR
from .task import FIRST, FRESH, LAST, REUSED

# Okabe and Ito's colours, which do not depend on colour vision; peers take them in turn.
BLUE, GREY = "#0072B2", "#777777"
COLOURS = ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", GREY)


def draw(run: Any, path: Path) -> None:
    """Draw ResNet-50's layers of a `bench.report.Run`; the ending of the path says what kind."""
    every = [r for r in run.records if r["group"] == "resnet50"]
    if not every:
        raise SystemExit("no layer of ResNet-50 was measured, there is nothing to draw")
    works = list(dict.fromkeys(r["work"] for r in every))
    peers = [p for p in dict.fromkeys(r["peer"] for r in every) if p not in ("cybn", FLOOR)]
    colours = {peer: COLOURS[i % len(COLOURS)] for i, peer in enumerate(peers)}
    figure = Figure(figsize=(5.2 * len(works) + 1, 10.5), layout="constrained")
    grid = figure.subplots(2, len(works), squeeze=False)
    for above, below, work in zip(*grid, works, strict=True):
        records = [r for r in every if r["work"] == work]
        _speeds(above, records, run.cache)
        above.set_title(work, pad=18)
        _times(below, records, colours)
        for axes in (above, below):
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.25)
            axes.set_axisbelow(True)
    legend = grid[0, 0].get_legend_handles_labels()
    figure.legend(*legend, loc="outside lower center", ncols=5, fontsize=9)
    machine = run.machine
    figure.suptitle(
        f"cybn {machine['cybn']} on {machine['cpu']}: layers of ResNet-50, batch 32, float32, "
        f"{every[0]['threads']} threads"
    )
    figure.savefig(path, dpi=120)


def _speeds(axes: Any, records: list[Record], cache: int) -> None:
    """Draw GB/s over the shapes, the largest at the left, beside the floor."""
    shapes = list(dict.fromkeys(r["shape"] for r in sorted(records, key=lambda r: -r["nbytes"])))

    def line(**where: str) -> list[float]:
        found = {r["shape"]: r for r in records if where.items() <= r.items()}
        return [
            found[s]["least_bytes"] / found[s]["seconds"] / 1e9 if s in found else float("nan")
            for s in shapes
        ]

    axes.plot(shapes, line(peer=FLOOR), color="black", drawstyle="steps-mid", label="floor")
    for layout, marker in ((FIRST, "o"), (LAST, "s")):
        for output, fill in ((REUSED, "full"), (FRESH, "none")):
            style = {"linestyle": "none", "marker": marker, "color": BLUE, "fillstyle": fill}
            values = line(peer="cybn", layout=layout, output=output)
            axes.plot(shapes, values, label=f"cybn {layout}, output {output}", **style)
    beyond = len({r["shape"] for r in records if r["nbytes"] > cache})
    axes.axvline(beyond - 0.5, color=GREY, linestyle=":", linewidth=1)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("GB/s, at the least traffic; dotted: the last-level cache ends")
    axes.tick_params(axis="x", labelrotation=60)


def _times(axes: Any, records: list[Record], colours: dict[str, str]) -> None:
    """Draw every other's time over cybn's: bars are geometric means, dots are shapes."""
    rows: dict[tuple[str, str, str], list[float]] = {}
    for r in records:
        if r["peer"] in colours:
            layout = LAST if r["layout"] == LAST else FIRST
            like = {"peer": "cybn", "case": r["case"], "layout": layout, "output": r["output"]}
            mine = [one["seconds"] for one in records if like.items() <= one.items()]
            key = (r["peer"], r["layout"], r["output"])
            rows.setdefault(key, []).extend(r["seconds"] / t for t in mine)
    for place, ((peer, layout, _), values) in enumerate(rows.items()):
        hatch = {FIRST: "", LAST: "//"}.get(layout, "..")
        colour, mean = colours[peer], geometric_mean(values)
        axes.barh(place, mean - 1, left=1, color=colour, alpha=0.55, hatch=hatch, edgecolor=colour)
        axes.plot(values, [place] * len(values), ".", color="black", markersize=4)
        axes.text(1.02, place, f"{mean:.1f}", transform=axes.get_yaxis_transform(), va="center")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.axvline(1, color=BLUE, linewidth=2)
    axes.set_yticks(range(len(rows)), [" ".join(key) for key in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(
        "time / cybn's time, same layout and output\nbars: geometric mean; dots: shapes"
    )
