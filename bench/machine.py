"""The record of a machine: figures mean nothing without it."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Any

from cybn import _bench, _runtime

THREADS = r"(OMP|GOMP|KMP|MKL|CYBN|MALLOC)_"  # environment variables that matter


def machine() -> dict[str, Any]:
    """Return what the figures depend on, apart from the peers."""
    config = {k: ", ".join(v) if isinstance(v, list) else v for k, v in _runtime.config().items()}
    pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    huge = re.search(r"\[(.*)\]", pages.read_text("utf-8") if pages.exists() else "")
    environment = [f"{n}={v}" for n, v in sorted(os.environ.items()) if re.match(THREADS, n)]
    return {
        "cpu": _bench.cpu_name(),
        "cpus usable": usable_cpus(),
        "memory": f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB",
        "transparent huge pages": huge[1] if huge else "unknown",
        "kernel": f"{platform.system()} {platform.release()}",
        "load before": f"{os.getloadavg()[0]:.1f}",
        **config,
        "environment": " ".join(environment) or "nothing set for threads",
    }


def usable_cpus() -> int:
    """Return how many CPUs this process may run on."""
    return len(os.sched_getaffinity(0))


def last_level_bytes() -> int:
    """Return the bytes of the last-level cache, or 32 MiB if the system does not report them."""
    return _runtime._cache_bytes(3)
