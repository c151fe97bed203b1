"""The two passes of a batch norm: forward, which may learn, and backward."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import functional
from .._arguments import array, integer
from ..moments import Moments
from . import _parts, _settings, _trials
from ._parts import Part
from ._renorm import Renorm
from ._running import Running
from ._settings import Setting
from ._tracking import Tracking

__all__ = ["Passes"]


class _Saved(NamedTuple):
    """What backward needs of the last forward."""

    statistics: Moments | Running | list[Part]  # of the batch; fixed; of parts of the batch
    x: NDArray[Any] | None  # y where from_output; None where it was written over for good
    from_output: bool
    residual: NDArray[Any] | None  # None where there was none
    selected: Mapping[str, Any]  # mask, weights and lengths, where given
    mark: list[bytes] | None = None  # of what x is worked out from, where from_output


_ALL: Mapping[str, Any] = MappingProxyType({})  # nothing is selected


def _same_memory(a: NDArray[Any] | None, b: NDArray[Any] | None) -> bool:
    """Whether two arrays start at one address; they then are one, or `out` was refused."""
    if a is None or b is None:
        return False
    start: bool = a.__array_interface__["data"][0] == b.__array_interface__["data"][0]
    return start


class Passes(Tracking):
    """Forward and backward, by batch or by running statistics, whole or in parts."""

    _axes: ClassVar[dict[int, str]] = {}  # rank -> name of its axes; empty: any rank from 2

    axis = Setting(integer)
    activation = Setting(_settings.activation)
    slope = Setting(_settings.slope)
    virtual_batch_size = Setting(_settings.virtual_batch_size)
    renorm = Setting(_settings.renorm)

    _axis: int
    _activation: str | None
    _slope: float
    _virtual_batch_size: int | None
    _renorm: Renorm | None

    def __call__(
        self,
        x: ArrayLike,
        *,
        residual: ArrayLike | None = None,
        mask: ArrayLike | None = None,
        weights: ArrayLike | None = None,
        lengths: ArrayLike | None = None,
        masked: str = "normalize",
        out: NDArray[Any] | None = None,
        num_threads: int | None = None,
    ) -> NDArray[Any]:
        """Call `forward`."""
        return self.forward(
            x,
            residual=residual,
            mask=mask,
            weights=weights,
            lengths=lengths,
            masked=masked,
            out=out,
            num_threads=num_threads,
        )

    def forward(
        self,
        x: ArrayLike,
        *,
        residual: ArrayLike | None = None,
        mask: ArrayLike | None = None,
        weights: ArrayLike | None = None,
        lengths: ArrayLike | None = None,
        masked: str = "normalize",
        out: NDArray[Any] | None = None,
        num_threads: int | None = None,
    ) -> NDArray[Any]:
        """Normalize a batch; in training mode, move the running statistics.

        Parameters
        ----------
        x : array_like of float32, float64, float16 or bfloat16
            C values along the channel axis. Kept by reference for `backward`.
        residual : array_like, shape and dtype of `x`, optional
            Added before the activation. Kept by reference for `backward`.
        mask, weights, lengths : array_like, optional
            Which positions count, and how often; as in `batch_norm`. Batch and running statistics
            are those of what counts; `backward` gives 0 elsewhere, in eval mode too. Kept by
            reference for `backward`.
        masked : {"normalize", "zero"}, default "normalize"
            What y is where a position does not count.
        out : ndarray, optional
            Where y goes: shape and dtype of `x`. May be `x` itself; then `backward` works from
            y, if the activation is None or leaky_relu. May be `residual` itself; then there is
            no backward through an activation, which needs it.
        num_threads : int, optional
            Threads for this call; `cybn.get_num_threads` where None.

        Returns
        -------
        ndarray
            `out`, or a new array with the dtype and memory layout of `x`.

        Raises
        ------
        TypeError, ValueError
            As in `batch_norm`, and if the rank or the number of channels of `x` is not the
            layer's. ValueError, if a mask meets virtual batches or renormalization, or if weights
            sum to no more than `running_ddof` and are to move the running variance.
        FloatingPointError
            With ``nan_policy="raise"``, where the running statistics would not stay finite. With
            `out` as well, statistics are taken once more beforehand, to leave it as it was. A
            `backward` then still belongs to the forward before.
        """
        x = self._admit(x)
        trial = _trials.active(self)
        all_of_it = mask is None and weights is None and lengths is None and masked == "normalize"
        if all_of_it and out is None and residual is None and trial is None:
            quick = self._quick(x, num_threads)
            if quick is not None:
                return quick
        residual = None if residual is None else array("residual", residual)
        training = self.training if trial is None else trial.training
        learns = trial is None and self._learns(training)
        functional.is_zero(masked)  # known, or an error
        selected: dict[str, Any] = {}
        if not (mask is None and weights is None and lengths is None):
            given = {"mask": mask, "weights": weights, "lengths": lengths}
            selected = self._selected(x, given, training, learns)
        if learns and out is not None and self._nan_policy == "raise":
            self._after(self._running, self._measure(x, learns, num_threads, **selected))
        options: dict[str, Any] = {
            "axis": self._axis,
            "eps": self._eps,
            "activation": self._activation,
            "slope": self._slope,
            "residual": residual,
            "out": out,
            "num_threads": num_threads,
        }
        if selected:
            options |= selected | {"masked": masked}
        y: NDArray[Any]
        statistics: Moments | Running | list[Part]
        batch: Moments | None = None
        noted = learns or (trial is not None and trial.note is not None)
        if self._by_batch(training):
            y, statistics = self._normalize_by_batch(x, training, options)
            if noted:
                batch = self._whole(statistics)
        else:
            if noted:
                # before out, which may be x
                batch = self._measure(x, learns, num_threads, **selected)
            statistics = running = self._running
            y = functional.batch_norm_inference(
                x, running.mean, running.var, self.gamma, self.beta, **options
            )
        if trial is not None:
            if trial.note is not None and batch is not None and self._track_running_stats:
                trial.note(self, batch)
            return y
        if out is None:
            saved = _Saved(statistics, x, False, residual, selected)
        else:
            saved = self._keep(statistics, x, y, residual, selected)
        if learns and batch is not None:
            self._learn(batch, saved)
        else:
            self._saved = saved
        return y

    def _quick(self, x: NDArray[Any], num_threads: int | None) -> NDArray[Any] | None:
        """Do what `forward` does for a batch with nothing special about it; else None.

        Most of `forward` is asking, which for a small batch takes longer than the answer.
        """
        if self._normalize is not functional.batch_norm:  # a subclass has a way of its own
            return None
        if self._virtual_batch_size is not None or self._renorm is not None:
            return None
        training = self.training
        learns = self._learns(training)
        options = functional.activation_of(self._activation, self._slope), None, num_threads
        if not self._by_batch(training):
            running = self._running
            given = x, running.mean, running.var, self.gamma, self.beta, self._axis, self._eps
            y = None if learns else functional.plain_inference(*given, *options)
            if y is not None:
                self._saved = _Saved(running, x, False, None, _ALL)
            return y
        done = functional.plain_forward(x, self.gamma, self.beta, self._axis, self._eps, *options)
        if done is None:
            return None
        y, batch = done
        saved = _Saved(batch, x, False, None, _ALL)
        if learns:
            self._learn(batch, saved)
        else:
            self._saved = saved
        return y

    def _selected(
        self, x: NDArray[Any], given: dict[str, Any], training: bool, learns: bool
    ) -> dict[str, Any]:
        """Return what selects values, nothing where all of them count; ValueError if unfit."""
        selected = {name: value for name, value in given.items() if value is not None}
        positions = functional.positions_of(x, self._axis, **selected)
        if positions is None:
            return {}
        parts = self._virtual_batch_size is not None or self._renorm is not None
        if parts and training and self._by_batch(training):
            raise ValueError(
                f"{', '.join(selected)} given to a layer with virtual_batch_size="
                f"{self._virtual_batch_size} and renorm={self._renorm}; in training it must have "
                "neither. Train such layers without a mask, or make one without them"
            )
        if learns and "weights" in selected and positions.total <= self._running_ddof:
            raise ValueError(
                f"weights sum to {positions.total}; the sum must be more than running_ddof="
                f"{self._running_ddof}, as the running variance is m2 / (sum - running_ddof). "
                "Scale the weights so that one says how often a value counts, or make the layer "
                "with running_ddof=0"
            )
        return selected

    def _normalize_by_batch(
        self, x: NDArray[Any], training: bool, options: dict[str, Any]
    ) -> tuple[NDArray[Any], Moments | list[Part]]:
        """Return y and what backward needs; in parts or renormalized where training is so."""
        if not training or (self._virtual_batch_size is None and self._renorm is None):
            return self._normalize(x, self.gamma, self.beta, **options)
        self._check_renorm()
        return _parts.forward(
            x,
            self.gamma,
            self.beta,
            size=self._virtual_batch_size,
            limits=self._renorm,
            running=self._running,
            **options,
        )

    def _check_renorm(self) -> None:
        """Refuse to renormalize towards running statistics that are not kept."""
        if self._renorm is not None and not self._track_running_stats:
            raise ValueError("renorm needs running statistics; track_running_stats is False")

    def _whole(self, statistics: Moments | list[Part]) -> Moments:
        """Return the statistics of a batch that the running ones move towards."""
        return statistics if isinstance(statistics, Moments) else _parts.merged(statistics)

    def _measure(
        self, x: NDArray[Any], learns: bool, num_threads: int | None, **selected: Any
    ) -> Moments:
        """Return the moments of a batch; ValueError where it is too small to learn from."""
        batch = functional.moments(x, axis=self._axis, num_threads=num_threads, **selected)
        if learns:
            positions = functional.positions_of(x, self._axis, **selected)
            functional._check_batch(x, self._axis, positions)
        return batch

    def _keep(
        self,
        statistics: Moments | Running | list[Part],
        x: NDArray[Any],
        y: NDArray[Any],
        residual: NDArray[Any] | None,
        selected: Mapping[str, Any],
    ) -> _Saved:
        """Return what backward may need; y where it took the place of x, and tells what x was."""
        lost = self._activation is not None and _same_memory(residual, y)
        if not lost and not _same_memory(x, y):
            return _Saved(statistics, x, False, residual, selected)
        tells = self._activation is None or (self._activation == "leaky_relu" and self._slope > 0)
        if lost or residual is not None or not tells:
            return _Saved(statistics, None, False, residual, selected)
        return _Saved(statistics, y, True, None, selected, self._mark(y))

    def _mark(self, y: NDArray[Any]) -> list[bytes]:
        """Return gamma, beta and a few values of y: some change where y is written over."""
        few = y[tuple(slice(None, None, max(1, n // 4)) for n in y.shape)]
        return [array.tobytes() for array in (few, self.gamma, self.beta) if array is not None]

    def backward(
        self,
        dy: ArrayLike,
        *,
        out: NDArray[Any] | None = None,
        out_residual: NDArray[Any] | None = None,
        num_threads: int | None = None,
    ) -> Any:
        """Return the gradient of the last forward's input; fill `grad_gamma` and `grad_beta`.

        Goes through the batch statistics if that forward used them, else through the running
        ones as constants. The input is let go of afterwards: one backward a forward.

        Parameters
        ----------
        dy : array_like, shape and dtype of the last forward's input
            Gradient with respect to y.
        out : ndarray, optional
            Where dx goes; may be `dy` itself.
        out_residual : ndarray, optional
            Where dresidual goes; must not overlap another array.
        num_threads : int, optional
            Threads for this call; `cybn.get_num_threads` where None.

        Returns
        -------
        dx : ndarray
            `out`, or a new array with the dtype and memory layout of the input.
        dresidual : ndarray
            Gradient of the residual; only where the forward had one: ``dx, dr = ...``.

        Raises
        ------
        RuntimeError
            If there was no forward since the last backward, or it wrote over its input and y
            does not tell what that was, or y, gamma or beta has changed since.
        TypeError, ValueError
            If `dy` or `out` does not fit the input; ValueError, if the forward wrote over its
            input, and a gamma is 0.
        """
        if _trials.active(self) is not None:
            raise RuntimeError("there is no backward in a preview: its forwards leave no trace")
        saved = self._last("input or residual, which backward needs with this activation")
        if saved.mark is not None and saved.mark != self._mark(saved.x):
            raise RuntimeError(
                "the last forward wrote its output over its input, and that output, gamma or beta "
                "has changed since; backward needs all three. Give forward, or what came after it, "
                "another out"
            )
        own = self._own(self._gradient_names)
        options: dict[str, Any] = {
            "beta": self.beta,
            "axis": self._axis,
            "eps": self._eps,
            "activation": self._activation,
            "slope": self._slope,
            "residual": saved.residual,
            **saved.selected,
            "from_output": saved.from_output,
            "out": out,
            "out_residual": out_residual,
            "num_threads": num_threads,
        }
        if isinstance(saved.statistics, Moments):
            dx, dgamma, dbeta, *dresidual = self._differentiate(
                dy, saved.x, saved.statistics, self.gamma, **options
            )
        elif isinstance(saved.statistics, list):
            dx, dgamma, dbeta, *dresidual = _parts.backward(
                dy, saved.x, saved.statistics, self.gamma, **options
            )
        else:
            mean, var, _ = saved.statistics
            dx, dgamma, dbeta, *dresidual = functional.batch_norm_inference_backward(
                dy, saved.x, mean, var, self.gamma, **options
            )
        self._write(own, (dgamma, dbeta) if self.train_affine else (0, 0), saved=None)
        return (dx, *dresidual) if dresidual else dx

    def _admit(self, x: ArrayLike) -> NDArray[Any]:
        """Return `x` as an array; ValueError unless its rank and channels are the layer's."""
        if not isinstance(x, np.ndarray):
            x = array("x", x)
        if self._axes and x.ndim not in self._axes:
            takes = " or ".join(self._axes.values())
            raise ValueError(f"x has shape {x.shape}; {type(self).__name__} takes {takes}")
        if -x.ndim <= self._axis < x.ndim and x.shape[self._axis] != self._num_features:
            raise ValueError(
                f"x has shape {x.shape}, with {x.shape[self._axis]} channels on axis {self._axis}; "
                f"this {type(self).__name__} has num_features={self._num_features}"
            )
        return x
