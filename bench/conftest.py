"""The bench on pytest-benchmark: ``pytest bench`` in an environment with ``cybn[bench]``.

About a minute without options: some layers of ResNet-50, float32, all CPUs, and tiny calls.

    pytest bench --full                     every shape, dtype, layout, output and peer
    pytest bench --peers cybn,pytorch       some peers only
    pytest bench -k "backward and x7x7"     what the names say
    pytest bench --benchmark-json=file      keep the figures; the machine is in the file

Rows of one table are one shape and one operation. ``floor`` is a copy, or an add for backward, on
the same threads; GB/s are at the least traffic, as for the floor. Each result is checked against
`cybn.reference` before it is timed, and a wrong one fails. pytest-benchmark times one contestant
after the other; ``cybn bench`` lets them take turns, and is the one to quote.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest

from cybn.bench.floors import FLOOR, floor, floor_answer
from cybn.bench.machine import machine
from cybn.bench.peers import PEERS, load
from cybn.bench.plans import Job, plan
from cybn.bench.session import entries
from cybn.bench.shapes import TINY, Shape
from cybn.bench.task import FIRST, OPERATIONS, REUSED, Contestant, Data, Peer, Task
from cybn.bench.timing import check

SOME = ["256x56x56", "512x28x28", "256x14x14", "2048x7x7"]  # of ResNet-50, without --full


class Row(NamedTuple):
    """One contestant on one job; no peer is the floor."""

    job: Job
    peer: Peer | None
    layout: str
    output: str

    @property
    def table(self) -> str:
        """What stands in one table."""
        group, operation, dtype, threads = self.job.case
        return f"{group} {self.job.shape.name} {operation} {dtype} {threads} threads"

    @property
    def name(self) -> str:
        """A test's id."""
        case, peer = self.job.case, self.peer.name if self.peer else FLOOR
        words = [case.operation, self.job.shape.name, case.dtype, f"{case.threads}t", peer]
        return "-".join(filter(None, [*words, self.layout, self.output])).replace(" ", "")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("cybn")
    group.addoption("--full", action="store_true", help="every shape, dtype, layout and peer")
    group.addoption("--peers", default=",".join(PEERS), help="default: %(default)s")


def pytest_configure(config: pytest.Config) -> None:
    names = config.getoption("--peers").split(",")
    try:
        config.cybn_peers, config.cybn_missing = load(names)
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error


def pytest_report_header(config: pytest.Config) -> list[str]:
    peers = ", ".join(f"{peer.name} {peer.version}" for peer in config.cybn_peers)
    return [f"peers: {peers}", *config.cybn_missing]


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info["cybn"] = machine()
    machine_info["peers"] = {peer.name: peer.version for peer in config.cybn_peers}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "row" not in metafunc.fixturenames:
        return
    tiny = metafunc.module.__name__.endswith("small_calls")
    chosen = rows(metafunc.config, tiny)
    metafunc.parametrize("row", chosen, ids=[row.name for row in chosen], scope="module")


def rows(config: pytest.Config, tiny: bool) -> list[Row]:
    """List what is benched, all of one batch in a row."""
    full = config.getoption("--full")
    work = plan(quick=not full)
    found = []
    for job in work.jobs:
        if (job.case.group == TINY) != tiny:
            continue
        if not (full or tiny or job.shape.name in SOME):
            continue
        if job.case.operation != "layer":
            found.append(Row(job, None, "", ""))
        found += [
            Row(job, *entry)
            for entry in entries(job, np.dtype(job.case.dtype), config.cybn_peers)
            if full or tiny or entry[1] == FIRST or entry[0].name == "oneDNN"
        ]
    return found


@pytest.fixture(scope="module")
def batches() -> Iterator[dict[tuple[Shape, str], Data]]:
    """Hold the batch of the last test, for as long as the next one wants the same."""
    kept: dict[tuple[Shape, str], Data] = {}
    yield kept
    kept.clear()


@pytest.fixture
def contestant(row: Row, batches: dict[tuple[Shape, str], Data]) -> Contestant:
    """Return a contestant whose result is right."""
    job = row.job
    key = (job.shape, job.case.dtype)
    if key not in batches:
        batches.clear()
        batches[key] = Data(job.shape, np.dtype(job.case.dtype))
    data = batches[key]
    if row.peer is None:
        one = floor(job.case.operation, job.case.threads, data)
        assert not check(one, floor_answer(job.case.operation, data), data.channels, 0.0)
        return one
    if row.output == REUSED:
        data.out(row.layout).fill(np.nan)
    one = row.peer.prepare(Task(job.case.operation, row.layout, row.output, job.case.threads, data))
    wrong = check(one, data.expected(job.case.operation), data.channels, data.tolerance)
    assert not wrong, wrong
    return one


@pytest.fixture
def timed(row: Row, contestant: Contestant, benchmark: Any) -> Any:
    """Return a function that benches the contestant and notes what belongs to the figure."""
    benchmark.group = row.table
    if contestant.note:
        benchmark.extra_info["note"] = contestant.note

    def run(count: int, rounds: int) -> None:
        if contestant.many is None:
            benchmark.pedantic(contestant.call, iterations=count, rounds=rounds, warmup_rounds=1)
        else:
            benchmark.pedantic(contestant.many, args=(1,), rounds=rounds, iterations=count)
        size = row.job.shape.size * np.dtype(row.job.case.dtype).itemsize
        moved = size * OPERATIONS[row.job.case.operation]
        if benchmark.stats is not None:  # None with --benchmark-disable
            benchmark.extra_info["GB/s"] = round(moved / benchmark.stats["median"] / 1e9, 2)

    return run
