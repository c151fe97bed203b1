"""BatchNorm, for any rank and axis, and its forms that insist on a rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import DTypeLike, NDArray

from .. import functional
from .._arguments import integer
from ..moments import Moments
from . import _conventions
from ._explain import explain
from ._renorm import Renorm
from ._running import NanPolicy
from ._safety import Safety

__all__ = ["BatchNorm", "BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]


class BatchNorm(Safety):
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
        Added to the variance. Positive.
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
    activation : {None, "relu", "relu6", "leaky_relu", "sigmoid", "tanh", "silu"}
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
        statistics. The last virtual batch has what is left; where that is one value a channel,
        it joins the one before. The running statistics follow those of the whole batch.
    renorm : Renorm, optional
        Batch renormalization, within these limits.

    Attributes
    ----------
    gamma, beta : ndarray, shape (C,), or None
        Scale and shift; 1 and 0 at the start. Change them in place or assign.
    grad_gamma, grad_beta : ndarray, shape (C,), or None
        Their gradients, overwritten in place by each `backward`; 0 at the start.
    running_mean, running_var : ndarray, shape (C,), or None
        0 and 1 at the start. Each training step puts new arrays in their place.
    num_batches_tracked : int
        Training steps so far.
    training : bool
        The mode; see `train` and `eval`.
    update_statistics, use_batch_statistics, train_affine : bool
        What may change in training; see `Switches` and `freeze`.

    Raises
    ------
    ValueError
        If an argument is out of its range.
    TypeError
        If `num_features` is no int, or `dtype` is neither float32 nor float64.

    Notes
    -----
    The input of a forward is kept by reference, not copied, until the next forward or backward:
    do not change it in between, nor gamma and beta where there is an activation. The same holds
    for the residual. A forward that writes over its input (``out=x``) keeps one array instead of
    two: without an activation, or with leaky_relu, backward recovers what it needs from y; with
    any other it raises. A call that raises has changed nothing. Several threads may share a
    layer: running updates are serialized; backward belongs to the last forward.

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

    _normalize: ClassVar[Callable[..., tuple[NDArray[Any], Moments]]] = staticmethod(
        functional.batch_norm
    )
    _differentiate: ClassVar[Callable[..., tuple[NDArray[Any], ...]]] = staticmethod(
        functional.batch_norm_backward
    )

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
        activation: str | None = None,
        slope: float = 0.01,
        nan_policy: NanPolicy = "propagate",
        virtual_batch_size: int | None = None,
        renorm: Renorm | None = None,
    ) -> None:
        super().__init__(num_features, affine, dtype)
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
        return cls(num_features, **_conventions.settings(library, options))

    def explain(self, channel: int = 0) -> None:
        """Print the formulas of the next forward, with the numbers of this layer in.

        Parameters
        ----------
        channel : int, default 0
            Whose gamma, beta and running statistics to put in.

        Raises
        ------
        TypeError
            If `channel` is no int.
        ValueError
            If there is no such channel.
        """
        channel = integer("channel", channel)
        if not 0 <= channel < self.num_features:
            raise ValueError(f"channel is {channel}; it must be in 0..{self.num_features - 1}")
        print(explain(self, channel))

    def __repr__(self) -> str:
        parts = [str(self.num_features)]
        if self.axis != 1:
            parts.append(f"axis={self.axis}")
        parts += [f"eps={self.eps:g}", f"momentum={self.momentum}"]
        parts += [f"affine={self.affine}", f"track_running_stats={self.track_running_stats}"]
        if self.running_ddof != 1:
            parts.append(f"running_ddof={self.running_ddof}")
        more = []
        if self.activation is not None:
            more.append(f"activation={self.activation!r}")
        if self.activation == "leaky_relu":
            more.append(f"slope={self.slope:g}")
        if self.nan_policy != "propagate":
            more.append(f"nan_policy={self.nan_policy!r}")
        if self.virtual_batch_size is not None:
            more.append(f"virtual_batch_size={self.virtual_batch_size}")
        if self.renorm is not None:
            more.append(f"renorm={self.renorm!r}")
        return self._describe(*parts, more=tuple(more))


class BatchNorm1d(BatchNorm):
    """`BatchNorm` that takes (N, C) or (N, C, L): tabular data and sequences.

    Parameters are those of `BatchNorm`; with ``axis=-1`` it takes (N, C) or (N, L, C).
    """

    _axes: ClassVar[dict[int, str]] = {2: "2 axes, (N, C)", 3: "3 axes, (N, C, L)"}


class BatchNorm2d(BatchNorm):
    """`BatchNorm` that takes (N, C, H, W): images.

    Parameters are those of `BatchNorm`; with ``axis=-1`` it takes (N, H, W, C).
    """

    _axes: ClassVar[dict[int, str]] = {4: "4 axes, (N, C, H, W)"}


class BatchNorm3d(BatchNorm):
    """`BatchNorm` that takes (N, C, D, H, W): volumes.

    Parameters are those of `BatchNorm`; with ``axis=-1`` it takes (N, D, H, W, C).
    """

    _axes: ClassVar[dict[int, str]] = {5: "5 axes, (N, C, D, H, W)"}
