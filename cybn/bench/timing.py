"""Measuring: check every contestant, then let them run in turn, round after round.

Contestants of one case run interleaved, so that whatever slows the machine down for a while
slows all of them. A turn is one figure: some untimed calls, which bring the contestant's data
into the caches and let the threads of the one before fall asleep, then timed calls, averaged.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .task import Contestant

__all__ = ["Figure", "check", "measure"]

_WARM = 0.002  # seconds of untimed calls before a turn, at least one call
_TURN = 0.01  # seconds of timed calls in a turn, at least one call
_LONG = 0.02  # seconds of a call that needs no untimed one before it
_MOST = 40  # rounds


@dataclass
class Figure:
    """What was found out about one contestant; seconds for one call."""

    contestant: Contestant
    turns: list[float]
    estimate: float = 0.0  # before the first turn
    error: str = ""  # why it was not timed

    @property
    def inner(self) -> int:
        """Timed calls in a turn."""
        return max(1, round(_TURN / self.estimate)) if self.estimate else 0

    @property
    def median(self) -> float:
        """The median of the turns; NaN where it was not timed."""
        return median(self.turns) if self.turns else float("nan")

    @property
    def minimum(self) -> float:
        """The quickest turn; NaN where it was not timed."""
        return min(self.turns, default=float("nan"))


def check(
    contestant: Contestant, expected: NDArray[Any], channels: Sequence[int], tolerance: float
) -> str:
    """Return what is wrong with a contestant's result; nothing where it is right.

    Parameters
    ----------
    contestant : Contestant
        It is called once.
    expected : ndarray
        Its right answer in these channels.
    channels : sequence of int
        The channels that are looked at.
    tolerance : float
        Largest error against the largest right value.
    """
    start = perf_counter()
    output = contestant.call()
    contestant.first = perf_counter() - start
    got = contestant.read(output, channels)
    if got.shape != expected.shape:
        return f"its result has shape {got.shape}, not {expected.shape}"
    error = np.max(np.abs(got - expected), initial=0)
    limit = tolerance * np.max(np.abs(expected), initial=0)
    return "" if error <= limit else f"its result is wrong by {error:.2g}; allowed is {limit:.2g}"


def measure(contestants: Sequence[Contestant], seconds: float, fewest: int = 3) -> list[Figure]:
    """Time contestants that have passed their check.

    Parameters
    ----------
    contestants : sequence of Contestant
        In the order in which they run in each round.
    seconds : float
        What all rounds may take, about.
    fewest : int, default 3
        Rounds that are run even if they take longer.
    """
    figures = [Figure(c, [], _estimate(c)) for c in contestants]
    until = perf_counter() + seconds
    enabled = gc.isenabled()
    gc.disable()
    try:
        for done in range(_MOST):
            if done >= fewest and perf_counter() > until:
                break
            for figure in figures:
                figure.turns.append(_turn(figure))
    finally:
        if enabled:
            gc.enable()
    return figures


def _estimate(contestant: Contestant) -> float:
    """Return about how long a call takes: the quickest of a few, the checked one included."""
    until = perf_counter() + _WARM
    found = contestant.first or _seconds(contestant, 1)
    while found < _LONG and perf_counter() < until:
        found = min(found, _seconds(contestant, 1))
    return found


def _turn(figure: Figure) -> float:
    call = figure.contestant.call
    if figure.estimate < _LONG:
        until = perf_counter() + _WARM
        call()
        while perf_counter() < until:
            call()
    return _seconds(figure.contestant, figure.inner)


def _seconds(contestant: Contestant, count: int) -> float:
    call, many = contestant.call, contestant.many
    start = perf_counter()
    if many is not None:
        many(count)
    else:
        for _ in repeat(None, count):
            call()
    return (perf_counter() - start) / count
