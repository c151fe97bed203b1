"""Handwritten digits: 1797 real images of 8 x 8 pixels that come with scikit-learn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Digits", "batches", "load_digits"]

TEST_IMAGES = 500


class Digits(NamedTuple):
    """Images in [0, 1] as (N, 1, 8, 8) float32, and the digit each one shows."""

    train_x: NDArray[np.float32]
    train_y: NDArray[np.int64]
    test_x: NDArray[np.float32]
    test_y: NDArray[np.int64]


def load_digits(seed: int) -> Digits:
    """Split the digits into 1297 training and 500 test images.

    Parameters
    ----------
    seed : int
        Chooses the split.

    Returns
    -------
    Digits
        The four arrays.
    """
    from sklearn import datasets

    bunch = datasets.load_digits()
    x = (bunch.images / 16).astype(np.float32)[:, np.newaxis]
    y = bunch.target.astype(np.int64)
    order = np.random.default_rng(seed).permutation(len(x))
    test, train = order[:TEST_IMAGES], order[TEST_IMAGES:]
    return Digits(x[train], y[train], x[test], y[test])


def batches(rng: np.random.Generator, count: int, size: int) -> Iterator[NDArray[np.int64]]:
    """Yield batches of indices forever, shuffled in each epoch, without incomplete batches.

    Parameters
    ----------
    rng : numpy.random.Generator
        The source of the shuffles.
    count : int
        The number of images.
    size : int
        The number of indices in a batch.

    Yields
    ------
    ndarray of int64, shape (size,)
        The indices of the images of the next batch.
    """
    while True:
        order = rng.permutation(count)
        for start in range(0, count - size + 1, size):
            yield order[start : start + size]
