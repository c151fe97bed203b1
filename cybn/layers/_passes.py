"""The two passes of a batch norm: forward, which may learn, and backward."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any

from numpy.typing import ArrayLike, NDArray

from .. import functional
from .._arguments import array
from .._moments import Moments
from .._words import Masked
from . import _trials
from ._layer import Saved, marks_of, same_memory
from ._parts import require_two
from ._running import Running

if TYPE_CHECKING:
    from .batch_norm import BatchNorm

__all__ = ["backward", "forward", "measure", "through_fixed"]


def forward(
    self: BatchNorm,
    x: ArrayLike,
    residual: ArrayLike | None,
    mask: ArrayLike | None,
    weights: ArrayLike | None,
    lengths: ArrayLike | None,
    masked: Masked,
    out: NDArray[Any] | None,
    num_threads: int | None,
) -> NDArray[Any]:
    """Do what `BatchNorm.forward` says."""
    x = self._admit(x)
    if residual is not None:
        residual = array("residual", residual)
    running, trial = self._running, _trials.active(self)
    training = self._training if trial is None else trial.training
    learns = trial is None and training and running.tracks and running.updates
    noted = learns or (trial is not None and trial.note is not None)
    if learns and (out is not None or weights is not None):
        selected = {"mask": mask, "weights": weights, "lengths": lengths}
        _foresee(self, x, out, num_threads, selected)
    gamma, beta, axis, eps = self._gamma, self._beta, self._axis, self._eps
    activation, slope = self._activation, self._slope
    y: NDArray[Any]
    batch: Moments | None = None
    if running.normalizes_by_batch(training):
        way = self._way(training)
        y, statistics = way.forward(
            x,
            gamma,
            beta,
            axis=axis,
            eps=eps,
            activation=activation,
            slope=slope,
            residual=residual,
            mask=mask,
            weights=weights,
            lengths=lengths,
            masked=masked,
            out=out,
            num_threads=num_threads,
        )
        differentiate = way.backward
        batch = statistics if isinstance(statistics, Moments) else statistics.merged()
    else:
        if noted:  # before out, which may be x
            batch = measure(
                self, x, learns, num_threads, mask=mask, weights=weights, lengths=lengths
            )
        differentiate, statistics = through_fixed, running.values
        y = functional.batch_norm_inference(
            x,
            statistics.mean,
            statistics.var,
            gamma,
            beta,
            axis=axis,
            eps=eps,
            activation=activation,
            slope=slope,
            residual=residual,
            mask=mask,
            weights=weights,
            lengths=lengths,
            masked=masked,
            out=out,
            num_threads=num_threads,
        )
    if trial is not None:
        trial.tell(self, batch)
        return y
    saved = Saved(
        differentiate,
        statistics,
        x,
        marks_of(x, gamma, beta if activation else None, residual if activation else None),
        (axis, eps, activation, slope),
        residual,
    )
    if mask is not None or weights is not None or lengths is not None:
        saved = saved._replace(selected=(*deepcopy((mask, weights, lengths)), masked))
    if out is not None:
        saved = _in_place(saved, y, gamma, beta)
    if learns and batch is not None:
        running.learn(batch, self, saved)
    else:
        self._saved = saved
    return y


def _foresee(
    bn: BatchNorm, x: NDArray[Any], out: Any, num_threads: int | None, selected: dict[str, Any]
) -> None:
    """Refuse a batch that the running statistics could not learn from, before out is written."""
    running, weights = bn._running, selected["weights"]
    positions = None
    if weights is not None:
        positions = functional.positions_of(x, bn._axis, **selected)
    if positions is not None and positions.total <= running.ddof:
        raise ValueError(
            f"weights sum to {positions.total}; the sum must be more than running_ddof="
            f"{running.ddof}, as the running variance is m2 / (sum - running_ddof). "
            "Scale the weights so that one says how often a value counts, or make the layer "
            "with running_ddof=0"
        )
    if out is not None and running.policy == "raise":
        running.after(running.values, measure(bn, x, True, num_threads, **selected))


def measure(
    bn: BatchNorm,
    x: NDArray[Any],
    learns: bool = False,
    num_threads: int | None = None,
    **selected: Any,
) -> Moments:
    """Return the moments of a batch; ValueError where it is too small to learn from."""
    batch = bn._way(False).measure(x, axis=bn._axis, num_threads=num_threads, **selected)
    if learns:
        positions = functional.positions_of(x, bn._axis, **selected)
        number: Any = batch.count if positions is None else positions.number
        require_two(x, bn._axis, number, selected)
    return batch


def _in_place(
    saved: Saved, y: NDArray[Any], gamma: NDArray[Any] | None, beta: NDArray[Any] | None
) -> Saved:
    """Return what backward may need; y where it took the place of x, and tells what x was."""
    _, _, activation, slope = saved.settings
    lost = activation is not None and same_memory(saved.residual, y)
    if not lost and not same_memory(saved.x, y):
        return saved
    tells = activation is None or (activation == "leaky_relu" and slope > 0)
    if lost or saved.residual is not None or not tells:
        return saved._replace(x=None)
    return saved._replace(x=y, from_output=True, marks=marks_of(y, gamma, beta))


def through_fixed(
    dy: Any, x: NDArray[Any], running: Running, gamma: Any, **options: Any
) -> tuple[NDArray[Any], ...]:
    """Return the gradients of a forward by running statistics."""
    return functional.batch_norm_inference_backward(
        dy, x, running.mean, running.var, gamma, **options
    )


def backward(
    self: BatchNorm,
    dy: ArrayLike,
    out: NDArray[Any] | None,
    out_residual: NDArray[Any] | None,
    num_threads: int | None,
) -> Any:
    """Do what `BatchNorm.backward` says."""
    if _trials.active(self) is not None:
        raise RuntimeError("there is no backward in a preview: its forwards leave no trace")
    saved, x = self._last()
    own = self._own_gradients()
    axis, eps, activation, slope = saved.settings
    mask, weights, lengths, masked = saved.selected
    dx, dgamma, dbeta, *dresidual = saved.differentiate(
        dy,
        x,
        saved.statistics,
        self._gamma,
        beta=self._beta,
        axis=axis,
        eps=eps,
        activation=activation,
        slope=slope,
        residual=saved.residual,
        mask=mask,
        weights=weights,
        lengths=lengths,
        masked=masked,
        from_output=saved.from_output,
        out=out,
        out_residual=out_residual,
        num_threads=num_threads,
    )
    self._finish(own, (dgamma, dbeta))
    return (dx, *dresidual) if dresidual else dx
