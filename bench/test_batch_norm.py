"""Layers of real networks: training forward, inference and backward of every peer."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

from cybn.bench.task import Contestant

SECONDS = 0.3  # for one test, about
ROUNDS = 5, 50


def test_batch_norm(timed: Callable[[int, int], None], contestant: Contestant) -> None:
    start = perf_counter()
    contestant.call()
    once = perf_counter() - start
    fewest, most = ROUNDS
    timed(1, min(most, max(fewest, round(SECONDS / once))))
