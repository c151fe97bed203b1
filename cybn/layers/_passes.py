"""The two passes of a layer: forward, which may update running statistics, and backward.

`forward` is that of batch and instance norms; `backward` serves every layer. Layers differ in their
`Way` to normalize by a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from numpy.typing import ArrayLike, NDArray

from .. import _dispatch, _trials
from .._arguments import array
from .._moments import Moments
from . import _state
from ._running import Running

if TYPE_CHECKING:
    from ._layer import Layer
    from ._tracking import Tracking

__all__ = ["ALL", "WHOLE", "Saved", "Way", "backward", "forward"]

Array: TypeAlias = NDArray[Any]

Selected: TypeAlias = tuple[Any, Any, Any, str]  # mask, weights, lengths and masked

ALL: Selected = (None, None, None, "normalize")  # every position counts
_new = tuple.__new__  # takes half the time of the constructor of a NamedTuple


class Way(NamedTuple):
    """How a layer normalizes by the batch.

    ``forward(x, gamma, beta, residual, settings, selected, out, num_threads)`` returns y and its
    statistics; ``backward(dy, x, statistics, gamma, beta, residual, settings, selected,
    from_output, out, out_residual, num_threads)`` returns the gradients; ``pool(statistics)``
    returns the moments of the batch. Settings are axis, eps, activation and slope.
    """

    forward: Callable[..., tuple[Array, Any]]
    backward: Callable[..., tuple[Array, ...]]
    pool: Callable[[Any], Moments]
    inverts: bool = False  # whether backward can work from y
    checks: bool = False  # whether forward checks the new running statistics before it writes


WHOLE = Way(  # the functions are looked up when they are called
    lambda *given: _dispatch.forward(*given),
    lambda *given: _dispatch.backward(*given),
    lambda moments: moments,
    inverts=True,
)


class Saved(NamedTuple):
    """The data of the last forward that backward needs."""

    differentiate: Callable[..., tuple[Array, ...]]  # `Way.backward`
    statistics: Any
    x: Array | None  # None if an output was written over it
    marks: tuple[bytes | None, ...]  # a few values of each array, which reveal most changes
    residual: Array | None
    settings: Any  # of the layer: they may have been assigned since
    selected: Selected = ALL
    from_output: bool = False  # whether x is the output, from which the input is recovered


def forward(
    self: Tracking,
    x: ArrayLike,
    residual: ArrayLike | None,
    selected: Selected,
    out: Array | None,
    num_threads: int | None,
    way: Way | None = None,
) -> Array:
    """Normalize a batch; in training, update the running statistics.

    A `way` that is given normalizes in any mode. If it is None, the mode and the layer decide.
    """
    x = self._admit(x)
    if residual is not None:
        residual = array("residual", residual)
    running, trial = self._running, _trials.active(self)
    before, training = running.values, self._training if trial is None else trial.training
    learns = trial is None and training and running.tracks and running.updates
    gamma, beta, activation = self._gamma, self._beta, self._activation
    settings = self._axis, self._eps, activation, self._slope
    given = gamma, beta, residual, settings, selected, out, num_threads
    y: Array
    batch: Moments | None = None
    after: Running | None = None
    statistics: Any
    if way is None:
        way = self._way(training)
    if way is not None:
        refused = running.policy == "raise" or (selected[1] is not None and way is not WHOLE)
        if learns and out is not None and refused and not way.checks:
            # Raises if the running statistics cannot be updated, before anything is written.
            running.after(before, self._measure(x, selected, num_threads, least=2))
        if learns and way is WHOLE:
            weight = running.weight(before)
            mean, var = before.mean, before.var
            y, batch, mean, var = _dispatch.learn(x, *given, mean, var, weight, running.ddof)
            statistics, after = batch, _new(Running, (mean, var, before.batches + 1))
        else:
            y, statistics = way.forward(x, *given)
            if running.tracks:
                batch = way.pool(statistics)
    else:
        if learns or trial is not None:  # before out, which may be x
            batch = self._measure(x, selected, num_threads, least=2 if learns else 1)
            if learns:
                after = running.after(before, batch)
        way, statistics = WHOLE, before
        y = _dispatch.inference(x, before.mean, before.var, *given)
    if trial is not None:
        trial.tell(self, batch)
        return y
    marks: Any = (x, gamma, beta, residual) if activation else (x, gamma, None, None)
    kept: Array | None = x
    inverts = False
    if out is not None:
        kept, inverts = _kept(way, x, y, residual, activation, self._slope)
        marks = (kept, gamma, beta, None) if inverts else (kept, *marks[1:])
    if selected is not ALL:
        selected = (*deepcopy(selected[:3]), selected[3])
    found = _dispatch.marks(*marks)
    saved: Saved = _new(
        Saved, (way.backward, statistics, kept, found, residual, settings, selected, inverts)
    )
    if learns and batch is not None:
        running.learn(before, after, batch, self, saved)
    else:
        self._saved = saved
    return y


def _kept(
    way: Way, x: Array, y: Array, residual: Array | None, activation: str | None, slope: float
) -> tuple[Array | None, bool]:
    """Return the array that backward is to read, or None if y replaced it, and whether it is y."""
    at = y.ctypes.data  # an input that starts there is y itself, or `out` was refused
    lost = activation is not None and residual is not None and residual.ctypes.data == at
    if not lost and x.ctypes.data != at:
        return x, False
    tells = activation is None or (activation == "leaky_relu" and slope > 0)
    if lost or residual is not None or not tells or not way.inverts:
        return None, False
    return y, True


def backward(
    self: Layer,
    dy: Any,
    out: Any,
    out_residual: Any,
    num_threads: int | None,
    differentiate: Callable[..., tuple[Array, ...]] | None = None,
) -> Any:
    """Return dx and, if there was a residual, its gradient; fill the layer's gradients.

    `differentiate` replaces the function that the forward saved.
    """
    if self._running is not None and _trials.active(self) is not None:
        raise RuntimeError("there is no backward in a preview, whose forwards are not stored")
    saved, x = _last(self)
    own = self._own([f"grad_{name}" for name in self._names])
    given = self._gamma, self._beta, *saved[4:]  # residual and what follows it
    if differentiate is None:
        differentiate = saved.differentiate
    dx, *gradients = differentiate(dy, x, saved.statistics, *given, out, out_residual, num_threads)
    values = _state.fitting(own, gradients if self._train_affine else (0.0, 0.0))
    both = len(own) == 2
    # From here on there is no call and no loop: Python looks for interrupts only there.
    if both:
        own[0][...], own[1][...] = values
    elif own:
        own[0][...] = values[0]
    self._saved = None
    return dx if saved.residual is None else (dx, gradients[2])


def _last(self: Layer) -> tuple[Saved, Array]:
    """Return what the last forward saved, and its x; raise RuntimeError if backward needs more."""
    saved = self._saved
    if saved is None:
        raise RuntimeError(
            "call forward before backward; each forward can be used by one backward only"
        )
    x, had = saved.x, saved.marks
    if x is None:
        raise RuntimeError(
            "the last forward wrote its output over its input or residual, which backward "
            "needs; give forward another out"
        )
    beta = None if had[2] is None else self._beta
    residual = None if had[3] is None else saved.residual
    now = _dispatch.marks(x, self._gamma, beta, residual)
    if now != had:
        names = "y" if saved.from_output else "x", "gamma", "beta", "residual"
        changed = [name for name, a, b in zip(names, now, had, strict=True) if a != b]
        over = ", which wrote y over its input," * saved.from_output
        raise RuntimeError(
            f"{' and '.join(changed)} {'has' if len(changed) == 1 else 'have'} changed since "
            f"the last forward{over} and backward needs what was there. Call backward first, "
            "and then change it, or give forward a copy"
        )
    return saved, x
