"""The record of a machine: figures mean nothing without it."""

from __future__ import annotations

import contextlib
import io
import os
import platform
import re
from pathlib import Path
from typing import Any

import numpy as np

import cybn

CPU = Path("/sys/devices/system/cpu/cpu0")


def machine() -> dict[str, Any]:
    """Return what the figures depend on, apart from the peers."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        cybn.show_config()
    said = dict(re.findall(r"^(\S+(?: \S+)*) {2,}(.*)$", out.getvalue(), re.M))
    model = re.search(r"^model name\s*: (.*)$", _read("/proc/cpuinfo"), re.M)
    huge = re.search(r"\[(.*)\]", _read("/sys/kernel/mm/transparent_hugepage/enabled"))
    threads = r"(OMP|GOMP|KMP|MKL|CYBN|MALLOC)_"
    environment = [f"{n}={v}" for n, v in sorted(os.environ.items()) if re.match(threads, n)]
    return {
        "cpu": model[1] if model else platform.machine(),
        "instruction levels": ", ".join(cpu_levels()),
        "cpus usable": usable_cpus(),
        **{f"L{level} cache": size for level, size in _caches().items()},
        "memory": f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB",
        "transparent huge pages": huge[1] if huge else "unknown",
        "kernel": f"{platform.system()} {platform.release()}",
        "load before": f"{os.getloadavg()[0]:.1f}",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "cybn": cybn.__version__,
        "cybn's level": said.get("level active", "unknown"),
        "openmp": said.get("openmp", "unknown"),
        "environment": " ".join(environment) or "nothing set for threads",
    }


def usable_cpus() -> int:
    """Return the CPUs that this process may run on."""
    return len(os.sched_getaffinity(0))


def cpu_levels() -> list[str]:
    """Return the levels of the psABI that the CPU has: what a bound may depend on."""
    flags = _read("/proc/cpuinfo")
    found = {"x86-64-v3": " avx2 ", "x86-64-v4": " avx512vl "}
    return [level for level, flag in found.items() if flag in flags] or ["baseline"]


def last_level_bytes() -> int:
    """Return the size of the largest cache, or 32 MiB where the system does not say."""
    sizes = [int(s[:-1]) << {"K": 10, "M": 20}[s[-1]] for s in _caches().values()]
    return max(sizes, default=32 << 20)


def _caches() -> dict[str, str]:
    """Return the sizes of the first CPU's data caches by level, as the system states them."""
    found = {}
    for folder in sorted((CPU / "cache").glob("index*")):
        level, kind, size = (_read(folder / name) for name in ("level", "type", "size"))
        if kind != "Instruction" and re.fullmatch(r"\d+[KM]", size):
            found[level] = size
    return found


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return ""
