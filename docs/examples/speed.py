"""The README's picture of the speed, from a run of the developers' bench.

    pytest bench --benchmark-json=figures.json
    python docs/examples/speed.py figures.json

Bars are geometric means over the nine layers of ResNet-50: time over that of copying the batch (of
adding two batches, for backward), float32, two threads. Of each library its fastest memory
layout counts, shape by shape.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from statistics import geometric_mean

from matplotlib.figure import Figure

from bench.report import Run, read

PICTURE = Path(__file__).resolve().parents[1] / "pictures" / "speed.png"
PEERS = ("cybn", "oneDNN", "PyTorch", "JAX", "ONNX Runtime", "NumPy")
TITLES = {"forward": "training forward", "inference": "inference", "backward": "backward"}


def times(run: Run, operation: str) -> dict[str, float]:
    """Return the geometric mean of each peer's best time over the floor's, shape by shape."""
    best: dict[str, dict[str, float]] = defaultdict(dict)
    for record in run.records:
        if (record["group"], record["operation"]) != ("resnet50", operation):
            continue
        if record["dtype"] != "float32" or record["threads"] != 2 or record["work"] != operation:
            continue
        shapes = best[record["peer"]]
        shapes[record["shape"]] = min(
            record["seconds"], shapes.get(record["shape"], record["seconds"])
        )
    floor = best.pop("floor")
    return {
        peer: geometric_mean(best[peer][shape] / floor[shape] for shape in floor)
        for peer in PEERS
        if len(best[peer]) == len(floor)
    }


def main() -> None:
    """Draw the picture, and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("figures", type=Path)
    parser.add_argument("--picture", type=Path, default=PICTURE)
    options = parser.parse_args()
    run = read(options.figures)
    figure = Figure(figsize=(10, 2.6), layout="constrained")
    for axes, (operation, title) in zip(figure.subplots(1, 3), TITLES.items(), strict=True):
        found = times(run, operation)
        print(operation, {peer: round(ratio, 2) for peer, ratio in found.items()})
        colours = ["#0072B2" if peer == "cybn" else "#999999" for peer in found]
        bars = axes.barh(list(found), list(found.values()), color=colours)
        axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=9)
        axes.axvline(1, color="black", linewidth=1, linestyle=":", zorder=0)
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.set_title(title, fontsize=11)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(
        "time, 1 = copying the batch (backward: adding two); shorter is faster", fontsize=9
    )
    figure.savefig(options.picture, dpi=110)


if __name__ == "__main__":
    main()
