"""The command ``cybn bench``, which measures this machine and prints one table.

It times three layers of ResNet-50 with float32 batches of 32 in training forward, inference and
backward. It compares cybn with a copy of the batch (an add for backward) on the same number of
threads, with the formula in NumPy, and with PyTorch if that is installed. Results are first checked
against the formula. Then all calls take turns, and the median of the turns is reported.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from math import prod
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import functional
from ._runtime import get_num_threads
from ._version import __version__

__all__ = ["BenchError", "run"]

Array = NDArray[Any]
Call = Callable[[], Any]

SHAPES = ((32, 512, 28, 28), (32, 128, 28, 28), (32, 256, 14, 14))
OPERATIONS = {"training forward": 2, "inference": 2, "backward": 3}  # arrays read or written
EPS = 1e-5
ABOUT = 15  # seconds of a whole run, including its preparation
LIMIT = 10.0  # seconds for all turns
ROUNDS = 2, 15  # fewest and most turns
WARM, TURN = 0.003, 0.005  # seconds of untimed and timed calls in a turn, at least one each
LONG = 0.02  # seconds; longer calls need no untimed call before them
TOLERANCE = 1e-3  # relative to the largest value; results must agree within it
BUSY = 0.25  # load per CPU above which figures are not reliable
NOTE = """\
ms: the median time of a call of cybn. GB/s: the bytes of x and y (backward: dy, x and dx) over this
time. copy GB/s: the same for np.copyto (backward: np.add) on the same threads. cybn/copy: the time
of cybn over that of the copy. NumPy, PyTorch: how many times as long as cybn they take. PyTorch
uses the quicker of its two memory formats."""


class BenchError(ValueError):
    """A file cannot be written, or a result is wrong. No figures are printed then."""


def run(*, json_file: Path | None = None, num_threads: int | None = None) -> None:
    """Measure, and print the machine, a table and a summary.

    Parameters
    ----------
    json_file : Path, optional
        File to which the figures are also written.
    num_threads : int, optional
        Threads of cybn, the copy and PyTorch. None means `cybn.get_num_threads`.

    Raises
    ------
    BenchError
        If `json_file` cannot be written (checked before the measurement), or a result is wrong.
    """
    if json_file is not None:
        check_writable(json_file)
    threads = num_threads or get_num_threads()
    torch = _torch(threads)
    peers = f", PyTorch {torch.__version__}" if torch else "; PyTorch is not installed"
    print(f"cybn {__version__} on {cpu_name()}, {threads} threads; NumPy {np.__version__}{peers}")
    if warning := busy():
        print(warning)
    print(f"Batches of 32, float32. Takes about {ABOUT} seconds.\n", flush=True)
    rows = []
    jobs = [(shape, operation) for shape in SHAPES for operation in OPERATIONS]
    for done, (shape, operation) in enumerate(jobs):
        if sys.stderr.isatty():
            print(f"\r{done} of {len(jobs)}", end="", file=sys.stderr, flush=True)
        seconds = race(contestants(shape, operation, threads, torch), LIMIT / len(jobs))
        rows.append({"operation": operation, "shape": list(shape), "seconds": seconds})
    if sys.stderr.isatty():
        print("\r", " " * 20, "\r", sep="", end="", file=sys.stderr, flush=True)
    print(table(rows), NOTE, "", *(summary(rows, name) for name in OPERATIONS), sep="\n")
    if json_file is not None:
        found = {"cybn": __version__, "cpu": cpu_name(), "threads": threads, "rows": rows}
        json_file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


# ---- the calls -----------------------------------------------------------------------------------


def contestants(shape: Sequence[int], operation: str, threads: int, torch: Any) -> dict[str, Call]:
    """Return the calls to time, by name; raise BenchError if a result is wrong."""
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal(shape, dtype=np.float32) for _ in range(2))
    gamma, beta = rng.uniform(0.5, 1.5, (2, shape[1])).astype(np.float32)
    mean, var = rng.uniform(0.5, 1.5, (2, shape[1])).astype(np.float32)
    out = np.zeros_like(x)
    given: dict[str, Any] = {"eps": EPS, "num_threads": threads}
    if operation == "training forward":
        own: Call = partial(functional.batch_norm, x, gamma, beta, **given)
        formula: Call = partial(_forward, x, gamma, beta)
    elif operation == "inference":
        own = partial(functional.batch_norm_inference, x, mean, var, gamma, beta, **given)
        formula = partial(_normalize, x, _column(mean), _column(var), gamma, beta)
    else:
        moments = functional.moments(x, num_threads=threads)
        own = partial(functional.batch_norm_backward, dy, x, moments, gamma, **given)
        formula = partial(_backward, dy, x, x.mean((0, 2, 3)), x.var((0, 2, 3)), gamma)
    calls = {"cybn": own, "NumPy": formula}
    if torch:
        calls |= _torch_calls(torch, operation, (x, dy, gamma, beta, mean, var))
    right = formula()
    for name, call in calls.items():
        result = call()
        y = np.asarray(result[0] if isinstance(result, tuple) else result)
        error = float(np.max(np.abs(y - right)) / np.max(np.abs(right)))
        if not error <= TOLERANCE:
            raise BenchError(
                f"{operation} of {name} on {shape} is wrong by {error:.1g} of the largest value; "
                f"it must be at most {TOLERANCE:g}: run cybn's tests on this machine"
            )
    return {"copy": _floor((x, dy) if operation == "backward" else (x,), out, threads), **calls}


def _column(values: Array) -> Array:
    return values[:, np.newaxis, np.newaxis]


def _normalize(x: Array, mean: Array, var: Array, gamma: Array, beta: Array) -> Array:
    y: Array = (x - mean) / np.sqrt(var + np.float32(EPS)) * _column(gamma) + _column(beta)
    return y


def _forward(x: Array, gamma: Array, beta: Array) -> Array:
    mean, var = (f((0, 2, 3), keepdims=True) for f in (x.mean, x.var))
    return _normalize(x, mean, var, gamma, beta)


def _backward(dy: Array, x: Array, mean: Array, var: Array, gamma: Array) -> Array:
    rstd = 1 / np.sqrt(_column(var) + np.float32(EPS))
    xhat = (x - _column(mean)) * rstd
    dbeta, dgamma = (v.mean((0, 2, 3), keepdims=True) for v in (dy, dy * xhat))
    dx: Array = _column(gamma) * rstd * (dy - dbeta - xhat * dgamma)
    return dx


def _floor(sources: Sequence[Array], out: Array, threads: int) -> Call:
    """Return a call that copies one array or adds two, in one part per thread."""
    cuts = np.linspace(0, out.size, threads + 1).astype(int)
    flat = [a.reshape(-1) for a in (*sources, out)]
    parts = [[a[start:end] for a in flat] for start, end in pairwise(cuts)]
    pool = ThreadPoolExecutor(threads)

    def move(part: Sequence[Array]) -> None:
        if len(part) == 3:
            np.add(part[0], part[1], out=part[2])
        else:
            np.copyto(part[1], part[0])

    return lambda: list(pool.map(move, parts))


def _torch(threads: int) -> Any:
    """Return PyTorch, set to this number of threads, or None if it is not installed."""
    try:
        torch = importlib.import_module("torch")
    except (ImportError, OSError):
        return None
    torch.set_num_threads(threads)
    return torch


def _torch_calls(torch: Any, operation: str, arrays: Sequence[Array]) -> dict[str, Call]:
    """Return PyTorch's calls, one for each memory format."""
    calls: dict[str, Call] = {}
    for name, layout in (("", torch.contiguous_format), (", channels-last", torch.channels_last)):
        x, dy, gamma, beta, mean, var = map(torch.from_numpy, arrays)
        x, dy = (t.to(memory_format=layout) for t in (x, dy))
        given = (None, None) if operation != "inference" else (mean, var)
        training = operation != "inference"
        options = (x, gamma, beta, *given, training, 0.1, EPS)
        call: Call = partial(torch.native_batch_norm, *options)
        if operation == "backward":
            _, saved, rstd = call()
            backward = torch.ops.aten.native_batch_norm_backward
            call = partial(
                backward, dy, x, gamma, None, None, saved, rstd, True, EPS, [True, True, True]
            )
        calls[f"PyTorch{name}"] = call
    return calls


# ---- timing --------------------------------------------------------------------------------------


def race(calls: dict[str, Call], limit: float) -> dict[str, float]:
    """Return the median seconds of each call; calls take turns until `limit` seconds are over."""
    until = time.perf_counter() + limit
    first = {name: _turn(call, 1, warm=True) for name, call in calls.items()}
    turns: dict[str, list[float]] = {name: [] for name in calls}
    for done in range(ROUNDS[1]):
        if done >= ROUNDS[0] and time.perf_counter() > until:
            break
        for name, call in calls.items():
            count = max(1, round(TURN / first[name]))
            turns[name].append(_turn(call, count, warm=first[name] < LONG))
    return {name: median(found) for name, found in turns.items()}


def _turn(call: Call, count: int, *, warm: bool) -> float:
    """Return the seconds per call, with `warm` after untimed calls.

    During these, the threads of the call that was timed before fall asleep.
    """
    until = time.perf_counter() + WARM
    while warm:
        call()
        warm = time.perf_counter() < until
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count


def busy() -> str:
    """Return a warning if the load of the machine is high, otherwise an empty string."""
    load, cpus = os.getloadavg()[0], os.cpu_count() or 1
    if load <= BUSY * cpus:
        return ""
    return f"The machine is busy (load {load:.1f}): wait a minute, or do not trust the figures."


# ---- the output ---------------------------------------------------------------------------------


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the table: a row for each operation and layer."""
    lines = [["operation", "layer", "ms", "GB/s", "copy GB/s", "cybn/copy", "NumPy", "PyTorch"]]
    for row in rows:
        t = row["seconds"]
        gigabytes = 4 * prod(row["shape"]) * OPERATIONS[row["operation"]] / 1e9
        words = [row["operation"], "x".join(map(str, row["shape"][1:])), f"{t['cybn'] * 1e3:.2f}"]
        words += [f"{gigabytes / t[name]:.1f}" for name in ("cybn", "copy")]
        words.append(f"{t['cybn'] / t['copy']:.2f}")
        words += [f"{p:.1f}".replace("nan", "-") for p in (t["NumPy"] / t["cybn"], _pytorch(t))]
        lines.append(words)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    layout = [str.ljust] * 2 + [str.rjust] * 6
    padded = [[f(cell, w) for f, cell, w in zip(layout, x, widths, strict=True)] for x in lines]
    return "\n".join("  ".join(line).rstrip() for line in padded) + "\n"


def summary(rows: Sequence[dict[str, Any]], operation: str) -> str:
    """Return a line that sums up an operation: geometric means over the layers."""
    chosen = [row for row in rows if row["operation"] == operation]
    times = [row["seconds"] for row in chosen]
    moved = [4 * prod(row["shape"]) * OPERATIONS[operation] / 1e9 for row in chosen]
    speed = geometric_mean([size / t["cybn"] for size, t in zip(moved, times, strict=True)])
    floor = geometric_mean([t["cybn"] / t["copy"] for t in times])
    what = "an add" if operation == "backward" else "a copy"
    other = "PyTorch" if "PyTorch" in times[0] else "NumPy"
    found = geometric_mean(
        [(_pytorch(t) if other == "PyTorch" else t["NumPy"] / t["cybn"]) for t in times]
    )
    return (
        f"{operation}: {speed:.0f} GB/s, {floor:.1f} times {what}; "
        f"{found:.1f} times as fast as {other} here"
    )


def _pytorch(seconds: dict[str, float]) -> float:
    """Return the shorter of PyTorch's times over cybn's, or NaN without PyTorch."""
    found = [t for name, t in seconds.items() if name.startswith("PyTorch")]
    return min(found) / seconds["cybn"] if found else float("nan")


def check_writable(path: Path) -> None:
    """Raise BenchError if a path cannot be written; create nothing."""
    if not path.parent.is_dir():
        raise BenchError(f"json is {path}, and {path.parent} is not a folder; make it first")
    try:
        with path.open("r+b") if path.exists() else tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise BenchError(f"json is {path}: {error.strerror}; name another file") from None


def cpu_name() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.processor() or platform.machine()
