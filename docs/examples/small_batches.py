"""Which normalization survives training batches of 2, 4 and 8? Handwritten digits, real runs.

The sigmoid network of `cybn demo`, its four ways of normalizing side by side. All start from the
same weights and see the same batches; what is reported is the accuracy in inference. Prints the
table of docs/statistics.md. Needs the extra ``cybn[demo]``:

    python docs/examples/small_batches.py
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits
from tqdm import tqdm

import cybn
from cybn.demo.data import Digits, load_digits
from cybn.demo.network import Dense, Flatten, Layer, Network, Sigmoid
from cybn.demo.training import accuracy, train

WIDTH = 100
GROUPS = 10
BATCH_SIZES = (2, 4, 8)
RATE_PER_IMAGE = 0.01
MOMENTUM = 0.01  # running statistics of small batches need a long memory
LIMITS = (3.0, 5.0)  # of renormalization, in the end


class GroupNorm:
    """Group normalization of (N, C) in NumPy, for as long as cybn has none.

    Groups of C / num_groups features of one sample share a mean and a variance.
    """

    def __init__(self, num_groups: int, num_channels: int, eps: float = 1e-5) -> None:
        self.groups, self.eps = num_groups, eps
        self.gamma = np.ones(num_channels, np.float32)
        self.beta = np.zeros(num_channels, np.float32)
        self.grad_gamma, self.grad_beta = np.zeros_like(self.gamma), np.zeros_like(self.beta)

    def __call__(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return y; mean and variance are those of each sample's groups, in either mode."""
        grouped = x.reshape(len(x), self.groups, -1)
        e = grouped - grouped.mean(2, keepdims=True)
        self._rstd = 1 / np.sqrt((e * e).mean(2, keepdims=True) + np.float32(self.eps))
        self._xhat = e * self._rstd
        return self._xhat.reshape(x.shape) * self.gamma + self.beta

    def backward(self, dy: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return dx, equation (21) of docs/math.md within each group."""
        (dy * self._xhat.reshape(dy.shape)).sum(0, out=self.grad_gamma)
        dy.sum(0, out=self.grad_beta)
        g = (dy * self.gamma).reshape(self._xhat.shape)
        along = (g * self._xhat).mean(2, keepdims=True) * self._xhat
        dx: NDArray[np.float32] = self._rstd * (g - g.mean(2, keepdims=True) - along)
        return dx.reshape(dy.shape)

    def parameters(self) -> list[NDArray[np.float32]]:
        """Return gamma and beta."""
        return [self.gamma, self.beta]

    def gradients(self) -> list[NDArray[np.float32]]:
        """Return their gradients."""
        return [self.grad_gamma, self.grad_beta]

    def train(self) -> None:
        """Do nothing: there is one mode."""

    def eval(self) -> None:
        """Do nothing: there is one mode."""


def normalizations(size: int, limits: cybn.Renorm) -> dict[str, Callable[[], Layer]]:
    """Return how to make a layer of each kind, for batches of `size`."""
    group = getattr(cybn, "GroupNorm", GroupNorm)
    options = {"momentum": MOMENTUM}
    ghost = options | {"virtual_batch_size": max(2, size // 2)}
    return {
        "plain": lambda: cybn.BatchNorm1d(WIDTH, **options),
        "renorm": lambda: cybn.BatchNorm1d(WIDTH, renorm=limits, **options),
        "ghost": lambda: cybn.BatchNorm1d(WIDTH, **ghost),
        "group norm": lambda: group(GROUPS, WIDTH),
    }


def network(rng: np.random.Generator, normalization: Callable[[], Layer]) -> Network:
    """Build the sigmoid network of the demo around one kind of normalization."""
    layers: list[Layer] = [Flatten()]
    for inputs in (64, WIDTH, WIDTH):
        layers += [Dense(rng, inputs, WIDTH, std=0.1, bias=False), normalization(), Sigmoid()]
    return Network(*layers, Dense(rng, WIDTH, 10, std=0.1))


def run(digits: Digits, kind: str, size: int, repeat: int, epochs: int, bar: tqdm) -> float:
    """Train once; return the accuracy in inference, in per cent."""
    limits = cybn.Renorm(r_max=1, d_max=0)
    net = network(np.random.default_rng([repeat, 1]), normalizations(size, limits)[kind])
    epoch = len(digits.train_x) // size
    done = 0

    def advance(steps: int) -> None:
        """Plain for a sixth of the run, full limits from a half on, a straight line between."""
        nonlocal done
        done += steps
        share = min(1.0, max(0.0, (done / (epochs * epoch) - 1 / 6) * 3))
        limits.r_max, limits.d_max = 1 + share * (LIMITS[0] - 1), share * LIMITS[1]
        bar.update(steps)

    train(
        net,
        digits,
        steps=epochs * epoch,
        batch_size=size,
        learning_rate=RATE_PER_IMAGE * size,
        rng=np.random.default_rng([repeat, 2]),
        every=epoch // 6,
        advance=advance,
    )
    return accuracy(net, digits)


def main() -> None:
    """Run everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--kinds", nargs="*")
    options = parser.parse_args()
    digits = load_digits(0)
    kinds = options.kinds or list(normalizations(2, cybn.Renorm()))
    total = options.repeats * options.epochs * len(kinds)
    total *= sum(len(digits.train_x) // size for size in BATCH_SIZES)
    rows = []
    with tqdm(total=total, unit="step") as bar:
        for kind in kinds:
            cells = [kind]
            for size in BATCH_SIZES:
                each = [
                    run(digits, kind, size, repeat, options.epochs, bar)
                    for repeat in range(options.repeats)
                ]
                cells.append(f"{np.mean(each):.1f} ({min(each):.1f} to {max(each):.1f})")
            rows.append(cells)
    print("|  | " + " | ".join(f"batches of {size}" for size in BATCH_SIZES) + " |")
    print("| --- |" + " ---: |" * len(BATCH_SIZES))
    for cells in rows:
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    with threadpool_limits(1, user_api="blas"), cybn.threads(1):
        main()
