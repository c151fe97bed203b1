"""The record of a machine: figures mean nothing without it, and those of two never mix."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Any

import numpy as np

from .. import _runtime

__all__ = ["last_level_bytes", "machine", "usable_cpus"]


def machine() -> dict[str, Any]:
    """Return what the figures depend on, apart from the peers."""
    config = _runtime.config()
    return {
        "cpu": _cpu_model(),
        "cpus usable": usable_cpus(),
        "threads a core": _threads_a_core(),
        **_caches(),
        "memory": f"{_memory() / 2**30:.1f} GiB",
        "transparent huge pages": _huge_pages(),
        "kernel": f"{platform.system()} {platform.release()}",
        "load before": _load(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "cybn": config["cybn"],
        "instruction level": config["level active"],
        "openmp": config["openmp"],
        "environment": _environment(),
        "compiler": _compiler(),
    }


def usable_cpus() -> int:
    """Return the CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _cpu_model() -> str:
    for line in _read("/proc/cpuinfo").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def _threads_a_core() -> str:
    siblings = _read("/sys/devices/system/cpu/cpu0/topology/thread_siblings_list")
    return str(len(re.split("[,-]", siblings))) if siblings else "unknown"


def _environment() -> str:
    """Return the variables that change how threads run."""
    names = sorted(
        n for n in os.environ if n.startswith(("OMP_", "GOMP_", "KMP_", "MKL_", "CYBN_"))
    )
    return " ".join(f"{n}={os.environ[n]}" for n in names) or "nothing set for threads"


def _caches() -> dict[str, str]:
    """Return the sizes of the first CPU's data caches, as the system states them."""
    sizes = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (_read(str(folder / n)) for n in ("level", "type", "size"))
        if kind != "Instruction" and size:
            cpus = _read(str(folder / "shared_cpu_list"))
            sizes[f"L{level} cache"] = f"{size} (CPUs {cpus})" if cpus != "0" else size
    return sizes


def last_level_bytes() -> int:
    """Return the size of the largest cache, or 32 MiB where the system does not say."""
    sizes = [text.split()[0] for text in _caches().values()]
    unit = {"K": 1 << 10, "M": 1 << 20}
    known = [int(s[:-1]) * unit[s[-1]] for s in sizes if s[:-1].isdigit() and s[-1] in unit]
    return max(known, default=32 << 20)


def _memory() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return 0


def _huge_pages() -> str:
    modes = _read("/sys/kernel/mm/transparent_hugepage/enabled")
    return modes.partition("[")[2].partition("]")[0] or "unknown"


def _compiler() -> str:
    """Return what the compiler left of its name in the kernels."""
    file = Path(_runtime.kernels.__file__ or "")
    found = re.search(rb"(GCC: |clang version )[^\0]+", file.read_bytes())
    return found.group().decode(errors="replace") if found else "unknown"


def _load() -> str:
    return f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
