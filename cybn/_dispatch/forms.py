"""The division of an array into rows, for layer, RMS, group and instance normalization.

A row is D neighbouring values that share one mean and variance. N = samples, G = groups of a
sample, D = values of a group, S = neighbouring values that share a gamma and beta.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .._arguments import channel_axis_of, integer, integer_from

__all__ = ["Form", "constant", "form_of", "ordered"]


class Form(NamedTuple):
    """The division of an array into rows; channels, if there are any, are taken as axis 1."""

    lead: int  # number of axes that fold into N
    samples: int  # N
    groups: int  # G
    size: int  # D
    run: int  # S
    shape: tuple[int, ...]  # of gamma and beta
    axis: int  # of the channels; 0 if there are none
    values: int  # number of values of gamma, and of beta

    @property
    def rows(self) -> int:
        """Return how many rows there are."""
        return self.samples * self.groups


def form_of(shape: tuple[int, ...], axis: int, num_groups: int | None) -> Form:
    """Return the form of an array.

    Parameters
    ----------
    shape : tuple of int
    axis : int
        The first normalized axis, or the channel axis.
    num_groups : int or None
        None for layer and RMS normalization, 0 for instance normalization, otherwise the number of
        groups of group normalization.
    """
    if num_groups is None:
        if isinstance(axis, bool):
            raise TypeError(f"axis is {axis}; it must be an int")
        return _layer_form(shape, integer("axis", axis))
    at = channel_axis_of(shape, axis)
    if at == 0:
        raise ValueError("axis is 0, which holds the samples; channels must lie on another axis")
    if num_groups == 0 and not isinstance(num_groups, bool):
        return _instance_form(shape, at)
    return _group_form(shape, at, integer_from("num_groups", num_groups))


@lru_cache(maxsize=1024)
def _layer_form(shape: tuple[int, ...], axis: int) -> Form:
    ndim = len(shape)
    if ndim == 0:
        raise ValueError("x has shape (); it must have at least 1 axis")
    if not -ndim <= axis < ndim:
        raise ValueError(f"axis is {axis}; x has {ndim} axes, so it must be in {-ndim}..{ndim - 1}")
    lead = axis + ndim if axis < 0 else axis
    size = prod(shape[lead:])
    return Form(lead, prod(shape[:lead]), 1, size, 1, shape[lead:], 0, size)


@lru_cache(maxsize=1024)
def _group_form(shape: tuple[int, ...], axis: int, num_groups: int) -> Form:
    channels = shape[axis]
    if channels % num_groups:
        raise ValueError(f"num_groups is {num_groups}; it must divide the {channels} channels of x")
    positions = _positions(shape, axis)
    count = channels // num_groups * positions
    if shape[0] == 1 and count == 1:
        raise ValueError(
            f"x has shape {shape}: one value a group has no variance, and would be normalized "
            "to beta whatever it is. Give larger groups, or more positions"
        )
    run = max(1, positions)
    return Form(1, shape[0], num_groups, count, run, (channels,), axis, channels)


@lru_cache(maxsize=1024)
def _instance_form(shape: tuple[int, ...], axis: int) -> Form:
    channels, positions = shape[axis], _positions(shape, axis)
    if len(shape) < 3 or positions == 1:
        raise ValueError(
            f"x has shape {shape}: one position a channel has no variance, and would be "
            "normalized to beta whatever it is. Give more positions, such as (N, C, L) with L > 1"
        )
    run = max(1, positions)
    return Form(1, shape[0], channels, positions, run, (channels,), axis, channels)


def _positions(shape: tuple[int, ...], axis: int) -> int:
    return prod(shape) // max(1, shape[0] * shape[axis])


@lru_cache(maxsize=64)
def constant(values: int, dtype: np.dtype[Any], one: bool) -> NDArray[Any]:
    """Return a read-only vector of ones or zeros, for a missing gamma or beta."""
    vector = np.ones(values, dtype) if one else np.zeros(values, dtype)
    vector.setflags(write=False)
    return vector


def ordered(
    values: NDArray[Any], sizes: tuple[int, ...], order: tuple[int, ...], to_rows: bool
) -> NDArray[Any]:
    """Return one value per row, in the order of the rows in memory or in that of x's axes.

    Parameters
    ----------
    values : ndarray
        The values in the other order.
    sizes : tuple of int
        Sizes of the axes that fold into N, in the order of x.
    order : tuple of int
        These axes in the order of memory.
    to_rows : bool
        If True, `values` are in the order of x's axes, and the result is in that of memory.
    """
    if to_rows:
        return values.reshape(sizes).transpose(order).flatten()
    back = tuple(order.index(i) for i in range(len(order)))
    return values.reshape(tuple(sizes[i] for i in order)).transpose(back).flatten()
