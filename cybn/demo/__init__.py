"""The demo: what batch normalization does for training, measured on real data.

`run` trains small NumPy networks on scikit-learn's handwritten digits, with and without the
layers of `cybn`, and writes one picture and one table. ``docs/demo.md`` explains both.

Which file to read for what:

data.py
    The digits, their split and their batches.
network.py
    The layers around a normalization, in plain NumPy.
training.py
    Gradient descent, test accuracy, and exact statistics of a whole training set.
experiments.py
    The three experiments and all their settings.
table.py, picture.py
    What they found, as markdown and as a figure.

The extra ``cybn[demo]`` brings what this package needs beyond NumPy.
"""

from __future__ import annotations

from pathlib import Path

import cybn

__all__ = ["run"]


def run(output: Path, seed: int = 0, quick: bool = False) -> None:
    """Run the experiments; print the table, write it and the picture.

    Parameters
    ----------
    output : Path
        The folder that gets ``cybn-demo.png`` and ``cybn-demo.md``; made if it is missing.
    seed : int, default 0
        Chooses the split of the data, the weights and the batches. The same seed gives the same
        numbers on every run, whatever the number of threads.
    quick : bool, default False
        Train for a moment only: a check that everything runs, which shows nothing else.

    Raises
    ------
    ModuleNotFoundError
        If a package of the extra ``cybn[demo]`` is missing. Nothing has been done then.
    """
    from threadpoolctl import threadpool_limits

    from .data import load_digits
    from .experiments import FULL, QUICK, run_all
    from .picture import draw
    from .table import write_table

    output.mkdir(parents=True, exist_ok=True)
    digits = load_digits(seed)
    # One thread: arrays this small gain nothing from more, and BLAS may round differently.
    with threadpool_limits(1, user_api="blas"), cybn.threads(1):
        results = run_all(digits, seed, QUICK if quick else FULL)
    table = write_table(results)
    print(table)
    (output / "cybn-demo.md").write_text(table, encoding="utf-8")
    draw(results, output / "cybn-demo.png")
    print(f"Wrote {output / 'cybn-demo.png'} and {output / 'cybn-demo.md'}.")
