"""The demo: the effect of batch normalization on training, measured on real data.

`run` trains small NumPy networks on scikit-learn's handwritten digits, with and without the
layers of `cybn`, and writes one picture and one table. ``docs/demo.md`` explains both.

Its files:

data.py
    The digits, their split and their batches.
network.py
    The layers around a normalization, in plain NumPy.
training.py
    Gradient descent, test accuracy, and exact statistics of a whole training set.
experiments.py
    The three experiments and all their settings.
table.py, picture.py
    The results of the experiments, as Markdown and as a figure.

The extra ``cybn[demo]`` installs what this package needs beyond NumPy.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import cybn

__all__ = ["DemoError", "run"]

ABOUT = {False: "half a minute", True: "5 seconds"}  # duration, by the value of `quick`


class DemoError(Exception):
    """The demo cannot write its files."""


def run(output: Path, seed: int = 0, quick: bool = False) -> None:
    """Run the experiments; print the table, and write it and the picture to files.

    Parameters
    ----------
    output : Path
        The folder for ``cybn-demo.png`` and ``cybn-demo.md``. It is created if it is missing.
    seed : int, default 0
        Chooses the split of the data, the weights and the batches. The same seed gives the same
        numbers on every run, whatever the number of threads.
    quick : bool, default False
        Train for a few steps only, to check that everything runs. The results mean nothing.

    Raises
    ------
    ModuleNotFoundError
        If a package of the extra ``cybn[demo]`` is missing. Nothing has been done then.
    DemoError
        If the files cannot be written in that folder. Nothing has been trained then.
    """
    start = time.perf_counter()
    from threadpoolctl import threadpool_limits

    from .data import load_digits
    from .experiments import FULL, QUICK, run_all
    from .picture import draw
    from .table import write_table

    picture, page = output / "cybn-demo.png", output / "cybn-demo.md"
    check_writable(picture, page)
    print(f"Trains small networks on handwritten digits. Takes about {ABOUT[quick]}.", flush=True)
    digits = load_digits(seed)
    # One thread: arrays this small gain nothing from more, and BLAS may round differently.
    with threadpool_limits(1, user_api="blas"), cybn.threads(1):
        results = run_all(digits, seed, QUICK if quick else FULL)
    table = write_table(results)
    print(table)
    page.write_text(table, encoding="utf-8")
    draw(results, picture)
    print(f"Wrote {picture} and {page}. Took {time.perf_counter() - start:.0f} seconds.")


def check_writable(*files: Path) -> None:
    """Make the folder of these files; raise DemoError if they could not be written later.

    Parameters
    ----------
    *files : Path
        Files of one folder. They are neither created nor changed.

    Raises
    ------
    DemoError
        If the folder cannot be made or written to, or a file of that name cannot be replaced.
    """
    folder = files[0].parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # checking permissions is not enough
            pass
    except OSError as error:
        raise DemoError(
            f"output is {str(folder)!r}, where no file can be written ({error.strerror}); "
            "name another folder with --output"
        ) from error
    for file in files:
        if file.exists() and not (file.is_file() and os.access(file, os.W_OK)):
            raise DemoError(
                f"{str(file)!r} is there already and cannot be written; "
                "remove it, or name another folder with --output"
            )
