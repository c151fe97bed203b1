"""Measure the cost of synchronized batch norms: ``mpiexec -n 2 python bench/ranks.py``.

Each rank has a batch of 16 and one thread. A step is a forward and a backward. The times are those
of the quickest of 40 steps on rank 0.
"""

import time

import numpy as np
from mpi4py import MPI

import cybn
from cybn.mpi import SyncBatchNorm2d

STEPS = 40
COMM = MPI.COMM_WORLD


def quickest(layer, x, dy):
    """Return the seconds of the quickest step."""
    found = []
    for _ in range(STEPS):
        COMM.Barrier()
        begun = time.perf_counter()
        layer(x)
        layer.backward(dy)
        found.append(time.perf_counter() - begun)
    return min(found)


cybn.set_num_threads(1)
rng = np.random.default_rng(COMM.rank)
for channels, side in ((64, 56), (256, 14), (512, 7)):
    x, dy = (rng.standard_normal((16, channels, side, side), np.float32) for _ in range(2))
    layer = SyncBatchNorm2d(channels)
    gather, sent = layer._link.gather, []  # seconds and bytes of each message

    def timed(row, gather=gather, sent=sent):
        begun = time.perf_counter()
        rows = gather(row)
        sent.append((time.perf_counter() - begun, row.nbytes))
        return rows

    layer._link.gather = timed
    times = [quickest(one, x, dy) * 1e3 for one in (cybn.BatchNorm2d(channels), layer)]
    waited = min(a + b for (a, _), (b, _) in zip(sent[::2], sent[1::2], strict=True)) * 1e3
    if COMM.rank == 0:
        words = f"{times[0]:.2f} | {times[1]:.2f} | {waited:.3f} | {2 * sent[0][1]:,}"
        print(f"| {channels}x{side}x{side} | {COMM.size} | {words} |", flush=True)
