"""The peak memory that a training forward with ``out=`` needs in addition to its arguments.

`tracemalloc` counts allocations of Python and NumPy. Page faults and the high-water mark of
resident memory count all others, such as stacks. They are measured in a separate process, in which
the C library requests every block from the system, so that reused blocks do not hide anything. A
small batch first loads the code. The limit is 64 KiB for each thread and 144 float64 values for
each channel, however large N and S are: 129 of these are partial sums, the others moments and
vectors.
"""

import json
import os
import subprocess
import sys

import pytest

from cybn import _runtime

SHAPES = [(16, 64, 112, 112), (32, 2048, 7, 7), (1, 1, 2048, 2048)]

MEASURE = """
import json, os, pathlib, resource, sys, tracemalloc
import numpy as np
import cybn

shape, axis, threads = json.loads(sys.argv[1])
status, clear = pathlib.Path("/proc/self/status"), pathlib.Path("/proc/self/clear_refs")

def forward(shape):
    x = np.full(shape, 0.5, np.float32)
    x.reshape(-1)[::3] = 2
    c, out = shape[axis], np.full_like(x, np.nan)
    gamma, beta = np.ones(c, np.float32), np.zeros(c, np.float32)
    return lambda: cybn.batch_norm(x, gamma, beta, axis=axis, out=out, num_threads=threads)

def resident():
    sizes = dict(line.split(":") for line in status.read_text().splitlines() if "kB" in line)
    return (int(sizes["VmHWM"].split()[0]) - int(sizes["RssFile"].split()[0])) << 10

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

forward([8, 8, 64, 64] if axis == 1 else [8, 64, 64, 8])()
first, again = forward(shape), forward(shape)
clear.write_text("5")  # the high-water mark starts from what is resident now
before, count = resident(), faults()
first()
touched = max((faults() - count) * os.sysconf("SC_PAGE_SIZE"), resident() - before)
tracemalloc.start()
before = tracemalloc.get_traced_memory()[0]
again()
print(json.dumps([tracemalloc.get_traced_memory()[1] - before, touched]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux reports the high-water mark")
@pytest.mark.skipif("sanitize" in _runtime.host.build(), reason="a sanitizer needs memory itself")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("axis", [1, 3], ids=["channels-first", "channels-last"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_training_forward_takes_next_to_no_memory(shape, axis, threads):
    n, c, *spatial = shape
    sizes = shape if axis == 1 else (n, *spatial, c)
    command = [sys.executable, "-P", "-c", MEASURE, json.dumps([sizes, axis, threads])]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "4096"}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    traced, touched = json.loads(done.stdout)
    assert traced > 0
    assert max(traced, touched) <= threads * (64 << 10) + 144 * 8 * c
