"""Forwards without side effects: `preview`, and how a layer finds out that one is active.

A trial is stored in a context variable and not in the layer, so that it applies to one thread (or
task) only. Others may continue to train the same layer.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from threading import Lock
from typing import Any, Generic, TypeVar, cast
from weakref import ref

from ._moments import Moments

__all__ = ["Trial", "active", "preview"]

_Given = TypeVar("_Given")


class _End:
    """The descriptor `Trial.__exit__`: a ``with`` statement gets the `__exit__` of the lock."""

    def __get__(self, trial: Trial[Any] | None, owner: type) -> Callable[..., None]:
        return self if trial is None else trial._open.__exit__

    def __call__(self, trial: Trial[Any], *error: object) -> None:
        trial._open.release()  # `contextlib.ExitStack` calls the `__exit__` of the class


class Trial(Generic[_Given]):
    """A context manager in which forwards change nothing; it can be entered once.

    No interrupt can leave a thread in a trial. Python handles signals at the beginning of each
    Python function and after each call in it. So `__exit__` is that of a lock, which is written in
    C, and the trial begins with an assignment, after the last call in `__enter__`.

    Parameters
    ----------
    layer : Layer or None
        The layer whose forwards change nothing; None means every layer. `__enter__` returns it.
    training : bool
        The mode in which they run.
    note : callable, optional
        Called with the layer and the moments of its input.
    """

    __slots__ = ("_begun", "_given", "_open", "_whose", "note", "training")

    __exit__ = _End()

    def __init__(
        self,
        layer: _Given,
        *,
        training: bool,
        note: Callable[[Any, Moments], None] | None = None,
    ) -> None:
        self.training = training
        self.note = note
        self._given: _Given | None = layer
        self._whose = None if layer is None else ref(layer)  # weak, so that the layer can be freed
        self._begun = False
        self._open = Lock()
        self._open.acquire()  # until the trial is over

    def __enter__(self) -> _Given:
        if self._begun:
            raise RuntimeError("this context was entered before; make another one")
        layer = cast("_Given", self._given)
        self._given = None
        _trials.set((*_running(), self))
        self._begun = True
        return layer

    def tell(self, layer: Any, batch: Moments | None) -> None:
        """Pass the moments of the layer's input to the trial that records them, if there is one."""
        if self.note is not None and batch is not None and layer._running.tracks:
            self.note(layer, batch)

    def over(self) -> bool:
        """Return whether the block of the trial has ended."""
        return not self._open.locked()

    def holds_for(self, layer: object) -> bool:
        """Return whether forwards of `layer` change nothing now."""
        whose = self._whose
        return self._begun and not self.over() and (whose is None or whose() is layer)


_trials: ContextVar[tuple[Trial[Any], ...]] = ContextVar("cybn_trials", default=())


def _running() -> tuple[Trial[Any], ...]:
    """Return the trials of this context, and forget those that are over."""
    found = _trials.get()
    running = tuple(trial for trial in found if not trial.over())
    if len(running) < len(found):
        _trials.set(running)
    return running


def active(layer: object) -> Trial[Any] | None:
    """Return the innermost trial that applies to `layer`, or None."""
    if not _trials.get():
        return None
    current: Trial[Any]
    for current in reversed(_running()):
        if current.holds_for(layer):
            return current
    return None


def preview(self: _Given) -> Trial[_Given]:
    """Run forwards in training mode that change nothing, within a ``with`` block.

    In the block a forward normalizes as in training, in either mode. Running statistics,
    `num_batches_tracked` and the mode do not change. `backward` raises an error in the block. After
    the block, it uses the last forward before the block. Switches apply: a layer that is frozen, or
    has `use_batch_statistics` set, normalizes as it does in training. The preview applies to the
    calling thread (or task) only, so others may continue to train the layer. It ends with the
    block, also after an interrupt at its beginning or end.

    Returns
    -------
    context manager
        For one ``with`` block; its value is the layer.

    Examples
    --------
    >>> import numpy as np
    >>> from cybn import BatchNorm
    >>> bn = BatchNorm(1)
    >>> with bn.preview():
    ...     y = bn(np.array([[1.0], [3.0]]))
    >>> bn.num_batches_tracked
    0
    """
    return Trial(self, training=True)
