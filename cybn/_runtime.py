"""The instruction level and the number of threads of the kernels, also in forked processes."""

from __future__ import annotations

import importlib
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType
from typing import Any

from ._version import __version__

__all__ = ["get_num_threads", "set_num_threads", "show_config", "threads"]

LEVELS = ("baseline", "x86-64-v3", "x86-64-v4")


def _load(name: str) -> ModuleType:
    return importlib.import_module(f"cybn._kernels.{name}")


try:
    host = _load("host")
except ImportError as error:
    raise ImportError(
        "cybn's compiled kernels are missing. If this is a source tree, run 'pip install .' and "
        f"start Python elsewhere, or run 'pip install -e .' to build in place. ({error})"
    ) from error


# ---- instruction level -------------------------------------------------------------------


def _module_name(level: str, kernel: str = "batch_norm") -> str:
    return f"{kernel}_" + level.replace("-", "_")


def compiled_levels() -> list[str]:
    """Return the instruction levels that this build contains, lowest first."""
    package = importlib.import_module("cybn._kernels")
    files = [file.name for folder in package.__path__ for file in Path(folder).iterdir()]
    return [
        level for level in LEVELS if any(f.startswith(_module_name(level) + ".") for f in files)
    ]


def supported_levels() -> list[str]:
    """Return the instruction levels that this CPU supports, lowest first."""
    return ["baseline"] + ["x86-64-v3"] * host.has_v3() + ["x86-64-v4"] * host.has_v4()


def usable_levels() -> list[str]:
    """Return the levels that are both compiled and supported, lowest first."""
    supported = supported_levels()
    return [level for level in compiled_levels() if level in supported]


def kernels_at(level: str, kernel: str = "batch_norm") -> ModuleType:
    """Return the kernel module "batch_norm" or "layer_norm" of one instruction level."""
    module = _load(_module_name(level, kernel))
    module.set_caches(_cache_bytes(2), _cache_bytes(3))
    return module


def _choose_level() -> str:
    """Return the highest usable level that is at most CYBN_LEVEL, if that is set."""
    wanted = os.environ.get("CYBN_LEVEL") or LEVELS[-1]
    if wanted not in LEVELS:
        raise ImportError(f"CYBN_LEVEL is {wanted!r}; it must be one of {', '.join(LEVELS)}")
    return [v for v in usable_levels() if LEVELS.index(v) <= LEVELS.index(wanted)][-1]


def _cache_bytes(index: int) -> int:
    """Return the size of the L2 or L3 cache in bytes, or a guess if Linux does not report it."""
    file = Path(f"/sys/devices/system/cpu/cpu0/cache/index{index}/size")
    try:
        text = file.read_text().strip()
        return int(text[:-1]) << {"K": 10, "M": 20}[text[-1]]
    except (OSError, ValueError, LookupError):
        return {2: 512 << 10, 3: 32 << 20}[index]


level = _choose_level()
kernels = kernels_at(level)
row_kernels = kernels_at(level, "layer_norm")


# ---- threads -----------------------------------------------------------------------------


def _cgroup_folders(root: Path, own: Path) -> Iterator[Path]:
    """Yield the folders of the cgroups, own and parents, that may limit this process's CPU time."""
    for line in own.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers or "cpu" in controllers.split(","):  # version 2, or 1
            top = root / controllers
            folder = top / path.lstrip("/")
            yield from (f for f in (folder, *folder.parents) if f.is_relative_to(top))


def _cgroup_limit(folder: Path) -> tuple[str, str] | None:
    """Return quota and period of a cgroup of version 2 or 1, or None if it has none."""
    if (file := folder / "cpu.max").is_file():
        quota, period = file.read_text().split()
        return quota, period
    if (file := folder / "cpu.cfs_quota_us").is_file():
        return file.read_text().strip(), file.with_name("cpu.cfs_period_us").read_text()
    return None


def _cgroup_cpus(
    root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> int | None:
    """Return the number of CPUs that the cgroups' quotas allow, or None if there is no quota."""
    try:
        limits = [_cgroup_limit(folder) for folder in _cgroup_folders(root, own)]
        quotas = [int(x[0]) / int(x[1]) for x in limits if x and x[0] not in ("max", "-1")]
    except (OSError, ValueError, ZeroDivisionError):
        return None
    return max(1, int(min(quotas) + 0.5)) if quotas else None


# A number in OMP_NUM_THREADS was set by the user, and has priority over the cgroup's quota.
_asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
_quota = None if _asked.isdigit() and int(_asked) > 0 else _cgroup_cpus()
_most = max(64, 4 * (os.cpu_count() or 1))
_chosen: int | None = None
_scoped: ContextVar[int | None] = ContextVar("cybn_threads", default=None)
_forked = False

# Held while the running statistics of any layer are stored. Reentrant, because a signal handler may
# train a layer, too.
turn = threading.RLock()


def _after_fork() -> None:
    global _forked, turn
    _forked = True
    turn = threading.RLock()


# A child of os.fork has none of its parent's threads. If the parent had run a parallel region, the
# first one of the child would wait forever for OpenMP's threads. If another thread held the lock,
# it would never be released in the child. So a forked child uses one thread, and has its own lock.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _checked(n: Any, name: str) -> int:
    if isinstance(n, bool) or not hasattr(n, "__index__"):
        raise TypeError(f"{name} is {n!r}; it must be an int of at least 1")
    if n < 1:
        raise ValueError(f"{name} is {n}; it must be at least 1")
    return int(n)


def set_num_threads(n: int | None) -> None:
    """Set the default number of threads of a call.

    Parameters
    ----------
    n : int or None
        At least 1. None restores the initial value: OpenMP's number (OMP_NUM_THREADS, CPU affinity,
        threadpoolctl), but at most the cgroup's CPU quota. A call never starts more than four
        threads per CPU, or 64 if that is more.

    Raises
    ------
    TypeError, ValueError
        If `n` is neither None nor an integer of at least 1.

    Notes
    -----
    Results are bitwise identical for any number. A child of ``os.fork`` uses one thread, because
    the parent's threads do not exist in it. Use the start method "spawn" or "forkserver" for
    children that should use several.

    Examples
    --------
    >>> import cybn
    >>> cybn.set_num_threads(1)
    >>> cybn.get_num_threads()
    1
    >>> cybn.set_num_threads(None)
    """
    global _chosen
    _chosen = None if n is None else _checked(n, "n")


def get_num_threads() -> int:
    """Return the default number of threads of a call.

    Returns
    -------
    int
        At least 1.

    Examples
    --------
    >>> import cybn
    >>> with cybn.threads(1):
    ...     cybn.get_num_threads()
    1
    """
    if _forked:
        return 1
    n = _scoped.get()
    if n is None:
        n = _chosen
    if n is None:
        n = host.max_threads()
        if _quota is not None:
            n = min(n, _quota)
    return min(n, _most)


@contextmanager
def threads(n: int) -> Iterator[None]:
    """Use `n` threads within a ``with`` block, in this thread or task only.

    Parameters
    ----------
    n : int
        At least 1.

    Examples
    --------
    >>> import cybn
    >>> with cybn.threads(1):
    ...     cybn.get_num_threads()
    1
    """
    token = _scoped.set(_checked(n, "n"))
    try:
        yield
    finally:
        _scoped.reset(token)


def thread_count(num_threads: int | None) -> int:
    """Return the number of threads for one call, given its `num_threads` argument."""
    if num_threads is None:
        return get_num_threads()
    return 1 if _forked else min(_checked(num_threads, "num_threads"), _most)


# ---- show_config -------------------------------------------------------------------------


def config() -> dict[str, Any]:
    """Return what `show_config` prints."""
    import numpy

    date = host.openmp()
    return {
        "cybn": __version__,
        "numpy": numpy.__version__,
        "python": sys.version.split()[0],
        "build": host.build(),
        "levels compiled": compiled_levels(),
        "levels supported": supported_levels(),
        "level active": level,
        "openmp": date if date else "NONE: the kernels are serial, whatever is asked for",
        "threads": get_num_threads(),
        "caches": [f"L{i} {_cache_bytes(i) >> 10} KiB" for i in (2, 3)],
    }


def show_config() -> None:
    """Print versions, instruction levels, OpenMP and the number of threads.

    If calls are slower than expected, check that "level active" is the last of the supported
    levels, and that "openmp" is a date.

    Examples
    --------
    >>> import cybn
    >>> cybn.show_config()  # doctest: +SKIP
    """
    for name, value in config().items():
        print(f"{name:17}", ", ".join(value) if isinstance(value, list) else value)
