"""The class of cybn that replaces a class of PyTorch, of timm or of a user.

Classes are recognized by what they do, not by name: if the methods of a class call normalizations
of `torch.nn.functional`, a subclass runs the same code with cybn's functions. Frozen batch norms
call none of them. They are recognized by their buffers, and by what they compute for a few values.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from ._functional import batch_norm
from .modules import NORMS, STOCK, Converted, derived, forward_of, methods_of

__all__ = ["class_for", "converted_class", "is_norm", "why_not"]

_cache: dict[type, type | None] = {}
_frozen: dict[type, type] = {}


def class_for(module: nn.Module) -> type | None:
    """Return the class that `module` is to get, or None if it keeps its own."""
    cls = type(module)
    if isinstance(module, Converted):
        return None
    if _looks_frozen(module):
        return _frozen_class(cls) if _computes_frozen(module) else None
    return converted_class(cls)


def converted_class(cls: type) -> type | None:
    """Return cybn's class for a class of modules, or None if it does not normalize."""
    if cls in NORMS:
        return NORMS[cls]
    if cls in _frozen:
        return _frozen[cls]
    if cls not in _cache:
        _cache[cls] = _make(cls)
    return _cache[cls]


def _make(cls: type) -> type | None:
    if cls in STOCK or issubclass(cls, torch.jit.ScriptModule | fx.GraphModule):
        return None
    if issubclass(cls, nn.modules.lazy.LazyModuleMixin | nn.SyncBatchNorm):
        return None
    base = cls.__bases__[0]
    if "parametrizations" in cls.__name__ or _is_parametrized(cls):
        inner = converted_class(base)
        return None if inner is None else derived(cls, (inner,))
    methods = methods_of(cls)
    if methods:
        return _subclass(cls, (Converted, cls), methods)
    stock = next((known for known in cls.__mro__ if known in NORMS), None)
    code = getattr(getattr(cls, "forward", None), "__code__", None)
    if stock is not None and code is not None and {"super", "forward"} <= set(code.co_names):
        return _subclass(cls, (cls, NORMS[stock]), {})
    return None


def _subclass(cls: type, bases: tuple[type, ...], methods: dict[str, Any]) -> type:
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls)(cls.__name__, bases, {**names, "_cybn_stock": cls, **methods})


def _is_parametrized(cls: type) -> bool:
    """Return whether `torch.nn.utils.parametrize` made this class from its base."""
    return cls.__name__ == f"Parametrized{cls.__bases__[0].__name__}" and any(
        isinstance(value, property) for value in cls.__dict__.values()
    )


# ---- frozen batch norms: of torchvision, timm, detectron2, and copies of them -------------


def _looks_frozen(module: nn.Module) -> bool:
    """Return whether a module has the name, the buffers and the eps of a frozen batch norm."""
    buffers = {name for name, value in module._buffers.items() if value is not None}
    return (
        "Frozen" in type(module).__name__
        and buffers - {"num_batches_tracked"} == {"weight", "bias", "running_mean", "running_var"}
        and not module._parameters
        and isinstance(getattr(module, "eps", None), float)
    )


def _computes_frozen(module: nn.Module) -> bool:
    """Return whether a module computes what its replacement does, for a few values."""
    try:
        twin = copy.deepcopy(module).double().cpu()
        generator = torch.Generator().manual_seed(0)
        for buffer in (twin.running_mean, twin.running_var, twin.weight, twin.bias):
            buffer.copy_(torch.rand(buffer.shape, generator=generator, dtype=torch.float64) + 0.5)
        x = torch.randn(2, len(twin.weight), 3, 2, generator=generator, dtype=torch.float64)
        expected = twin(x)
        return torch.allclose(_frozen_forward(twin, x), expected, rtol=1e-9, atol=1e-9)
    except Exception:  # a user's class may raise anything
        return False


def _frozen_forward(self: Any, x: Tensor) -> Tensor:
    y = batch_norm(
        x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
    )
    for name in ("drop", "act"):
        after = self._modules.get(name)
        if after is not None:
            y = after(y)
    return y


def _frozen_class(cls: type) -> type:
    if cls not in _frozen:
        # `cls` is any class of modules, so type checkers know no forward.
        methods = {"forward": forward_of(cls.forward, _frozen_forward)}  # type: ignore[attr-defined]
        _frozen[cls] = _subclass(cls, (Converted, cls), methods)
    return _frozen[cls]


# ---- modules that are not converted ------------------------------------------------------

_KNOWN = (nn.modules.batchnorm._NormBase, *NORMS)


def is_norm(module: nn.Module) -> bool:
    """Return whether this is a normalization, judging by its class and parameters."""
    return isinstance(module, _KNOWN) or (
        "norm" in type(module).__name__.lower()
        and not any(is_norm(child) for child in module.children())
        and any(name in module._parameters or name in module._buffers for name in ("weight",))
    )


def why_not(module: nn.Module) -> str:
    """Return why a normalization is not converted."""
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return "it has seen no data yet: call the model once, and convert it again"
    if isinstance(module, nn.SyncBatchNorm):
        return "it is synchronized: convert(model, sync=True)"
    if isinstance(module, torch.jit.ScriptModule):
        return "it is compiled by torch.jit"
    if parametrize.is_parametrized(module):
        return "its class is one that cybn.torch does not convert"
    if _looks_frozen(module):
        return "it does not compute the same as a frozen batch norm"
    return "its forward does not call PyTorch's functions that normalize"
