"""Timing: every contestant is checked, then all of them run in turn, round after round.

So whatever slows the machine down for a while slows all of them. A turn is one figure: some untimed
calls, which bring the contestant's data into the caches and let the threads of the one before fall
asleep, then timed calls, averaged. The turns go to pytest-benchmark: its timer, statistics, tables
and JSON.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from .task import AT_THE_KINK, FIRST, LAST, REUSED, TOLERANCE, Contestant, Data, Peer, Task

WARM = 0.002  # seconds of untimed calls before a turn, at least one call
TURN = 0.01  # seconds of timed calls in a turn, at least one call
LONG = 0.02  # seconds of a call that needs no untimed one before it
MOST = 40  # rounds


@dataclass
class Runner:
    """A contestant in its race: what is known of it, how it is called, and its turns."""

    contestant: Contestant
    info: dict[str, Any]  # of the record
    calls: int = 1  # timed calls in a turn
    estimate: float = 0.0
    stats: Any = None  # of pytest-benchmark

    def words(self, *keys: str) -> str:
        """Return some of what is known, in words."""
        return " ".join(str(self.info[key]) for key in keys if self.info.get(key))


def wrong(task: Task, data: Data, contestant: Contestant, result: Any) -> str:
    """Return what is wrong with a result; nothing where it is right."""
    sample = data.sample(task)
    got = np.asarray(contestant.read(result))
    if got.shape != task.shape:
        return f"its result has shape {got.shape}, not {task.shape}"
    if contestant.answer is not None:
        expected, tolerance = contestant.answer(sample).astype(np.float64), 0.0
    else:
        expected, tolerance = data.expected(task), TOLERANCE[task.dtype]
    error = np.abs(got[sample].astype(np.float64) - expected)
    limit = tolerance * np.max(np.abs(expected), initial=0)
    off = np.mean(~(error <= limit))  # NaN is off
    kinks = task.operation == "backward" and task.activation
    if off > (AT_THE_KINK if kinks else 0):
        return f"its result is wrong by {np.max(error):.2g}; allowed is {limit:.2g}"
    return ""


class Race:
    """Contestants of one case; made by the fixture `race`."""

    def __init__(self, benchmark: Any, group: str, seconds: float, fewest: int) -> None:
        self.benchmark, self.seconds, self.fewest = benchmark, seconds, fewest
        self.group = group
        self.runners: list[Runner] = []
        self.errors: list[str] = []

    def enter(self, peer: Peer, task: Task, data: Data, info: dict[str, Any]) -> None:
        """Prepare and check what a peer has for a task; a failure is kept, and told at the end."""
        sizes = {"sizes": list(task.shape), "nbytes": task.nbytes, "least_bytes": task.least_bytes}
        known = {**task._asdict(), **sizes, **info, "work": task.work, "peer": peer.name}
        try:
            for one in peer.contestants(task, data):
                if one.output == REUSED and one.layout in (FIRST, LAST):
                    # The answer of the one before is not ours.
                    data.get("out", task.dtype, one.layout).fill(np.nan)
                start = time.perf_counter()
                result = one.call()
                estimate = time.perf_counter() - start
                places = {"layout": one.layout, "output": one.output, "note": one.note}
                if fault := wrong(task, data, one, result):
                    self.fail(f"{peer.name} {one.layout} {one.output}, {task.work}: {fault}")
                else:
                    self.runners.append(Runner(one, known | places, estimate=estimate))
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            words = f"{type(error).__name__}: {error}".splitlines()[0]
            self.fail(f"{peer.name}, {task.work}, {task.dtype}: {words}")

    def add(self, call: Callable[[], object], **info: Any) -> Runner:
        """Enter a call that was checked elsewhere."""
        one = Contestant(info.get("layout", ""), info.get("output", ""), call, np.asarray)
        self.runners.append(Runner(one, {"layout": "", "output": "", "note": ""} | info))
        return self.runners[-1]

    def fail(self, words: str) -> None:
        """Keep why somebody is not timed."""
        self.errors.append(words)

    def run(self) -> None:
        """Let all of them take turns; fail at the end if somebody could not."""
        self.benchmark._mode = "race"  # so that the fixture knows that it was used
        if not self.benchmark.disabled:
            enabled = gc.isenabled()
            gc.disable()
            try:
                self._turns([self._ready(runner) for runner in self.runners])
            finally:
                if enabled:
                    gc.enable()
        if self.errors:
            pytest.fail("\n".join(["not timed:", *self.errors]), pytrace=False)

    def _ready(self, runner: Runner) -> Runner:
        """Estimate a call, and open the record at pytest-benchmark."""
        one = runner.contestant
        until = time.perf_counter() + WARM
        if one.before:
            one.before()
        while runner.estimate < LONG and time.perf_counter() < until:
            start = time.perf_counter()
            one.call()
            taken = time.perf_counter() - start
            runner.estimate = min(runner.estimate or taken, taken)
        runner.calls = max(1, round(TURN / runner.estimate)) if runner.estimate else 1
        apart = ("work", "dtype", "threads")  # said where they differ in a race
        several = len({one.words(*apart) for one in self.runners}) > 1
        keys = ("peer", "layout", "output", *(apart if several else ()))
        self.benchmark.group, self.benchmark.name = self.group, runner.words(*keys)
        self.benchmark.extra_info = runner.info
        runner.stats = self.benchmark._make_stats(runner.calls)
        return runner

    def _turns(self, runners: Iterable[Runner]) -> None:
        runners = list(runners)
        until = time.perf_counter() + self.seconds
        for done in range(MOST):
            if done >= self.fewest and time.perf_counter() > until:
                break
            for runner in runners:
                runner.stats.update(self._turn(runner))

    def _turn(self, runner: Runner) -> float:
        """Return the seconds of all timed calls of a turn."""
        one = runner.contestant
        if one.before:
            one.before()
        if runner.estimate < LONG:
            until = time.perf_counter() + WARM
            one.call()
            while time.perf_counter() < until:
                one.call()
        if one.many is not None:
            timed = self.benchmark._make_runner(one.many, (runner.calls,), {})
            return timed(range(1))
        return self.benchmark._make_runner(one.call, (), {})(range(runner.calls))
