"""Statistics of a whole dataset, for every batch normalization that it passes through."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

from .layers import BatchNorm, InstanceNorm
from .layers._trials import Trial
from ._moments import Moments, Progress

__all__ = ["population_statistics"]


def population_statistics(
    model_or_layers: Callable[[Any], object] | Sequence[Callable[[Any], Any]],
    batches: Iterable[Any],
    progress: Progress | None = None,
    *,
    upstream: Literal["batch", "running"] = "batch",
) -> dict[BatchNorm | InstanceNorm, Moments]:
    """Return the mean and variance over a whole dataset for each batch norm that it reaches.

    Merged `Moments` count every value once: an uneven last batch has its own weight, and the
    variance between batches is in it, which an average of batch variances leaves out. No layer is
    changed. To take the result over::

        for layer, moments in cybn.population_statistics(model, batches).items():
            layer.set_statistics(moments)

    Parameters
    ----------
    model_or_layers : callable, or sequence of callables
        Called with each batch: a forward function, a network object, one layer; or a list of
        layers, called one after the other. Every batch or instance norm that runs in the call,
        and tracks running statistics, is recorded; one that runs twice has both inputs counted. It
        must run in the thread of the call.
    batches : iterable
        What the model takes, one batch at a time, each given to it as it is. Gone through once.
    progress : callable, optional
        Given `batches`, it returns an iterable over them, and may draw a bar: `tqdm.tqdm`, or a
        `functools.partial` of it.
    upstream : {"batch", "running"}, default "batch"
        How the layers normalize meanwhile, and so what reaches the next ones: as in training, by
        each batch, as Algorithm 2 of the paper has it, so that the result belongs to this batch
        size; or as in inference, by the running statistics, so that it does not depend on the
        batches. For all layers to be right under "running", set their statistics from the first to
        the last, one call each.

    Returns
    -------
    dict of layer to Moments
        In the order in which the layers first ran.

    Raises
    ------
    TypeError
        If `model_or_layers` is neither callable nor a sequence of callables.
    ValueError
        If there were no batches, no batch norm ran, or `upstream` is neither.

    Notes
    -----
    Whatever the modes and switches of the layers, nothing in them changes, neither running
    statistics nor modes, also where a batch raises. With "batch", a batch that has one value a
    channel raises, as in training.

    Switches hold, as in training and inference themselves: a layer that is frozen, or whose
    `use_batch_statistics` is False, normalizes by its running statistics with "batch" too, and one
    where that is True by the batch with "running" too. It is recorded like the others. To have
    all layers normalize as `upstream` says, `unfreeze` them first.

    For an instance norm, means and variances are those within samples, which is what its running
    statistics are of: the result is a kind of `Moments` with an attribute `samples`, and its
    variance leaves out how the samples differ from each other.

    References
    ----------
    Ioffe and Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing
    Internal Covariate Shift", 2015, Algorithm 2.

    Examples
    --------
    >>> import numpy as np
    >>> import cybn
    >>> bn = cybn.BatchNorm(1)
    >>> batches = np.array([[0.0], [2.0], [4.0]]), np.array([[6.0], [8.0]])
    >>> cybn.population_statistics(bn, batches)[bn]
    Moments(count=5, mean=[4.], var=[8.])
    """
    if upstream not in ("batch", "running"):
        raise ValueError(f"upstream is {upstream!r}; it must be 'batch' or 'running'")
    model = _as_function(model_or_layers)
    totals: dict[BatchNorm | InstanceNorm, Moments] = {}

    def note(layer: BatchNorm | InstanceNorm, moments: Moments) -> None:
        totals[layer] = totals[layer].merge(moments) if layer in totals else moments

    count = 0
    for batch in batches if progress is None else progress(batches):
        count += 1
        with _recording(note, upstream):
            model(batch)
    if not count:
        raise ValueError("batches has no batches")
    if not totals:
        raise ValueError(
            f"no batch norm that tracks running statistics ran in any of {count} batches; "
            "it must run in the call of the model, and in the same thread"
        )
    return totals


def _recording(note: Callable[[Any, Moments], None], upstream: str) -> Trial[None]:
    return Trial(None, training=upstream == "batch", note=note)


def _as_function(model_or_layers: Any) -> Callable[[Any], object]:
    """Return one function of a batch."""
    if callable(model_or_layers):
        function: Callable[[Any], object] = model_or_layers
        return function
    if not isinstance(model_or_layers, Sequence) or not all(map(callable, model_or_layers)):
        raise TypeError(
            f"model_or_layers is of type {type(model_or_layers).__name__}; it must be a function "
            "of a batch, a layer, or a list of layers"
        )
    layers = list(model_or_layers)

    def in_turn(x: Any) -> object:
        for layer in layers:
            x = layer(x)
        return x

    return in_turn
