"""A layer as plain data for a file, and back: its class, its settings and its modes."""

from __future__ import annotations

import inspect
from math import prod
from typing import Any

import numpy as np

from .. import layers as _layers
from ..layers import Renorm
from ._forms import ROLES

__all__ = ["LAYERS", "called", "layer_from", "settings_of"]

LAYERS: dict[str, Any] = {
    kind.__name__: kind
    for kind in (
        *(_layers.BatchNorm, _layers.BatchNorm1d, _layers.BatchNorm2d, _layers.BatchNorm3d),
        *(_layers.InstanceNorm1d, _layers.InstanceNorm2d, _layers.InstanceNorm3d),
        *(_layers.LayerNorm, _layers.RMSNorm, _layers.GroupNorm),
    )
}
SWITCHES = ("training", "update_statistics", "use_batch_statistics", "train_affine")
MODES = (*SWITCHES, "nan_policy")  # set on a layer, unless its class takes them
MOST_STATELESS = 1 << 24  # largest number of values of a layer without arrays to confirm it


def settings_of(layer: Any, limits: dict[int, int]) -> dict[str, Any]:
    """Return the arguments that make such a layer, and its mode and switches."""
    own = {"bias": layer.beta is not None, "dtype": str(layer.dtype)}
    names = inspect.signature(type(layer)).parameters
    values: dict[str, Any] = {
        name: own[name] if name in own else getattr(layer, name) for name in names
    }
    renorm: Any = values.get("renorm")
    if renorm is not None:
        shared = limits.setdefault(id(renorm), len(limits))
        values["renorm"] = {"r_max": renorm.r_max, "d_max": renorm.d_max, "shared": shared}
    later = (name for name in MODES if name not in names and hasattr(layer, name))
    values["modes"] = {name: getattr(layer, name) for name in later}
    return values


def called(name: str) -> str:
    """Return how an error refers to a layer, which has no name if it was saved alone."""
    return f"layer {name!r}" if name else "the layer"


def layer_from(
    name: str, settings: dict[str, Any], arrays: dict[str, Any], limits: dict[Any, Renorm]
) -> Any:
    """Return a new layer with its arrays, which are removed from `arrays`."""
    settings = dict(settings)
    kind, modes = LAYERS[settings.pop("class")], settings.pop("modes", {})
    channels = [settings[k] for k in ("num_features", "num_channels") if k in settings]
    shape = tuple(channels or np.atleast_1d(settings["normalized_shape"]).tolist())
    start = f"{name}." if name else ""
    roles = [role for role in ROLES if start + role in arrays]
    state = {role: arrays.pop(start + role) for role in roles}
    sizes = {array.shape for role, array in state.items() if array.ndim}
    if sizes != {shape} and not (not sizes and prod(shape) <= MOST_STATELESS):
        raise ValueError(f"it has the shape {shape}, and arrays of shapes {sizes}")
    if settings.get("renorm") is not None:
        given = dict(settings["renorm"])
        shared = given.pop("shared", object())
        settings["renorm"] = limits.setdefault(shared, Renorm(**given))
    layer = kind(**settings)
    layer.load_state_dict(state)
    for mode, value in modes.items():
        if mode not in MODES or (mode in SWITCHES and not isinstance(value, bool | None)):
            raise ValueError(f"it has the mode {mode!r} = {value!r}, which is not valid")
        setattr(layer, mode, value)
    return layer
