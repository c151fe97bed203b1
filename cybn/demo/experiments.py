"""The three experiments: faster training, higher learning rates, and batches that are too small.

Wherever a network with normalization is compared with one without, both start from the same
weights and see the same batches in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

import cybn

from .data import Digits
from .network import AveragePool, Conv3x3, Dense, Flatten, Layer, Network, ReLU, Sigmoid
from .training import accuracy, train, use_exact_statistics

__all__ = [
    "FULL",
    "QUICK",
    "BatchSizeRun",
    "ConvRun",
    "Curve",
    "Results",
    "Settings",
    "SigmoidRun",
    "run_all",
]

SIGMOID_BATCH = 60
SIGMOID_RATE = 0.3
CONV_BATCH = 100
CONV_RATES = (0.1, 0.5, 1.5)
BATCH_SIZES = (2, 4, 8, 32)
RATE_PER_IMAGE = 0.01  # third experiment: the learning rate is this times the batch size
PERCENTILES = (15, 50, 85)


class Settings(NamedTuple):
    """How long to train, and how many steps lie between two observations."""

    sigmoid_steps: int  # a multiple of ten times sigmoid_every: the table shows each tenth
    sigmoid_every: int
    conv_steps: int
    conv_every: int
    epochs: int
    repeats: int


FULL = Settings(10_000, 100, conv_steps=300, conv_every=10, epochs=6, repeats=6)
QUICK = Settings(200, 20, conv_steps=12, conv_every=2, epochs=1, repeats=1)


@dataclass
class Curve:
    """Test accuracy in per cent at some of the training steps."""

    steps: list[int] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    diverged: int | None = None  # the first step whose loss was not finite


class SigmoidRun(NamedTuple):
    """The first experiment, for one network."""

    curve: Curve
    unit: NDArray[np.float32]  # (observations, 3): percentiles of a typical unit's input


class ConvRun(NamedTuple):
    """The second experiment, at one learning rate."""

    learning_rate: float
    plain: Curve
    normalized: Curve


class BatchSizeRun(NamedTuple):
    """The third experiment, at one batch size: accuracies in per cent, one for each repeat."""

    batch_size: int
    running: list[float]
    exact: list[float]


class Results(NamedTuple):
    """All that the table and the picture show."""

    seed: int
    settings: Settings
    sigmoid_plain: SigmoidRun
    sigmoid_normalized: SigmoidRun
    conv: list[ConvRun]
    batch_size: list[BatchSizeRun]


def run_all(digits: Digits, seed: int, settings: Settings) -> Results:
    """Run the three experiments, each with a progress bar if the output is a terminal.

    Parameters
    ----------
    digits : Digits
        Training and test images.
    seed : int
        Chooses the weights and the batches.
    settings : Settings
        How long to train: `FULL` or `QUICK`.

    Returns
    -------
    Results
        The measurements.
    """
    with tqdm(
        total=2 * settings.sigmoid_steps, desc="1/3 sigmoid network", unit="step", disable=None
    ) as bar:
        plain = run_sigmoid(digits, seed, settings, False, bar)
        normalized = run_sigmoid(digits, seed, settings, True, bar)
    total = 2 * len(CONV_RATES) * settings.conv_steps
    with tqdm(total=total, desc="2/3 learning rates ", unit="step", disable=None) as bar:
        conv = [
            ConvRun(
                rate,
                run_conv(digits, seed, settings, rate, False, bar),
                run_conv(digits, seed, settings, rate, True, bar),
            )
            for rate in CONV_RATES
        ]
    total = settings.epochs * settings.repeats * sum(len(digits.train_x) // b for b in BATCH_SIZES)
    with tqdm(total=total, desc="3/3 small batches  ", unit="step", disable=None) as bar:
        batch_size = [run_batch_size(digits, seed, settings, b, bar) for b in BATCH_SIZES]
    return Results(seed, settings, plain, normalized, conv, batch_size)


def sigmoid_network(rng: np.random.Generator, normalize: bool) -> Network:
    """Build the first network of Ioffe and Szegedy (2015): three layers of 100 sigmoid units."""
    layers: list[Layer] = [Flatten()]
    for inputs in (64, 100, 100):
        layers.append(Dense(rng, inputs, 100, std=0.1, bias=not normalize))
        if normalize:
            layers.append(cybn.BatchNorm1d(100))
        layers.append(Sigmoid())
    return Network(*layers, Dense(rng, 100, 10, std=0.1))


def conv_network(rng: np.random.Generator, normalize: bool) -> Network:
    """Build (convolution, normalization, ReLU) twice, then pooling and a linear classifier.

    Weights have the variance of He et al. (2015): 2 / fan-in before a ReLU, and 1 / fan-in in the
    classifier, which no ReLU follows.
    """
    layers: list[Layer] = []
    for inputs, outputs in ((1, 8), (8, 16)):
        std = (2 / (9 * inputs)) ** 0.5
        layers.append(Conv3x3(rng, inputs, outputs, std, bias=not normalize))
        if normalize:
            layers.append(cybn.BatchNorm2d(outputs))
        layers.append(ReLU())
    features = 16 * 4 * 4
    classifier = Dense(rng, features, 10, std=(1 / features) ** 0.5)
    return Network(*layers, AveragePool(), Flatten(), classifier)


def run_sigmoid(
    digits: Digits, seed: int, settings: Settings, normalize: bool, bar: tqdm
) -> SigmoidRun:
    """Train the sigmoid network; watch its accuracy and the inputs of its last hidden layer."""
    network = sigmoid_network(np.random.default_rng([seed, 1]), normalize)
    last_sigmoid = len(network.layers) - 2
    curve, percentiles = Curve(), []

    def observe(step: int) -> None:
        curve.steps.append(step)
        curve.accuracy.append(accuracy(network, digits))
        inputs = network(digits.test_x, stop=last_sigmoid)
        percentiles.append(np.percentile(inputs, PERCENTILES, axis=0))

    curve.diverged = train(
        network,
        digits,
        steps=settings.sigmoid_steps,
        batch_size=SIGMOID_BATCH,
        learning_rate=SIGMOID_RATE,
        rng=np.random.default_rng([seed, 2]),
        every=settings.sigmoid_every,
        observe=observe,
        advance=bar.update,
    )
    return SigmoidRun(curve, typical_unit(np.array(percentiles)))


def typical_unit(percentiles: NDArray[np.float32]) -> NDArray[np.float32]:
    """Choose the unit whose median moves by the median amount within its layer.

    Parameters
    ----------
    percentiles : ndarray, shape (observations, 3, units)
        The 15th, 50th and 85th percentile of each unit's input, over time.

    Returns
    -------
    ndarray, shape (observations, 3)
        The percentiles of the chosen unit.
    """
    wandering = np.ptp(percentiles[:, 1], axis=0)
    ranked = np.argsort(wandering, kind="stable")
    return percentiles[:, :, ranked[len(ranked) // 2]]


def run_conv(
    digits: Digits, seed: int, settings: Settings, rate: float, normalize: bool, bar: tqdm
) -> Curve:
    """Train the convolutional network at one learning rate; watch its accuracy."""
    network = conv_network(np.random.default_rng([seed, 3]), normalize)
    curve = Curve()

    def observe(step: int) -> None:
        curve.steps.append(step)
        curve.accuracy.append(accuracy(network, digits))

    curve.diverged = train(
        network,
        digits,
        steps=settings.conv_steps,
        batch_size=CONV_BATCH,
        learning_rate=rate,
        rng=np.random.default_rng([seed, 4]),
        every=settings.conv_every,
        observe=observe,
        advance=bar.update,
    )
    return curve


def run_batch_size(
    digits: Digits, seed: int, settings: Settings, size: int, bar: tqdm
) -> BatchSizeRun:
    """Train the sigmoid network with one batch size; test it with running and exact statistics."""
    result = BatchSizeRun(size, [], [])
    epoch = len(digits.train_x) // size
    for repeat in range(settings.repeats):
        network = sigmoid_network(np.random.default_rng([seed, 5, repeat]), normalize=True)
        train(
            network,
            digits,
            steps=settings.epochs * epoch,
            batch_size=size,
            learning_rate=RATE_PER_IMAGE * size,
            rng=np.random.default_rng([seed, 6, repeat]),
            every=epoch,
            advance=bar.update,
        )
        result.running.append(accuracy(network, digits))
        use_exact_statistics(network, digits.train_x)
        result.exact.append(accuracy(network, digits))
    return result
