"""BatchNorm, for any rank and axis, and its forms that insist on a rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isfinite
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, Self, get_args

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from .. import _runtime, functional
from .._arguments import array, number
from ..moments import Moments
from . import _conventions, _parts, _state, _trials
from ._explain import explain
from ._layer import float_type
from ._parts import Part
from ._renorm import Renorm
from ._running import NanPolicy, Running
from ._safety import Safety

__all__ = ["BatchNorm", "BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]


_NOTHING: Mapping[str, Any] = MappingProxyType({})


class _Saved(NamedTuple):
    """What backward needs of the last forward."""

    statistics: Moments | Running | list[Part]  # of the batch; fixed; of parts of the batch
    x: NDArray[Any] | None  # y where from_output; None where it was written over for good
    from_output: bool
    residual: NDArray[Any] | None  # None where there was none
    selected: Mapping[str, Any] = _NOTHING  # mask, weights and lengths, where given


def _same_memory(a: NDArray[Any] | None, b: NDArray[Any] | None) -> bool:
    """Whether two arrays start at one address; they then are one, or `out` was refused."""
    if a is None or b is None:
        return False
    start: bool = a.__array_interface__["data"][0] == b.__array_interface__["data"][0]
    return start


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

    _axes: ClassVar[dict[int, str]] = {}  # rank -> name of its axes; empty: any rank from 2
    _normalize: ClassVar[Callable[..., tuple[NDArray[Any], Moments]]] = staticmethod(
        functional.batch_norm
    )
    _differentiate: ClassVar[Callable[..., tuple[NDArray[Any], ...]]] = staticmethod(
        functional.batch_norm_backward
    )

    num_features: int
    axis: int
    eps: float
    momentum: float | None
    affine: bool
    track_running_stats: bool
    running_ddof: int
    dtype: np.dtype[Any]
    activation: str | None
    slope: float
    nan_policy: NanPolicy
    virtual_batch_size: int | None
    renorm: Renorm | None
    training: bool
    gamma: NDArray[Any] | None
    beta: NDArray[Any] | None
    grad_gamma: NDArray[Any] | None
    grad_beta: NDArray[Any] | None

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
        if isinstance(num_features, bool) or not hasattr(num_features, "__index__"):
            raise TypeError(f"num_features is {num_features!r}; it must be an int")
        if num_features < 1:
            raise ValueError(f"num_features is {num_features}; it must be at least 1")
        if not hasattr(axis, "__index__"):
            raise TypeError(f"axis is {axis!r}; it must be an int")
        eps = number("eps", eps)
        if not (eps > 0 and isfinite(eps)):
            raise ValueError(f"eps is {eps}; it must be positive and finite")
        momentum = None if momentum is None else number("momentum", momentum)
        if momentum is not None and not 0 <= momentum <= 1:
            raise ValueError(
                f"momentum is {momentum}; it must be in [0, 1], or None for the mean of all batches"
            )
        if running_ddof not in (0, 1):
            raise ValueError(f"running_ddof is {running_ddof}; it must be 0 (biased) or 1")
        functional.activation_of(activation, slope)
        if nan_policy not in get_args(NanPolicy):
            raise ValueError(
                f"nan_policy is {nan_policy!r}; it must be one of {', '.join(get_args(NanPolicy))}"
            )
        if virtual_batch_size is not None:
            if isinstance(virtual_batch_size, bool) or not hasattr(virtual_batch_size, "__index__"):
                raise TypeError(
                    f"virtual_batch_size is {virtual_batch_size!r}; it must be an int, or None"
                )
            if virtual_batch_size < 1:
                raise ValueError(
                    f"virtual_batch_size is {virtual_batch_size}; it must be at least 1"
                )
        if not (renorm is None or isinstance(renorm, Renorm)):
            raise TypeError(
                f"renorm is {renorm!r}; it must be a Renorm, such as Renorm(r_max=3, d_max=5)"
            )
        if renorm is not None and not track_running_stats:
            raise ValueError("renorm needs running statistics; track_running_stats is False")
        self.dtype = float_type(dtype)
        self.activation = activation
        self.slope = number("slope", slope)
        self.num_features = int(num_features)
        self.axis = int(axis)
        self.eps = eps
        self.momentum = momentum
        self.affine = bool(affine)
        self.track_running_stats = bool(track_running_stats)
        self.running_ddof = int(running_ddof)
        self.nan_policy = nan_policy
        self.virtual_batch_size = None if virtual_batch_size is None else int(virtual_batch_size)
        self.renorm = renorm
        self.training = True
        shape = (self.num_features,)
        self.gamma = np.ones(shape, self.dtype) if affine else None
        self.beta = np.zeros(shape, self.dtype) if affine else None
        self.grad_gamma = np.zeros(shape, self.dtype) if affine else None
        self.grad_beta = np.zeros(shape, self.dtype) if affine else None
        self._running = Running.start(self.num_features, self.dtype)
        self._saved: _Saved | None = None
        self._seen: tuple[Moments, Running] | None = None  # last batch, and what it moved

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

    # ---- mode ----------------------------------------------------------------------------

    def train(self, mode: bool = True) -> Self:
        """Switch to training mode, or to eval mode where `mode` is False; return the layer."""
        self.training = bool(mode)
        return self

    def eval(self) -> Self:
        """Switch to eval mode; return the layer."""
        return self.train(False)

    # ---- forward and backward ------------------------------------------------------------

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
            `out` as well, statistics are taken once more beforehand, to leave it as it was.
        """
        x = self._admit(x)
        residual = None if residual is None else array("residual", residual)
        trial = _trials.active(self)
        training = self.training if trial is None else trial.training
        learns = trial is None and self._learns(training)
        functional.is_zero(masked)  # known, or an error
        given = {"mask": mask, "weights": weights, "lengths": lengths}
        selected = self._selected(x, given, training, learns)
        if learns and out is not None and self.nan_policy == "raise":
            self._after(self._running, self._measure(x, learns, num_threads, **selected))
        options: dict[str, Any] = {
            "axis": self.axis,
            "eps": self.eps,
            "activation": self.activation,
            "slope": self.slope,
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
            if trial.note is not None and batch is not None and self.track_running_stats:
                trial.note(self, batch)
            return y
        saved = self._keep(statistics, x, y, residual)._replace(selected=selected)
        if learns and batch is not None:
            self._learn(batch, saved)
        else:
            self._saved = saved
        return y

    def _selected(
        self, x: NDArray[Any], given: dict[str, Any], training: bool, learns: bool
    ) -> dict[str, Any]:
        """Return what selects values, nothing where all of them count; ValueError if unfit."""
        selected = {name: value for name, value in given.items() if value is not None}
        positions = functional.positions_of(x, self.axis, **selected) if selected else None
        if positions is None:
            return {}
        parts = self.virtual_batch_size is not None or self.renorm is not None
        if parts and training and self._by_batch(training):
            raise ValueError(
                f"{', '.join(selected)} given to a layer with virtual_batch_size="
                f"{self.virtual_batch_size} and renorm={self.renorm}; in training it must have "
                "neither. Train such layers without a mask, or make one without them"
            )
        if learns and "weights" in selected and positions.total <= self.running_ddof:
            raise ValueError(
                f"weights sum to {positions.total}; the sum must be more than running_ddof="
                f"{self.running_ddof}, as the running variance is m2 / (sum - running_ddof). Scale "
                "the weights so that one says how often a value counts, or make the layer with "
                "running_ddof=0"
            )
        return selected

    def _normalize_by_batch(
        self, x: NDArray[Any], training: bool, options: dict[str, Any]
    ) -> tuple[NDArray[Any], Moments | list[Part]]:
        """Return y and what backward needs; in parts or renormalized where training is so."""
        if not training or (self.virtual_batch_size is None and self.renorm is None):
            return self._normalize(x, self.gamma, self.beta, **options)
        return _parts.forward(
            x,
            self.gamma,
            self.beta,
            size=self.virtual_batch_size,
            limits=self.renorm,
            running=self._running,
            **options,
        )

    def _whole(self, statistics: Moments | list[Part]) -> Moments:
        """Return the statistics of a batch that the running ones move towards."""
        return statistics if isinstance(statistics, Moments) else _parts.merged(statistics)

    def _measure(
        self, x: NDArray[Any], learns: bool, num_threads: int | None, **selected: Any
    ) -> Moments:
        """Return the moments of a batch; ValueError where it is too small to learn from."""
        batch = functional.moments(x, axis=self.axis, num_threads=num_threads, **selected)
        if learns:
            positions = functional.positions_of(x, self.axis, **selected)
            functional._check_batch(x, self.axis, positions)
        return batch

    def _by_batch(self, training: bool) -> bool:
        """Whether a batch is normalized with its own statistics."""
        if not self.track_running_stats:
            return True
        return training if self.use_batch_statistics is None else self.use_batch_statistics

    def _learns(self, training: bool) -> bool:
        """Whether a batch moves the running statistics."""
        return training and self.track_running_stats and self.update_statistics

    def _after(self, before: Running, batch: Moments) -> Running:
        """Return the running statistics after `batch`; they may be those of before."""
        after = before.absorb(batch, self.momentum, self.running_ddof)
        return before.settle(after, self.nan_policy)

    def _learn(self, batch: Moments, saved: _Saved) -> None:
        """Move the running statistics, and keep what backward needs: both or, interrupted, neither.

        Where another thread moved them meanwhile, once more from there. Nothing is called while
        the lock is held, so that Python can neither be interrupted nor change threads there.
        """
        while True:
            before = self._running
            after = self._after(before, batch)
            seen = self._seen if after is before else (batch, before)
            with _runtime.turn:
                if self._running is before:
                    self._running, self._seen, self._saved = after, seen, saved
                    return

    def _replace(self, **parts: Any) -> None:
        """Replace parts of the running statistics, as they then are."""
        while True:
            before = self._running
            after = before._replace(**parts)
            with _runtime.turn:
                if self._running is before:
                    self._running = after
                    return

    def _keep(
        self,
        statistics: Moments | Running | list[Part],
        x: NDArray[Any],
        y: NDArray[Any],
        residual: NDArray[Any] | None,
    ) -> _Saved:
        """Return what backward may need; y where it took the place of x, and tells what x was."""
        lost = self.activation is not None and _same_memory(residual, y)
        if not lost and not _same_memory(x, y):
            return _Saved(statistics, x, False, residual)
        tells = self.activation is None or (self.activation == "leaky_relu" and self.slope > 0)
        if lost or residual is not None or not tells:
            return _Saved(statistics, None, False, residual)
        return _Saved(statistics, y, True, None)

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
            does not tell what that was.
        TypeError, ValueError
            If `dy` or `out` does not fit the input; ValueError, if the forward wrote over its
            input, and a gamma is 0.
        """
        if _trials.active(self) is not None:
            raise RuntimeError("there is no backward in a preview: its forwards leave no trace")
        saved = self._saved
        if saved is None:
            raise RuntimeError("backward needs a forward before it; each backward takes up one")
        if saved.x is None:
            raise RuntimeError(
                "the last forward wrote its output over its input or residual, which backward "
                "needs with this activation; give forward another out"
            )
        self._check_own("grad_gamma", "grad_beta")
        options: dict[str, Any] = {
            "beta": self.beta,
            "axis": self.axis,
            "eps": self.eps,
            "activation": self.activation,
            "slope": self.slope,
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
        if self.grad_gamma is None or self.grad_beta is None:
            self._saved = None
            return (dx, *dresidual) if dresidual else dx
        own = self.grad_gamma, self.grad_beta
        found = _state.fitting(own, (dgamma, dbeta) if self.train_affine else (0, 0))
        # No call from here on: an interrupt comes before all three, or after.
        self.grad_gamma[...], self.grad_beta[...] = found
        self._saved = None
        return (dx, *dresidual) if dresidual else dx

    def _admit(self, x: ArrayLike) -> NDArray[Any]:
        """Return `x` as an array; ValueError unless its rank and channels are the layer's."""
        if not isinstance(x, np.ndarray):
            x = array("x", x)
        name = type(self).__name__
        if self._axes and x.ndim not in self._axes:
            takes = " or ".join(self._axes.values())
            raise ValueError(f"x has shape {x.shape}; {name} takes {takes}")
        if -x.ndim <= self.axis < x.ndim and x.shape[self.axis] != self.num_features:
            raise ValueError(
                f"x has shape {x.shape}, with {x.shape[self.axis]} channels on axis {self.axis}; "
                f"this {name} has num_features={self.num_features}"
            )
        return x

    def _check_own(self, *names: str) -> None:
        """Raise ValueError unless these arrays of the layer can be written to in place."""
        for name in names:
            array = getattr(self, name)
            shape = (self.num_features,)
            if self.affine and not (
                isinstance(array, np.ndarray) and array.shape == shape and array.flags.writeable
            ):
                raise ValueError(f"{name} of this layer must be a writeable array of shape {shape}")

    # ---- parameters and state ------------------------------------------------------------

    def parameters(self) -> list[NDArray[Any]]:
        """Return ``[gamma, beta]``, the arrays themselves.

        Empty where `affine` or `train_affine` is False.
        """
        return self._affine()[:2] if self.train_affine else []

    def gradients(self) -> list[NDArray[Any]]:
        """Return ``[grad_gamma, grad_beta]``, in the order of `parameters`."""
        return self._affine()[2:] if self.train_affine else []

    def _affine(self) -> list[NDArray[Any]]:
        arrays = [self.gamma, self.beta, self.grad_gamma, self.grad_beta]
        return [array for array in arrays if array is not None]

    @property
    def running_mean(self) -> NDArray[Any] | None:
        """Running mean, (C,), or None where `track_running_stats` is False."""
        return self._running.mean if self.track_running_stats else None

    @running_mean.setter
    def running_mean(self, value: ArrayLike) -> None:
        self._replace(mean=_state.finite("running_mean", self._tracked("running_mean", value)))

    @property
    def running_var(self) -> NDArray[Any] | None:
        """Running variance, (C,), or None where `track_running_stats` is False."""
        return self._running.var if self.track_running_stats else None

    @running_var.setter
    def running_var(self, value: ArrayLike) -> None:
        var = self._tracked("running_var", value)
        self._replace(var=_state.finite("running_var", var, least=0))

    @property
    def num_batches_tracked(self) -> int | None:
        """Training steps so far, or None where `track_running_stats` is False."""
        return self._running.batches if self.track_running_stats else None

    @num_batches_tracked.setter
    def num_batches_tracked(self, value: int) -> None:
        self._refuse_untracked("num_batches_tracked")
        self._replace(batches=_state.batches(value))

    def _refuse_untracked(self, name: str) -> None:
        if not self.track_running_stats:
            raise AttributeError(f"{name} cannot be set: track_running_stats is False")

    def _tracked(self, name: str, value: ArrayLike) -> NDArray[Any]:
        self._refuse_untracked(name)
        return _state.vector(name, value, self.num_features, self.dtype)

    def set_statistics(self, moments: Moments) -> None:
        """Take these moments, such as those of a whole dataset, for the running statistics.

        `running_mean` becomes their mean and `running_var` their variance, unbiased or not as
        `running_ddof` says. `num_batches_tracked` stays as it is.

        Parameters
        ----------
        moments : Moments
            Of C channels, with more than `running_ddof` values in each.

        Raises
        ------
        TypeError
            If `moments` is none.
        AttributeError
            If `track_running_stats` is False.
        ValueError
            If it has other channels, too few values, or one that is not finite. The layer is
            unchanged.
        """
        if not isinstance(moments, Moments):
            raise TypeError(f"moments is of type {type(moments).__name__}; it must be Moments")
        mean = _state.finite("running_mean", self._tracked("running_mean", moments.mean))
        var = self._tracked("running_var", moments.var(self.running_ddof))
        var = _state.finite("running_var", var, least=0)
        self._replace(mean=mean, var=var)

    def reset_running_stats(self) -> None:
        """Put the running statistics back to mean 0, variance 1, no batches."""
        start = Running.start(self.num_features, self.dtype)
        with _runtime.turn:
            self._running, self._seen = start, None

    def explain(self, channel: int = 0) -> None:
        """Print the formulas of the next forward, with the numbers of this layer in.

        Parameters
        ----------
        channel : int, default 0
            Whose gamma, beta and running statistics to put in.

        Raises
        ------
        ValueError
            If there is no such channel.
        """
        if not 0 <= channel < self.num_features:
            raise ValueError(f"channel is {channel}; it must be in 0..{self.num_features - 1}")
        print(explain(self, channel))

    def scale_shift(self, dtype: DTypeLike | None = None) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return eval mode's normalization as ``y = x * scale + shift``, channel by channel.

        Parameters
        ----------
        dtype : dtype, optional
            Of the result: float32 or float64; that of the layer where None. Computed in float64
            and rounded once.

        Returns
        -------
        scale, shift : ndarray, shape (C,)
            ``gamma / sqrt(running_var + eps)`` and ``beta - running_mean * scale``: new arrays.

        Raises
        ------
        ValueError
            If `track_running_stats` is False: without running statistics there is no such form.
        TypeError
            If `dtype` is neither float32 nor float64.

        Notes
        -----
        Where the mean is many standard deviations from zero, ``x * scale`` and ``shift`` cancel,
        and the layer itself, which subtracts the mean first, is the more accurate of the two.
        """
        dtype = self.dtype if dtype is None else float_type(dtype)
        if not self.track_running_stats:
            raise ValueError(
                "track_running_stats is False: this layer normalizes with the statistics of each "
                "batch, which no fixed scale and shift can do"
            )
        mean, var, _ = self._running
        gamma = 1.0 if self.gamma is None else self.gamma.astype(np.float64)
        beta = 0.0 if self.beta is None else self.beta.astype(np.float64)
        scale = gamma / np.sqrt(var.astype(np.float64) + self.eps)
        shift = beta - mean.astype(np.float64) * scale
        return scale.astype(dtype), shift.astype(dtype)

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """Return copies of all that `load_state_dict` needs.

        Returns
        -------
        dict of str to ndarray
            ``gamma`` and ``beta`` where `affine`; ``running_mean``, ``running_var`` and
            ``num_batches_tracked`` (int64, shape ()) where `track_running_stats`. A NaN or
            infinity in the running statistics is saved, but not loaded again.
        """
        state: dict[str, NDArray[Any]] = {}
        if self.gamma is not None and self.beta is not None:
            state |= {"gamma": self.gamma.copy(), "beta": self.beta.copy()}
        if self.track_running_stats:
            mean, var, batches = self._running
            state |= {
                "running_mean": mean.copy(),
                "running_var": var.copy(),
                "num_batches_tracked": np.array(batches, np.int64),
            }
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state; every part is checked before any is changed.

        Parameters
        ----------
        state : mapping of str to array_like
            With the keys of `state_dict`. Copied, and converted to the layer's dtype.

        Raises
        ------
        TypeError
            If `state` is no mapping.
        ValueError
            If keys are missing or unexpected, a shape or dtype is wrong, running_mean is not
            finite, or running_var is not finite or is negative. The layer is unchanged.
        """
        _state.check_keys(state, self.state_dict())
        self._check_own("gamma", "beta")
        c, dtype = self.num_features, self.dtype
        vectors = {
            name: _state.vector(name, value, c, dtype)
            for name, value in state.items()
            if name != "num_batches_tracked"
        }
        running = self._running
        if self.track_running_stats:
            running = Running(
                _state.finite("running_mean", vectors["running_mean"]),
                _state.finite("running_var", vectors["running_var"], least=0),
                _state.batches(state["num_batches_tracked"]),
            )
        if self.gamma is None or self.beta is None:
            with _runtime.turn:
                self._running, self._seen = running, None
            return
        own = self.gamma, self.beta
        given = _state.fitting(own, (vectors["gamma"], vectors["beta"]))
        with _runtime.turn:  # and no call in it, as in _learn
            self.gamma[...], self.beta[...] = given
            self._running, self._seen = running, None

    def __getstate__(self) -> dict[str, Any]:
        # The input of a forward is not the layer's to copy.
        return self.__dict__ | {"_saved": None, "_seen": None}

    def __repr__(self) -> str:
        parts = [str(self.num_features)]
        if self.axis != 1:
            parts.append(f"axis={self.axis}")
        parts += [f"eps={self.eps:g}", f"momentum={self.momentum}"]
        parts += [f"affine={self.affine}", f"track_running_stats={self.track_running_stats}"]
        if self.running_ddof != 1:
            parts.append(f"running_ddof={self.running_ddof}")
        if self.dtype != np.float32:
            parts.append(f"dtype={self.dtype}")
        if self.activation is not None:
            parts.append(f"activation={self.activation!r}")
        if self.activation == "leaky_relu":
            parts.append(f"slope={self.slope:g}")
        if self.nan_policy != "propagate":
            parts.append(f"nan_policy={self.nan_policy!r}")
        if self.virtual_batch_size is not None:
            parts.append(f"virtual_batch_size={self.virtual_batch_size}")
        if self.renorm is not None:
            parts.append(f"renorm={self.renorm!r}")
        return f"{type(self).__name__}({', '.join(parts)})"


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
