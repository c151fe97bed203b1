"""A layer of any kind from a group of arrays, and back."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._arguments import number
from ..layers import (
    BatchNorm,
    GroupNorm,
    InstanceNorm1d,
    InstanceNorm2d,
    InstanceNorm3d,
    LayerNorm,
    RMSNorm,
)
from ._arrays import as_floats
from ._forms import BATCHES, BETA, GAMMA, MEAN, VAR, Group, form, read, variance, write

# The kinds of layers. INSTANCE is in the order of the number of spatial axes.
BATCH = BatchNorm
INSTANCE = (InstanceNorm1d, InstanceNorm2d, InstanceNorm3d)
FAMILY = (LayerNorm, RMSNorm, GroupNorm)  # without running statistics
NORMS = (BATCH, *INSTANCE, *FAMILY)


def build(
    state: Any,
    name: str,
    prefix: str,
    layer: type[Any],
    running_ddof: int | None,
    count: Any,
    state_ddof: int | None = None,
    num_groups: int | None = None,
    **options: Any,
) -> Any:
    """Return a new layer with the arrays that `state` has under a prefix."""
    family, batch = issubclass(layer, FAMILY), not issubclass(layer, (*INSTANCE, *FAMILY))
    group = read(state, name, prefix, batch)
    if family:
        return family_layer(group, layer, num_groups, options["eps"], options["axis"])
    if num_groups is not None:
        raise ValueError(f"num_groups is {num_groups}; it is for layer=GroupNorm only")
    known = form(name).ddof if state_ddof is None else state_ddof
    ddof = known if running_ddof is None else running_ddof
    for what, value in (("state_ddof", known), ("running_ddof", ddof)):
        if value not in (0, 1):
            raise ValueError(f"{what} is {value}; it must be 0 (biased), 1 or None")
    assert known is not None
    assert ddof is not None
    if ddof != known and VAR in group:
        if count is None:
            raise ValueError(
                f"running_ddof is {ddof}, and the state has the other variance: give count=, the "
                "number of values per channel in a training batch, or leave running_ddof out"
            )
        group[VAR] = variance(group[VAR], known, ddof, count)
    return layer_of(group, layer, running_ddof=ddof, **options)


def _vectors(group: Group) -> tuple[dict[str, NDArray[Any]], type[np.floating[Any]]]:
    """Return the arrays of a group, which must have one shape, and the widest of their types."""
    vectors = {role: as_floats(value, role) for role, value in group.items() if role != BATCHES}
    shape = next(iter(vectors.values())).shape
    for role, array in vectors.items():  # before memory is allocated for a layer
        if array.shape != shape:
            raise ValueError(f"{role} has shape {array.shape}; it must have shape {shape}")
    wide = any(array.dtype == np.float64 for array in vectors.values())
    return vectors, np.float64 if wide else np.float32


def layer_of(group: Group, layer: type[Any], **options: Any) -> Any:
    """Return a new layer with the arrays of a group, and its other settings from `options`."""
    for role, value in group.items():
        if role != BATCHES and np.ndim(value) != 1:
            raise ValueError(
                f"{role} has shape {np.shape(value)}; it must have shape (C,). There may be a "
                "layer of another kind at this prefix"
            )
    vectors, dtype = _vectors(group)
    first = next(iter(vectors.values()))
    affine, track = bool({GAMMA, BETA} & set(vectors)), VAR in vectors
    bn = layer(first.size, affine=affine, track_running_stats=track, dtype=dtype, **options)
    counted = {BATCHES: group[BATCHES]} if BATCHES in group else {}
    # If only one of gamma and beta is given, the other keeps its initial value.
    bn.load_state_dict(bn.state_dict() | vectors | counted)
    return bn


def family_layer(group: Group, layer: Any, num_groups: int | None, eps: Any, axis: int) -> Any:
    """Return a new layer norm, RMS norm or group norm with the arrays of a group."""
    vectors, dtype = _vectors({role: v for role, v in group.items() if role in (GAMMA, BETA)})
    shape = next(iter(vectors.values())).shape
    if issubclass(layer, GroupNorm):
        if num_groups is None or len(shape) != 1:
            raise ValueError(
                f"num_groups is {num_groups}, and the arrays have the shape {shape}; a GroupNorm "
                "needs num_groups= and arrays of shape (C,)"
            )
        norm: Any = layer(num_groups, shape[0], axis=axis, eps=eps, dtype=dtype)
    elif issubclass(layer, RMSNorm):
        if BETA in vectors:
            raise ValueError("there is a shift, and an RMSNorm has none: give layer=LayerNorm")
        norm = layer(shape, eps=eps, dtype=dtype)
    else:
        norm = layer(shape, eps=eps, bias=BETA in vectors, dtype=dtype)
    norm.load_state_dict(norm.state_dict() | vectors)
    return norm


def check_norm(bn: Any) -> None:
    """Raise an error for anything but a layer, and for options that other libraries lack."""
    known: tuple[Any, ...] = NORMS
    if not isinstance(bn, known):
        raise TypeError(f"bn is of type {type(bn).__name__}; it must be a layer of cybn")
    if getattr(bn, "activation", None) is not None:
        raise ValueError(
            f"bn has the activation {bn.activation!r}, which is a layer of its own in the other "
            "library: convert a copy whose activation is None (twin = copy.copy(bn); "
            "twin.activation = None), and put the activation after it there"
        )
    if getattr(bn, "use_batch_statistics", None) is True and bn.track_running_stats:
        raise ValueError(
            "use_batch_statistics is True: bn normalizes with the statistics of each batch in "
            "inference too, but the converted layer would use its running statistics. Convert a "
            "copy whose use_batch_statistics is None"
        )


def arrays_of(bn: Any, name: str, prefix: str, count: Any) -> dict[str, Any]:
    """Return copies of a layer's arrays under the keys of a form."""
    check_norm(bn)
    known, group = form(name), dict(bn.state_dict())
    if isinstance(bn, INSTANCE) and known.tracked:
        if MEAN in group:
            raise ValueError(
                "track_running_stats is True, and an instance norm of that library has no running "
                "statistics; set bn.track_running_stats = False to leave them out"
            )
    elif not isinstance(bn, FAMILY) and MEAN not in group and known.tracked:
        raise ValueError(
            "track_running_stats is False, and a batch norm of that library always has running "
            "statistics"
        )
    if VAR in group and count is not None and known.ddof is not None:
        group[VAR] = variance(group[VAR], bn.running_ddof, known.ddof, count)
    return write(group, name, prefix, whole=not isinstance(bn, FAMILY))


def needs_eps(bn: Any) -> float:
    """Return the eps of a layer. Raise ValueError if it depends on the input's dtype."""
    if bn.eps is None:
        raise ValueError(
            "eps is None, the machine epsilon of the input's dtype, which only PyTorch has as "
            "well; set bn.eps to a number first, such as 1.1920929e-07 for float32"
        )
    return float(bn.eps)


def other_momentum(momentum: float | None) -> float:
    """Return 1 - momentum, which converts between the weights of the old and the new value.

    It is computed in decimal, so that 0.1 becomes exactly 0.9, and 0.9 becomes 0.1 again. A value
    out of range is rejected here, so that the error shows the momentum that was given.
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
