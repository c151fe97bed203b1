"""Which cases a run measures, on which shapes, against whom."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from .machine import last_level_bytes, usable_cpus
from .results import Case
from .shapes import ALL_GROUPS, TINY, Shape
from .task import LAYOUTS

__all__ = ["BAR_THREADS", "Job", "Plan", "plan"]

BAR_THREADS = 2  # the bars are for two threads

_PLAIN = ["forward", "inference", "backward"]
_QUICK, _FULL = (0.2, 2), (2.0, 5)  # seconds for a job, about, and fewest rounds
_BARS = (1.2, 5)


class Job(NamedTuple):
    """One case on one shape."""

    case: Case
    shape: Shape
    peers: tuple[str, ...] | None = None  # by `Peer.name`, beside cybn and the floor; None is all


class Plan(NamedTuple):
    """Everything that a run will do."""

    jobs: list[Job]
    layouts: list[str] | None
    seconds: float  # for the rounds of a job, about
    fewest: int  # rounds of a job
    quickest: bool  # tables show the minimum, not the median


def plan(
    *,
    quick: bool = False,
    bars: bool = False,
    groups: Sequence[str] | None = None,
    operations: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    layouts: Sequence[str] | None = None,
    threads: Sequence[int] | None = None,
    quickest: bool = False,
) -> Plan:
    """List the jobs of a run, all of a shape in a row.

    Parameters
    ----------
    quick : bool, default False
        Fewer rounds; without `bars` also float32 on all CPUs, ResNet-50 and tiny calls, unless the
        other arguments say otherwise.
    bars : bool, default False
        Only what the bars need.
    groups, operations, dtypes, threads
        As in `cybn.bench.run`.
    layouts, quickest
        As in `cybn.bench.run`.
    """
    every = usable_cpus()
    few = quick and not bars
    names = list(groups or (["resnet50", TINY] if few else ALL_GROUPS))
    kinds = list(dtypes or (["float32"] if few else ["float32", "float64"]))
    counts = list(threads or ([every] if few else sorted({1, min(BAR_THREADS, every), every})))
    _known("group", names, list(ALL_GROUPS))
    _known("operation", operations or [], [*_PLAIN, "layer"])
    _known("dtype", kinds, ["float32", "float64"])
    _known("layout", layouts or [], LAYOUTS)
    if min(counts) < 1:
        raise ValueError(f"threads is {counts}; each must be at least 1")
    jobs = list(_all_jobs(names, operations, kinds, counts))
    if bars:
        cache = last_level_bytes()
        jobs = [
            job._replace(peers=peers)
            for job in jobs
            if (peers := _peers_for_bars(job, cache)) is not None
        ]
    seconds, fewest = _QUICK if quick else _BARS if bars else _FULL
    return Plan(jobs, list(layouts) if layouts else None, seconds, fewest, quickest)


def _all_jobs(
    groups: Sequence[str],
    operations: Sequence[str] | None,
    dtypes: Sequence[str],
    threads: Sequence[int],
) -> Iterator[Job]:
    for group in groups:
        chosen = operations or [*_PLAIN, *(["layer"] if group == TINY else [])]
        for shape in ALL_GROUPS[group]:
            for dtype in dtypes:
                for operation in chosen:
                    if operation != "inference" and not shape.trainable:
                        continue
                    for count in [1] if group == TINY else threads:
                        yield Job(Case(group, operation, dtype, count), shape)


def _peers_for_bars(job: Job, cache: int) -> tuple[str, ...] | None:
    """Return whom the bars compare cybn with in a job; None where no bar asks for it."""
    case, shape = job.case, job.shape
    network = case.group == "resnet50"
    if case.dtype == "float64":
        return ("PyTorch",) if network and case.threads == BAR_THREADS else None
    if case.group == TINY:
        return ("PyTorch",)
    if case.threads == 1:
        fits = shape.size * np.dtype(case.dtype).itemsize <= cache
        return () if network and fits else None
    if case.threads != BAR_THREADS:
        return None
    return ("PyTorch", "oneDNN") if network else ("PyTorch",)


def _known(what: str, names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"no {what} is called {name!r}; there are {', '.join(known)}")
