"""BatchNorm, for any rank and axis, and its forms that insist on a rank."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Self, overload

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from .._arguments import integer, integer_from
from .._words import Activation, Masked, NanPolicy
from . import _explain, _passes, _settings, _snapshots, _trials
from . import _running as statistics
from ._layer import Layer
from ._parts import WHOLE, Renorm, Way, parts_of
from ._running import RunningStatistics
from ._settings import Fixed, Setting

__all__ = ["BatchNorm", "BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]


class BatchNorm(Layer):
    """Batch normalization over arrays of any rank from 2.

    In training mode each channel is normalized with the mean and biased variance of the batch,
    and the running statistics move towards them; in eval mode with the running statistics.

    Parameters
    ----------
    num_features : int
        C, the number of channels. At least 1.
    axis : int, default 1
        The channel axis of the input; negative counts from the end.
    eps : float, default 1e-5
        Added to the variance. Positive; 0 will do for a layer that only does inference.
    momentum : float or None, default 0.1
        Weight of the new batch in the running statistics, in [0, 1], as in PyTorch. None: the
        mean over all batches so far.
    affine : bool, default True
        Whether the layer has gamma and beta.
    track_running_stats : bool, default True
        Whether the layer has running statistics. Without them eval mode uses the batch's.
    running_ddof : {1, 0}, default 1
        1: `running_var` follows the unbiased variance, as in PyTorch; 0: the biased one.
    dtype : dtype, default float32
        Of gamma, beta, their gradients and the running statistics: float32 or float64. Inputs
        may be either or a half type, whatever this is.
    activation : {None, "relu", "relu6", "leaky_relu", "sigmoid", "tanh", "silu", "gelu", \
            "hardswish"}
        Applied to the normalized values, and the residual if there is one, in the same pass; see
        `batch_norm`.
    slope : float, default 0.01
        Of leaky_relu below 0.
    nan_policy : {"propagate", "raise", "skip"}, default "propagate"
        What a training batch does that would put a NaN or infinity into the running statistics:
        put it there, in its channel; raise FloatingPointError, with nothing changed; or leave
        the running statistics and `num_batches_tracked` as they were.
    virtual_batch_size : int, optional
        Ghost batches: in training, normalize that many samples at a time, by their own
        statistics. The last virtual batch has what is left. One in which fewer than two values
        a channel count joins the next, and the last one that before. The running statistics
        follow those of the whole batch.
    renorm : Renorm, optional
        Batch renormalization, within these limits.

    Attributes
    ----------
    gamma, beta : ndarray, shape (C,), or None
        Scale and shift; 1 and 0 at the start. Change them in place, or assign: values are then
        checked and copied into the array, which stays the same one.
    grad_gamma, grad_beta : ndarray, shape (C,), or None
        Their gradients, overwritten in place by each `backward`; 0 at the start.
    running_mean, running_var : ndarray, shape (C,), or None
        0 and 1 at the start. Each training step puts new arrays in their place.
    num_batches_tracked : int
        Training steps so far.
    training : bool
        The mode; see `train` and `eval`.
    update_statistics : bool
        Whether a training forward moves the running statistics.
    use_batch_statistics : bool or None
        Whether a batch is normalized with its own statistics (True) or the running ones (False).
        None, the default: with its own in training mode, with the running ones in eval mode.
    train_affine : bool
        Whether gamma and beta are trained. Where they are not, `parameters` and `gradients` are
        empty, and `backward` sets their gradients to 0, for optimizers that hold the arrays.

    Raises
    ------
    ValueError
        If an argument is out of its range.
    TypeError
        If `num_features` is no int, or `dtype` is neither float32 nor float64.

    Notes
    -----
    The input of a forward is kept by reference, not copied, until the next forward or backward:
    do not change it in between, nor gamma, nor beta and the residual where there is an activation.
    A `backward` that sees such a change, by a few values that were remembered, raises. A forward
    that writes over its input (``out=x``) keeps one array instead of two: without an activation, or
    with leaky_relu, backward recovers what it needs from y; with any other it raises. A call that
    raises has changed nothing. Several threads may share a layer: running updates are serialized;
    backward belongs to the last forward.

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

    num_features = Fixed(integer_from)
    affine = Fixed(_settings.flag)
    axis = Setting(integer)
    eps = Setting(_settings.not_negative)
    activation = Setting(_settings.activation)
    slope = Setting(_settings.slope)
    virtual_batch_size = Setting(_settings.virtual_batch_size)
    renorm = Setting(_settings.renorm)
    train_affine = Setting(_settings.flag)

    # What a layer has for its running statistics, for looking without touching, and in words.
    momentum, running_ddof = statistics.momentum, statistics.running_ddof
    nan_policy, track_running_stats = statistics.nan_policy, statistics.track_running_stats
    update_statistics = statistics.update_statistics
    use_batch_statistics = statistics.use_batch_statistics
    running_mean, running_var = statistics.running_mean, statistics.running_var
    num_batches_tracked = statistics.num_batches_tracked
    freeze, unfreeze = statistics.freeze, statistics.unfreeze
    set_statistics, reset_running_stats = statistics.set_statistics, statistics.reset_running_stats
    scale_shift = statistics.scale_shift
    preview = _trials.preview
    snapshot, restore, drift = _snapshots.snapshot, _snapshots.restore, _snapshots.drift
    explain = _explain.explain
    __repr__ = _explain.describe

    _running: RunningStatistics
    _axis: int
    _eps: float
    _activation: Activation | None
    _slope: float
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
        self.num_features, self.affine = num_features, affine
        super().__init__((self.num_features,), self.affine, self.affine, dtype)
        self._running = RunningStatistics(self.num_features, self.dtype)
        self.axis = axis
        self.eps = eps
        self.momentum = momentum
        self.track_running_stats = track_running_stats
        self.running_ddof = running_ddof
        self.activation = activation
        self.slope = slope
        self.nan_policy = nan_policy
        self.virtual_batch_size = virtual_batch_size
        self.renorm = renorm
        self._check_renorm()

    @classmethod
    def like(cls, library: str, num_features: int, **options: Any) -> Self:
        """Return a layer that means eps, momentum and the running variance as `library` does.

        Parameters
        ----------
        library : {"torch", "keras", "onnx", "paper"}
            Default eps, default momentum, weight of, and running variance:

            - torch: 1e-5; 0.1, the new value; unbiased
            - keras: 1e-3; 0.99, the old value; biased
            - onnx: 1e-5; 0.9, the old value; biased
            - paper: 1e-5, as the paper names none; the mean over all batches; unbiased
        num_features : int
            C.
        **options
            As for the layer itself, with `momentum` in the library's meaning: with "keras",
            ``momentum=0.99`` is 0.01 here. The channel axis stays 1, also where that library
            has it last: give ``axis=-1``.

        Raises
        ------
        ValueError
            If `library` is none of these, or an option is out of its range.
        """
        return cls(num_features, **_explain.settings(library, options))

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
        """Normalize a batch; in training mode, move the running statistics.

        Parameters
        ----------
        x : array_like of float32, float64, float16 or bfloat16
            C values along the channel axis. Kept by reference for `backward`.
        residual : array_like, shape and dtype of `x`, optional
            Added before the activation. Kept by reference for `backward`.
        mask, weights, lengths : array_like, optional
            Which positions count, and how often; as in `batch_norm`. Batch and running statistics
            are those of what counts.
        masked : {"normalize", "zero"}, default "normalize"
            What y is where a position does not count; `backward` follows it.
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
            layer's. ValueError, if weights sum to no more than `running_ddof` and are to move the
            running variance.
        FloatingPointError
            With ``nan_policy="raise"``, where the running statistics would not stay finite. With
            `out` as well, statistics are taken once more beforehand, to leave it as it was. A
            `backward` then still belongs to the forward before.
        """
        return _passes.forward(self, x, residual, mask, weights, lengths, masked, out, num_threads)

    if TYPE_CHECKING:

        def __call__(
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
            """Do what `forward` does."""
            raise NotImplementedError  # never run: for type checkers alone

    else:
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

        Goes through the batch statistics if that forward used them, else through the running
        ones as constants. The input is not kept afterwards: one backward a forward.

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
            does not tell what that was, or what it reads has changed since: x (or y, where that was
            written over x), gamma, and with an activation beta and the residual.
        TypeError, ValueError
            If `dy` or `out` does not fit the input; ValueError, if the forward wrote over its
            input, and a gamma is 0.
        """
        return _passes.backward(self, dy, out, out_residual, num_threads)

    _measure = _passes.measure

    def _way(self, training: bool) -> Way:
        """Return how a batch is normalized by its own statistics, and measured."""
        if not training or (self._virtual_batch_size is None and self._renorm is None):
            return WHOLE
        self._check_renorm()
        return parts_of(self._virtual_batch_size, self._renorm, self._running.values)

    def _check_renorm(self) -> None:
        """Refuse to renormalize towards running statistics that are not kept."""
        if self._renorm is not None and not self._running.tracks:
            raise ValueError("renorm needs running statistics; track_running_stats is False")


class BatchNorm1d(BatchNorm):
    """`BatchNorm` that takes (N, C) or (N, C, L): tabular data and sequences.

    Parameters
    ----------
    num_features : int
        C, the number of channels.
    axis : int, default 1
        The channel axis; with -1 it takes (N, C) or (N, L, C).
    eps, momentum, affine, track_running_stats, running_ddof, dtype
        As in `BatchNorm`: 1e-5, 0.1, True, True, 1 (unbiased) and float32.
    activation, slope, nan_policy, virtual_batch_size, renorm
        As in `BatchNorm`: no activation, slope 0.01, "propagate", None and None.
    """

    _axes: ClassVar[dict[int, str]] = {2: "2 axes, (N, C)", 3: "3 axes, (N, C, L)"}


class BatchNorm2d(BatchNorm):
    """`BatchNorm` that takes (N, C, H, W): images.

    Parameters
    ----------
    num_features : int
        C, the number of channels.
    axis : int, default 1
        The channel axis; with -1 it takes (N, H, W, C).
    eps, momentum, affine, track_running_stats, running_ddof, dtype
        As in `BatchNorm`: 1e-5, 0.1, True, True, 1 (unbiased) and float32.
    activation, slope, nan_policy, virtual_batch_size, renorm
        As in `BatchNorm`: no activation, slope 0.01, "propagate", None and None.
    """

    _axes: ClassVar[dict[int, str]] = {4: "4 axes, (N, C, H, W)"}


class BatchNorm3d(BatchNorm):
    """`BatchNorm` that takes (N, C, D, H, W): volumes.

    Parameters
    ----------
    num_features : int
        C, the number of channels.
    axis : int, default 1
        The channel axis; with -1 it takes (N, D, H, W, C).
    eps, momentum, affine, track_running_stats, running_ddof, dtype
        As in `BatchNorm`: 1e-5, 0.1, True, True, 1 (unbiased) and float32.
    activation, slope, nan_policy, virtual_batch_size, renorm
        As in `BatchNorm`: no activation, slope 0.01, "propagate", None and None.
    """

    _axes: ClassVar[dict[int, str]] = {5: "5 axes, (N, C, D, H, W)"}
