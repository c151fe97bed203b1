"""Statistics of a whole dataset, for every batch normalization that it passes through."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import reduce
from typing import Any, Literal

from ._foreign import widened
from ._measuring import Progress
from ._moments import Moments
from ._trials import Trial

__all__ = ["population_statistics"]


def population_statistics(
    model_or_layers: Callable[[Any], object] | Sequence[Callable[[Any], Any]],
    batches: Iterable[Any],
    progress: Progress | None = None,
    *,
    upstream: Literal["batch", "running"] = "batch",
    inputs: Callable[[Any], Any] | None = None,
    comm: Any = None,
) -> dict[Any, Moments]:
    """Return the mean and variance over a whole dataset for each batch norm of a model.

    Merged `Moments` count every value once. So a shorter last batch weighs less, and the variance
    between batches is included, which an average of batch variances leaves out. No layer is
    changed. To use the result::

        for layer, moments in cybn.population_statistics(model, batches).items():
            layer.set_statistics(moments)

    or, in a model of PyTorch::

        for module, moments in cybn.population_statistics(model, loader).items():
            module.running_mean.copy_(torch.tensor(moments.mean))
            module.running_var.copy_(torch.tensor(moments.var(ddof=1)))

    Parameters
    ----------
    model_or_layers : callable, or sequence of callables
        A forward function, a network object or a layer, which is called with each batch; or a list
        of layers, which are called one after the other. Every `BatchNorm` that runs in the call,
        and tracks running statistics, is recorded; if it runs twice, both inputs are counted. It
        must run in the thread of the call. The batch norms of a `torch.nn.Module` are recorded,
        too.
    batches : iterable
        The batches, in the form that the model takes. It is iterated once. A function gets each
        batch unchanged. A layer, a list of layers and a `torch.nn.Module` get the first item of a
        batch that is a tuple or a list, such as (images, labels).
    progress : callable, optional
        Given `batches`, it returns an iterable over them, and may draw a bar: `tqdm.tqdm`, or a
        `functools.partial` of it.
    upstream : {"batch", "running"}, default "batch"
        How the layers normalize while they are measured, which affects the inputs of the next
        layers. "batch" uses each batch, as in training and in Algorithm 2 of the paper, so the
        result belongs to this batch size. "running" uses the running statistics, as in inference,
        so the result does not depend on the batches. With "running", set the statistics of the
        layers one after the other, from the first to the last, with one call for each.
    inputs : callable, optional
        A function from a batch to the input of the model, such as `operator.itemgetter(0)` for its
        first item.
    comm : object with a method ``allgather``, optional
        For a dataset that is divided among processes, as in `Moments.allreduce`. Each process calls
        the function with its own batches, at least one, and gets the statistics of all batches.

    Returns
    -------
    dict of BatchNorm to Moments
        The keys are the layers, also those of PyTorch, in the order in which they first ran.

    Raises
    ------
    TypeError
        If `model_or_layers` is neither callable nor a sequence of callables.
    ValueError
        If there were no batches, no batch norm ran, or `upstream` is unknown; with `comm`, if
        another number of batch norms ran in another process.
    RuntimeError
        With `comm`, if another process raised an error, which is quoted.

    An error that a batch causes has a note that describes the input of the model.

    Notes
    -----
    Nothing in the layers changes, even if a batch raises an error. With "batch", a batch with one
    value per channel raises an error, as in training.

    The switches of a layer have priority over `upstream`. A layer that is frozen, or whose
    `use_batch_statistics` is False, always uses its running statistics. If it is True, the layer
    always uses the batch. Such layers are recorded like the others. To make all layers follow
    `upstream`, `unfreeze` them first.

    For an instance norm, means and variances are those within samples, like its running statistics.
    The result is a kind of `Moments` with an attribute `samples`, whose variance does not include
    the differences between samples.

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
    if comm is None:
        return _measure(model_or_layers, batches, progress, upstream, inputs)
    try:
        totals = _measure(model_or_layers, batches, progress, upstream, inputs)
    except Exception as error:
        comm.allgather(f"{type(error).__name__}: {error}")
        raise
    return _of_all(totals, comm)


def _of_all(totals: dict[Any, Moments], comm: Any) -> dict[Any, Moments]:
    """Return the moments of all processes; a synchronized layer has these already."""
    own = [None if hasattr(layer, "comm") else moments for layer, moments in totals.items()]
    found = comm.allgather(own)
    for rank, parts in enumerate(found):
        if isinstance(parts, str):
            raise RuntimeError(f"rank {rank} raised {parts}; so no rank has statistics")
        if len(parts) != len(own):
            raise ValueError(
                f"{len(parts)} batch norms ran on rank {rank}, and {len(own)} here; all ranks must "
                "call one model"
            )
    merged = dict(totals)
    for layer, parts in zip(totals, zip(*found, strict=True), strict=True):
        if parts[0] is not None:
            merged[layer] = reduce(lambda one, other: one.merge(other), parts)
    return merged


def _measure(
    model_or_layers: Any,
    batches: Iterable[Any],
    progress: Progress | None,
    upstream: str,
    inputs: Callable[[Any], Any] | None,
) -> dict[Any, Moments]:
    """Return the moments of the batches of this process."""
    model = _as_function(model_or_layers)
    take = inputs if inputs is not None else _how_to_take(model_or_layers)
    totals: dict[Any, Moments] = {}

    def note(layer: Any, moments: Moments) -> None:
        totals[layer] = totals[layer].merge(moments) if layer in totals else moments

    count = 0
    with _modules_recording(model_or_layers, note, upstream):
        for batch in batches if progress is None else progress(batches):
            count += 1
            given = take(batch)
            try:
                with Trial(None, training=upstream == "batch", note=note):
                    model(given)
            except Exception as error:
                error.add_note(_describe_call(count, batch, given))
                raise
    if not count:
        raise ValueError("batches has no batches")
    if not totals:
        raise ValueError(
            f"no batch norm that tracks running statistics ran in any of {count} batches; "
            "it must run in the call of the model, and in the same thread"
        )
    return totals


def _how_to_take(model: Any) -> Callable[[Any], Any]:
    """Return a function that takes the input of a model from a batch."""
    if not (_is_module(model) or isinstance(model, Sequence) or hasattr(model, "scale_shift")):
        return lambda batch: batch
    return lambda batch: batch[0] if isinstance(batch, tuple | list) and batch else batch


def _describe_call(count: int, batch: Any, given: Any) -> str:
    """Return a note that describes the input of a model."""
    text = f"population_statistics called the model with batch {count - 1}, {_describe(given)}"
    if given is not batch:
        return f"{text}, of {_describe(batch)}"
    if isinstance(batch, tuple | list):
        return f"{text}; inputs=operator.itemgetter(0) would give it the first part"
    return text


def _describe(value: Any, depth: int = 0) -> str:
    """Return the type of a value, with the shape of an array and the parts of a sequence."""
    name = type(value).__name__
    if isinstance(value, tuple | list) and depth < 2:
        parts = [_describe(part, depth + 1) for part in value[:4]]
        more = ", ..." if len(value) > 4 else ""
        return f"a {name} of ({', '.join(parts)}{more})"
    shape = getattr(value, "shape", None)
    return f"{name}" if shape is None else f"{name} of shape {tuple(shape)}"


# ---- models of PyTorch -------------------------------------------------------------------


def _is_module(model: Any) -> bool:
    """Return whether this is a module of PyTorch, without importing PyTorch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(model, torch.nn.Module)


@contextmanager
def _modules_recording(
    model: Any, note: Callable[[Any, Moments], None], upstream: str
) -> Iterator[None]:
    """Record the inputs of each batch norm of a model of PyTorch, without training it."""
    models = model if isinstance(model, Sequence) else [model]
    modules = [m for one in models if _is_module(one) for m in one.modules()]
    torch = sys.modules.get("torch")
    norms = [
        m
        for m in modules
        if any(base.__name__ == "_BatchNorm" for base in type(m).__mro__)
        and getattr(m, "running_mean", None) is not None
    ]
    before = [(norm, norm.training, norm.track_running_stats) for norm in norms]

    def report(norm: Any, given: tuple[Any, ...]) -> None:
        x = widened(given[0].detach()).cpu().numpy()
        if x.size:
            note(norm, Moments.empty(norm.num_features).update(x))

    with ExitStack() as stack:
        if torch is not None and modules:
            stack.enter_context(torch.no_grad())
        try:
            for norm in norms:
                stack.callback(norm.register_forward_pre_hook(report).remove)
                # In training mode without tracking, batch norms use the batch and change nothing.
                norm.training, norm.track_running_stats = upstream == "batch", upstream != "batch"
            yield
        finally:
            for norm, training, tracks in before:
                norm.training, norm.track_running_stats = training, tracks


def _as_function(model_or_layers: Any) -> Callable[[Any], object]:
    """Return a model or a list of layers as one function of a batch."""
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
