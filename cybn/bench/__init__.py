"""Measuring cybn on a machine: beside what memory allows, and beside the others.

Each figure comes from a result that was checked first, and all contestants of a case take turns,
so that they share the machine's moods. Which file to read for what:

shapes.py
    The layers: ResNet-50, Inception v3, tables, sequences, volumes, edges.
task.py
    What is measured, on which arrays, with which right answers; the interface of a peer.
peers/
    cybn, the NumPy formula, PyTorch, JAX, ONNX Runtime and oneDNN, a module each.
floors.py
    A copy, and an add, on the same threads.
timing.py
    Checking, and taking turns.
session.py, results.py
    One run, and its records and ratios.
machine.py
    What the figures depend on.
report.py, picture.py
    Tables on the terminal, and a figure.

The extra ``cybn[bench]`` brings what this package needs beyond NumPy; every peer is optional.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

__all__ = ["run"]


def run(
    *,
    quick: bool = False,
    groups: Sequence[str] | None = None,
    operations: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    layouts: Sequence[str] | None = None,
    threads: Sequence[int] | None = None,
    peers: Sequence[str] | None = None,
    quickest: bool = False,
    json: Path | None = None,
    picture: Path | None = None,
) -> None:
    """Measure, and print machine, tables and ratios.

    Parameters
    ----------
    quick : bool, default False
        Under a minute: ResNet-50 and tiny calls in float32 on all CPUs, and fewer rounds.
    groups : sequence of str, optional
        Keys of `cybn.bench.shapes.GROUPS`, or ``tiny``.
    operations : sequence of str, optional
        ``forward`` (training), ``inference``, ``backward``, ``layer`` (training, through a layer
        that keeps running statistics).
    dtypes : sequence of str, optional
        ``float32``, ``float64``.
    layouts : sequence of str, optional
        ``channels-first``, ``channels-last``, and oneDNN's ``nChw8c`` and ``nChw16c``.
    threads : sequence of int, optional
        Numbers of threads to measure with; 1 and all CPUs where None.
    peers : sequence of str, optional
        ``numpy``, ``pytorch``, ``jax``, ``onnxruntime``, ``onednn``; all that are installed where
        None.
    quickest : bool, default False
        Show the quickest turn of each contestant, not the median: the one to read on a machine
        that is not idle. Both are in the JSON file.
    json, picture : Path, optional
        Where the figures, and the picture, go.

    Raises
    ------
    ModuleNotFoundError
        If a package of the extra ``cybn[bench]`` is missing. Nothing has been measured then.
    ValueError
        If a name is unknown.
    """
    from tqdm import tqdm

    from .report import show_machine, show_results
    from .session import plan, run_all

    if picture is not None:
        from .picture import draw

    work = plan(
        quick=quick,
        groups=groups,
        operations=operations,
        dtypes=dtypes,
        layouts=layouts,
        threads=threads,
        quickest=quickest,
    )
    results = run_all(work, peers, lambda jobs: iter(tqdm(jobs, unit="case", leave=False)))
    show_machine(results)
    show_results(results)
    if json is not None:
        results.save(json)
    if picture is not None:
        draw(results, picture)
