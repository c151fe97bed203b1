"""The four folds. All arithmetic is in float64, and every result is rounded once."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .._arguments import parameters, tensor
from ..interop import as_array
from ..layers import BatchNorm, InstanceNorm
from ._layouts import CONV, CONV_TRANSPOSE, LINEAR, Grouped, seen

Array = NDArray[Any]
Norm = BatchNorm | InstanceNorm | tuple[ArrayLike, ArrayLike]
Flatten = Literal["channels-first", "channels-last"]


class Affine(NamedTuple):
    """y = x * scale + shift, channel by channel, in float64."""

    scale: Array  # (C,)
    shift: Array  # (C,)

    @classmethod
    def of(cls, bn: Norm) -> Affine:
        """Return the affine form of a layer, or that of a pair (scale, shift)."""
        if isinstance(bn, BatchNorm | InstanceNorm):
            return cls(*bn.scale_shift(np.float64))
        if not (isinstance(bn, tuple) and len(bn) == 2):
            raise TypeError(
                f"bn is of type {type(bn).__name__}; it must be a cybn.BatchNorm, or a tuple "
                "(scale, shift) of arrays of shape (C,)"
            )
        scale, shift = as_array(bn[0], "scale"), as_array(bn[1], "shift")
        (scale, shift), _ = parameters(scale.size, scale=scale, shift=shift)
        return cls(scale.astype(np.float64), shift.astype(np.float64))

    def need(self, channels: int, what: str) -> None:
        """Raise ValueError unless there is one value for each of `channels`."""
        if len(self.scale) != channels:
            raise ValueError(f"bn has {len(self.scale)} channels; the weight has {channels} {what}")


def weight_of(weight: ArrayLike) -> Array:
    """Return `weight` as an array of float32 or float64, in place where possible."""
    return tensor("weight", as_array(weight, "weight"), half=False)


def bias_of(bias: ArrayLike | None, channels: int) -> Array:
    """Return `bias`, zeros where it is None, in float64."""
    if bias is None:
        return np.zeros(channels)
    (array,), _ = parameters(channels, bias=as_array(bias, "bias"))
    return np.asarray(array, np.float64)


def _rounded(name: str, wide: Array, dtype: np.dtype[Any]) -> Array:
    """Return `wide` as `dtype`; ValueError where a value is not finite or does not fit."""
    with np.errstate(all="ignore"):
        array = wide.astype(dtype)
    if not np.isfinite(array).all():
        raise ValueError(
            f"the folded {name} has values that are not finite in {dtype}; look for NaN, infinity "
            "or a very large gamma / sqrt(running_var + eps) in weight, bias and bn"
        )
    return array


def _fold(
    weight: ArrayLike,
    bias: ArrayLike | None,
    bn: Norm,
    layouts: dict[str, Grouped],
    layout: str,
    groups: int,
) -> tuple[Array, Array]:
    """Fold `bn` into the linear map before it: w * scale, b * scale + shift."""
    weight, affine = weight_of(weight), Affine.of(bn)
    wide = weight.astype(np.float64)
    kernel = seen(wide, layouts, layout, groups)
    g, _, o, *taps = kernel.shape
    affine.need(g * o, "outputs")
    with np.errstate(all="ignore"):
        b = bias_of(bias, g * o) * affine.scale + affine.shift
        kernel *= affine.scale.reshape(g, 1, o, *(1 for _ in taps))
    return _rounded("weight", wide, weight.dtype), _rounded("bias", b, weight.dtype)


def fold_conv(
    weight: ArrayLike,
    bias: ArrayLike | None,
    bn: Norm,
    *,
    layout: str = "torch",
    groups: int = 1,
) -> tuple[Array, Array]:
    """Fold batch normalization into the convolution before it.

    Stride, padding and dilation play no part: the folded convolution has those of the old one.

    Parameters
    ----------
    weight : array_like of float32 or float64
        Of a convolution over any number of axes, in `layout`. Arrays of other libraries are read
        as by `cybn.interop.as_array`, here and below: tensors that require gradients without them.
    bias : array_like, shape (C,), or None
        None: the convolution has no bias.
    bn : BatchNorm or tuple of (scale, shift)
        A layer, whose running statistics are used whatever its mode; or two arrays of shape (C,),
        as from `BatchNorm.scale_shift`. What a layer does after normalizing is not folded.
    layout : {"torch", "onnx", "keras", "keras-depthwise", "flax"}
        torch, onnx: (out, in / groups, *taps); keras, flax: (*taps, in / groups, out);
        keras-depthwise: (*taps, in, multiplier), without `groups`.
    groups : int, default 1
        Groups of the convolution.

    Returns
    -------
    weight, bias : ndarray
        New arrays of the shape and dtype of `weight`, and (C,) of that dtype.

    Raises
    ------
    TypeError
        If `weight` or `bias` is not float32 or float64, or `bn` is of another type.
    ValueError
        If shapes do not fit each other, `layout` is unknown, the layer has no running statistics,
        or the result is not finite.

    Examples
    --------
    >>> import numpy as np
    >>> from cybn.folding import fold_conv
    >>> w = np.ones((2, 1, 1), np.float32)  # a pointwise convolution, 1 channel to 2
    >>> scale, shift = np.array([2.0, 3.0]), np.array([0.5, 0.0])
    >>> w, b = fold_conv(w, None, (scale, shift))
    >>> w.ravel(), b
    (array([2., 3.], dtype=float32), array([0.5, 0. ], dtype=float32))
    """
    return _fold(weight, bias, bn, CONV, layout, groups)


def fold_conv_transpose(
    weight: ArrayLike,
    bias: ArrayLike | None,
    bn: Norm,
    *,
    layout: str = "torch",
    groups: int = 1,
) -> tuple[Array, Array]:
    """Fold batch normalization into the transposed convolution before it.

    With groups, an output channel g * O + o sits in column o of the weight for the inputs of
    group g alone: the same column holds other output channels for other groups.

    Parameters
    ----------
    weight, bias, bn
        As in `fold_conv`.
    layout : {"torch", "onnx", "keras", "flax"}
        torch, onnx: (in, out / groups, *taps); keras: (*taps, out, in); flax, with its
        ``transpose_kernel=False``: (*taps, in, out). The last two have no groups.
    groups : int, default 1
        Groups of the convolution.

    Returns
    -------
    weight, bias : ndarray
        As from `fold_conv`.

    Raises
    ------
    TypeError, ValueError
        As in `fold_conv`.
    """
    return _fold(weight, bias, bn, CONV_TRANSPOSE, layout, groups)


def fold_linear(
    weight: ArrayLike, bias: ArrayLike | None, bn: Norm, *, layout: str = "torch"
) -> tuple[Array, Array]:
    """Fold batch normalization into the linear layer before it.

    Parameters
    ----------
    weight, bias, bn
        As in `fold_conv`, `weight` with two axes.
    layout : {"torch", "onnx", "onnx-matmul", "keras", "flax"}
        torch, and onnx for a Gemm with transB=1: (out, in). keras, flax, and onnx-matmul for a
        MatMul or a Gemm with transB=0: (in, out).

    Returns
    -------
    weight, bias : ndarray
        As from `fold_conv`.

    Raises
    ------
    TypeError, ValueError
        As in `fold_conv`.
    """
    return _fold(weight, bias, bn, LINEAR, layout, 1)


def positions(inputs: int, channels: int, flatten: Flatten | None) -> tuple[int, bool]:
    """Return how many inputs of a linear layer each channel feeds, and whether channels vary fast.

    Of inputs that are a flattened (C, S) or (S, C).
    """
    if inputs % channels:
        raise ValueError(
            f"bn has {channels} channels; the weight has {inputs} inputs, "
            "which must be as many, or a multiple of it after a flattening"
        )
    if flatten not in (None, "channels-first", "channels-last"):
        raise ValueError(
            f"flatten is {flatten!r}; it must be 'channels-first', 'channels-last' or None"
        )
    if inputs != channels and flatten is None:
        raise ValueError(
            f"the weight has {inputs} inputs for {channels} channels: say with flatten= whether "
            "'channels-first' (C, S) or 'channels-last' (S, C) was flattened"
        )
    return inputs // channels, flatten == "channels-last"


def fold_into_next_linear(
    weight: ArrayLike,
    bias: ArrayLike | None,
    bn: Norm,
    *,
    layout: str = "torch",
    flatten: Flatten | None = None,
) -> tuple[Array, Array]:
    """Fold batch normalization into the linear layer after it.

    Exact only where nothing but a flattening lies between the two: no activation, no pooling by
    maxima, no dropout in use.

    Parameters
    ----------
    weight : array_like of float32 or float64
        Of the linear layer, in `layout`, with C or C * S inputs.
    bias : array_like, shape (outputs,), or None
        None: the linear layer has no bias.
    bn : BatchNorm or tuple of (scale, shift)
        As in `fold_conv`.
    layout : {"torch", "onnx", "onnx-matmul", "keras", "flax"}
        As in `fold_linear`.
    flatten : {"channels-first", "channels-last"}, optional
        What was flattened to C * S inputs: (C, S), as in PyTorch; or (S, C), as in Keras and Flax
        with their usual order. Needed where S is more than 1.

    Returns
    -------
    weight, bias : ndarray
        New arrays of the shape and dtype of `weight`, and (outputs,) of that dtype.

    Raises
    ------
    TypeError, ValueError
        As in `fold_conv`; ValueError too if `bn` is a layer with an activation, which would come
        between.
    """
    activation = getattr(bn, "activation", None)
    if activation is not None:
        raise ValueError(
            f"bn has the activation {activation!r}, which would come between it and the linear "
            "layer; fold such a layer into the one before it"
        )
    weight, affine = weight_of(weight), Affine.of(bn)
    wide = weight.astype(np.float64)
    matrix = seen(wide, LINEAR, layout, 1)[0]  # (inputs, outputs)
    s, last = positions(len(matrix), len(affine.scale), flatten)
    spread = np.tile if last else np.repeat
    with np.errstate(all="ignore"):
        b = bias_of(bias, matrix.shape[1]) + spread(affine.shift, s) @ matrix
        matrix *= spread(affine.scale, s)[:, np.newaxis]
    return _rounded("weight", wide, weight.dtype), _rounded("bias", b, weight.dtype)
