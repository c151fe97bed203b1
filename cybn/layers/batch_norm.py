"""BatchNorm, for any rank and axis, and its forms for inputs of one rank."""

from __future__ import annotations

from typing import Any, ClassVar, overload

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from .. import _dispatch, functional
from .._arguments import check_batch, integer_from
from .._moments import Moments
from .._words import Activation, Masked, NanPolicy
from . import _passes, _settings
from ._parts import Renorm, parts_of
from ._passes import ALL, Selected, Way
from ._settings import Setting, optional
from ._tracking import Tracking

__all__ = ["BatchNorm", "BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]


class BatchNorm(Tracking):
    """Batch normalization over arrays of any rank from 2.

    In training mode each channel is normalized with the mean and biased variance of the batch, and
    the running statistics are updated. In eval mode it is normalized with the running statistics.

    Parameters
    ----------
    num_features : int
        C, the number of channels.
    axis : int, default 1
        The channel axis of the input. Negative numbers count from the end.
    eps : float, default 1e-5
        Added to the variance. Positive, or 0 for a layer that is only used in inference.
    momentum : float or None, default 0.1
        Weight of the new batch in the running statistics, in [0, 1], as in PyTorch. None means the
        average over all batches so far.
    affine : bool, default True
        Whether the layer has gamma and beta.
    track_running_stats : bool, default True
        Whether the layer has running statistics. Without them eval mode uses the batch's.
    running_ddof : {1, 0}, default 1
        1: `running_var` follows the unbiased variance, as in PyTorch; 0: the biased one.
    dtype : dtype, default float32
        The type of gamma, beta, their gradients and the running statistics: float32 or float64.
        Inputs may have either type or a half type.
    activation : {None, "relu", "relu6", "leaky_relu", "sigmoid", "tanh", "silu", "gelu", \
            "hardswish"}
        Applied to the normalized values plus the residual, in the same pass; see `batch_norm`.
    slope : float, default 0.01
        The slope of leaky_relu for negative arguments.
    nan_policy : {"propagate", "raise", "skip"}, default "propagate"
        What to do with a training batch that would make running statistics NaN or infinite:
        "propagate" lets them become so, "raise" raises FloatingPointError with nothing changed, and
        "skip" leaves the running statistics and `num_batches_tracked` unchanged.
    virtual_batch_size : int, optional
        Ghost batches: in training, normalize that many samples at a time, by their own statistics.
        The last virtual batch has the remaining samples. One with fewer than two used values per
        channel is joined to the next, and the last to the one before. The running statistics use
        the statistics of the whole batch.
    renorm : Renorm, optional
        Batch renormalization, within these limits.

    Attributes
    ----------
    gamma, beta, grad_gamma, grad_beta, training
        As in `Layer`. The arrays have shape (C,), or are None.
    running_mean, running_var : ndarray, shape (C,), or None
        0 and 1 at the start. Each training step replaces them by new arrays.
    num_batches_tracked : int
        Training steps so far.
    update_statistics : bool
        Whether a training forward updates the running statistics.
    use_batch_statistics : bool or None
        Whether a batch is normalized with its own statistics (True) or the running ones (False).
        None, the default, means its own in training mode and the running ones in eval mode.
    train_affine : bool
        Whether gamma and beta are trained. If not, `parameters` and `gradients` are empty, and
        `backward` sets their gradients to 0, for optimizers that refer to the arrays.

    Raises
    ------
    ValueError, TypeError
        If an argument is out of its range or of another type.

    Notes
    -----
    The layer refers to the input of a forward, without a copy, until the next forward or backward.
    Do not change it in between, nor gamma, nor with an activation beta and the residual; `backward`
    compares a few values and raises an error if they have changed.

    A forward that overwrites its input (``out=x``) needs one array instead of two. Without an
    activation, or with leaky_relu, backward recovers the input from y; with any other activation it
    raises an error.

    If a call raises an error, nothing has changed. Several threads may share a layer: no update of
    the running statistics is lost, and backward belongs to the last forward.

    References
    ----------
    Ioffe and Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing
    Internal Covariate Shift", 2015. Ghost batches: Hoffer, Hubara and Soudry, "Train longer,
    generalize better", 2017. Renormalization: see `Renorm`.

    Examples
    --------
    >>> import numpy as np
    >>> from cybn import BatchNorm
    >>> bn = BatchNorm(2, axis=-1)
    >>> y = bn(np.array([[1.0, 10.0], [3.0, 30.0]], dtype=np.float32))
    >>> bn.running_mean
    array([0.2, 2. ], dtype=float32)
    """

    activation = Setting(_settings.activation)
    slope = Setting(_settings.slope)
    virtual_batch_size = Setting(optional(integer_from))
    renorm = Setting(optional(_settings.renorm))

    _virtual_batch_size: int | None
    _renorm: Renorm | None

    def __init__(
        self,
        num_features: int,
        *,
        axis: int = 1,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        running_ddof: int = 1,
        dtype: DTypeLike = np.float32,
        activation: Activation | None = None,
        slope: float = 0.01,
        nan_policy: NanPolicy = "propagate",
        virtual_batch_size: int | None = None,
        renorm: Renorm | None = None,
    ) -> None:
        statistics = momentum, track_running_stats, running_ddof
        super().__init__(num_features, affine, dtype, axis, eps, *statistics)
        self.activation, self.slope, self.nan_policy = activation, slope, nan_policy
        self.virtual_batch_size, self.renorm = virtual_batch_size, renorm
        self._check_renorm()

    def forward(
        self,
        x: ArrayLike,
        *,
        residual: ArrayLike | None = None,
        mask: ArrayLike | None = None,
        weights: ArrayLike | None = None,
        lengths: ArrayLike | None = None,
        masked: Masked = "normalize",
        out: NDArray[Any] | None = None,
        num_threads: int | None = None,
    ) -> NDArray[Any]:
        """Normalize a batch; in training mode, update the running statistics.

        Parameters
        ----------
        x : array_like of float32, float64, float16 or bfloat16
            C values along the channel axis.
        residual : array_like, shape and dtype of `x`, optional
            Added before the activation. The layer refers to it until `backward`, as to `x`.
        mask, weights, lengths : array_like, optional
            Which positions are used, and their weights, as in `batch_norm`. Batch and running
            statistics ignore the other positions.
        masked : {"normalize", "zero"}, default "normalize"
            What y is at positions that are not used; `backward` does the same.
        out : ndarray, optional
            Array for y, with the shape and dtype of `x`. It may be `x` itself; then `backward`
            recovers x from y, if the activation is None or leaky_relu. It may be `residual` itself;
            then `backward` raises an error if there is an activation.
        num_threads
            As in `Layer.forward`.

        Returns
        -------
        ndarray
            `out`, or a new array with the dtype and memory layout of `x`.

        Raises
        ------
        TypeError, ValueError
            As in `batch_norm`, and if `x` has another rank or number of channels than the layer, or
            if the sum of the weights is at most `running_ddof` in a step that updates the running
            variance.
        FloatingPointError
            With ``nan_policy="raise"``, if the running statistics would not stay finite. `out` is
            unchanged then, for which statistics are computed twice. `backward` can still be called
            for the forward before.
        """
        selected: Selected = ALL
        if not (mask is None and weights is None and lengths is None and masked == "normalize"):
            selected = mask, weights, lengths, masked
        return _passes.forward(self, x, residual, selected, out, num_threads)

    __call__ = forward

    @overload
    def backward(
        self,
        dy: ArrayLike,
        *,
        out: NDArray[Any] | None = None,
        out_residual: None = None,
        num_threads: int | None = None,
    ) -> NDArray[Any]: ...
    @overload
    def backward(
        self,
        dy: ArrayLike,
        *,
        out: NDArray[Any] | None = None,
        out_residual: NDArray[Any],
        num_threads: int | None = None,
    ) -> tuple[NDArray[Any], NDArray[Any]]: ...
    def backward(
        self,
        dy: ArrayLike,
        *,
        out: NDArray[Any] | None = None,
        out_residual: NDArray[Any] | None = None,
        num_threads: int | None = None,
    ) -> Any:
        """Return the gradient of the last forward's input; fill `grad_gamma` and `grad_beta`.

        The gradient includes the batch statistics if that forward used them; otherwise the running
        statistics are constants. Call it once per forward.

        Parameters
        ----------
        dy, out, num_threads
            As in `Layer.backward`.
        out_residual : ndarray, optional
            Array for dresidual. It must not overlap another array.

        Returns
        -------
        dx : ndarray
            `out`, or a new array with the dtype and memory layout of the input.
        dresidual : ndarray
            Gradient of the residual, only if the forward had one: ``dx, dr = ...``.

        Raises
        ------
        RuntimeError
            As in `Layer.backward`, and with an activation also if beta or the residual has changed.
        TypeError, ValueError
            As in `Layer.backward`, and if the forward overwrote its input and a gamma is 0.
        """
        return _passes.backward(self, dy, out, out_residual, num_threads)

    def _way(self, training: bool) -> Way | None:
        if not self._running.normalizes_by_batch(training):
            return None
        if not training or (self._virtual_batch_size is None and self._renorm is None):
            return _passes.WHOLE
        self._check_renorm()
        return parts_of(self._virtual_batch_size, self._renorm, self._running.values)

    def _check_renorm(self) -> None:
        """Raise ValueError if there are no running statistics to renormalize by."""
        if self._renorm is not None and not self._running.tracks:
            raise ValueError("renorm needs running statistics; track_running_stats is False")

    def _measure(self, x: Any, selected: Any = ALL, threads: Any = None, least: int = 1) -> Moments:
        positions = functional.positions_of(x, self._axis, *selected[:3])
        number = None if positions is None else positions.number
        check_batch(x.shape, self._axis, number, least)
        return _dispatch.statistics(x, self._axis, selected, threads)


class BatchNorm1d(BatchNorm):
    """`BatchNorm` of tables and sequences: (N, C) or (N, C, L); with ``axis=-1``, (N, L, C)."""

    _axes: ClassVar[dict[int, str]] = {2: "2 axes, (N, C)", 3: "3 axes, (N, C, L)"}


class BatchNorm2d(BatchNorm):
    """`BatchNorm` of images: (N, C, H, W), or (N, H, W, C) with ``axis=-1``."""

    _axes: ClassVar[dict[int, str]] = {4: "4 axes, (N, C, H, W)"}


class BatchNorm3d(BatchNorm):
    """`BatchNorm` of volumes: (N, C, D, H, W), or (N, D, H, W, C) with ``axis=-1``."""

    _axes: ClassVar[dict[int, str]] = {5: "5 axes, (N, C, D, H, W)"}
