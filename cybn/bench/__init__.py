"""Measuring cybn on a machine: beside what memory allows, and beside the others.

Each figure comes from a result that was checked first, and all contestants of a case take turns,
so that they share the machine's moods. Which file to read for what:

shapes.py
    The layers: ResNet-50, Inception v3, tables, sequences, volumes, edges.
plans.py
    Which cases a run has.
task.py
    What is measured, on which arrays, with which right answers; the interface of a peer.
peers/
    cybn, the NumPy formula, PyTorch, JAX, ONNX Runtime and oneDNN, a module each.
floors.py
    A copy, and an add, on the same threads.
timing.py
    Checking, and taking turns.
memory.py
    What a call takes beside its arguments.
session.py, results.py
    One run, and its records: kept, read again, put together if they are of one machine.
ratios.py, bars.py, claims.py
    Ratios, what a bar is, and the bars.
machine.py
    What the figures depend on.
report.py, picture.py
    Tables on the terminal, and a figure.
tables.py, markdown.py
    Tables for pages.

The extra ``cybn[bench]`` brings what this package needs beyond NumPy; every peer is optional.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .plans import Plan
    from .results import Results

__all__ = ["BenchError", "run"]


class BenchError(ValueError):
    """Something was asked for that would mislead, or cannot be written: said before measuring."""


def run(
    *,
    quick: bool = False,
    bars: bool = False,
    groups: Sequence[str] | None = None,
    operations: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    layouts: Sequence[str] | None = None,
    threads: Sequence[int] | None = None,
    peers: Sequence[str] | None = None,
    quickest: bool = False,
    json: Path | None = None,
    picture: Path | None = None,
    markdown: Sequence[Path] = (),
    stored: Sequence[Path] = (),
) -> None:
    """Measure, and print machine, tables, ratios and bars.

    Parameters
    ----------
    quick : bool, default False
        Under a minute: ResNet-50 and tiny calls in float32 on all CPUs, and fewer rounds.
    bars : bool, default False
        Measure what the bars need and print them, no other tables.
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
        Numbers of threads to measure with; 1, 2 and all CPUs where None.
    peers : sequence of str, optional
        ``numpy``, ``pytorch``, ``jax``, ``onnxruntime``, ``onednn``; all that are installed where
        None.
    quickest : bool, default False
        Show the quickest turn of each contestant, not the median: the one to read on a machine
        that is not idle. Both are in the JSON file.
    json, picture : Path, optional
        Where the figures, and the picture, go. The figures are kept as they come.
    markdown : sequence of Path, optional
        Pages whose marked places get the tables, as in `cybn.bench.markdown`.
    stored : sequence of Path, optional
        Files that `json` has written: report on them, and measure nothing.

    Raises
    ------
    BenchError
        If `stored` holds figures of two machines, or a page cannot be written. Nothing has been
        measured then.
    ModuleNotFoundError
        If a package of the extra ``cybn[bench]`` is missing. Nothing has been measured then.
    ValueError
        If a name is unknown.
    """
    from .markdown import check_page, write_page
    from .report import show_bars, show_machine, show_results
    from .results import Results, merge

    if picture is not None:
        from .picture import draw
    for page in markdown:
        check_page(page)
    if stored:
        results = merge([Results.read(path) for path in stored])
    else:
        from .plans import plan

        work = plan(
            quick=quick,
            bars=bars,
            groups=groups,
            operations=operations,
            dtypes=dtypes,
            layouts=layouts,
            threads=threads,
            quickest=quickest,
        )
        results = _measured(work, peers, json)
    if json is not None:
        results.save(json)
    for page in markdown:
        write_page(results, page)
    if picture is not None:
        draw(results, picture)
    show_machine(results)
    if not bars:
        show_results(results)
    show_bars(results)


def _measured(work: Plan, peers: Sequence[str] | None, json: Path | None) -> Results:
    """Measure behind a progress bar, and keep what there is."""
    from tqdm import tqdm

    from .session import run_all

    def keep(results: Results) -> None:
        if json is not None:
            results.save(json)

    return run_all(work, peers, lambda jobs: iter(tqdm(jobs, unit="case", leave=False)), keep)
