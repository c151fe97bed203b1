"""Copies of functions that call cybn's normalizations instead of PyTorch's.

The forward of a module of PyTorch, of timm or of a user calls `F.batch_norm`, `F.layer_norm` or
another normalization. A copy runs the same code, but its global names refer to cybn's functions. So
everything else that it does stays the same, such as counting batches or an activation.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from ._functional import FUNCTIONS

__all__ = ["rebound"]

_REPLACED: dict[Any, Any] = {
    getattr(home, name): ours
    for name, ours in FUNCTIONS.items()
    for home in (functional, torch)
    if home is functional or name == "rms_norm"  # the others in torch have other arguments
}
_DEPTH = 2  # levels of called functions that are copied, too


class _Namespace(types.SimpleNamespace):
    """A module in which some names refer to other objects."""

    def __init__(self, module: types.ModuleType, **names: Any) -> None:
        super().__init__(**names)
        self.__dict__["_module"] = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_module"], name)


_FUNCTIONAL = _Namespace(functional, **FUNCTIONS)
_NN = _Namespace(torch.nn, functional=_FUNCTIONAL)
_TORCH = _Namespace(torch, nn=_NN)
_SPACES: dict[Any, _Namespace] = {functional: _FUNCTIONAL, torch.nn: _NN, torch: _TORCH}


def rebound(function: Any, depth: int = _DEPTH) -> Callable[..., Any] | None:
    """Return a copy of `function` that calls cybn's normalizations.

    Return None if it is not a Python function, or does not seem to call PyTorch's normalizations.
    """
    if not isinstance(function, types.FunctionType):
        return None
    code, before = function.__code__, function.__globals__
    names = set(code.co_names)
    changes: dict[str, Any] = {}
    for name in names & before.keys():
        value = before[name]
        if (ours := _replacement(value, names, depth)) is not None:
            changes[name] = ours
    if not changes:
        return None
    after = {**before, **changes}
    after.pop("__name__", None)  # torch.compile would look names up in the module of that name
    new = types.FunctionType(
        code, after, function.__name__, function.__defaults__, function.__closure__
    )
    new.__kwdefaults__ = function.__kwdefaults__
    new.__module__ = function.__module__
    return new


def _replacement(value: Any, names: set[str], depth: int) -> Any:
    """Return the object that a global name is to refer to, or None if that does not change."""
    if isinstance(value, types.ModuleType):
        used = names & FUNCTIONS.keys()
        if value is functional:
            return _FUNCTIONAL if used else None
        return _SPACES.get(value) if used and "functional" in names else None
    try:
        if value in _REPLACED:
            return _REPLACED[value]
    except TypeError:  # it cannot be hashed
        return None
    if depth and isinstance(value, types.FunctionType) and "torch." not in value.__module__ + ".":
        return rebound(value, depth - 1)
    return None
