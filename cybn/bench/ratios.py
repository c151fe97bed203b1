"""The ratios that are read from the records of a run: cybn's time over another's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp, log

from .floors import FLOOR
from .results import Case, Record, Results
from .task import FIRST, LAST, REUSED

__all__ = [
    "Comparison",
    "best",
    "compare",
    "comparisons",
    "geometric_mean",
    "over_one_thread",
    "summed_over_layers",
]


@dataclass
class Comparison:
    """cybn's time divided by a peer's, shape by shape; below 1, cybn is ahead."""

    name: str
    ratios: dict[str, float]  # by shape

    @property
    def mean(self) -> float:
        """The geometric mean over the shapes."""
        return geometric_mean(list(self.ratios.values()))

    @property
    def worst(self) -> tuple[str, float]:
        """The shape where cybn does least well."""
        return max(self.ratios.items(), key=lambda item: item[1])


def geometric_mean(values: Sequence[float]) -> float:
    """Return the geometric mean; NaN of nothing."""
    return exp(sum(map(log, values)) / len(values)) if values else float("nan")


def best(records: Sequence[Record], chosen: Callable[[Record], bool]) -> dict[str, Record]:
    """Return the quickest of the chosen records of each shape."""
    found: dict[str, Record] = {}
    for record in records:
        if record.seconds is None or not chosen(record):
            continue
        if record.shape not in found or record.seconds < (found[record.shape].seconds or 0):
            found[record.shape] = record
    return found


def compare(
    name: str,
    records: Sequence[Record],
    ours: Callable[[Record], bool],
    theirs: Callable[[Record], bool],
) -> Comparison | None:
    """Compare the best of ours with the best of theirs on every shape that both have."""
    mine, other = best(records, ours), best(records, theirs)
    ratios = {
        shape: (record.seconds or 0) / (other[shape].seconds or 1)
        for shape, record in mine.items()
        if shape in other
    }
    return Comparison(name, ratios) if ratios else None


def comparisons(records: Sequence[Record], cache: int) -> list[Comparison]:
    """Compare cybn with everybody else in one case, like with like.

    cybn has the output of the peer, fresh or reused, and its layout; where the layout is a
    blocked one, cybn is channels-first. The best layout of a peer is picked shape by shape.
    Shapes larger than `cache` bytes are compared with the floor by themselves too.
    """

    def is_cybn(layout: str, output: str) -> Callable[[Record], bool]:
        return lambda r: (r.peer, r.layout, r.output) == ("cybn", layout, output)

    large = [record for record in records if record.nbytes > cache]
    found = [
        compare(f"cybn {layout} {REUSED} / floor{where}", some, is_cybn(layout, REUSED), _is_floor)
        for layout in (FIRST, LAST)
        for some, where in ((large, ", larger than the cache"), (records, ""))
    ]
    names = dict.fromkeys(r.contestant for r in records if r.peer not in ("cybn", FLOOR))
    for name in names:
        one = next(r for r in records if r.contestant == name)
        layout = LAST if one.layout == LAST else FIRST
        mine = is_cybn(layout, one.output)
        label = f"cybn {layout} {one.output} / {one.peer} {one.layout}"

        def of_name(r: Record, name: str = name) -> bool:
            return r.contestant == name

        found.append(compare(label, records, mine, of_name))
    for peer, output in dict.fromkeys((r.peer, r.output) for r in records):
        several = {r.layout for r in records if (r.peer, r.output) == (peer, output)}
        if peer == "cybn" or len(several) < 2:
            continue

        def of_peer(r: Record, key: tuple[str, str] = (peer, output)) -> bool:
            return (r.peer, r.output) == key

        for layout in (FIRST, LAST):
            label = f"cybn {layout} {output} / {peer}, its best layout"
            found.append(compare(label, records, is_cybn(layout, output), of_peer))
    return [comparison for comparison in found if comparison is not None]


def over_one_thread(results: Results, case: Case) -> Comparison | None:
    """Compare cybn on the threads of a case with itself on one, where x fits the cache."""
    one = case._replace(threads=1)
    if case == one:
        return None

    def mine(r: Record, threads: int) -> bool:
        return (r.peer, r.layout, r.output) == ("cybn", FIRST, REUSED) and r.threads == threads

    cache = results.settings["last-level cache"]
    records = [r for r in results.of(case) + results.of(one) if r.nbytes <= cache]
    return compare(
        f"cybn {FIRST} {REUSED}, {case.threads} threads / 1 thread, in the cache",
        records,
        lambda r: mine(r, case.threads),
        lambda r: mine(r, 1),
    )


def _is_floor(record: Record) -> bool:
    return record.peer == FLOOR


def summed_over_layers(
    results: Results, dtype: str, threads: int, peer: str, layout: str, output: str
) -> float | None:
    """Return the seconds of forward and backward over all 53 layers of ResNet-50.

    None where a shape or an operation was not measured.
    """
    total, layers = 0.0, 0
    for record in results.records:
        key = (record.group, record.dtype, record.threads, record.peer, record.layout)
        if key != ("resnet50", dtype, threads, peer, layout) or record.output != output:
            continue
        if record.operation in ("forward", "backward") and record.seconds is not None:
            total += record.layers * record.seconds
            layers += record.layers
    return total if layers == 2 * 53 else None
