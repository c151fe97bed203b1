"""Tiny batches on one thread, where the call itself is what takes the time."""

from __future__ import annotations

from collections.abc import Callable

CALLS, ROUNDS = 1000, 7


def test_small_call(timed: Callable[[int, int], None]) -> None:
    timed(CALLS, ROUNDS)
