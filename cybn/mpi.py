"""Batch normalization over the ranks of an MPI program, each of which has a part of the batch.

>>> from mpi4py import MPI
>>> import numpy as np, cybn.mpi
>>> bn = cybn.mpi.SyncBatchNorm2d(8, comm=MPI.COMM_WORLD)
>>> y = bn(np.random.default_rng(MPI.COMM_WORLD.rank).standard_normal((4, 8, 5, 5)))

Start a program with ``mpiexec -n 4 python -m mpi4py train.py``. docs/distributed.md describes
the messages, and when synchronization is worth its cost.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

try:
    from mpi4py import MPI
except ImportError as error:
    raise ImportError(
        "cybn.mpi needs mpi4py and an MPI library, and one of them is not installed. Install both: "
        "pip install 'cybn[mpi]'"
    ) from error

from . import _ranks, _trials
from ._arguments import number
from ._moments import Moments
from ._words import Activation, Masked, NanPolicy
from .layers import _passes, _settings
from .layers._passes import ALL, Way
from .layers._settings import Setting
from .layers.batch_norm import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d

__all__ = ["Ranks", "SyncBatchNorm", "SyncBatchNorm1d", "SyncBatchNorm2d", "SyncBatchNorm3d"]

_PATIENT = 200  # tests for a message without a pause, before pauses of up to a millisecond
_left: dict[int, tuple[Any, ...]] = {}  # buffers of failed messages; MPI may write to them


class Ranks:
    """The ranks of a communicator, and how long to wait for their messages.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm, default MPI.COMM_WORLD
        All of its ranks must take part in every call, in the same order.
    timeout : float or None, default 300
        Seconds to wait for the others. None means no limit.

    Raises
    ------
    TypeError
        If `comm` is not a communicator.
    ValueError
        If `timeout` is not positive.

    Examples
    --------
    >>> import numpy as np
    >>> from cybn.mpi import Ranks
    >>> rows = Ranks(timeout=60).gather(np.array([1.0, 2.0]))  # one row for each rank
    >>> rows[0]
    array([1., 2.])
    """

    def __init__(self, comm: Any = None, timeout: float | None = 300.0) -> None:
        comm = MPI.COMM_WORLD if comm is None else comm
        if not isinstance(comm, MPI.Intracomm):
            raise TypeError(
                f"comm is of type {type(comm).__name__}; it must be an mpi4py.MPI.Intracomm, such "
                "as MPI.COMM_WORLD"
            )
        if timeout is not None:
            timeout = number("timeout", timeout)
            if not timeout > 0:
                raise ValueError(f"timeout is {timeout}; it must be positive, or None to wait")
        self.comm = comm
        self.timeout = timeout

    def __deepcopy__(self, memo: object) -> Ranks:
        return self  # a copy of a layer uses the same ranks

    def gather(self, row: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the rows of all ranks, (ranks, n), in the order of the ranks, by one message.

        Parameters
        ----------
        row : ndarray of float64, shape (n,)
            It has the same length on every rank.

        Raises
        ------
        TimeoutError
            If a rank has sent nothing in time. It may have died, or made another call. No further
            message can be sent on this communicator.
        RuntimeError
            If MPI reports an error, for example because rows have different lengths, or if an
            earlier call raised `TimeoutError`.
        """
        rows = np.zeros((self.comm.size, row.size))  # a row of zeros is not a valid message
        self._run(self.comm.Iallgather, row, rows)
        return rows

    def allgather(self, value: Any) -> list[Any]:
        """Return the values of all ranks, in the order of the ranks, by two messages (pickled).

        Parameters
        ----------
        value : object
            Anything that can be pickled.

        Raises
        ------
        TimeoutError, RuntimeError
            As in `gather`.
        """
        data = np.frombuffer(pickle.dumps(value), np.uint8)
        sizes = self.gather(np.array([data.size], np.float64))[:, 0].astype(int)
        found = np.empty(sizes.sum(), np.uint8)
        self._run(self.comm.Iallgatherv, data, (found, sizes))
        parts = np.split(found, np.cumsum(sizes)[:-1])
        return [pickle.loads(part.tobytes()) for part in parts]

    def _run(self, start: Callable[[Any, Any], Any], send: Any, receive: Any) -> None:
        """Run a collective operation; raise TimeoutError after `timeout` seconds."""
        comm = self.comm
        if comm.handle in _left:
            raise RuntimeError(
                "an earlier message on this communicator was given up, so the ranks are out of "
                "step; end the program with comm.Abort(), and start again from a checkpoint"
            )
        try:
            request = start(send, receive)
            if not self._wait(request):
                _left[comm.handle] = request, send, receive
                raise TimeoutError(
                    f"rank {comm.rank} of {comm.size} has waited {self.timeout:g} s for the "
                    "others: one has died, or does not make this call. End the program with "
                    "comm.Abort()"
                )
        except MPI.Exception as error:
            _left[comm.handle] = send, receive
            raise RuntimeError(
                f"MPI reports: {error}. All ranks must call the same layers, with the "
                "same number of channels, in one order"
            ) from error

    def _wait(self, request: Any) -> bool:
        """Wait for a message; return False if the time is over."""
        looks = 0
        end = None if self.timeout is None else time.monotonic() + self.timeout
        while not request.Test():
            looks += 1
            if looks > _PATIENT:
                if end is not None and time.monotonic() > end:
                    return False
                time.sleep(min(1e-3, 1e-6 * (looks - _PATIENT)))
        return True

    def message(self, kind: Any, channels: int) -> _ranks.Message:
        """Return a message with two values per channel."""
        return _ranks.Message(self.gather, self.comm.rank, kind, channels)


class SyncBatchNorm(BatchNorm):
    """`BatchNorm` of a batch that is divided among the ranks of an MPI communicator.

    In training mode, y is normalized with the mean and variance of the whole batch, over all ranks.
    `backward` returns dx of this rank's part, and fills `grad_gamma` and `grad_beta` with the
    gradients of the whole batch. Do not sum these two over the ranks again. They and the running
    statistics are bitwise identical on all ranks. Ranks may have different numbers of samples, or
    none.

    Every rank must make the same calls in the same order. A training forward and a backward each
    send one message of 16 bytes per channel. If one rank raises an error, all raise one, and no
    layer has changed. In eval mode there are no messages.

    Parameters
    ----------
    num_features : int
        C, the number of channels.
    comm : mpi4py.MPI.Intracomm, optional
        The ranks. None means MPI.COMM_WORLD.
    timeout : float or None, default 300
        Seconds to wait for the other ranks before TimeoutError is raised. None means no limit.
    axis, eps, momentum, affine, track_running_stats, running_ddof, dtype
        As in `BatchNorm`. Defaults are 1, 1e-5, 0.1, True, True, 1 (unbiased) and float32.
    activation, slope, nan_policy
        As in `BatchNorm`. Defaults are None, 0.01 and "propagate".

    Raises
    ------
    TypeError, ValueError
        As in `BatchNorm` and `Ranks`.

    Notes
    -----
    A preview normalizes by the whole batch, too, so all ranks must use it together. There are no
    ghost batches and no renormalization: `virtual_batch_size` and `renorm` are None. Copies use the
    same communicator. A layer can be pickled if MPI itself provides its communicator, such as
    MPI.COMM_WORLD.

    Examples
    --------
    >>> import numpy as np
    >>> from cybn.mpi import SyncBatchNorm
    >>> bn = SyncBatchNorm(1)
    >>> y = bn(np.array([[1.0], [3.0]]))
    >>> bn.running_mean
    array([0.2], dtype=float32)
    """

    virtual_batch_size = Setting(_settings.nothing)
    renorm = Setting(_settings.nothing)

    _link: Ranks

    def __init__(
        self,
        num_features: int,
        *,
        comm: Any = None,
        timeout: float | None = 300.0,
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
    ) -> None:
        super().__init__(
            num_features,
            axis=axis,
            eps=eps,
            momentum=momentum,
            affine=affine,
            track_running_stats=track_running_stats,
            running_ddof=running_ddof,
            dtype=dtype,
            activation=activation,
            slope=slope,
            nan_policy=nan_policy,
        )
        self._link = Ranks(comm, timeout)

    @property
    def comm(self) -> Any:
        """The communicator."""
        return self._link.comm

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
        """Normalize this rank's part of a batch; in training mode, update the running statistics.

        Parameters
        ----------
        x, residual, mask, weights, lengths, masked, out, num_threads
            As in `BatchNorm.forward`. `x` may have no samples.

        Returns
        -------
        ndarray
            As in `BatchNorm.forward`.

        Raises
        ------
        TypeError, ValueError, FloatingPointError
            As in `BatchNorm.forward`, for the batch of all ranks.
        RuntimeError
            If another rank raised an error, which is quoted, or made another call.
        TimeoutError
            If another rank has sent nothing within `timeout` seconds.
        """
        selected: Any = ALL
        if mask is not None or weights is not None or lengths is not None or masked != ALL[3]:
            selected = mask, weights, lengths, masked
        given = x, residual, selected, out, num_threads
        running, trial = self._running, _trials.active(self)
        training = self._training if trial is None else trial.training
        learns = trial is None and training and running.tracks and running.updates
        by_batch = running.normalizes_by_batch(training)
        if not (by_batch or learns or (trial is not None and trial.note is not None)):
            return _passes.forward(self, *given)
        with self._link.message("forward", self.num_features) as message:
            return _passes.forward(self, *given, way=self._over_ranks(message, by_batch, learns))

    __call__ = forward

    def backward(
        self,
        dy: ArrayLike,
        *,
        out: NDArray[Any] | None = None,
        out_residual: NDArray[Any] | None = None,
        num_threads: int | None = None,
    ) -> Any:
        """Return the gradient of the last forward's input; fill `grad_gamma` and `grad_beta`.

        This is done as in `BatchNorm.backward`, but `grad_gamma` and `grad_beta` are those of the
        whole batch.

        Parameters
        ----------
        dy, out, out_residual, num_threads
            As in `BatchNorm.backward`.

        Returns
        -------
        dx, dresidual : ndarray
            As in `BatchNorm.backward`.

        Raises
        ------
        RuntimeError, TypeError, ValueError
            As in `BatchNorm.backward`; RuntimeError and TimeoutError as in `forward`.
        """
        given, saved = (dy, out, out_residual, num_threads), self._saved
        by_batch = (
            self._running.normalizes_by_batch(self._training)
            if saved is None
            else isinstance(saved.statistics, Moments)
        )
        if not by_batch or _trials.active(self) is not None:
            return _passes.backward(self, *given)
        with self._link.message("backward", self.num_features) as message:
            return _passes.backward(self, *given, differentiate=partial(_ranks.through, message))

    def _over_ranks(self, message: _ranks.Message, by_batch: bool, learns: bool) -> Way:
        """Return the way to normalize this rank's part; backward sends its own message."""
        running, values = self._running, self._running.values
        check = partial(running.after, values) if learns else None
        if by_batch:
            forward = partial(_ranks.normalize, message, check=check)
            return Way(forward, _passes.WHOLE.backward, _itself, inverts=True, checks=True)
        batch: list[Moments] = []

        def by_running(*given: Any) -> tuple[NDArray[Any], Any]:
            fixed = values.mean, values.var
            y, moments = _ranks.normalize(message, *given, check=check, fixed=fixed)
            batch.append(moments)
            return y, values

        return Way(
            by_running, _passes.WHOLE.backward, lambda _: batch[0], inverts=True, checks=True
        )


def _itself(moments: Moments) -> Moments:
    return moments


class SyncBatchNorm1d(SyncBatchNorm):
    """`SyncBatchNorm` that takes (N, C) or (N, C, L); parameters are the same."""

    _axes: ClassVar[dict[int, str]] = BatchNorm1d._axes


class SyncBatchNorm2d(SyncBatchNorm):
    """`SyncBatchNorm` that takes (N, C, H, W); parameters are the same."""

    _axes: ClassVar[dict[int, str]] = BatchNorm2d._axes


class SyncBatchNorm3d(SyncBatchNorm):
    """`SyncBatchNorm` that takes (N, C, D, H, W); parameters are the same."""

    _axes: ClassVar[dict[int, str]] = BatchNorm3d._axes
