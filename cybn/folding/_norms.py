"""The scale and shift of a layer, a module of PyTorch or a pair of arrays."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .._arguments import parameters
from ..interop._arrays import as_floats
from ..layers import BatchNorm

Array = NDArray[Any]
Norm = Any  # a layer, a module of PyTorch, or a tuple (scale, shift)
_PLAIN = ("FrozenBatchNorm2d",)  # of torchvision and detectron2: its statistics are fixed
_MODULE = ("running_mean", "running_var", "weight", "bias", "eps")  # as PyTorch names them


def fixed(bn: Norm) -> Any:
    """Return a layer or a pair (scale, shift) that computes what `bn` does in inference.

    Raise an error if a fixed scale and shift cannot compute it, or not all of it.
    """
    if isinstance(bn, tuple) and len(bn) == 2:
        return bn
    if all(hasattr(bn, name) for name in _MODULE):
        bn = _of_module(bn)
    if not hasattr(bn, "scale_shift"):
        raise TypeError(
            f"bn is of type {type(bn).__name__}; it must be a cybn.BatchNorm, a batch norm of "
            "torch.nn or cybn.torch, or a tuple (scale, shift) of arrays of shape (C,)"
        )
    if bn.activation is not None:
        raise ValueError(
            f"bn has the activation {bn.activation!r}, which would be lost, or come between bn and "
            "the layer after it. Fold bn.scale_shift(np.float64) into the layer before it, and put "
            "the activation after that"
        )
    return bn


def _of_module(module: Any) -> BatchNorm:
    """Return a layer with the statistics and parameters of a module of PyTorch."""
    if module.running_mean is None or module.running_var is None:
        raise ValueError(
            "bn has no running statistics (track_running_stats is False): it normalizes with the "
            "statistics of each batch, which no fixed scale and shift can do"
        )
    owner = next((c for c in type(module).__mro__ if "forward" in vars(c)), None)
    if owner is not None and not (
        owner.__module__.partition(".")[0] in ("torch", "cybn") or owner.__name__ in _PLAIN
    ):
        raise ValueError(
            f"bn is of type {type(module).__name__}, whose forward is its own: what it does beside "
            "a batch norm, such as an activation, would be lost. Fold cybn.interop.from_torch("
            "bn.state_dict(), eps=bn.eps), and put the rest after that"
        )
    mean, var = (as_floats(getattr(module, name), name) for name in _MODULE[:2])
    weight, bias = (
        None if getattr(module, name) is None else as_floats(getattr(module, name), name)
        for name in ("weight", "bias")
    )
    affine = weight is not None or bias is not None
    layer = BatchNorm(mean.size, eps=module.eps, affine=affine, dtype=np.float64)
    given = {"running_mean": mean, "running_var": var, "gamma": weight, "beta": bias}
    layer.load_state_dict(layer.state_dict() | {k: v for k, v in given.items() if v is not None})
    return layer


def vector(values: ArrayLike, name: str) -> Array:
    """Return an array of floats. Half types become float32, which represents them exactly."""
    array = as_floats(values, name)
    return array.astype(np.float32) if array.dtype == np.float16 else array


class Affine(NamedTuple):
    """The map y = x * scale + shift for each channel, in float64."""

    scale: Array  # (C,)
    shift: Array  # (C,)

    @classmethod
    def of(cls, bn: Norm) -> Affine:
        """Return the affine form of a layer or a module, or that of a pair (scale, shift)."""
        bn = fixed(bn)
        if not isinstance(bn, tuple):
            return cls(*bn.scale_shift(np.float64))
        scale, shift = vector(bn[0], "scale"), vector(bn[1], "shift")
        (scale, shift), _ = parameters(scale.size, scale=scale, shift=shift)
        return cls(scale.astype(np.float64), shift.astype(np.float64))

    def need(self, channels: int, what: str) -> None:
        """Raise ValueError unless there is one value for each of `channels`."""
        if len(self.scale) != channels:
            raise ValueError(f"bn has {len(self.scale)} channels; the weight has {channels} {what}")
