"""The extension list: each kernel source once per instruction level, with OpenMP if it works.

Everything that does not depend on the machine stands in pyproject.toml.
"""

import os
import platform
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

LEVELS = {"baseline": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    LEVELS["x86_64_v3"] = ["-march=x86-64-v3"]

# Floating point stays strict: no -ffast-math (it switches a whole process to flush-to-zero), no
# contraction (a fused multiply-add would give each level bits of its own).
FLAGS = ["-O3", "-g0", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]

# Free-threaded builds have no limited API.
ABI3 = not sysconfig.get_config_var("Py_GIL_DISABLED")

PROBE = """
#include <omp.h>
#include <stdio.h>
int main(void) {
    int threads = 0;
    #pragma omp parallel num_threads(2) reduction(+:threads)
    threads += 1;
    return threads >= 1 && omp_get_max_threads() >= 1 ? 0 : 1;
}
"""


def openmp_flags():
    """Return the flags with which an OpenMP program compiles, links and runs, or none."""
    compiler = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder, "probe.c"), Path(folder, "probe")
        source.write_text(PROBE)
        try:
            command = [*compiler, "-fopenmp", str(source), "-o", str(program)]
            subprocess.run(command, check=True, capture_output=True)
            subprocess.run([str(program)], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            detail = getattr(error, "stderr", b"") or str(error).encode()
            print(
                "=" * 78,
                "cybn: NO OPENMP. The kernels are built serial: one thread, whatever is asked for.",
                "cybn: install a compiler with OpenMP (gcc and libgomp) and build again.",
                detail.decode(errors="replace").strip(),
                "=" * 78,
                sep="\n",
                file=sys.stderr,
            )
            return []
    return ["-fopenmp"]


def extensions():
    """Return one extension per source and level, cythonized into a folder of its own."""
    openmp = openmp_flags()
    macros = [("Py_LIMITED_API", "0x030b0000")] if ABI3 else []
    for level, flags in LEVELS.items():
        yield from cythonize(
            [
                Extension(
                    f"cybn._kernels.batch_norm_{level}",
                    ["cybn/_kernels/batch_norm.pyx"],
                    define_macros=macros,
                    py_limited_api=ABI3,
                    extra_compile_args=FLAGS + openmp + flags,
                    extra_link_args=openmp,
                )
            ],
            build_dir=f"build/{level}",
            quiet=True,
        )


setup(
    ext_modules=list(extensions()),
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if ABI3 else {},
)
