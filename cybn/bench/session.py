"""One run: measuring the cases of a plan one after the other."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from .floors import floor, floor_answer
from .machine import last_level_bytes, machine, usable_cpus
from .memory import peaks
from .peers import load
from .plans import BAR_THREADS, Job, Plan
from .results import Record, Results
from .task import LAST, REUSED, Contestant, Data, Peer, Task
from .timing import Figure, check, measure

__all__ = ["entries", "run_all"]


def run_all(
    work: Plan,
    peers: Sequence[str] | None,
    watch: Callable[[list[Job]], Iterator[Job]],
    keep: Callable[[Results], object] = lambda results: None,
) -> Results:
    """Measure every job of a plan.

    Parameters
    ----------
    work : Plan
        What to do.
    peers : sequence of str, optional
        As in `cybn.bench.run`.
    watch : callable
        Gives the jobs back one by one, and may show how far it is.
    keep : callable, optional
        Gets what there is so far whenever a shape is done: a long run may be cut short.
    """
    field, missing = load(peers)
    versions = {peer.name: f"{peer.version}; {peer.note}" for peer in field}
    settings = {
        "shown": "quickest turn" if work.quickest else "median of the turns",
        "seconds a job": work.seconds,
        "fewest rounds": work.fewest,
        "layouts": work.layouts or "all",
        "last-level cache": last_level_bytes(),
    }
    results = Results(machine(), versions, missing, settings)
    results.memory = peaks(min(BAR_THREADS, usable_cpus()))
    data: Data | None = None
    for job in watch(work.jobs):
        key = (job.shape, np.dtype(job.case.dtype))
        if data is None or (data.shape, data.dtype) != key:
            keep(results)
            data = None  # before the next one takes its memory
            gc.collect()
            data = Data(*key)
        results.records += measure_job(job, data, field, work)
    return results


def measure_job(job: Job, data: Data, peers: Sequence[Peer], work: Plan) -> list[Record]:
    """Check all contestants of one job, then time those that are right."""
    case = job.case
    ready, failed = [], []
    for peer, layout, output in entries(job, data.dtype, peers, work.layouts):
        figure = _prepared(peer, Task(case.operation, layout, output, case.threads, data))
        if figure.error:
            failed.append(figure)
        else:
            ready.append(figure.contestant)
    yardstick = floor(case.operation, case.threads, data)
    error = check(yardstick, floor_answer(case.operation, data), data.channels, 0.0)
    if error:
        raise RuntimeError(f"the floor is wrong: {error}")
    figures = measure([yardstick, *ready], work.seconds, work.fewest)
    return [_record(job, figure, work.quickest) for figure in (*figures, *failed)]


def entries(
    job: Job,
    dtype: np.dtype[Any],
    peers: Sequence[Peer],
    layouts: Sequence[str] | None = None,
) -> Iterator[tuple[Peer, str, str]]:
    """Yield who takes part; channels-last where there is nothing after C is no other layout."""
    for peer in peers:
        if job.peers is not None and peer.name not in ("cybn", *job.peers):
            continue
        for layout, output in peer.variants(job.case.operation, dtype, job.case.threads):
            if layout == LAST and not job.shape.spatial:
                continue
            if layouts is None or layout in layouts:
                yield peer, layout, output


def _prepared(peer: Peer, task: Task) -> Figure:
    """Make a contestant ready and check it; what goes wrong is its error, not ours."""
    if task.output == REUSED:
        task.data.out(task.layout).fill(np.nan)  # the answer of the one before is not ours
    contestant = Contestant(peer.name, task.layout, task.output, lambda: None, _nothing)
    try:
        contestant = peer.prepare(task)
        expected = task.data.expected(task.operation)
        error = check(contestant, expected, task.data.channels, task.data.tolerance)
    except (RuntimeError, ValueError, TypeError) as failure:
        error = f"{type(failure).__name__}: {failure}".splitlines()[0]
    return Figure(contestant, [], error=error)


def _nothing(output: Any, channels: Sequence[int]) -> Any:
    """Read nothing: a contestant that could not be made ready has no result."""
    raise RuntimeError("this contestant was not made ready")


def _record(job: Job, figure: Figure, quickest: bool) -> Record:
    contestant = figure.contestant
    timed = bool(figure.turns)
    shown = figure.minimum if quickest else figure.median
    return Record(
        **job.case._asdict(),
        shape=job.shape.name,
        sizes=job.shape.channels_first,
        layers=job.shape.layers,
        peer=contestant.peer,
        layout=contestant.layout,
        output=contestant.output,
        note=contestant.note,
        seconds=shown if timed else None,
        median=figure.median if timed else None,
        minimum=figure.minimum if timed else None,
        turns=len(figure.turns),
        calls=figure.inner,
        error=figure.error,
    )
