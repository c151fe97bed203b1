"""The bars: speed targets of cybn. Each limits the ratio of two times of the same race.

`ours` and `theirs` of a bar select records of some groups by their fields. A field that is left out
may have any value; the quickest record counts, so "its best layout" is chosen for each shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from statistics import geometric_mean
from typing import Any, NamedTuple

from cybn._runtime import supported_levels

from .cases import PASSES, SHAPES
from .peers.floor import FLOOR
from .task import FIRST, FRESH, LAST, REUSED

Record = Where = dict[str, Any]  # the fields of one contestant in one race; some of them

MINE: Where = {"peer": "cybn", "layout": FIRST, "output": REUSED, "dtype": "float32"}
ALONE: Where = {"peer": "cybn", "layout": FIRST, "dtype": "float32"}


class Pair(NamedTuple):
    """A time of cybn, and the time that it is compared with, in seconds."""

    place: str
    mine: float
    theirs: float
    layers: int

    @property
    def ratio(self) -> float:
        """The ratio of the times; below 1, cybn is faster."""
        return self.mine / self.theirs


@dataclass(frozen=True)
class Bar:
    """One target. `how` is "mean" (geometric, over the cases), "each", or "sum" (over layers)."""

    name: str
    groups: tuple[str, ...]
    bound: float | None
    ours: Where
    theirs: Where = field(default_factory=dict)  # empty if the bound is in microseconds
    how: str = "mean"
    only: Callable[[Record], bool] = lambda record: True

    def pairs(self, found: Sequence[Record]) -> Iterator[Pair]:
        """Yield the pairs of a run for this bar, one for each case and layout."""
        every = [r for r in found if r["group"] in self.groups and self.only(r)]
        best: dict[tuple[str, str], Record] = {}
        for r in sorted(every, key=lambda r: -r["seconds"]):  # the last, the quickest, is kept
            if self.ours.items() <= r.items():
                best[r["case"], r["layout"]] = r
        for (case, layout), one in best.items():
            # If `ours` has any layout, `theirs` must have the same one.
            same = {} if "layout" in self.ours else {"layout": layout}
            theirs = (self.theirs | same if self.theirs else {}) | {"case": case}
            rest = [r["seconds"] for r in every if theirs.items() <= r.items()]
            if rest:
                words = [one["shape"], *([] if "work" in self.ours else [one["work"]])]
                words += [*same.values(), *([one["group"]] if len(self.groups) > 1 else [])]
                against = min(rest) if self.theirs else 1e-6
                yield Pair(", ".join(words), one["seconds"], against, one["layers"])

    def held(self, found: Sequence[Record]) -> Verdict | None:
        """Compare a run with the bar; return None if the run has no records for it."""
        pairs = sorted(self.pairs(found), key=lambda pair: pair.ratio)
        return Verdict(self, pairs) if pairs else None


@dataclass(frozen=True)
class Verdict:
    """A bar and the result of a run."""

    bar: Bar
    pairs: list[Pair]  # the worst is the last

    @property
    def figure(self) -> float:
        """The figure that is compared with the bound."""
        if self.bar.how == "sum":
            ours, theirs = (sum(p.layers * p[i] for p in self.pairs) for i in (1, 2))
            return ours / theirs
        ratios = [pair.ratio for pair in self.pairs]
        return ratios[-1] if self.bar.how == "each" else geometric_mean(ratios)

    @property
    def unit(self) -> str:
        """The unit of the figures; none for a ratio."""
        return "" if self.bar.theirs else " us"

    @property
    def cells(self) -> list[str]:
        """The cells of a row of the table with the heads `HEADS`."""
        limit, unit, worst = self.bar.bound, self.unit, self.pairs[-1]
        said = "no target" if limit is None else "met" if self.figure <= limit else "missed"
        figures = [f"{self.figure:.3f}{unit}", "-" if limit is None else f"{limit:.3g}{unit}"]
        words = [str(len(self.pairs)), f"{worst.ratio:.3f}{unit}", worst.place]
        return [self.bar.name, said, *figures, *words]


HEADS = ["target", "verdict", "figure", "at most", "cases", "worst figure", "worst case"]


def verdicts(found: Sequence[Record], cache: int) -> list[Verdict]:
    """Compare a run with all bars; leave out bars of which nothing was measured."""
    return [verdict for bar in bars(cache) if (verdict := bar.held(found))]


def bars(cache: int) -> Iterator[Bar]:
    """Yield all bars; `cache` is the size of the last-level cache in bytes."""
    layers, wide = ("resnet50",), "x86-64-v4" in supported_levels()
    torch, onednn = {"peer": "PyTorch"}, {"peer": "oneDNN"}

    # ---- plain passes: oneDNN, the floors, PyTorch's best layout and fresh outputs, two threads
    bounds = {  # over oneDNN: its best layout, channels-last; over the floor: large x, any size
        "forward": (1.0 if wide else 0.85, 0.8, 1.25, 2.0),
        "inference": (None, None, 1.0, 1.1),
        "backward": (1.1 if wide else 1.0, 0.95, 1.25, 2.0),
    }
    fresh = {"forward": (1 / 9, 1 / 3), "inference": (1 / 2, None), "backward": (1 / 5, 2 / 5)}
    for work, (best, last, beyond, any_size) in bounds.items():
        name = "training forward" if work == "forward" else work
        here: Where = {"work": work}
        ours, both = MINE | here, here | {"layout": LAST}
        if best and last:
            yield Bar(f"{name} / oneDNN, its best layout", layers, best, ours, onednn | here)
            title = f"{name}, channels-last / oneDNN, channels-last"
            yield Bar(title, layers, last, MINE | both, onednn | both)
        floor = f"{name} / {'add' if work == 'backward' else 'copy'} floor"
        theirs = {"peer": FLOOR, **here}
        yield Bar(f"{floor}, beyond the cache", ("beyond",), beyond, ours, theirs)
        yield Bar(floor, layers, any_size, ours, theirs)
        for layout, bound in zip((FIRST, LAST), fresh[work], strict=True):
            where = here | {"layout": layout, "output": FRESH}
            if bound:
                title = f"{name} / PyTorch, {layout}, fresh"
                yield Bar(title, layers, bound, MINE | where, torch | where)
        one, two = (ours | {"threads": threads} for threads in (1, 2))
        title = f"{name}, two threads / one, in the cache"
        yield Bar(title, ("one thread",), 0.55, two, one, only=lambda r: r["nbytes"] <= cache)
    for layout in (FIRST, LAST):
        title = f"any operation, {layout} / PyTorch, its best layout"
        yield Bar(title, (*layers, *SHAPES), 1.0, MINE | {"layout": layout}, torch, how="each")
    title = "forward + backward of 53 layers / PyTorch, fresh"
    pair = (MINE | {"output": FRESH}, torch | {"layout": FIRST, "output": FRESH}, "sum")
    yield Bar(title, layers, 1 / 6, *pair, only=lambda r: r["work"] != "inference")

    # ---- the family, with outputs that are reused
    chosen: dict[str, Callable[[Record], bool]] = {
        "group norm, 16x16": lambda r: r["norm"] == "group" and r["sizes"][-1] == 16,
        "layer norm, rows of 16 to 128": lambda r: r["norm"] == "layer" and r["sizes"][-1] <= 128,
    }
    for (name, only), work in product(chosen.items(), PASSES):
        ours, theirs = MINE | {"work": work}, torch | {"output": REUSED}
        title = f"{name}, {work} / PyTorch, reused"
        yield Bar(title, ("family",), 1.0, ours, theirs, how="each", only=only)

    # ---- calls
    def smallest(record: Record) -> bool:
        return record["sizes"] in ([32, 16], [4, 8, 4, 4]) or record["shape"] == "32x16"

    new = ALONE | {"output": FRESH}
    module = new | {"work": "forward, through a layer"}
    tiny = ALONE | {"output": REUSED, "work": "inference"}
    yield Bar("a call: inference, out=", ("tiny",), 1.0, tiny, how="each", only=smallest)
    yield Bar("a call: BatchNorm1d, training", ("tiny",), 3.0, module, how="each", only=smallest)
    kinds: dict[str, Where] = {"bfloat16": {"dtype": "bfloat16"}}
    kinds |= {f"{norm} norm": {"norm": norm} for norm in ("layer", "group")}
    for work in PASSES:
        special = {name: {"work": f"{work}, {name}"} for name in ("relu + residual", "masked")}
        for name, where in (special | kinds).items():
            ours = new | {"work": work} | where
            yield Bar(f"a call: {name}, {work}", ("calls",), 3.0, ours, how="each")
    yield Bar("inference, out= / PyTorch's native call", ("tiny",), 0.5, tiny, torch, how="each")
    yield Bar("a layer's training call / PyTorch's", ("tiny",), 1 / 3, module, torch, how="each")

    # ---- half types, activations, residuals
    plain: Where = {"peer": "cybn", "output": REUSED, "dtype": "float32"}
    for dtype in ("bfloat16", "float16"):
        same = plain | {"work": "forward"}
        title = f"forward, {dtype} / float32, beyond the cache"
        yield Bar(title, ("beyond",), 0.65, same | {"dtype": dtype}, same)
    limits = [("relu + residual", 1.3, 1.6), ("silu", 1.5, 1.9), ("gelu", 1.5, 1.9)]
    limits += [(name, None, 1.2) for name in ("relu6", "leaky_relu", "hardswish")]
    for name, *both_bounds in limits:
        for work, bound in zip(PASSES, both_bounds, strict=True):
            ours = plain | {"work": f"{work}, {name}"}
            title = f"{work}, {name} / plain"
            yield Bar(title, ("activations",), bound, ours, plain | {"work": work}, how="each")
