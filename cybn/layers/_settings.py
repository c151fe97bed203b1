"""Attributes of a layer that are checked when it is made and whenever one is assigned."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any, Generic, NoReturn, Self, SupportsFloat, TypeVar, cast, get_args, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import functional
from .._arguments import check_eps, number
from .._words import Activation, NanPolicy
from . import _state
from ._parts import Renorm

__all__ = ["Fixed", "Parameter", "Setting", "Statistic", "elsewhere"]

Kept = TypeVar("Kept")
Given = TypeVar("Given")


class Setting(Generic[Kept, Given]):
    """An attribute that is checked as it is assigned.

    The value is stored under the setting's name with an underscore before it, in the layer or in a
    part of it. The code that runs in every forward reads it there, because a look-up through this
    object takes three times as long. `check` takes the name and a value, and returns the value to
    store or raises an error. `place` is the path from the layer, such as ``"_running.momentum"``.
    """

    def __init__(self, check: Callable[[str, Given], Kept], place: str = "") -> None:
        self._check, self._place = check, place

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name
        part, _, self._kept_as = (self._place or f"_{name}").rpartition(".")
        self._part: Callable[[Any], Any] = attrgetter(part) if part else lambda layer: layer

    @overload
    def __get__(self, layer: None, owner: type) -> Self: ...
    @overload
    def __get__(self, layer: object, owner: type) -> Kept: ...
    def __get__(self, layer: object | None, owner: type) -> Kept | Self:
        """Return the value, or this object if the attribute is that of the class."""
        return self if layer is None else getattr(self._part(layer), self._kept_as)

    def __set__(self, layer: object, value: Given) -> None:
        """Store a value if it passes the check; otherwise the setting is unchanged."""
        setattr(self._part(layer), self._kept_as, self._check(self._name, value))


class Fixed(Setting[Kept, Given]):
    """A setting that determines the layer's arrays, so that it cannot be assigned again."""

    def __set__(self, layer: object, value: Given) -> None:
        """Store the first value; refuse any other."""
        if hasattr(layer, self._kept_as):
            raise AttributeError(
                f"{self._name} is {getattr(layer, self._kept_as)}, and fixed when a layer is made; "
                "make a new one"
            )
        super().__set__(layer, value)


class Parameter(Setting[NDArray[Any] | Any, ArrayLike | None]):
    """gamma, beta or a gradient: one array for the life of a layer, or None if it has none.

    An assigned value is checked, converted and copied into that array, so that an optimizer which
    refers to the array sees the change. The type has ``| Any`` instead of ``| None``, because most
    layers have the array, and programs need not assert that.
    """

    def __init__(self) -> None:
        self._place = ""

    def __set__(self, layer: object, value: ArrayLike | None) -> None:
        """Copy a checked value into the array."""
        own = getattr(layer, self._kept_as)
        if value is own:  # what ``bn.gamma *= 2`` assigns, or None
            return
        if own is None:
            raise AttributeError(
                f"{self._name} cannot be set: this {type(layer).__name__} was made without"
            )
        own[...] = _state.array(self._name, value, own.shape, own.dtype)


class Statistic(Setting[Kept, Given]):
    """A running statistic, a field of `Running`; None if the layer does not track it."""

    def __init__(self, field: str) -> None:
        self._place = f"_running.shown.{field}"

    def __set__(self, layer: Any, value: Given) -> None:
        """Replace the statistic by a checked copy."""
        running = layer._running
        running.replace(**{self._kept_as: running.checked(self._name, value, layer._eps)})


def elsewhere(name: str, advice: str) -> property:
    """Return an attribute that cannot be assigned, as the layer would ignore it.

    Layers of other libraries, or other layers of cybn, have an attribute of this name.
    """

    def refuse(layer: object, *value: object) -> NoReturn:
        raise AttributeError(f"{type(layer).__name__} has no {name}; {advice}")

    return property(refuse, refuse)


# ---- checks ------------------------------------------------------------------------------


def flag(name: str, value: bool) -> bool:
    """Return a bool, from True, False, 1 or 0."""
    if not isinstance(value, bool | int | np.bool_) or value not in (0, 1):
        raise TypeError(f"{name} is {value!r}; it must be True or False")
    return bool(value)


def optional(check: Callable[[str, Given], Kept]) -> Callable[[str, Given | None], Kept | None]:
    """Return a check that accepts None as well, and mentions it in TypeErrors."""

    def checked(name: str, value: Given | None) -> Kept | None:
        try:
            return None if value is None else check(name, value)
        except TypeError as error:
            raise TypeError(f"{error}, or None") from None

    return checked


def positive(name: str, value: SupportsFloat) -> float:
    """Return a positive, finite eps."""
    return check_eps(value)


def not_negative(name: str, value: SupportsFloat) -> float:
    """Return a finite eps, which may be 0: only a training forward refuses that."""
    return check_eps(value, least=0)


def momentum(name: str, value: SupportsFloat) -> float:
    """Return the weight of a batch."""
    weight = number(name, value)
    if not 0 <= weight <= 1:
        raise ValueError(
            f"{name} is {weight}; it must be in [0, 1], or None for the mean of all batches"
        )
    return weight


def ddof(name: str, value: int) -> int:
    """Return 0 or 1."""
    if isinstance(value, bool | np.bool_) or value not in (0, 1):
        raise ValueError(f"{name} is {value}; it must be 0 (biased) or 1")
    return int(value)


def _fuse(**options: Any) -> None:
    """Raise the error of the functions for an unknown activation or a bad slope."""
    functional.batch_norm_inference(np.zeros((1, 1), np.float32), [0.0], [1.0], **options)


def activation(name: str, value: Activation | None) -> Activation | None:
    """Return the name of a known activation, or None."""
    _fuse(activation=value)
    return None if value is None else cast("Activation", str(value))


def slope(name: str, value: SupportsFloat) -> float:
    """Return a finite float."""
    _fuse(activation="leaky_relu", slope=value)
    return number(name, value)


def nan_policy(name: str, value: NanPolicy) -> NanPolicy:
    """Return one of the policies."""
    if value not in get_args(NanPolicy):
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(get_args(NanPolicy))}")
    return cast("NanPolicy", str(value))


def renorm(name: str, value: Renorm) -> Renorm:
    """Return the limits of batch renormalization."""
    if not isinstance(value, Renorm):
        raise TypeError(
            f"{name} is {value!r}; it must be a Renorm, such as Renorm(r_max=3, d_max=5)"
        )
    return value


def nothing(name: str, value: None) -> None:
    """Return None, for an option that this kind of layer does not have."""
    if value is not None:
        raise ValueError(f"{name} is {value!r}; it must be None, as this kind of layer has none")


def float_type(dtype: Any) -> np.dtype[Any]:
    """Return float32 or float64 as a dtype; None is refused, although it is float64 in NumPy."""
    try:
        given = None if dtype is None else np.dtype(dtype)
    except TypeError:
        given = dtype
    if given not in (np.float32, np.float64):
        raise TypeError(f"dtype is {given}; it must be float32 or float64")
    return np.dtype(np.float32 if given == np.float32 else np.float64)
