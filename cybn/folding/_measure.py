"""The error of a fold, measured on random input.

The outputs before and after folding are computed in a wider type than that of the weights:
`np.longdouble` for float64, and float64 for all others. So the difference between them comes from
the fold alone, which rounds the arrays that it returns.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .._arguments import integer_from, is_bfloat16
from ._convolution import convolve, convolve_transposed
from ._folds import (
    bias_of,
    fold_conv,
    fold_conv_transpose,
    fold_into_next_conv,
    fold_into_next_linear,
    fold_linear,
    positions,
    weight_of,
)
from ._layouts import CONV, CONV_TRANSPOSE, LINEAR, seen
from ._norms import Affine, Norm, fixed

Array = NDArray[Any]
BATCH = 2


class Report(NamedTuple):
    """The effect of folding on the outputs.

    Attributes
    ----------
    dtype : dtype
        The dtype of the weight.
    outputs : int
        The number of outputs that were compared.
    largest : float
        The largest absolute output before folding.
    error : float
        The largest absolute difference between an output before and after folding.
    worst : float
        The largest quotient of such a difference and eps * a, where eps is that of `dtype`, and a
        is the sum of the absolute values of all terms of the output: inputs times weights, bias,
        mean and beta.

    Examples
    --------
    >>> import numpy as np
    >>> from cybn import BatchNorm1d, folding
    >>> report = folding.measure(folding.fold_linear, np.ones((2, 3)), None, BatchNorm1d(2))
    >>> report.outputs, str(report.dtype), report.worst < 4
    (4, 'float64', True)
    """

    dtype: np.dtype[Any]
    outputs: int
    largest: float
    error: float
    worst: float

    def __str__(self) -> str:
        return (
            f"largest error {self.error:.2g} on outputs up to {self.largest:.3g}: "
            f"{self.worst:.2f} eps of the sum of absolute terms "
            f"({self.outputs} outputs, {self.dtype})"
        )


class _Sum(NamedTuple):
    """Values that are sums, and the sums of the absolute values of their terms."""

    value: Array
    size: Array


Step = Callable[[_Sum], _Sum]


def _normalize(bn: Norm, wide: np.dtype[Any]) -> Step:
    """Return a step that normalizes (N, C, ...) by the definition, not by the affine form."""
    bn = fixed(bn)
    if not isinstance(bn, tuple):
        mean, var = bn.running_mean, bn.running_var
        rstd = 1 / np.sqrt(var.astype(wide) + bn.eps)
        scale = rstd if bn.gamma is None else rstd * bn.gamma
        shift = np.zeros_like(mean) if bn.beta is None else bn.beta
    else:
        scale, shift = Affine.of(bn)
        mean = np.zeros_like(scale)

    def step(x: _Sum) -> _Sum:
        tail = (1,) * (x.value.ndim - 2)
        m, s, t = (p.astype(wide).reshape(-1, *tail) for p in (mean, scale, shift))
        return _Sum((x.value - m) * s + t, (x.size + abs(m)) * abs(s) + abs(t))

    return step


def _linear(run: Callable[[Array, Array], Array], kernel: Array, bias: Array) -> Step:
    """Return a step that applies a kernel (G, I, O, *taps) and adds a bias."""

    def step(x: _Sum) -> _Sum:
        y, size = run(x.value, kernel), run(x.size, abs(kernel))
        b = bias.reshape(-1, *(1 for _ in y.shape[2:]))
        return _Sum(y + b, size + abs(b))

    return step


def _flatten(channels_last: bool) -> Step:
    """Return a step that flattens (N, C, S), in the order of (N, S, C) if channels are last."""

    def flat(x: Array) -> Array:
        return (x.swapaxes(1, 2) if channels_last else x).reshape(len(x), -1)

    return lambda x: _Sum(flat(x.value), flat(x.size))


def _run(steps: list[Step], x: Array) -> _Sum:
    return reduce(lambda y, step: step(y), steps, _Sum(x, abs(x)))


def _check_step(name: str, value: int, least: int) -> None:
    try:
        integer_from(name, value, least)
    except TypeError as error:
        raise TypeError(f"{error}, the same along each axis") from None


def measure(
    fold: Callable[..., tuple[Array, Array]],
    weight: ArrayLike,
    bias: ArrayLike | None,
    bn: Norm,
    *,
    folded: tuple[ArrayLike, ArrayLike] | None = None,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    seed: int = 0,
    **options: Any,
) -> Report:
    """Measure the effect of folding on the outputs for a random input.

    The layers before and after folding are computed in plain NumPy, in a wider type than that of
    the weights, for a batch of two small inputs of standard normal values.

    Parameters
    ----------
    fold : function
        One of the five functions of this package.
    weight, bias, bn
        The arguments of that function.
    folded : tuple of (weight, bias), optional
        The arrays to measure, such as those of another program. None means the result of `fold`.
    stride, padding, dilation : int
        Those of the convolution, the same along each axis. They do not affect the error of a
        correct result.
    seed : int, default 0
        The seed of the random input.
    **options
        The other arguments of `fold`: `layout`, `groups`, `flatten`.

    Returns
    -------
    Report
        Its `worst` is below 1 for a correct result in float32 and half types, and below 4 in
        float64. Its `str` is a short text.

    Raises
    ------
    TypeError, ValueError
        As in `fold`, and if `folded` has other shapes than the result of `fold`, `stride` or
        `dilation` is not an int of at least 1, or `padding` is not an int of at least 0.

    Examples
    --------
    >>> import numpy as np
    >>> from cybn import BatchNorm1d, folding
    >>> weight = np.ones((2, 3), np.float32)
    >>> folding.measure(folding.fold_linear, weight, None, BatchNorm1d(2)).worst < 1
    True
    """
    for name, value, least in (
        ("stride", stride, 1),
        ("padding", padding, 0),
        ("dilation", dilation, 1),
    ):
        _check_step(name, value, least)
    geometry: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation}
    runs: dict[Any, Any] = {
        fold_conv: (CONV, partial(convolve, **geometry)),
        fold_conv_transpose: (CONV_TRANSPOSE, partial(convolve_transposed, **geometry)),
        fold_linear: (LINEAR, convolve),
        fold_into_next_linear: (LINEAR, convolve),
        fold_into_next_conv: (CONV, partial(convolve, **geometry)),
    }
    if fold not in runs:
        raise TypeError(f"fold is {fold!r}; it must be one of the five folds of cybn.folding")
    layouts, run = runs[fold]
    pads = {"padding": padding} if fold is fold_into_next_conv else {}
    own = fold(weight, bias, bn, **pads, **options)
    dtype, shape = own[0].dtype, own[0].shape
    wide = np.dtype(np.longdouble if dtype == np.float64 else np.float64)
    eps = 2.0**-7 if is_bfloat16(dtype) else float(np.finfo(dtype).eps)
    layout, groups = options.get("layout", "torch"), options.get("groups", 1)

    def linear(weight: ArrayLike, bias: ArrayLike | None) -> tuple[Step, Array]:
        array = weight_of(weight)
        if array.shape != shape:
            raise ValueError(f"weight has shape {array.shape}; it must have shape {shape}")
        kernel = seen(array.astype(wide), layouts, layout, groups)
        return _linear(run, kernel, bias_of(bias, kernel.shape[0] * kernel.shape[2])), kernel

    (before, kernel), (after, _) = linear(weight, bias), linear(*(folded or own))
    inputs, norm = kernel.shape[0] * kernel.shape[1], _normalize(bn, wide)
    # Long enough for several outputs, even after a transposed convolution removes the padding.
    lengths = [(k - 1) * dilation + 1 + stride + 2 * padding for k in kernel.shape[3:]]
    chains = [before, norm], [after]
    if fold is fold_into_next_conv:
        chains = [norm, before], [after]
    if fold is fold_into_next_linear:
        channels = len(Affine.of(bn).scale)
        s, last = positions(inputs, channels, options.get("flatten"))
        inputs, lengths = channels, [s]
        chains = [norm, _flatten(last), before], [_flatten(last), after]
    x = np.random.default_rng(seed).standard_normal((BATCH, inputs, *lengths))
    y, z = (_run(chain, x.astype(dtype).astype(wide)) for chain in chains)
    error = abs(z.value - y.value)
    share = error / np.where(y.size > 0, y.size, 1) / eps
    return Report(dtype, error.size, *(float(a.max()) for a in (abs(y.value), error, share)))
