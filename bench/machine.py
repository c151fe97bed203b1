"""The record of a machine: figures mean nothing without it, and those of two never mix."""

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


def machine() -> dict[str, Any]:
    """Return what the figures depend on, apart from the peers."""
    said = config()
    return {
        "cpu": _cpu_model(),
        "instruction levels": ", ".join(cpu_levels()),
        "cpus usable": usable_cpus(),
        **_caches(),
        "memory": f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB",
        "transparent huge pages": _huge_pages(),
        "kernel": f"{platform.system()} {platform.release()}",
        "load before": f"{os.getloadavg()[0]:.1f}",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "cybn": cybn.__version__,
        "cybn's level": said.get("level active", "unknown"),
        "openmp": said.get("openmp", "unknown"),
        "environment": _environment(),
    }


def config() -> dict[str, str]:
    """Return what `cybn.show_config` prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        cybn.show_config()
    pairs = (re.split(r"\s{2,}", line, maxsplit=1) for line in out.getvalue().splitlines())
    return {pair[0]: pair[1] for pair in pairs if len(pair) == 2}


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
    unit = {"K": 1 << 10, "M": 1 << 20}
    sizes = [text.split()[0] for text in _caches().values()]
    return max((int(s[:-1]) * unit[s[-1]] for s in sizes), default=32 << 20)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _cpu_model() -> str:
    found = re.search(r"^model name\s*: (.*)$", _read("/proc/cpuinfo"), re.M)
    return found[1] if found else platform.processor() or platform.machine()


def _caches() -> dict[str, str]:
    """Return the sizes of the first CPU's data caches, as the system states them."""
    sizes = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (_read(str(folder / n)) for n in ("level", "type", "size"))
        if kind != "Instruction" and re.fullmatch(r"\d+[KM]", size):
            cpus = _read(str(folder / "shared_cpu_list"))
            sizes[f"L{level} cache"] = f"{size} (CPUs {cpus})" if cpus != "0" else size
    return sizes


def _huge_pages() -> str:
    modes = _read("/sys/kernel/mm/transparent_hugepage/enabled")
    return modes.partition("[")[2].partition("]")[0] or "unknown"


def _environment() -> str:
    """Return the variables that change how threads run."""
    starts = ("OMP_", "GOMP_", "KMP_", "MKL_", "CYBN_", "MALLOC_")
    names = sorted(name for name in os.environ if name.startswith(starts))
    return " ".join(f"{n}={os.environ[n]}" for n in names) or "nothing set for threads"
