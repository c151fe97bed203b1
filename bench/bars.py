"""The bars: what cybn claims, each a time over another of the same race, and its bound.

A bar looks at records of some groups. `ours` and `theirs` say which: a field that is left out may
be anything, and the quickest record counts, so that "its best layout" is picked shape by shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import geometric_mean
from typing import Any, NamedTuple

from .cases import SHAPES
from .machine import cpu_levels
from .peers.floor import FLOOR
from .task import FIRST, FRESH, LAST, REUSED

Record = dict[str, Any]  # of one contestant in one race, as `records` makes it
Where = dict[str, Any]

MINE: Where = {"peer": "cybn", "layout": FIRST, "output": REUSED, "dtype": "float32"}
ALONE: Where = {"peer": "cybn", "layout": FIRST, "dtype": "float32"}


class Pair(NamedTuple):
    """A figure of cybn, and what it is held against, in seconds."""

    place: str
    mine: float
    theirs: float
    layers: int

    @property
    def ratio(self) -> float:
        """Below 1, cybn is ahead."""
        return self.mine / self.theirs


@dataclass(frozen=True)
class Bar:
    """One claim. `how` is "mean" (geometric, over the cases), "each", or "sum" (over layers)."""

    name: str
    groups: tuple[str, ...]
    bound: float | dict[str, float] | None  # for each level of the CPU where it is a dict
    ours: Where
    theirs: Where = field(default_factory=dict)  # none: microseconds of a call
    how: str = "mean"
    only: Callable[[Record], bool] = lambda record: True

    def pairs(self, found: Sequence[Record]) -> Iterator[Pair]:
        """Yield what a run has for this bar, a case and layout at a time."""
        every = [r for r in found if r["group"] in self.groups and self.only(r)]
        mine = [r for r in every if self.ours.items() <= r.items()]
        for case, layout in dict.fromkeys((r["case"], r["layout"]) for r in mine):
            one = min(
                (r for r in mine if (r["case"], r["layout"]) == (case, layout)),
                key=lambda r: r["seconds"],
            )
            # Any layout of ours: theirs is the same one.
            same = {} if "layout" in self.ours else {"layout": layout}
            theirs = self.theirs | same if self.theirs else {}
            rest = [
                r["seconds"] for r in every if r["case"] == case and theirs.items() <= r.items()
            ]
            if rest:
                words = [one["shape"], "" if "work" in self.ours else one["work"], *same.values()]
                words += [one["group"]] if len(self.groups) > 1 else []
                place = ", ".join(filter(None, words))
                against = min(rest) if self.theirs else 1e-6
                yield Pair(place, one["seconds"], against, one["layers"])

    @property
    def limit(self) -> float | None:
        """The bound on this CPU."""
        if isinstance(self.bound, dict):
            return self.bound[cpu_levels()[-1]]
        return self.bound


@dataclass(frozen=True)
class Verdict:
    """A bar and what a run says about it."""

    bar: Bar
    pairs: list[Pair]  # the worst last

    @property
    def figure(self) -> float:
        """What is held against the bound."""
        if self.bar.how == "sum":
            ours, theirs = (sum(p.layers * p[i] for p in self.pairs) for i in (1, 2))
            return ours / theirs
        ratios = [pair.ratio for pair in self.pairs]
        return ratios[-1] if self.bar.how == "each" else geometric_mean(ratios)

    @property
    def cells(self) -> list[str]:
        """A row of the table whose heads are `HEADS`."""
        limit, unit, worst = self.bar.limit, "" if self.bar.theirs else " us", self.pairs[-1]
        said = "no bar" if limit is None else "met" if self.figure <= limit else "missed"
        figures = [f"{self.figure:.3f}{unit}", "-" if limit is None else f"{limit:.3g}{unit}"]
        words = [str(len(self.pairs)), f"{worst.ratio:.3f}{unit}", worst.place]
        return [self.bar.name, said, *figures, *words]


HEADS = ["bar", "verdict", "figure", "at most", "places", "worst", "on"]


def verdicts(found: Sequence[Record], cache: int) -> list[Verdict]:
    """Hold a run against all bars; those of which nothing was measured are left out."""
    every = (Verdict(bar, sorted(bar.pairs(found), key=lambda p: p.ratio)) for bar in bars(cache))
    return [verdict for verdict in every if verdict.pairs]


def bars(cache: int) -> Iterator[Bar]:
    """Yield all bars; `cache` is the size of the last-level cache in bytes."""
    layers, words = ("resnet50",), {"forward": "training forward", "backward": "backward"}

    def in_cache(record: Record) -> bool:
        return record["nbytes"] <= cache

    # ---- oneDNN: its best layout, and channels-last against channels-last
    best = {
        "forward": {"baseline": 0.85, "x86-64-v3": 0.85, "x86-64-v4": 1.0},
        "backward": {"baseline": 1.0, "x86-64-v3": 1.0, "x86-64-v4": 1.1},
    }
    for work, bounds in best.items():
        name = f"{words[work]} / oneDNN, its best layout"
        theirs = {"peer": "oneDNN", "work": work}
        yield Bar(name, layers, bounds, MINE | {"work": work}, theirs)
    for work, bound in (("forward", 0.8), ("backward", 0.95)):
        name = f"{words[work]}, channels-last / oneDNN, channels-last"
        last: Where = {"layout": LAST, "work": work}
        yield Bar(name, layers, bound, MINE | last, {"peer": "oneDNN", **last})

    # ---- floors
    floors = (("inference", 1.0, 1.1), ("forward", 1.25, 2.0), ("backward", 1.25, 2.0))
    for work, large, any_size in floors:
        floor = "add" if work == "backward" else "copy"
        name = f"{words.get(work, work)} / {floor} floor"
        pair = (MINE | {"work": work}, {"peer": FLOOR, "work": work})
        yield Bar(f"{name}, beyond the cache", ("beyond",), large, *pair)
        yield Bar(name, layers, any_size, *pair)

    # ---- the family, with outputs that are used again
    for norm, what, most in (("group", "16x16", 0), ("layer", "rows of 16 to 128", 128)):
        for work in ("forward", "backward"):

            def chosen(record: Record, most: int = most) -> bool:
                size = record["sizes"][-1]
                return size <= most if most else size == 16

            name = f"{norm} norm, {what}, {work} / PyTorch, reused"
            ours = MINE | {"norm": norm, "work": work}
            theirs = {"peer": "PyTorch", "output": REUSED, "norm": norm}
            yield Bar(name, ("family",), 1.0, ours, theirs, how="each", only=chosen)

    # ---- calls
    def smallest(record: Record) -> bool:
        return record["sizes"] in ([32, 16], [4, 8, 4, 4]) or record["shape"] == "32x16"

    reused, fresh = ALONE | {"output": REUSED}, ALONE | {"output": FRESH}
    module = fresh | {"work": "forward, through a layer"}
    tiny = reused | {"work": "inference"}
    yield Bar("a call: inference, out=", ("tiny",), 1.0, tiny, how="each", only=smallest)
    yield Bar("a call: BatchNorm1d, training", ("tiny",), 3.0, module, how="each", only=smallest)
    kinds: list[tuple[str, Where]] = [
        *((f"relu + residual, {w}", {"work": f"{w}, relu + residual"}) for w in words),
        *((f"bfloat16, {w}", {"work": w, "dtype": "bfloat16"}) for w in words),
        *((f"masked, {w}", {"work": f"{w}, masked"}) for w in words),
        *((f"{n} norm, {w}", {"work": w, "norm": n}) for n in ("layer", "group") for w in words),
    ]
    for name, where in kinds:
        yield Bar(f"a call: {name}", ("calls",), 3.0, fresh | where, how="each")
    torch = {"peer": "PyTorch"}
    yield Bar("inference, out= / PyTorch's native call", ("tiny",), 0.5, tiny, torch, how="each")
    yield Bar("a layer's training call / PyTorch's", ("tiny",), 1 / 3, module, torch, how="each")

    # ---- half types, activations, residuals
    for dtype in ("bfloat16", "float16"):
        ours = {"peer": "cybn", "output": REUSED, "work": "forward", "dtype": dtype}
        name = f"forward, {dtype} / float32, beyond the cache"
        yield Bar(name, ("beyond",), 0.65, ours, ours | {"dtype": "float32"})
    plain: Where = {"peer": "cybn", "output": REUSED, "dtype": "float32"}
    limits = [("relu + residual", 1.3, 1.6), ("silu", 1.5, 1.9), ("gelu", 1.5, 1.9)]
    limits += [(name, None, 1.2) for name in ("relu6", "leaky_relu", "hardswish")]
    for name, *bounds in limits:
        for work, bound in zip(words, bounds, strict=True):
            ours = plain | {"work": f"{work}, {name}"}
            title = f"{work}, {name} / plain"
            yield Bar(title, ("activations",), bound, ours, plain | {"work": work}, how="each")

    # ---- PyTorch with fresh outputs, its best layout, all 53 layers; two threads
    against = [("forward", FIRST, 1 / 9), ("backward", FIRST, 1 / 5), ("inference", FIRST, 1 / 2)]
    against += [("forward", LAST, 1 / 3), ("backward", LAST, 2 / 5)]
    for work, layout, bound in against:
        here = {"work": work, "layout": layout, "output": FRESH}
        name = f"{words.get(work, work)} / PyTorch, {layout}, fresh"
        yield Bar(name, layers, bound, MINE | here, torch | here)
    for layout in (FIRST, LAST):
        name = f"any operation, {layout} / PyTorch, its best layout"
        yield Bar(name, (*layers, *SHAPES), 1.0, MINE | {"layout": layout}, torch, how="each")
    passes = Bar(
        "forward + backward of 53 layers / PyTorch, fresh",
        layers,
        1 / 6,
        MINE | {"output": FRESH},
        torch | {"layout": FIRST, "output": FRESH},
        how="sum",
        only=lambda record: record["work"] != "inference",
    )
    yield passes
    for work in ("forward", "backward", "inference"):
        ours = MINE | {"work": work}
        name = f"{words.get(work, work)}, two threads / one, in the cache"
        alone = (ours | {"threads": 2}, ours | {"threads": 1})
        yield Bar(name, ("one thread",), 0.55, *alone, only=in_cache)
