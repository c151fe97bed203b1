"""A layer from a group of arrays, and back."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import numpy as np

from .._arguments import number
from ..layers import BatchNorm, InstanceNorm
from ._arrays import as_array
from ._forms import BATCHES, BETA, GAMMA, MEAN, VAR, Group, form, read, variance, write


def build(
    state: Any,
    name: str,
    prefix: str,
    layer: type[BatchNorm],
    running_ddof: int | None,
    count: Any,
    **options: Any,
) -> BatchNorm:
    """Return a new layer with the arrays that `state` has under a prefix."""
    group = read(state, name, prefix)
    known = form(name).ddof
    assert known is not None
    ddof = known if running_ddof is None else running_ddof
    if ddof not in (0, 1):
        raise ValueError(f"running_ddof is {running_ddof}; it must be 0 (biased), 1 or None")
    if ddof != known and VAR in group:
        if count is None:
            raise ValueError(
                f"running_ddof is {ddof}, and the state has the other variance: give count=, the "
                "values of a channel in a training batch, or leave running_ddof out"
            )
        group[VAR] = variance(group[VAR], known, ddof, count)
    return layer_of(group, layer, running_ddof=ddof, **options)


def layer_of(group: Group, layer: type[BatchNorm], **options: Any) -> BatchNorm:
    """Return a new layer with the arrays of a group, and its other settings from `options`."""
    vectors = {role: as_array(value, role) for role, value in group.items() if role != BATCHES}
    shape = next(iter(vectors.values())).shape
    if len(shape) != 1:
        raise ValueError(f"{next(iter(vectors))} has shape {shape}; it must have shape (C,)")
    for role, array in vectors.items():  # before room is made for them
        if array.shape != shape:
            raise ValueError(f"{role} has shape {array.shape}; it must have shape {shape}")
    wide = any(array.dtype == np.float64 for array in vectors.values())
    affine, track = bool({GAMMA, BETA} & set(vectors)), VAR in vectors
    bn = layer(
        shape[0],
        affine=affine,
        track_running_stats=track,
        dtype=np.float64 if wide else np.float32,
        **options,
    )
    bn.load_state_dict(bn.state_dict() | group)  # a lone gamma or beta joins the layer's own
    return bn


def arrays_of(bn: BatchNorm, name: str, prefix: str, count: Any) -> dict[str, Any]:
    """Return copies of a layer's arrays under the keys of a form."""
    if not isinstance(bn, BatchNorm | InstanceNorm):
        raise TypeError(f"bn is of type {type(bn).__name__}; it must be a cybn.BatchNorm")
    if bn.activation is not None:
        raise ValueError(
            f"bn has the activation {bn.activation!r}, which the other library has as a layer of "
            "its own: convert a copy whose activation is None (twin = copy.copy(bn); "
            "twin.activation = None), and put the activation after it there"
        )
    known, group = form(name), dict(bn.state_dict())
    if MEAN not in group and known.tracked:
        raise ValueError(
            "track_running_stats is False, and a batch norm of that library always has running "
            "statistics"
        )
    if VAR in group and count is not None and known.ddof is not None:
        group[VAR] = variance(group[VAR], bn.running_ddof, known.ddof, count)
    return write(group, name, prefix)


def other_momentum(momentum: float | None) -> float:
    """Return the weight of the old value from that of the new one, or back.

    In decimal, so that 0.1 becomes 0.9, and 0.1 again. What is out of range is refused here, where
    the error can still show the value that was given.
    """
    if momentum is None:
        raise ValueError(
            "momentum is None, the mean of all batches, which only PyTorch has as well; "
            "set bn.momentum to a number first"
        )
    momentum = number("momentum", momentum)
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum is {momentum}; it must be in 0..1")
    return float(1 - Decimal(repr(momentum)))
