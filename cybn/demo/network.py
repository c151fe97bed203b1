"""A small neural network in NumPy, with the few layers that the demo needs besides `cybn`.

Every layer has the interface of `cybn.BatchNorm`. A call is a forward pass. ``backward(dy)``
returns dx and fills the gradients. ``parameters()`` and ``gradients()`` return lists of the layer's
own arrays in the same order. So a network is a list of layers, and batch normalization is one of
them.

Letters: N images, C channels in, F channels (or features) out, H x W pixels.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

__all__ = [
    "AveragePool",
    "Conv3x3",
    "Dense",
    "Flatten",
    "Layer",
    "Network",
    "ReLU",
    "Sigmoid",
    "softmax_cross_entropy",
]

Array = NDArray[np.float32]


class Layer(Protocol):
    """The methods that a network needs of its layers; `cybn.BatchNorm` has all of them."""

    def __call__(self, x: Array, /) -> Array:
        """Return the output for x, and store what `backward` needs."""

    def backward(self, dy: Array, /) -> Array:
        """Return dx, and fill the gradients."""

    def parameters(self) -> list[Array]:
        """Return the arrays that training changes, not copies."""

    def gradients(self) -> list[Array]:
        """Return the gradient of each parameter, in the same order."""

    def train(self) -> object:
        """Switch to training mode."""

    def eval(self) -> object:
        """Switch to inference mode."""


class Plain:
    """A layer without parameters, the same in training and in inference."""

    def parameters(self) -> list[Array]:
        """Return no parameters."""
        return []

    def gradients(self) -> list[Array]:
        """Return no gradients."""
        return []

    def train(self) -> None:
        """Do nothing, because both modes are the same."""

    def eval(self) -> None:
        """Do nothing, because both modes are the same."""


class Weighted(Plain):
    """A layer with a weight, and a bias unless a normalization that follows would cancel it."""

    def __init__(self, weight: Array, outputs: int, bias: bool) -> None:
        self.weight = weight
        self.grad_weight: Array = np.zeros_like(weight)
        self.bias: Array | None = np.zeros(outputs, np.float32) if bias else None
        self.grad_bias: Array | None = np.zeros(outputs, np.float32) if bias else None

    def parameters(self) -> list[Array]:
        """Return the weight, and the bias if there is one."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def gradients(self) -> list[Array]:
        """Return the gradients that the last `backward` computed."""
        return [self.grad_weight] if self.grad_bias is None else [self.grad_weight, self.grad_bias]


class Dense(Weighted):
    """y = x W + b, from (N, C) to (N, F).

    Parameters
    ----------
    rng : numpy.random.Generator
        Draws the weights from a normal distribution.
    inputs, outputs : int
        C and F.
    std : float
        Standard deviation of the weights.
    bias : bool, default True
        Whether to add b, which starts at zero.
    """

    def __init__(
        self,
        rng: np.random.Generator,
        inputs: int,
        outputs: int,
        std: float,
        bias: bool = True,
    ) -> None:
        weight = rng.normal(0.0, std, (inputs, outputs)).astype(np.float32)
        super().__init__(weight, outputs, bias)

    def __call__(self, x: Array) -> Array:
        """Return x W + b."""
        self._x = x
        y: Array = x @ self.weight
        if self.bias is not None:
            y += self.bias
        return y

    def backward(self, dy: Array) -> Array:
        """Return dx = dy W^T; store dW = x^T dy and db = sum of dy."""
        np.matmul(self._x.T, dy, out=self.grad_weight)
        if self.grad_bias is not None:
            dy.sum(0, out=self.grad_bias)
        return dy @ self.weight.T


class Conv3x3(Weighted):
    """A 3 x 3 convolution with a border of zeros, from (N, C, H, W) to (N, F, H, W).

    Parameters
    ----------
    rng : numpy.random.Generator
        Draws the weights from a normal distribution.
    inputs, outputs : int
        C and F.
    std : float
        Standard deviation of the weights.
    bias : bool, default True
        Whether to add one number for each channel, which starts at zero.
    """

    def __init__(
        self,
        rng: np.random.Generator,
        inputs: int,
        outputs: int,
        std: float,
        bias: bool = True,
    ) -> None:
        weight = rng.normal(0.0, std, (outputs, inputs, 3, 3)).astype(np.float32)
        super().__init__(weight, outputs, bias)

    def __call__(self, x: Array) -> Array:
        """Return the convolution of x: one matrix product for each image."""
        n, _, h, w = x.shape
        self._columns = columns(x)
        y: Array = self.weight.reshape(len(self.weight), -1) @ self._columns
        if self.bias is not None:
            y += self.bias[:, np.newaxis]
        return y.reshape(n, -1, h, w)

    def backward(self, dy: Array) -> Array:
        """Return dx: the convolution of dy with each kernel rotated by 180 degrees."""
        n, f, h, w = dy.shape
        flat = dy.reshape(n, f, h * w)
        each = flat @ self._columns.transpose(0, 2, 1)  # (N, F, C*9)
        each.sum(0, out=self.grad_weight.reshape(f, -1))
        if self.grad_bias is not None:
            flat.sum((0, 2), out=self.grad_bias)
        turned = self.weight[:, :, ::-1, ::-1].transpose(1, 0, 2, 3)  # (C, F, 3, 3)
        dx: Array = turned.reshape(len(turned), -1) @ columns(dy)
        return dx.reshape(n, -1, h, w)


def columns(x: Array) -> Array:
    """Lay the 3 x 3 window around each pixel out as a column: (N, C, H, W) to (N, C*9, H*W)."""
    n, c, h, w = x.shape
    padded = np.zeros((n, c, h + 2, w + 2), x.dtype)
    padded[:, :, 1:-1, 1:-1] = x
    windows = sliding_window_view(padded, (h, w), axis=(2, 3))  # (N, C, 3, 3, H, W)
    return windows.reshape(n, c * 9, h * w)


class AveragePool(Plain):
    """The mean of each 2 x 2 block of pixels, from (N, C, H, W) to (N, C, H/2, W/2)."""

    def __call__(self, x: Array) -> Array:
        """Return the means."""
        rows = x[:, :, ::2] + x[:, :, 1::2]
        return (rows[..., ::2] + rows[..., 1::2]) * np.float32(0.25)

    def backward(self, dy: Array) -> Array:
        """Return dx: a quarter of dy for each of the four pixels."""
        return (dy * np.float32(0.25)).repeat(2, axis=2).repeat(2, axis=3)


class Flatten(Plain):
    """From (N, C, H, W) to (N, C*H*W)."""

    def __call__(self, x: Array) -> Array:
        """Return x as a matrix."""
        self._shape = x.shape
        return x.reshape(len(x), -1)

    def backward(self, dy: Array) -> Array:
        """Return dy in the shape of x."""
        return dy.reshape(self._shape)


class ReLU(Plain):
    """max(x, 0)."""

    def __call__(self, x: Array) -> Array:
        """Return max(x, 0)."""
        self._positive = x > 0
        return np.maximum(x, 0)

    def backward(self, dy: Array) -> Array:
        """Return dy where x was positive."""
        return np.where(self._positive, dy, np.float32(0))


class Sigmoid(Plain):
    """1 / (1 + exp(-x))."""

    def __call__(self, x: Array) -> Array:
        """Return the sigmoid, through tanh, which cannot overflow."""
        y: Array = (np.tanh(x * np.float32(0.5)) + np.float32(1)) * np.float32(0.5)
        self._y = y
        return y

    def backward(self, dy: Array) -> Array:
        """Return dy y (1 - y)."""
        dx: Array = dy * self._y * (1 - self._y)
        return dx


def softmax_cross_entropy(logits: Array, labels: NDArray[np.int64]) -> tuple[float, Array]:
    """Measure how far the softmax of the logits is from the labels.

    Parameters
    ----------
    logits : ndarray of float32, shape (N, classes)
        One row of scores for each image.
    labels : ndarray of int64, shape (N,)
        The right class of each image.

    Returns
    -------
    loss : float
        Mean of -log(probability of the right class); not finite once training has diverged.
    dlogits : ndarray of float32, shape (N, classes)
        The gradient of the loss.
    """
    rows = np.arange(len(logits))
    shifted = logits - logits.max(axis=1, keepdims=True)
    exp = np.exp(shifted)
    total = exp.sum(axis=1, keepdims=True)
    loss = float((np.log(total[:, 0]) - shifted[rows, labels]).mean())
    dlogits = exp / total
    dlogits[rows, labels] -= 1
    dlogits /= len(logits)
    return loss, dlogits


class Network:
    """Layers one after the other.

    Parameters
    ----------
    *layers : Layer
        The layers in their order, from the input to the logits.
    """

    def __init__(self, *layers: Layer) -> None:
        self.layers = layers

    def __call__(self, x: Array, stop: int | None = None) -> Array:
        """Return the logits, or the input of layer number `stop` if that is given."""
        for layer in self.layers[:stop]:
            x = layer(x)
        return x

    def backward(self, dy: Array) -> None:
        """Fill the gradients of every layer."""
        for layer in reversed(self.layers):
            dy = layer.backward(dy)

    def descend(self, learning_rate: float) -> None:
        """Take one step of gradient descent."""
        rate = np.float32(learning_rate)
        for layer in self.layers:
            for parameter, gradient in zip(layer.parameters(), layer.gradients(), strict=True):
                np.subtract(parameter, rate * gradient, out=parameter)

    def train(self) -> None:
        """Switch every layer to training mode."""
        for layer in self.layers:
            layer.train()

    def eval(self) -> None:
        """Switch every layer to inference mode."""
        for layer in self.layers:
            layer.eval()
