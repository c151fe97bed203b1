"""Batch normalization of one batch that is divided among several processes (ranks).

Every rank measures its part and sends one message. A forward sends count, mean and M2, and a
backward sends two sums of gradients. Each rank then merges all messages in the order of the ranks,
so all get the same bits, whichever message came first. If a rank raises an error, it sends that
error instead, and all ranks raise one. For this, each rank checks and allocates everything before
it sends, and writes only afterwards.

A function carries the messages: it takes a row of float64 and returns the rows of all ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from . import _dispatch
from ._dispatch import parts
from ._dispatch.beyond import deviations
from ._moments import Moments

__all__ = ["Gather", "Message", "normalize", "through"]

Gather = Callable[[NDArray[np.float64]], NDArray[np.float64]]  # (n,) to (ranks, n)

# A row begins with mark, pass, channels, bytes of an error, positions, count, whether weighted.
_HEAD = 7
_MARK = float(0x6379626E)  # the beginning of every message
_TEXT = 32  # a row has room for at least this many numbers, so that an error fits
_PASSES = ("forward", "backward")


class Message:
    """A context manager for one message from each rank to all, with two values per channel.

    If its block raises an error before `exchange` was called, that error is sent to the other ranks
    instead of the values, and they raise an error, too.

    Parameters
    ----------
    gather : callable
        The function that carries the message.
    rank : int
        The rank of this process.
    kind : {"forward", "backward"}
        The pass it belongs to.
    channels : int
        C.
    """

    def __init__(
        self, gather: Gather, rank: int, kind: Literal["forward", "backward"], channels: int
    ) -> None:
        self._gather, self._rank = gather, rank
        self._row = np.zeros(_HEAD + max(2 * channels, _TEXT))
        self._size = 2 * channels
        self._row[:3] = _MARK, _PASSES.index(kind), channels
        self._sent = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if self._sent or not isinstance(error, Exception):
            return
        text = f"{type(error).__name__}: {error}".encode()[: 8 * (self._row.size - _HEAD)]
        self._row[3] = len(text)
        self._row[_HEAD:].view(np.uint8)[: len(text)] = np.frombuffer(text, np.uint8)
        try:
            self._send()
        except Exception as other:
            error.add_note(f"the other ranks could not be told: {other}")

    def exchange(self, head: tuple[float, ...], values: NDArray[np.float64]) -> Any:
        """Send 3 numbers and (2, C) values; return (ranks, 3) numbers and (ranks, 2, C) values.

        Raises
        ------
        RuntimeError
            If another rank sent an error, or is in another pass.
        ValueError
            If another rank has another number of channels.
        """
        self._row[4:_HEAD] = head
        self._row[_HEAD : _HEAD + self._size] = values.ravel()
        rows = self._send()
        for rank, row in enumerate(rows):
            self._compare(rank, row)
        found = rows[:, _HEAD : _HEAD + self._size]
        return rows[:, 4:_HEAD], found.reshape(len(rows), *values.shape)

    def _send(self) -> NDArray[np.float64]:
        self._sent = True
        return self._gather(self._row)

    def _compare(self, rank: int, row: NDArray[np.float64]) -> None:
        """Raise an error if another rank sent an error, or another kind of message."""
        mark, kind, channels, error = row[:4]
        _, own_kind, own_channels, _ = self._row[:4]
        if mark != _MARK:
            raise RuntimeError(
                f"rank {rank} has sent something else than a layer of {own_channels:.0f} channels "
                "does; all ranks must call the same layers, with the same number of channels, in "
                "one order"
            )
        if channels != own_channels:
            raise ValueError(
                f"rank {rank} has {channels:.0f} channels, and rank {self._rank} has "
                f"{own_channels:.0f}; all ranks must make the layer with the same number"
            )
        if error:
            text = row[_HEAD:].tobytes()[: int(error)].decode(errors="replace")
            raise RuntimeError(
                f"rank {rank} raised {text}; so this call raises on every rank, and has changed "
                "nothing"
            )
        if kind != own_kind:
            raise RuntimeError(
                f"rank {rank} is in a {_PASSES[int(kind)]} pass, and rank {self._rank} in a "
                f"{_PASSES[int(own_kind)]} pass; all must call the same layers in one order"
            )

    def merged(
        self, number: int, count: float, mean: Any, m2: Any, deviation: Callable[[Moments], Any]
    ) -> Moments:
        """Return the moments of the batch, given those of this rank's part.

        If an M2 overflows float64, the negative of the standard deviation is sent instead.
        `deviation` computes it from the moments of the part.

        Raises
        ------
        ValueError
            If all ranks together have fewer than two used values per channel, and as in `exchange`.
        """
        weighted = isinstance(count, float)
        sent = np.array([mean, m2])
        own = Moments._adopt(count, *sent.copy())
        if (far := parts.far(own)).size:
            sent[1, far] = -deviation(own)[far]
        heads, values = self.exchange((number, count, weighted), sent)
        together = int(heads[:, 0].sum())
        if together < 2:
            raise ValueError(
                f"{together} values a channel count on all {len(heads)} ranks together; at least 2 "
                "must count, as one value has no variance. Train with more values a channel, or "
                "normalize with running statistics: eval()"
            )
        number_of = float if heads[:, 2].any() else int
        total = Moments.empty(values.shape[-1])
        for (some, size, _), (mean, m2) in zip(heads, values, strict=True):
            if some:
                with np.errstate(all="ignore"):
                    std = np.where(m2 < 0, -m2, np.sqrt(m2 / size))
                m2 = np.where(m2 < 0, np.inf, m2)
                total = total.merge(Moments._adopt(number_of(size), mean.copy(), m2, None, std))
        return total


def normalize(
    message: Message,
    x: Any,
    gamma: Any,
    beta: Any,
    residual: Any,
    settings: Any,
    selected: Any,
    out: NDArray[Any] | None = None,
    num_threads: int | None = None,
    *,
    check: Callable[[Moments], object] | None = None,
    fixed: tuple[Any, Any] | None = None,
) -> tuple[NDArray[Any], Moments]:
    """Return y of this rank's part, and the moments of the batch.

    Arguments are those of the dispatch. If `fixed` is a mean and a variance, y is normalized with
    those. `check` is called with the moments of the batch before anything is written, and may raise
    an error.
    """
    found: list[Moments] = []
    far: list[tuple[parts.Part, NDArray[Any]]] = []

    def deviation(part: Moments) -> NDArray[Any]:
        return deviations(x, settings[0] % x.ndim, part, selected, num_threads)

    def exchange(number: int, count: float, mean: Any, m2: Any) -> tuple[Any, Any]:
        batch = message.merged(number, count, mean, m2, deviation)
        if check is not None:
            check(batch)
        found.append(batch)
        if fixed is not None:
            return fixed
        where = parts.far(batch)
        if where.size and x.size:  # before y is written, as that may overwrite x
            part = parts.Part.of(where, x, residual, batch, gamma, beta, settings)
            far.append((part, part.forward(selected, num_threads)))
        return batch.mean, batch.var()

    y, _ = _dispatch.forward(
        x, gamma, beta, residual, settings, selected, out, num_threads, exchange
    )
    for part, values in far:
        part.put(values, y)
    return y, found[0]


def through(
    message: Message,
    dy: Any,
    x: Any,
    moments: Moments,
    gamma: Any,
    beta: Any,
    residual: Any,
    settings: Any,
    selected: Any,
    from_output: bool = False,
    out: NDArray[Any] | None = None,
    out_residual: NDArray[Any] | None = None,
    num_threads: int | None = None,
    *,
    own: list[NDArray[np.float64]] | None = None,
) -> tuple[NDArray[Any], ...]:
    """Return dx of this rank's part, and dgamma and dbeta of the batch.

    Arguments are those of the dispatch; `moments` are those of the batch. dbeta and dgamma of the
    part alone are appended to `own`, as float64 of shape (2, C).
    """

    def send(sums: NDArray[np.float64]) -> NDArray[np.float64]:
        if own is not None:
            own.append(sums.copy())
        _, values = message.exchange((0, 0, 0), sums)
        with np.errstate(all="ignore"):
            total: NDArray[np.float64] = values[0].copy()
            for part in values[1:]:  # in the order of the ranks
                total += part
        return total

    far: list[tuple[parts.Part, tuple[NDArray[Any], ...]]] = []

    def exchange(sums: NDArray[np.float64]) -> NDArray[np.float64]:
        where = parts.unwritable(moments, gamma, beta, settings[1], x.dtype == np.float64)
        if not (where.size and x.size):
            return send(sums)
        total = sums.copy()

        def of_far(some: NDArray[np.float64]) -> NDArray[np.float64]:
            sums[:, where] = some
            total[...] = send(sums)
            return total[:, where]

        part = parts.Part.of(where, x, residual, moments, gamma, beta, settings)
        given = dy, moments.count, selected, from_output, num_threads
        far.append((part, part.backward(*given, of_far)))
        return total

    dx, dgamma, dbeta, *rest = _dispatch.backward(
        dy, x, moments, gamma, beta, residual, settings, selected, from_output, out, out_residual,
        num_threads, exchange,
    )  # fmt: skip
    for part, values in far:
        for gradient, into in zip(values, (dx, *rest), strict=True):
            part.put(gradient, into)
    return dx, dgamma, dbeta, *rest
