"""PyTorch's normalization modules, computed by cybn's functions."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm as _NormBase

from ._functional import counting_batch_norm, current
from ._rebind import rebound
from ._small import is_small, quick

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "RMSNorm",
]

# Attributes that cybn adds to a module.
KEPT = ("_cybn_borders", "_cybn_fusing", "_cybn_reason")


class Converted(nn.Module):
    """The first base of a converted class, before the class of PyTorch or of a user."""

    def __prepare_scriptable__(self) -> nn.Module:
        """Return PyTorch's own module, which `torch.jit.script` compiles instead of this one."""
        stock = stock_class(type(self))
        twin: nn.Module = object.__new__(stock)
        twin.__dict__ = {k: v for k, v in self.__dict__.items() if k not in KEPT}
        return twin

    @property
    def __jit_unused_properties__(self) -> list[str]:
        """Raise an error if torch.jit compiles this module without calling the method above."""
        if sys._getframe(1).f_globals.get("__name__", "").startswith("torch.jit"):
            raise RuntimeError(
                "torch.jit cannot compile a module of cybn.torch inside a torch.jit.ScriptModule; "
                "give it PyTorch's own: cybn.torch.revert(model)"
            )
        return []

    def extra_repr(self) -> str:
        """Return PyTorch's representation, with the activation if one is fused."""
        text = super().extra_repr()
        fusing = self.__dict__.get("_cybn_fusing")
        also = fusing.describe()[0] if fusing is not None else ""
        return f"{text}, then {also}" if also else text

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle a module. If its class was made here, refer to the class that it was made from."""
        cls = type(self)
        if "_cybn_stock" in cls.__dict__ and cls not in STOCK:
            state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
            return _empty, (cls._cybn_stock,), state
        return super().__reduce_ex__(protocol)


def _empty(stock: type) -> nn.Module:
    """Return a converted module without state, for `pickle` and `copy`."""
    from ._classes import converted_class  # here, because it imports this module

    cls = converted_class(stock)
    if cls is None:
        raise TypeError(f"{stock.__name__} is not a class that cybn.torch converts")
    return object.__new__(cls)


def forward_of(
    original: Callable[..., Any], computed: Callable[..., Any], alone: bool = True
) -> Callable[..., Any]:
    """Return a forward that runs `computed`, and is a single module in traced graphs.

    PyTorch computes small calls. They go to `original` if `alone` is True, which means that it
    calls no other methods that were converted. Otherwise the functions in `computed` call PyTorch.
    """
    of_pytorch = quick(original) or (original if alone else None)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return computed(self, *args, **kwargs)
        small = bool(args) and is_small(self, args[0])
        if small and of_pytorch is not None:
            y = of_pytorch(self, *args, **kwargs)
            if y is not None:
                return y
        if args and isinstance(args[0], fx.Proxy):
            tracer = args[0].tracer
            path = tracer.path_of_module(self)
            return tracer.create_proxy("call_module", path, args, kwargs)
        before = current.module, current.small
        current.module, current.small = self, small
        try:
            return computed(self, *args, **kwargs)
        finally:
            current.module, current.small = before

    forward.__doc__ = original.__doc__ or "Normalize, as the class of the same name does."
    # Type checkers do not know that inspect looks for this attribute of a function.
    forward.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    return forward


def methods_of(cls: type) -> dict[str, Callable[..., Any]]:
    """Return a class's methods that normalize, with cybn's functions, and its forward.

    If no method normalizes, the result is empty.
    """
    found: dict[str, Callable[..., Any]] = {}
    for owner in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        for name, method in owner.__dict__.items():
            if getattr(cls, name, None) is method and (new := rebound(method)) is not None:
                found[name] = new
    if found:
        # `cls` is any class of modules, so type checkers know no forward.
        original: Any = cls.forward  # type: ignore[attr-defined]
        computed = found.get("forward", original)
        if original is _NormBase.forward:
            computed = _whole(computed)
        alone = found.keys() <= {"forward"}
        found["forward"] = forward_of(original, computed, alone)
    return found


def _whole(in_graphs: Callable[..., Any]) -> Callable[..., Any]:
    """Return PyTorch's own forward of batch norms, but update counter and statistics together.

    PyTorch counts the batch first. An interrupt or another thread could come in between, so that
    only the counter is updated.
    """

    def forward(self: Any, input: Tensor) -> Any:
        tracked = self.training and self.track_running_stats
        if torch.compiler.is_compiling() or (tracked and self.running_mean is None):
            return in_graphs(self, input)  # nothing follows, so the graph breaks only once
        self._check_input_dim(input)
        counter = self.num_batches_tracked if tracked else None
        momentum = 0.0 if self.momentum is None and counter is None else self.momentum
        by_batch = self.training or (self.running_mean is None and self.running_var is None)
        moving = not self.training or self.track_running_stats
        return counting_batch_norm(
            input,
            self.running_mean if moving else None,
            self.running_var if moving else None,
            self.weight,
            self.bias,
            by_batch,
            momentum,
            self.eps,
            counter,
        )

    return forward


class BatchNorm1d(Converted, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` for (N, C) and (N, C, L), computed by cybn.

    Examples
    --------
    >>> import torch
    >>> import cybn.torch
    >>> cybn.torch.BatchNorm1d(8)(torch.ones(4, 8, 10)).shape
    torch.Size([4, 8, 10])
    """


class BatchNorm2d(Converted, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` for (N, C, H, W), computed by cybn.

    Examples
    --------
    >>> import torch
    >>> import cybn.torch
    >>> cybn.torch.BatchNorm2d(8)(torch.ones(4, 8, 5, 5)).shape
    torch.Size([4, 8, 5, 5])
    """


class BatchNorm3d(Converted, nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d` for (N, C, D, H, W), computed by cybn.

    Examples
    --------
    >>> import torch
    >>> import cybn.torch
    >>> cybn.torch.BatchNorm3d(8)(torch.ones(4, 8, 3, 5, 5)).shape
    torch.Size([4, 8, 3, 5, 5])
    """


class InstanceNorm1d(Converted, nn.InstanceNorm1d):
    """`torch.nn.InstanceNorm1d` for (N, C, L) and (C, L), computed by cybn.

    Examples
    --------
    >>> import torch
    >>> import cybn.torch
    >>> cybn.torch.InstanceNorm1d(8)(torch.ones(4, 8, 10)).shape
    torch.Size([4, 8, 10])
    """


class InstanceNorm2d(Converted, nn.InstanceNorm2d):
    """`torch.nn.InstanceNorm2d` for (N, C, H, W) and (C, H, W), computed by cybn.

    Examples
    --------
    >>> import torch
    >>> import cybn.torch
    >>> cybn.torch.InstanceNorm2d(8)(torch.ones(4, 8, 5, 5)).shape
    torch.Size([4, 8, 5, 5])
    """


class InstanceNorm3d(Converted, nn.InstanceNorm3d):
    """`torch.nn.InstanceNorm3d` for (N, C, D, H, W) and (C, D, H, W), computed by cybn.

    Examples
    --------
    >>> import torch
    >>> import cybn.torch
    >>> cybn.torch.InstanceNorm3d(8)(torch.ones(4, 8, 3, 5, 5)).shape
    torch.Size([4, 8, 3, 5, 5])
    """


class GroupNorm(Converted, nn.GroupNorm):
    """`torch.nn.GroupNorm`, computed by cybn.

    Examples
    --------
    >>> import torch
    >>> import cybn.torch
    >>> cybn.torch.GroupNorm(2, 8)(torch.ones(4, 8, 5, 5)).shape
    torch.Size([4, 8, 5, 5])
    """


class LayerNorm(Converted, nn.LayerNorm):
    """`torch.nn.LayerNorm`, computed by cybn.

    Examples
    --------
    >>> import torch
    >>> import cybn.torch
    >>> cybn.torch.LayerNorm(8)(torch.ones(4, 10, 8)).shape
    torch.Size([4, 10, 8])
    """


class RMSNorm(Converted, nn.RMSNorm):
    """`torch.nn.RMSNorm`, computed by cybn.

    Examples
    --------
    >>> import torch
    >>> import cybn.torch
    >>> cybn.torch.RMSNorm(8)(torch.ones(4, 10, 8)).shape
    torch.Size([4, 10, 8])
    """


NORMS: dict[type, type] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
    nn.InstanceNorm1d: InstanceNorm1d,
    nn.InstanceNorm2d: InstanceNorm2d,
    nn.InstanceNorm3d: InstanceNorm3d,
    nn.GroupNorm: GroupNorm,
    nn.LayerNorm: LayerNorm,
    nn.RMSNorm: RMSNorm,
}
STOCK = {ours: stock for stock, ours in NORMS.items()}
for _stock, _ours in NORMS.items():
    for _name, _method in methods_of(_stock).items():
        setattr(_ours, _name, _method)


def stock_class(cls: type) -> type:
    """Return the class that a class of cybn, or one derived from it, replaces."""
    if cls in STOCK:
        return STOCK[cls]
    if not issubclass(cls, Converted):
        return cls
    made_of = cls.__dict__.get("_cybn_stock")
    if made_of is not None:
        return made_of
    return derived(cls, tuple(stock_class(base) for base in cls.__bases__))


def derived(cls: type, bases: tuple[type, ...]) -> type:
    """Return a class like `cls` with other bases."""
    if bases == cls.__bases__:
        return cls
    namespace = {
        name: value
        for name, value in cls.__dict__.items()
        if name not in ("__dict__", "__weakref__")
    }
    return type(cls)(cls.__name__, bases, namespace)
