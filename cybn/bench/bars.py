"""A bar, and what a run says about it: its figures, their bound, met or missed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from .ratios import geometric_mean
from .results import Results

__all__ = ["HEADS", "MICROSECONDS", "Bar", "Figures", "Line", "row"]

Figures = dict[str, float]  # by shape, or by group, shape and operation

MICROSECONDS = "us"


@dataclass(frozen=True)
class Bar:
    """One claim: figures of a run, one for each shape, and what they must not exceed."""

    name: str
    shapes: str
    bound: str  # such as "1/9"; empty where the figure stands for itself
    figures: Callable[[Results], Figures]
    expected: Callable[[Results], int]  # how many figures a complete run has
    each: bool = False  # whether each figure must keep the bound, or their geometric mean
    unit: str = ""  # of a figure that is no ratio

    @property
    def limit(self) -> float:
        """The bound as a number."""
        return float(Fraction(self.bound)) if self.bound else float("inf")


@dataclass
class Line:
    """A bar and what a run says about it."""

    bar: Bar
    figures: Figures
    expected: int

    @property
    def figure(self) -> float:
        """What is held against the bound; NaN where nothing was measured."""
        values = list(self.figures.values())
        if self.bar.each:
            return max(values, default=float("nan"))
        return geometric_mean(values)

    @property
    def verdict(self) -> str:
        """``met``, ``missed``, or why it is neither."""
        if not self.figures:
            return "not measured" if self.expected else "no such shape"
        if self.figure > self.bar.limit and (self.bar.each or self._complete):
            return "missed"
        if not self._complete:
            return f"only {len(self.figures)} of {self.expected} measured"
        return "met" if self.bar.bound else "no bar"

    @property
    def _complete(self) -> bool:
        return len(self.figures) >= self.expected

    @property
    def worst(self) -> tuple[str, float]:
        """The shape where cybn does least well."""
        return max(self.figures.items(), key=lambda item: item[1], default=("", float("nan")))

    @property
    def offenders(self) -> list[tuple[str, float]]:
        """Shapes above the bound, the worst first, of a bar that holds for each."""
        above = [item for item in self.figures.items() if item[1] > self.bar.limit]
        return sorted(above, key=lambda item: -item[1]) if self.bar.each else []


HEADS = ["bar", "shapes", "figure", "at most", "verdict", "worst", "on"]


def row(line: Line) -> list[str]:
    """Return a line of the table of bars, as words for `HEADS`."""
    shape, worst = line.worst
    unit = f" {line.bar.unit}" if line.bar.unit else ""
    if not line.figures:
        return [line.bar.name, line.bar.shapes, "-", line.bar.bound or "-", line.verdict, "-", ""]
    return [
        line.bar.name,
        line.bar.shapes,
        f"{line.figure:.3f}{unit}",
        f"{_bound(line.bar)}{unit}",
        line.verdict,
        f"{worst:.3f}{unit}",
        shape,
    ]


def _bound(bar: Bar) -> str:
    """Say a fraction as a decimal too, which is what the figure beside it is."""
    if not bar.bound:
        return "-"
    return f"{bar.bound} = {bar.limit:.3f}" if "/" in bar.bound else bar.bound
