"""Shared code of the tests of layers: every kind of layer, their state, bounds of gradients."""

import copy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from bounds import ULP32, ULP64, column, wide
from cases import backward_bound

import cybn
from cybn import reference
from cybn.layers._running import RunningStatistics


def snapshot(bn):
    """Return the complete state of a layer, for comparing bits."""
    arrays = bn.parameters() + bn.gradients() + list(bn.state_dict().values())
    return repr(bn), bn.training, [(a.dtype.str, a.shape, a.tobytes()) for a in arrays]


def gradient_bounds(dy, x, gamma, axis=1, eps=1e-5, mean=None, var=None):
    """Return the exact (dx, dgamma, dbeta) and their bounds, through the batch or for (mean, var).

    With a fixed mean and variance, and `size` as in `backward_bound`, they are
    dbeta: ulp * sum |dy|;  dgamma: ulp * sum (|dy| * size);  dx: ulp * |gamma| * r * |dy|.
    """
    if mean is None:
        return backward_bound(dy, x, gamma, axis, eps)
    dy, wx, mean, var, gamma = wide(dy, x, mean, var, gamma)
    exact = reference.batch_norm_inference_backward(dy, wx, mean, var, gamma, axis=axis, eps=eps)
    axis = axis % x.ndim
    others = tuple(i for i in range(x.ndim) if i != axis)
    g = np.ones(x.shape[axis]) if gamma is None else gamma
    mean, var, g = (column(v, x.ndim, axis) for v in (mean, var, g))
    r = 1 / np.sqrt(var + eps)
    size = np.abs(wx - mean) * r + 1
    if x.dtype == np.float64:
        size += np.abs(mean) * r
    ulp, dy = ULP32 if x.dtype == np.float32 else ULP64, np.abs(dy)
    return exact, (
        ulp * np.abs(g) * r * dy,
        ulp * (dy * size).sum(others),
        ulp * dy.sum(others),
    )


# ---- every kind of layer -----------------------------------------------------------------


class Kind(NamedTuple):
    """A kind of layer, how to make one, and the inputs that it takes."""

    make: Callable[..., Any]
    shape: tuple
    options: dict  # of a forward
    residual: bool = False

    def data(self, rng, count=1):
        """Return `count` batches."""
        return rng.standard_normal((count, *self.shape)).astype(np.float32)

    def forward(self, layer, x):
        more = {"residual": x[::-1].copy()} if self.residual else {}
        return layer(x, **self.options, **more)


def batch_norm(make, *shape, options=None, residual=False, **k):
    return Kind(lambda **more: make(6, **k, **more), shape, options or {}, residual)


IMAGES = (4, 6, 3, 5)
KINDS = {
    "BatchNorm": batch_norm(cybn.BatchNorm, 8, 6),
    "BatchNorm1d": batch_norm(cybn.BatchNorm1d, 4, 6, 5),
    "BatchNorm2d": batch_norm(cybn.BatchNorm2d, *IMAGES),
    "BatchNorm3d": batch_norm(cybn.BatchNorm3d, *IMAGES, 2),
    "channels-last": batch_norm(cybn.BatchNorm2d, 4, 3, 5, 6, axis=-1),
    "not affine": batch_norm(cybn.BatchNorm2d, *IMAGES, affine=False),
    "no running statistics": batch_norm(cybn.BatchNorm2d, *IMAGES, track_running_stats=False),
    "cumulative": batch_norm(cybn.BatchNorm2d, *IMAGES, momentum=None),
    "activation": batch_norm(cybn.BatchNorm2d, *IMAGES, activation="silu"),
    "residual": batch_norm(cybn.BatchNorm2d, *IMAGES, activation="relu", residual=True),
    "mask": batch_norm(cybn.BatchNorm1d, 4, 6, 5, options={"lengths": [5, 3, 0, 4]}),
    "virtual batches": batch_norm(cybn.BatchNorm2d, *IMAGES, virtual_batch_size=2),
    "renormalization": batch_norm(cybn.BatchNorm2d, *IMAGES, renorm=cybn.Renorm(3, 5)),
    "nan_policy": batch_norm(cybn.BatchNorm2d, *IMAGES, nan_policy="raise"),
    "LayerNorm": Kind(lambda **more: cybn.LayerNorm((6, 5), **more), (4, 6, 5), {}),
    "LayerNorm without bias": Kind(
        lambda **more: cybn.LayerNorm(5, bias=False, **more), (4, 6, 5), {}
    ),
    "RMSNorm": Kind(lambda **more: cybn.RMSNorm(5, **more), (4, 6, 5), {}),
    "GroupNorm": Kind(lambda **more: cybn.GroupNorm(3, 6, **more), (4, 6, 5), {}),
    "InstanceNorm1d": batch_norm(cybn.InstanceNorm1d, 4, 6, 5, affine=True),
    "InstanceNorm2d": batch_norm(cybn.InstanceNorm2d, *IMAGES, track_running_stats=True),
    "InstanceNorm3d": batch_norm(cybn.InstanceNorm3d, *IMAGES, 2),
}
LEARNING = [name for name in KINDS if getattr(KINDS[name].make(), "track_running_stats", False)]


def trained(kind, rng):
    """Return a layer after a training step and one more forward, so that backward can be called."""
    layer = kind.make()
    for parameter in layer.parameters():
        parameter[...] = rng.uniform(0.5, 2, parameter.shape)
    first, second, dy = kind.data(rng, 3)
    kind.forward(layer, first)
    layer.backward(dy)
    kind.forward(layer, second)
    return layer


def twin(layer):
    """Return a copy of a layer, with the results of its last forward that backward needs."""
    other = copy.deepcopy(layer)
    other._saved = layer._saved
    if layer._running is not None:
        other._running.seen = layer._running.seen
    return other


def everything(thing):
    """Return all that a layer stores, including what it keeps for backward, for comparing."""
    if isinstance(thing, np.ndarray):
        return thing.dtype.str, thing.shape, thing.tobytes()
    if isinstance(thing, cybn.Moments):
        return everything([thing.count, thing.mean, thing.m2])
    if isinstance(thing, tuple | list):
        return [everything(part) for part in thing]
    if isinstance(thing, Mapping):
        return {name: everything(part) for name, part in thing.items()}
    if isinstance(thing, cybn.Layer | RunningStatistics):
        return everything(vars(thing))
    return repr(thing)
