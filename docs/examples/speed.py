"""Draw the pictures of the speed from a run of the developers' bench.

    pytest bench --benchmark-json=figures.json
    python -m docs.examples.speed figures.json

speed.png is the picture of the README. A bar is the time of a library divided by that of copying
the batch (for backward, of adding two batches): the geometric mean over the nine layers of
ResNet-50, with float32 and two threads. For each shape the library's fastest memory layout is used.
resnet50.png compares the GB/s of cybn with those of that copy, layer by layer.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from matplotlib.figure import Figure

from bench.report import Run, read

PICTURES = Path(__file__).resolve().parents[1] / "pictures"
PEERS = ("cybn", "oneDNN", "PyTorch", "JAX", "ONNX Runtime", "NumPy")
TITLES = {"forward": "training forward", "inference": "inference", "backward": "backward"}
BLUE, GREY = "#0072B2", "#999999"  # Okabe and Ito's blue, for any colour vision


def quickest(run: Run, **where: str) -> dict[str, dict[str, Any]]:
    """Return the quickest record of each layer, the largest layers first."""
    where = {"group": "resnet50", "dtype": "float32", **where}
    found = [r for r in run.records if where.items() <= r.items()]
    found.sort(key=lambda r: (-r["nbytes"], -r["seconds"]))
    return {r["shape"]: r for r in found}


def compared(axes: Any, run: Run, operation: str) -> None:
    """Draw and print the times of all libraries, divided by those of the floor."""
    floor = quickest(run, peer="floor", work=operation)
    found = {}
    for peer in PEERS:
        best = quickest(run, peer=peer, work=operation)
        if best and len(best) == len(floor):
            found[peer] = geometric_mean(
                best[shape]["seconds"] / floor[shape]["seconds"] for shape in floor
            )
    print(operation, {peer: round(ratio, 2) for peer, ratio in found.items()})
    colours = [BLUE if peer == "cybn" else GREY for peer in found]
    bars = axes.barh(list(found), list(found.values()), color=colours)
    axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=9)
    axes.axvline(1, color="black", linewidth=1, linestyle=":", zorder=0)
    axes.invert_yaxis()
    axes.margins(x=0.15)


def speeds(axes: Any, run: Run, operation: str) -> None:
    """Draw the GB/s of each layer, and those of the floor."""
    floor = quickest(run, peer="floor", work=operation)
    lines = {"floor": floor}
    for layout in ("channels-first", "channels-last"):
        for output in ("reused", "fresh"):
            given = {"layout": layout, "output": output, "work": operation}
            lines[f"{layout}, output {output}"] = quickest(run, peer="cybn", **given)
    styles = [{"color": "black", "drawstyle": "steps-mid"}]
    styles += [
        {"color": BLUE, "linestyle": "none", "marker": marker, "fillstyle": fill}
        for marker in "os"
        for fill in ("full", "none")
    ]
    for (name, records), style in zip(lines.items(), styles, strict=True):
        values = [r["least_bytes"] / r["seconds"] / 1e9 for r in records.values()]
        axes.plot(list(records), values, label=name, **style)
    beyond = sum(r["nbytes"] > run.cache for r in floor.values())
    axes.axvline(beyond - 0.5, color=GREY, linestyle=":", linewidth=1)
    axes.set_ylim(bottom=0)
    axes.tick_params(axis="x", labelrotation=60)
    axes.grid(alpha=0.25)


def main() -> None:
    """Draw both pictures, and print the figures of the first."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("figures", type=Path)
    parser.add_argument("--folder", type=Path, default=PICTURES)
    options = parser.parse_args()
    run = read(options.figures)
    for name, height, draw in (("speed", 2.6, compared), ("resnet50", 4.4, speeds)):
        figure = Figure(figsize=(10, height), layout="constrained")
        every = figure.subplots(1, 3)
        for axes, (operation, title) in zip(every, TITLES.items(), strict=True):
            draw(axes, run, operation)
            axes.set_title(title, fontsize=11)
            axes.spines[["top", "right"]].set_visible(False)
        if draw is compared:
            words = "time, 1 = copying the batch (backward: adding two); shorter is faster"
            figure.supxlabel(words, fontsize=9)
        else:
            every[0].set_ylabel("GB/s; dotted: the last cache ends")
            handles = every[0].get_legend_handles_labels()
            figure.legend(*handles, loc="outside lower center", ncols=3)
        figure.savefig(options.folder / f"{name}.png", dpi=110)


if __name__ == "__main__":
    main()
