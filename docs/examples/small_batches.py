"""Which normalization works with training batches of 2, 4 and 8? An experiment with digits.

This program trains the sigmoid network of `cybn demo` with four kinds of normalization. All start
from the same weights and see the same batches. It prints the table of docs/statistics.md, with the
accuracy in inference. It needs the extra ``cybn[demo]``:

    python docs/examples/small_batches.py
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
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
LIMITS = (3.0, 5.0)  # final r_max and d_max of renormalization


def normalizations(size: int, limits: cybn.Renorm) -> dict[str, Callable[[], Layer]]:
    """Return a function for each kind that makes a layer, for batches of `size`."""
    options = {"momentum": MOMENTUM}
    ghost = options | {"virtual_batch_size": max(2, size // 2)}
    return {
        "plain": lambda: cybn.BatchNorm1d(WIDTH, **options),
        "renorm": lambda: cybn.BatchNorm1d(WIDTH, renorm=limits, **options),
        "ghost": lambda: cybn.BatchNorm1d(WIDTH, **ghost),
        "group norm": lambda: cybn.GroupNorm(GROUPS, WIDTH),
    }


def network(rng: np.random.Generator, normalization: Callable[[], Layer]) -> Network:
    """Build the sigmoid network of the demo with one kind of normalization."""
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
        """Widen the limits linearly, from a sixth of the run to a half."""
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
