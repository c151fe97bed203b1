"""Forwards without a trace: what a layer looks up before it learns from a batch.

A trial lives in a context variable and not in the layer, so that it holds for one thread (or
task) alone: others go on training the same layer meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

from ..moments import Moments

__all__ = ["Trial", "active", "trial"]


class Trial(NamedTuple):
    """How forwards are to run for a while."""

    layer: object  # None: every layer
    training: bool
    note: Callable[[Any, Moments], None] | None  # told the layer and the moments of its input


_trials: ContextVar[tuple[Trial, ...]] = ContextVar("cybn_trials", default=())


def active(layer: object) -> Trial | None:
    """Return the innermost trial that `layer` is in."""
    current: Trial
    for current in reversed(_trials.get()):
        if current.layer is None or current.layer is layer:
            return current
    return None


@contextmanager
def trial(
    layer: object, *, training: bool, note: Callable[[Any, Moments], None] | None = None
) -> Iterator[None]:
    """Let forwards of `layer`, or of all where it is None, leave no trace within this context."""
    token = _trials.set((*_trials.get(), Trial(layer, training, note)))
    try:
        yield
    finally:
        _trials.reset(token)
