"""What the settings of a layer may be, checked when it is made and whenever one is assigned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, Self, TypeVar, get_args, overload

import numpy as np

from .. import functional
from .._arguments import check_eps, integer_from, number
from ._renorm import Renorm
from ._running import NanPolicy

__all__ = ["Fixed", "Setting"]

T = TypeVar("T")


class Setting(Generic[T]):
    """An attribute of a layer that is checked as it is assigned.

    It is kept under its name with an underscore before it, which is what the code that runs in
    every forward reads: an attribute like any other costs a third of one that is looked up here.

    Parameters
    ----------
    check : callable
        Given the name and a value, it returns the value to keep, or raises.
    """

    def __init__(self, check: Callable[[str, Any], T]) -> None:
        self._check = check

    def __set_name__(self, owner: type, name: str) -> None:
        self._name, self._place = name, f"_{name}"

    @overload
    def __get__(self, layer: None, owner: type) -> Self: ...
    @overload
    def __get__(self, layer: object, owner: type) -> T: ...
    def __get__(self, layer: object | None, owner: type) -> T | Self:
        """Return the value; this object where it is looked up in the class."""
        return self if layer is None else getattr(layer, self._place)

    def __set__(self, layer: object, value: Any) -> None:
        """Keep a value that will do; raise, with nothing changed, where it will not."""
        setattr(layer, self._place, self._check(self._name, value))


class Fixed(Setting[T]):
    """A setting that arrays of the layer were made by: it cannot be assigned again."""

    def __set__(self, layer: object, value: Any) -> None:
        """Keep the first value."""
        if hasattr(layer, self._place):
            raise AttributeError(
                f"{self._name} is {getattr(layer, self._place)}, and fixed when a layer is made; "
                "make a new one"
            )
        super().__set__(layer, value)


# ---- checks ------------------------------------------------------------------------------


def flag(name: str, value: Any) -> bool:
    """Return a bool; whatever Python takes for one is one."""
    return bool(value)


def positive(name: str, value: Any) -> float:
    """Return a positive, finite eps."""
    eps = number(name, value)
    check_eps(eps)
    return eps


def momentum(name: str, value: Any) -> float | None:
    """Return the weight of a batch, or None."""
    weight = None if value is None else number(name, value)
    if weight is not None and not 0 <= weight <= 1:
        raise ValueError(
            f"{name} is {weight}; it must be in [0, 1], or None for the mean of all batches"
        )
    return weight


def ddof(name: str, value: Any) -> int:
    """Return 0 or 1."""
    if value not in (0, 1):
        raise ValueError(f"{name} is {value}; it must be 0 (biased) or 1")
    return int(value)


def activation(name: str, value: Any) -> str | None:
    """Return the name of an activation, or None."""
    functional.activation_of(value, 0.0)
    return None if value is None else str(value)


def slope(name: str, value: Any) -> float:
    """Return a finite float."""
    functional.activation_of("leaky_relu", value)
    return number(name, value)


def nan_policy(name: str, value: Any) -> NanPolicy:
    """Return one of the policies."""
    if value not in get_args(NanPolicy):
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(get_args(NanPolicy))}")
    policy: NanPolicy = value
    return policy


def virtual_batch_size(name: str, value: Any) -> int | None:
    """Return a number of samples, or None."""
    try:
        return None if value is None else integer_from(name, value)
    except TypeError as error:
        raise TypeError(f"{error}, or None") from None


def renorm(name: str, value: Any) -> Renorm | None:
    """Return the limits of batch renormalization, or None."""
    if not (value is None or isinstance(value, Renorm)):
        raise TypeError(
            f"{name} is {value!r}; it must be a Renorm, such as Renorm(r_max=3, d_max=5)"
        )
    return value


def nothing(name: str, value: Any) -> None:
    """Return None: for what a layer inherits and does not have."""
    if value is not None:
        raise ValueError(f"{name} is {value!r}; it must be None, as this kind of layer has none")


def float_type(dtype: Any) -> np.dtype[Any]:
    """Return float32 or float64 as a dtype; None, NumPy's word for float64, is refused."""
    try:
        given = None if dtype is None else np.dtype(dtype)
    except TypeError:
        given = dtype
    if given not in (np.float32, np.float64):
        raise TypeError(f"dtype is {given}; it must be float32 or float64")
    return np.dtype(np.float32 if given == np.float32 else np.float64)
