"""The five folds. All arithmetic is in float64, and every result is rounded once."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .._arguments import is_bfloat16, parameters, tensor
from ..interop import as_array
from ._layouts import CONV, CONV_TRANSPOSE, LINEAR, Grouped, seen
from ._norms import Affine, Norm, vector

Array = NDArray[Any]
Flatten = Literal["channels-first", "channels-last"]


def weight_of(weight: ArrayLike) -> Array:
    """Return `weight` as an array of a float type, without a copy if possible."""
    return tensor("weight", as_array(weight, "weight"))


def bias_of(bias: ArrayLike | None, channels: int) -> Array:
    """Return `bias` in float64, or zeros if it is None."""
    if bias is None:
        return np.zeros(channels)
    (array,), _ = parameters(channels, bias=vector(bias, "bias"))
    return np.asarray(array, np.float64)


def _rounded(name: str, wide: Array, dtype: np.dtype[Any]) -> Array:
    """Return `wide` as `dtype`. Raise ValueError if a value is not finite or does not fit."""
    with np.errstate(all="ignore"):
        array = (_to_odd(wide) if is_bfloat16(dtype) else wide).astype(dtype)
    if not np.isfinite(array.astype(np.float64)).all():
        raise ValueError(
            f"the folded {name} has values that are not finite in {dtype}; look for NaN, infinity "
            "or a very large gamma / sqrt(running_var + eps) in weight, bias and bn"
        )
    return array


def _to_odd(wide: Array) -> Array:
    """Return `wide` as float32, such that rounding it again gives the same as a single rounding.

    A value that float32 does not represent exactly is truncated, and the last bit is set to 1
    ("rounding to odd", Boldo and Melquiond, 2008).
    """
    near = wide.astype(np.float32)
    cut = np.where(abs(near) > abs(wide), np.nextafter(near, np.float32(0)), near)
    bits: Array = cut.view(np.uint32) | (cut != wide).astype(np.uint32)
    return bits.view(np.float32)


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

    Stride, padding and dilation do not matter: the folded convolution has those of the old one.

    Parameters
    ----------
    weight : array_like of float32, float64, float16 or bfloat16
        The weight of a convolution over any number of axes, in `layout`. Arrays of other libraries
        are read by `cybn.interop.as_array`, here and below. `as_array` ignores the gradients of
        tensors, and converts bfloat16 tensors of PyTorch to float32.
    bias : array_like, shape (C,), or None
        None if the convolution has no bias.
    bn : BatchNorm, module of PyTorch, or tuple of (scale, shift)
        A layer, or a batch norm of ``torch.nn`` or ``cybn.torch``, whose running statistics are
        used in any mode; or two arrays of shape (C,), as from `BatchNorm.scale_shift`.
    layout : {"torch", "onnx", "keras", "keras-depthwise", "flax"}
        torch, onnx: (out, in / groups, taps...); keras, flax: (taps..., in / groups, out);
        keras-depthwise: (taps..., in, multiplier), without `groups`.
    groups : int, default 1
        The number of groups of the convolution.

    Returns
    -------
    weight, bias : ndarray
        New arrays of the shape of `weight` and of shape (C,), with the dtype of `weight`.

    Raises
    ------
    TypeError
        If `weight` or `bias` does not consist of floats, or `bn` is of another type.
    ValueError
        If shapes do not fit together, `layout` is unknown, the layer has no running statistics,
        does not use them or has an activation, or the result is not finite.

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

    If a group has O output channels, channel g * O + o is in column o of the weight, in the rows of
    the inputs of group g. In the rows of other groups, the same column has other output channels.

    Parameters
    ----------
    weight, bias, bn
        As in `fold_conv`.
    layout : {"torch", "onnx", "keras", "flax"}
        torch, onnx: (in, out / groups, taps...); keras: (taps..., out, in); flax, with its
        ``transpose_kernel=False``: (taps..., in, out). The last two have no groups.
    groups : int, default 1
        The number of groups of the convolution.

    Returns
    -------
    weight, bias : ndarray
        As from `fold_conv`.

    Raises
    ------
    TypeError, ValueError
        As in `fold_conv`.

    Examples
    --------
    >>> import numpy as np
    >>> from cybn import BatchNorm2d, folding
    >>> bn = BatchNorm2d(4).eval()
    >>> w, b = folding.fold_conv_transpose(np.ones((3, 4, 2, 2), np.float32), None, bn)
    >>> w.shape, b.shape
    ((3, 4, 2, 2), (4,))
    """
    return _fold(weight, bias, bn, CONV_TRANSPOSE, layout, groups)


def fold_linear(
    weight: ArrayLike, bias: ArrayLike | None, bn: Norm, *, layout: str = "torch"
) -> tuple[Array, Array]:
    """Fold batch normalization into the linear layer before it.

    Parameters
    ----------
    weight, bias, bn
        As in `fold_conv`. `weight` has two axes.
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

    Examples
    --------
    >>> import numpy as np
    >>> from cybn import BatchNorm1d, folding
    >>> bn = BatchNorm1d(2).eval()
    >>> w, b = folding.fold_linear(np.ones((2, 3), np.float32), None, bn)
    >>> w.shape, b.shape
    ((2, 3), (2,))
    """
    return _fold(weight, bias, bn, LINEAR, layout, 1)


def positions(inputs: int, channels: int, flatten: Flatten | None) -> tuple[int, bool]:
    """Return S, and whether the inputs of a linear layer are a flattened (S, C), not (C, S).

    S is the number of inputs for each channel.
    """
    if inputs % channels:
        raise ValueError(
            f"bn has {channels} channels; the weight has {inputs} inputs, "
            f"which must be {channels}, or a multiple of it after a flattening"
        )
    if flatten not in (None, "channels-first", "channels-last"):
        raise ValueError(
            f"flatten is {flatten!r}; it must be 'channels-first', 'channels-last' or None"
        )
    if inputs != channels and flatten is None:
        raise ValueError(
            f"the weight has {inputs} inputs for {channels} channels: set flatten= to the order "
            "that was flattened, 'channels-first' (C, S) or 'channels-last' (S, C)"
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

    This is exact only if nothing but a flattening is between the two: no activation, no max pooling
    and no active dropout.

    Parameters
    ----------
    weight : array_like of float32, float64, float16 or bfloat16
        The weight of the linear layer, in `layout`, with C or C * S inputs.
    bias : array_like, shape (outputs,), or None
        None if the linear layer has no bias.
    bn : BatchNorm or tuple of (scale, shift)
        As in `fold_conv`.
    layout : {"torch", "onnx", "onnx-matmul", "keras", "flax"}
        As in `fold_linear`.
    flatten : {"channels-first", "channels-last"}, optional
        The array that was flattened to C * S inputs: (C, S), as in PyTorch; or (S, C), as in Keras
        and Flax with their usual order. Needed if S is more than 1.

    Returns
    -------
    weight, bias : ndarray
        New arrays of the shape of `weight` and of shape (outputs,), with the dtype of `weight`.

    Raises
    ------
    TypeError, ValueError
        As in `fold_conv`.

    Examples
    --------
    >>> import numpy as np
    >>> from cybn import BatchNorm1d, folding
    >>> bn = BatchNorm1d(3).eval()
    >>> w, b = folding.fold_into_next_linear(np.ones((2, 3), np.float32), None, bn)
    >>> w.shape, b.shape
    ((2, 3), (2,))
    """
    weight, affine = weight_of(weight), Affine.of(bn)
    wide = weight.astype(np.float64)
    matrix = seen(wide, LINEAR, layout, 1)[0]  # (inputs, outputs)
    s, last = positions(len(matrix), len(affine.scale), flatten)
    spread = np.tile if last else np.repeat
    with np.errstate(all="ignore"):
        b = bias_of(bias, matrix.shape[1]) + spread(affine.shift, s) @ matrix
        matrix *= spread(affine.scale, s)[:, np.newaxis]
    return _rounded("weight", wide, weight.dtype), _rounded("bias", b, weight.dtype)


def fold_into_next_conv(
    weight: ArrayLike,
    bias: ArrayLike | None,
    bn: Norm,
    *,
    padding: Any,
    layout: str = "torch",
    groups: int = 1,
) -> tuple[Array, Array]:
    """Fold batch normalization into the convolution after it.

    This is exact only if nothing is between the two, and the convolution does not pad. The zeros of
    padding are added after the shift, and a folded convolution would shift them, too.

    Parameters
    ----------
    weight, layout, groups
        As in `fold_conv`, for the convolution after `bn`. It has C input channels.
    bias : array_like, shape (outputs,), or None
        None if the convolution has no bias.
    bn
        As in `fold_conv`.
    padding : int, str, or sequence of these
        The padding of the convolution. It must be 0 or "valid", unless the shift of `bn` is 0 in
        every channel.

    Returns
    -------
    weight, bias : ndarray
        New arrays of the shape of `weight` and of shape (outputs,), with the dtype of `weight`.

    Raises
    ------
    TypeError, ValueError
        As in `fold_conv`; ValueError too if the convolution pads.

    Examples
    --------
    >>> import numpy as np
    >>> from cybn.folding import fold_into_next_conv
    >>> w = np.ones((1, 2, 1), np.float32)  # 2 channels to 1
    >>> w, b = fold_into_next_conv(w, None, (np.array([2.0, 3.0]), np.array([0.5, 1.0])), padding=0)
    >>> w.ravel(), b
    (array([2., 3.], dtype=float32), array([1.5], dtype=float32))
    """
    weight, affine = weight_of(weight), Affine.of(bn)
    wide = weight.astype(np.float64)
    kernel = seen(wide, CONV, layout, groups)
    g, i, o, *taps = kernel.shape
    affine.need(g * i, "inputs")
    pads = any(str(side).lower() not in ("0", "valid") for side in np.ravel(padding))
    if pads and affine.shift.any():
        raise ValueError(
            f"padding is {padding!r}: the convolution pads zeros after bn has shifted, so at the "
            "border a folded one would differ. Pad before bn instead, with -shift / scale of each "
            "channel, which bn makes 0, and give the convolution padding=0"
        )
    with np.errstate(all="ignore"):
        shift = affine.shift.reshape(g, i, 1, *(1 for _ in taps))
        moved = (shift * kernel).sum((1, *range(3, kernel.ndim))).ravel()
        b = bias_of(bias, g * o) + moved
        kernel *= affine.scale.reshape(shift.shape)
    return _rounded("weight", wide, weight.dtype), _rounded("bias", b, weight.dtype)
