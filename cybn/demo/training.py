"""One training run, the accuracy it reaches, and statistics over a whole training set."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce

import numpy as np
from numpy.typing import NDArray

import cybn

from .data import Digits, batches
from .network import Network, softmax_cross_entropy

__all__ = ["accuracy", "train", "use_exact_statistics"]

CHUNK = 100  # images at a time, when the whole training set goes through a network


def train(
    network: Network,
    digits: Digits,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    rng: np.random.Generator,
    every: int,
    observe: Callable[[int], None] | None = None,
    advance: Callable[[int], object],
) -> int | None:
    """Train by plain gradient descent: no momentum, no decay, no schedule.

    Parameters
    ----------
    network : Network
        It is changed in place, and is in inference mode afterwards.
    digits : Digits
        The training images.
    steps, batch_size, learning_rate : int, int, float
        The number of steps, the images per step, and the step size.
    rng : numpy.random.Generator
        Shuffles the images into batches: equal states give equal batches.
    every : int
        How many steps lie between two observations.
    observe : callable, optional
        Called with the number of steps so far. The network is in inference mode then.
    advance : callable
        Called with the number of steps since its last call, for a progress bar.

    Returns
    -------
    int or None
        The step at which training ended because the loss was not finite, or None.
    """
    order = batches(rng, len(digits.train_x), batch_size)
    network.train()
    with np.errstate(all="ignore"):  # a run that diverges overflows first
        for step in range(1, steps + 1):
            batch = next(order)
            logits = network(digits.train_x[batch])
            loss, dlogits = softmax_cross_entropy(logits, digits.train_y[batch])
            if not math.isfinite(loss):
                advance(steps - (step - 1) // every * every)
                network.eval()
                return step
            network.backward(dlogits)
            network.descend(learning_rate)
            if step % every == 0:
                if observe is not None:
                    network.eval()
                    observe(step)
                    network.train()
                advance(every)
    network.eval()
    return None


def accuracy(network: Network, digits: Digits) -> float:
    """Return the share of test images that the network, in inference mode, gets right.

    Parameters
    ----------
    network : Network
        In inference mode.
    digits : Digits
        The test images.

    Returns
    -------
    float
        The share in per cent.
    """
    right = network(digits.test_x).argmax(axis=1) == digits.test_y
    return 100.0 * float(right.mean())


def use_exact_statistics(network: Network, images: NDArray[np.float32]) -> None:
    """Replace the running statistics by those of the whole training set.

    All images go through the network together, layer by layer, in chunks. So the inputs of each
    normalization come from layers whose statistics are already exact.

    Parameters
    ----------
    network : Network
        In inference mode; its running statistics are overwritten.
    images : ndarray of float32, shape (N, 1, 8, 8)
        The training images.
    """
    chunks = [images[start : start + CHUNK] for start in range(0, len(images), CHUNK)]
    for layer in network.layers:
        if isinstance(layer, cybn.BatchNorm):
            exact = reduce(cybn.Moments.merge, [cybn.moments(chunk) for chunk in chunks])
            layer.set_statistics(exact)
        chunks = [layer(chunk) for chunk in chunks]
