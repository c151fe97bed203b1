"""The bars: what cybn claims, each with its bound.

A figure is a time of cybn over a time of another in the same run, for two threads, float32 and an
output that is used again unless the bar says otherwise. PyTorch's backward has no such output, its
modules have none at all. "Its best layout" is picked shape by shape, and out of fresh and used
again too where both were timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from .bars import MICROSECONDS, Bar, Figures, Line
from .floors import FLOOR
from .memory import SHAPES as MEMORY_SHAPES
from .plans import BAR_THREADS
from .ratios import best, compare, summed_over_layers
from .results import Record, Results
from .shapes import ALL_GROUPS, RESNET50, TINY, Shape
from .task import FIRST, FRESH, LAST, REUSED

__all__ = ["BARS", "Side", "lines"]

NETWORK = "ResNet-50, batch 32"
ITEMSIZE = {"float32": 4, "float64": 8}
WORDS = {"forward": "training forward", "backward": "backward", "inference": "inference"}


@dataclass(frozen=True)
class Side:
    """Whose records a bar looks at; None is any, and the quickest of them counts."""

    peer: str
    layout: str | None = None
    output: str | None = None
    threads: int = BAR_THREADS

    def __call__(self, record: Record) -> bool:
        """Say whether a record is one of this side's."""
        return (
            (record.peer, record.threads) == (self.peer, self.threads)
            and self.layout in (None, record.layout)
            and self.output in (None, record.output)
        )


def lines(results: Results) -> list[Line]:
    """Hold a run against all bars."""
    return [Line(bar, bar.figures(results), bar.expected(results)) for bar in BARS]


# ---- bars on the layers of ResNet-50 -------------------------------------------------------------


def everything(nbytes: int, cache: int) -> bool:
    """Choose all layers."""
    return True


def beyond_cache(nbytes: int, cache: int) -> bool:
    """Choose layers whose x is larger than the last-level cache."""
    return nbytes > cache


def in_cache(nbytes: int, cache: int) -> bool:
    """Choose layers whose x is no larger than the last-level cache."""
    return nbytes <= cache


def network_bar(
    name: str,
    operation: str,
    ours: Side,
    theirs: Side,
    bound: str,
    *,
    dtype: str = "float32",
    where: Callable[[int, int], bool] = everything,
) -> Bar:
    """Make a bar for the geometric mean over layers of ResNet-50."""

    def figures(results: Results) -> Figures:
        key, cache = ("resnet50", operation, dtype), results.settings["last-level cache"]
        chosen = [
            r
            for r in results.records
            if (r.group, r.operation, r.dtype) == key and where(r.nbytes, cache)
        ]
        found = compare(name, chosen, ours, theirs)
        return found.ratios if found else {}

    def expected(results: Results) -> int:
        cache = results.settings["last-level cache"]
        return sum(where(shape.size * ITEMSIZE[dtype], cache) for shape in RESNET50)

    words: dict[Callable[[int, int], bool], str] = {
        everything: NETWORK,
        beyond_cache: f"{NETWORK}, larger than the last-level cache",
        in_cache: f"{NETWORK}, in the last-level cache",
    }
    return Bar(name, words[where], bound, figures, expected)


def against_pytorch(operation: str, layout: str, bound: str, dtype: str = "float32") -> Bar:
    """Make a bar against PyTorch in the same layout, with fresh outputs on both sides."""
    where = {FIRST: "NCHW", LAST: "NHWC"}[layout]
    kind = "" if dtype == "float32" else f", {dtype}"
    return network_bar(
        f"{WORDS[operation]} / PyTorch, {where}, fresh{kind}",
        operation,
        Side("cybn", layout, FRESH),
        Side("PyTorch", layout, FRESH),
        bound,
        dtype=dtype,
    )


def floor_against_pytorch(operation: str) -> Bar:
    """Make the line that says how far a bar against PyTorch can be met: by a mere copy, or add."""
    floor = "add floor" if operation == "backward" else "copy floor"
    return network_bar(
        f"{floor} / {WORDS[operation]} of PyTorch, NCHW, fresh",
        operation,
        Side(FLOOR),
        Side("PyTorch", FIRST, FRESH),
        "",
    )


def against_floor(
    operation: str, bound: str, where: Callable[[int, int], bool] = everything
) -> Bar:
    """Make a bar against a copy, or an add for backward, on the same threads."""
    floor = "add floor" if operation == "backward" else "copy floor"
    which = "" if where is everything else ", beyond the cache"
    name = f"{WORDS[operation]} / {floor}{which}"
    return network_bar(name, operation, MINE, Side(FLOOR), bound, where=where)


def two_threads(operation: str) -> Bar:
    """Make a bar for what the second thread brings."""
    return network_bar(
        f"{WORDS[operation]}, two threads / one",
        operation,
        MINE,
        replace(MINE, threads=1),
        "0.55",
        where=in_cache,
    )


MINE = Side("cybn", FIRST, REUSED)


def whole_network(output: str, bound: str) -> Bar:
    """Make a bar for the sum over all 53 layers, forward and backward."""

    def figures(results: Results) -> Figures:
        key = ("float32", BAR_THREADS)
        ours = summed_over_layers(results, *key, "cybn", FIRST, output)
        theirs = summed_over_layers(results, *key, "PyTorch", FIRST, FRESH)
        return {"53 layers": ours / theirs} if ours and theirs else {}

    name = f"forward + backward, summed, {output} / PyTorch, NCHW, fresh"
    return Bar(name, f"the 53 layers of {NETWORK}", bound, figures, lambda results: 1)


# ---- every shape by itself -----------------------------------------------------------------------


def every_shape(layout: str) -> Bar:
    """Make the bar that no shape may miss: any operation against the best of PyTorch."""

    def figures(results: Results) -> Figures:
        found: Figures = {}
        for case in results.cases():
            threads = 1 if case.group == TINY else BAR_THREADS
            if (case.dtype, case.threads) != ("float32", threads):
                continue
            pair = Side("cybn", layout, REUSED, threads), Side("PyTorch", threads=threads)
            comparison = compare("", results.of(case), *pair)
            for shape, ratio in (comparison.ratios if comparison else {}).items():
                found[f"{case.group}, {shape}, {case.operation}"] = ratio
        return found

    def operations(group: str, shape: Shape) -> int:
        if layout == LAST and not shape.spatial:
            return 0
        return (3 if shape.trainable else 1) + (group == TINY)

    def expected(results: Results) -> int:
        return sum(operations(group, s) for group, shapes in ALL_GROUPS.items() for s in shapes)

    name = f"any operation, {layout} / PyTorch, its best layout"
    return Bar(name, "every shape, each by itself", "1", figures, expected, each=True)


# ---- tiny calls, memory --------------------------------------------------------------------------


def tiny_bar(name: str, operation: str, ours: Side, theirs: Side | None, bound: str) -> Bar:
    """Make a bar for calls at (32, 16) and (60, 100), each by itself; times where alone."""

    def figures(results: Results) -> Figures:
        key = (TINY, operation, "float32")
        chosen = [r for r in results.records if (r.group, r.operation, r.dtype) == key]
        if theirs is None:
            return {s: (r.seconds or 0) * 1e6 for s, r in best(chosen, ours).items()}
        found = compare(name, chosen, ours, theirs)
        return found.ratios if found else {}

    shapes = "a call at (32, 16) and (60, 100), each, one thread"
    unit = "" if theirs else MICROSECONDS
    return Bar(
        name, shapes, bound, figures, lambda results: len(ALL_GROUPS[TINY]), each=True, unit=unit
    )


def memory_bar() -> Bar:
    """Make the bar for memory: the larger of two measures over 64 KiB a thread and O(C)."""

    def figures(results: Results) -> Figures:
        return {f"{peak.shape} {peak.layout}": peak.ratio for peak in results.memory}

    return Bar(
        "peak extra memory of a training forward with out= / (64 KiB a thread + 1.1 KiB a channel)",
        "the largest, the most channels, one channel",
        "1",
        figures,
        lambda results: 2 * len(MEMORY_SHAPES),
        each=True,
    )


ALONE = replace(MINE, threads=1)
TORCH_ALONE = Side("PyTorch", threads=1)

BARS: Sequence[Bar] = [
    against_pytorch("forward", FIRST, "1/9"),
    against_pytorch("backward", FIRST, "1/5"),
    against_pytorch("inference", FIRST, "1/2"),
    against_pytorch("forward", LAST, "1/3"),
    against_pytorch("backward", LAST, "2/5"),
    network_bar(
        "training forward / oneDNN, its best layout", "forward", MINE, Side("oneDNN"), "0.9"
    ),
    network_bar("backward / oneDNN, its best layout", "backward", MINE, Side("oneDNN"), "0.9"),
    network_bar(
        "training forward, NHWC / oneDNN, NHWC",
        "forward",
        Side("cybn", LAST, REUSED),
        Side("oneDNN", LAST),
        "0.95",
    ),
    against_floor("forward", "1.25", beyond_cache),
    against_floor("forward", "2"),
    against_floor("backward", "1.25", beyond_cache),
    against_floor("backward", "2"),
    against_floor("inference", "1.1"),
    every_shape(FIRST),
    every_shape(LAST),
    whole_network(FRESH, "1/6"),
    whole_network(REUSED, "1/6"),
    *(two_threads(operation) for operation in WORDS),
    tiny_bar("inference with out=", "inference", ALONE, None, "2.5"),
    tiny_bar("inference with out= / PyTorch's native call", "inference", ALONE, TORCH_ALONE, "1/2"),
    tiny_bar(
        "training forward through a layer, fresh / PyTorch's module",
        "layer",
        replace(ALONE, output=FRESH),
        TORCH_ALONE,
        "1/3",
    ),
    memory_bar(),
    *(floor_against_pytorch(operation) for operation in WORDS),
    against_pytorch("forward", FIRST, "1/3", "float64"),
    against_pytorch("backward", FIRST, "", "float64"),
    against_pytorch("inference", FIRST, "", "float64"),
    against_pytorch("forward", LAST, "", "float64"),
    against_pytorch("backward", LAST, "", "float64"),
]
