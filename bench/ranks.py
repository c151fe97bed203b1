"""What synchronized batch norms cost: ``mpiexec -n 2 python bench/ranks.py``.

Each rank has a batch of 16 and one thread. A step is a forward and a backward; the times are those
of the quickest of 40 steps, as seen by rank 0.
"""

import time

import numpy as np
from mpi4py import MPI

import cybn
from cybn.mpi import SyncBatchNorm2d

STEPS = 40
COMM = MPI.COMM_WORLD


def steps(layer, x, dy):
    """Return the seconds of each step."""
    found = []
    for _ in range(STEPS):
        COMM.Barrier()
        begun = time.perf_counter()
        layer(x)
        layer.backward(dy)
        found.append(time.perf_counter() - begun)
    return found


def messages(layer):
    """Return a list that gets seconds and bytes of each message of a layer from now on."""
    found = []
    gather = layer._link.gather

    def timed(row):
        begun = time.perf_counter()
        rows = gather(row)
        found.append((time.perf_counter() - begun, row.nbytes))
        return rows

    layer._link.gather = timed
    return found


def main():
    """Print one line a layer."""
    cybn.set_num_threads(1)
    rng = np.random.default_rng(COMM.rank)
    for channels, side in ((64, 56), (256, 14), (512, 7)):
        shape = 16, channels, side, side
        x, dy = (rng.standard_normal(shape, dtype=np.float32) for _ in range(2))
        plain = min(steps(cybn.BatchNorm2d(channels), x, dy))
        layer = SyncBatchNorm2d(channels)
        sent = messages(layer)
        together = min(steps(layer, x, dy))
        waited = min(a + b for (a, _), (b, _) in zip(sent[::2], sent[1::2], strict=True))
        if COMM.rank == 0:
            print(
                f"| {channels}x{side}x{side} | {COMM.size} | {plain * 1e3:.2f} "
                f"| {together * 1e3:.2f} | {waited * 1e3:.3f} | {2 * sent[0][1]:,} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
