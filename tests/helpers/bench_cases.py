"""Runs of the bench as they would be, with times that are made up."""

from cybn.bench.claims import ITEMSIZE
from cybn.bench.memory import SHAPES
from cybn.bench.plans import plan
from cybn.bench.results import Peak, Record, Results
from cybn.bench.shapes import TINY
from cybn.bench.task import FIRST, FRESH, LAST, REUSED

CACHE = 32 << 20
MACHINE = {"cpu": "made up", "cpus usable": 2, "load before": "0.1", "cybn": "1.0"}
PEERS = {"cybn": "1.0", "PyTorch": "2.0", "oneDNN": "3.0"}

BOTH = [(layout, output) for layout in (FIRST, LAST) for output in (REUSED, FRESH)]
BLOCKED = [(layout, REUSED) for layout in (FIRST, LAST, "nChw16c")]


def variants(peer, operation, dtype):
    """Return the layouts and outputs that a peer has for an operation."""
    if peer == "oneDNN":
        return [] if dtype == "float64" or operation == "layer" else BLOCKED
    if peer == "PyTorch" and operation in ("backward", "layer"):
        return [(FIRST, FRESH), (LAST, FRESH)]
    return BOTH


def record(job, peer, layout, output, seconds):
    """Return a record as a run would make it."""
    return Record(
        **job.case._asdict(),
        shape=job.shape.name,
        sizes=job.shape.channels_first,
        layers=job.shape.layers,
        peer=peer,
        layout=layout,
        output=output,
        note="",
        seconds=seconds,
        median=seconds,
        minimum=seconds,
        turns=5,
        calls=1,
        error="",
    )


def records_of(job, seconds):
    """Return a job's records; `seconds` is called with job, peer, layout and output."""
    yield record(job, "floor", "", "", seconds(job, "floor", "", ""))
    for peer in ("cybn", *(("PyTorch", "oneDNN") if job.peers is None else job.peers)):
        for layout, output in variants(peer, job.case.operation, job.case.dtype):
            if layout != LAST or job.shape.spatial:
                yield record(job, peer, layout, output, seconds(job, peer, layout, output))


def peaks(bytes_taken=1 << 10):
    """Return what `cybn.bench.memory.peaks` returns, each with the same bytes."""
    return [
        Peak(s.name, s.c, layout, "float32", 2, bytes_taken, bytes_taken)
        for s in SHAPES
        for layout in (FIRST, LAST)
    ]


def run(seconds, **options):
    """Return the results of a plan; what `plan` says of CPUs and cache is the caller's to patch."""
    settings = {"shown": "median of the turns", "last-level cache": CACHE}
    results = Results(dict(MACHINE), dict(PEERS), [], settings)
    for job in plan(**options).jobs:
        results.records += records_of(job, seconds)
    results.memory = peaks()
    return results


def steady(job, peer, layout, output):
    """Return a time: as the size of x says, times a factor of the peer's, plus nothing else.

    On one thread cybn takes twice as long. A tiny call takes cybn 1 us.
    """
    factor = {"cybn": 1.0, "floor": 1.0, "PyTorch": 10.0, "oneDNN": 2.0}[peer]
    if job.case.group == TINY:
        return 1e-6 * factor
    alone = 2.0 if job.case.threads == 1 else 1.0
    return job.shape.size * ITEMSIZE[job.case.dtype] * 1e-10 * factor * alone
