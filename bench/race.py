"""Timing: every contestant is checked, then all of them take turns, round after round.

So if something slows the machine down for a while, it slows all of them. A turn begins with some
untimed calls. They bring the contestant's data into the caches, and let the threads of the previous
contestant fall asleep. Then some calls are timed, and their average is the figure of the turn.
pytest-benchmark has the timer, and makes statistics, tables and JSON of the turns.
"""

from __future__ import annotations

import gc
import time
from typing import Any

import numpy as np
import pytest

from .task import AT_THE_KINK, FIRST, LAST, TOLERANCE, Contestant, Data, Peer, Task

WARM = 0.002  # seconds of untimed calls before a turn, at least one call
TURN = 0.01  # seconds of timed calls in a turn, at least one call
LONG = 0.02  # seconds of a call, from which it needs no untimed call before it
MOST = 40  # most rounds


def wrong(task: Task, data: Data, contestant: Contestant, result: Any) -> str:
    """Return a text that states what is wrong with a result; an empty one if it is right."""
    sample = data.sample(task)
    got = np.asarray(contestant.read(result))
    got = np.moveaxis(got, -1, 1) if contestant.layout == LAST else got
    if got.shape != task.shape:
        return f"its result has shape {got.shape}, not {task.shape}"
    if contestant.answer is not None:
        expected, tolerance = contestant.answer(sample).astype(np.float64), 0.0
    else:
        expected, tolerance = data.expected(task), TOLERANCE[task.dtype]
    error = np.abs(got[sample].astype(np.float64) - expected)
    limit = tolerance * np.max(np.abs(expected), initial=0)
    off = np.mean(~(error <= limit))  # NaN counts as off
    kinks = task.operation == "backward" and task.activation
    if off > (AT_THE_KINK if kinks else 0):
        return f"its result is wrong by {np.max(error):.2g}; allowed is {limit:.2g}"
    return ""


class Race:
    """The contestants of one case; made by the fixture `race`."""

    def __init__(self, benchmark: Any, group: str, seconds: float, fewest: int) -> None:
        self.benchmark, self.group, self.seconds, self.fewest = benchmark, group, seconds, fewest
        self.contestants: list[Contestant] = []
        self.errors: list[str] = []

    def enter(self, peer: Peer, task: Task, data: Data, info: dict[str, Any]) -> None:
        """Prepare and check the contestants of a peer for a task; report a failure at the end."""
        sizes = {"sizes": list(task.shape), "nbytes": task.nbytes, "least_bytes": task.least_bytes}
        known = {**task._asdict(), **sizes, **info, "work": task.work, "peer": peer.name}
        try:
            for one in peer.contestants(task, data):
                if one.layout in (FIRST, LAST):  # remove the result of the previous contestant
                    data.get("out", task.dtype, one.layout).fill(np.nan)
                one.before()
                start = time.perf_counter()
                result = one.call()
                one.estimate = time.perf_counter() - start
                one.info = known | {key: getattr(one, key) for key in ("layout", "output", "note")}
                if fault := wrong(task, data, one, result):
                    self.errors.append(
                        f"{peer.name} {one.layout} {one.output}, {task.work}: {fault}"
                    )
                else:
                    self.contestants.append(one)
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            words = f"{type(error).__name__}: {error}".splitlines()[0]
            self.errors.append(f"{peer.name}, {task.work}, {task.dtype}: {words}")

    def add(self, call: Any, before: Any = lambda: None, **info: Any) -> Contestant:
        """Enter a call that was checked elsewhere."""
        given = {"layout": "", "output": "", "note": ""} | info
        self.contestants.append(Contestant("", "", call, before=before, info=given))
        return self.contestants[-1]

    def run(self) -> None:
        """Let all contestants take turns; fail at the end if one had an error."""
        self.benchmark._mode = "race"  # so that the fixture knows that it was used
        if not self.benchmark.disabled:
            gc.disable()
            try:
                for one in self.contestants:
                    self._ready(one)
                self._turns()
            finally:
                gc.enable()
        if self.errors:
            pytest.fail("\n".join(["not timed:", *self.errors]), pytrace=False)

    def _ready(self, one: Contestant) -> None:
        """Estimate the time of a call, and begin its record in pytest-benchmark."""
        until = time.perf_counter() + WARM
        one.before()
        while one.estimate < LONG and time.perf_counter() < until:
            start = time.perf_counter()
            one.call()
            taken = time.perf_counter() - start
            one.estimate = min(one.estimate or taken, taken)
        one.calls = max(1, round(TURN / one.estimate)) if one.estimate else 1
        apart = ["work", "dtype", "threads"]  # in the name if they differ within a race
        apart = [key for key in apart if len({each.info.get(key) for each in self.contestants}) > 1]
        words = [one.info.get(key) for key in ("peer", "layout", "output", *apart)]
        self.benchmark.group = self.group
        self.benchmark.name = " ".join(str(word) for word in words if word)
        self.benchmark.extra_info = one.info
        one.stats = self.benchmark._make_stats(one.calls)

    def _turns(self) -> None:
        until = time.perf_counter() + self.seconds
        for done in range(MOST):
            if done >= self.fewest and time.perf_counter() > until:
                break
            for one in self.contestants:
                one.turns.append(self._turn(one))
                one.stats.update(one.turns[-1])

    def _turn(self, one: Contestant) -> float:
        """Return the seconds of all timed calls of a turn."""
        until = time.perf_counter() + WARM
        one.before()
        again = one.estimate < LONG
        while again:
            one.call()
            again = time.perf_counter() < until
        if one.many is not None:
            timed = self.benchmark._make_runner(one.many, (one.calls,), {})
            return timed(range(1))
        return self.benchmark._make_runner(one.call, (), {})(range(one.calls))
