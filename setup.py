"""The list of extensions: each kernel once per instruction level, with OpenMP if it works.

Everything that does not depend on the machine is in pyproject.toml.
"""

import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import numpy
from Cython.Build import cythonize
from setuptools import Extension, setup

KERNELS = ["batch_norm", "layer_norm"]
DISPATCH = ["arguments", "shares", "running", "batch_norm", "rows", "routes"]

# The address of this tree's files on the web, for example of its main branch. There is none yet. To
# release from one, set it in CYBN_HOME, or here.
HOME = os.environ.get("CYBN_HOME", "").rstrip("/")

# Floating point stays strict: no -ffast-math (it switches a whole process to flush-to-zero), no
# contraction (with fused multiply-add, each level would give different bits).
STRICT = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]

# Builds for tests (docs/reliability.md), from the same sources, in separate folders.
SANITIZE = os.environ.get("CYBN_SANITIZE", "")  # for -fsanitize: address,undefined or thread
DEBUG, QUICK = (os.environ.get(f"CYBN_{n}", "0") not in ("", "0") for n in ("DEBUG", "QUICK"))
KINDS = ["debug"] * DEBUG + [f"sanitize={SANITIZE}"] * bool(SANITIZE)
BUILD = " ".join(KINDS) or ("quick" if QUICK else "release")
FOLDER = "build" if BUILD == "release" else "build/" + BUILD.replace(" ", "-")

# Cython's checks of the arrays that functions take. Kernels have only pointers, and use check.pxd.
DIRECTIVES = {
    "boundscheck": DEBUG,
    "initializedcheck": DEBUG,
    "nonecheck": DEBUG,
    "wraparound": False,
}
FILLED = "-ftrivial-auto-var-init=pattern"  # variables that are not initialized get odd values

# -O3 without what makes the code longer but not faster: copies of loops and functions, and unrolled
# loops with more rounds than a strip has vectors. With these, it would be half as long again.
SHORT = ["-O3", "--param=max-completely-peel-times=4", "-fno-ipa-cp-clone", "-fno-split-loops"]
SHORT += ["-fno-split-paths", "-fno-unswitch-loops", "-fno-version-loops-for-strides"]
SHORT += ["-fno-inline-functions"]  # except functions that are declared inline

# No symbols, and no tables to unwind the stack for exceptions, which C does not have.
BARE = ["-g0", "-DNDEBUG", "-fno-asynchronous-unwind-tables"]

# If there are other levels, only processors from before 2013 use baseline: prefer short code.
OLDER = ["-O2", "-ftree-vectorize", "-fvect-cost-model=dynamic"]

# Lanes of 128 bytes are cleared by two vector stores. gcc would call memset, as a `rep stos` that
# takes longer than the sums of a short run: 10 to 30 % of group normalization on 16 x 16.
CLEARING = "-fno-tree-loop-distribute-patterns"

# The platform to build for. To cross-compile, set it in _PYTHON_HOST_PLATFORM, for example
# linux-aarch64, and the compiler in CC. Probes are then compiled, but not run.
TARGET = sysconfig.get_platform()
CROSS = "_PYTHON_HOST_PLATFORM" in os.environ
WINDOWS = TARGET.startswith("win")  # Microsoft's compiler, not tested; baseline is the only level

# Inline functions of .pxd files are parts of hot loops, and constant arguments remove most of them.
ALWAYS = "__forceinline" if WINDOWS else "inline __attribute__((always_inline, unused))"

# Builds with checks have one level, which takes a third of the time: the source is always the same.
LEVELS = {"baseline": []}
if TARGET.endswith("x86_64") and not KINDS:
    LEVELS["x86-64-v3"] = ["-march=x86-64-v3"]
    LEVELS["x86-64-v4"] = ["-march=x86-64-v4", "-mprefer-vector-width=512"]

# CYBN_LEVELS=x86-64-v3 builds only that level, in a third of the time, for work on a kernel.
if wanted := os.environ.get("CYBN_LEVELS"):
    if unknown := set(wanted.split(",")) - set(LEVELS):
        sys.exit(f"CYBN_LEVELS has {', '.join(unknown)}; it takes {', '.join(LEVELS)}")
    LEVELS = {level: flags for level, flags in LEVELS.items() if level in wanted.split(",")}

# There is one wheel for every Python from 3.11 on; free-threaded builds have no limited API.
ABI3 = not sysconfig.get_config_var("Py_GIL_DISABLED")

OPENMP_PROBE = """
#include <omp.h>
int main(void) {
    int threads = 0;
    #pragma omp parallel num_threads(2) reduction(+:threads)
    threads += 1;
    return threads >= 1 && omp_get_max_threads() >= 1 ? 0 : 1;
}
"""


def failure(source, flags, run=False):
    """Return why a C program does not compile, link and, if asked, run; None if it does."""
    compiler = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()
    for name in ("CPPFLAGS", "LDFLAGS"):
        flags = [*flags, *os.environ.get(name, "").split()]
    with tempfile.TemporaryDirectory() as folder:
        code, program = Path(folder, "probe.c"), Path(folder, "probe")
        code.write_text(source)
        try:
            command = [*compiler, *flags, str(code), "-o", str(program)]
            subprocess.run(command, check=True, capture_output=True)
            if run:
                subprocess.run([str(program)], check=True, capture_output=True)
        except OSError as error:
            return str(error)
        except subprocess.CalledProcessError as error:
            return error.stderr.decode(errors="replace").strip() or str(error)
    return None


def supported(*flags):
    """Return whether the compiler accepts flags without a warning."""
    return failure("int main(void) { return 0; }", ["-Werror", *flags]) is None


def description():
    """Return the README for the page of a package index, which does not have the other files.

    Links and pictures of the tree refer to HOME. If it is empty, links become plain text, and
    pictures are left out with their captions.
    """
    text = Path(__file__).with_name("README.md").read_text("utf-8")
    text = re.sub(r"'\.(\[\w+\])'", r"'cybn\1'", text)
    if HOME:
        text = re.sub(r"!\[([^]]*)\]\(([^:)]+)\)", rf"![\1]({HOME}/\2?raw=true)", text)
        return re.sub(r"(?<!!)\[([^]]*)\]\((?!https?://|#)([^)]+)\)", rf"[\1]({HOME}/\2)", text)
    text = re.sub(r"!\[[^]]*\]\([^:)]+\)\n\n\*[^*]+\*\n\n", "", text)
    return re.sub(r"\[([^]]*)\]\((?!https?://|#)[^)]+\)", r"\1", text)


def urls():
    """Return the links that a package index shows beside the description."""
    pages = {"Homepage": "", "Documentation": "docs/index.md", "Changelog": "CHANGELOG.md"}
    return {name: f"{HOME}/{page}".rstrip("/") for name, page in pages.items() if HOME}


def compiles():
    """Return whether a command needs the extensions, which take half a minute to translate to C."""
    words = set(sys.argv)
    quick = words & {"egg_info", "dist_info", "sdist"}
    return not quick or bool(words & {"build", "build_ext", "bdist_wheel"})


def warn(*lines):
    """Print lines that stand out in a build log."""
    print("=" * 78, *(f"cybn: {line}" for line in lines), "=" * 78, sep="\n", file=sys.stderr)


def openmp_flags():
    """Return the flags with which an OpenMP program compiles, and those with which it links."""
    if WINDOWS:
        return ["/openmp"], []
    compiling, linking = ["-fopenmp"], ["-fopenmp"]
    if TARGET.startswith("macosx"):  # Apple's clang, with libomp from LDFLAGS; not tested
        compiling, linking = ["-Xpreprocessor", "-fopenmp"], ["-lomp"]
    why = failure(OPENMP_PROBE, compiling + linking, run=not CROSS)
    if why is None:
        return compiling, linking
    warn(
        "NO OPENMP. The kernels are built without threads: every call uses one thread.",
        "Install a compiler with OpenMP (gcc with libgomp, clang with libomp) and build again.",
        why,
    )
    return [], []


def build_flags():
    """Return the flags of this kind of build, to compile with and to link with."""
    if WINDOWS:
        return ["/O2", "/fp:precise", "/DNDEBUG"], []
    if not KINDS:  # a quick build takes half as long, but its loops take twice as long
        fast = ["-O1"] if QUICK else SHORT if supported(*SHORT) else ["-O3"]
        strip = ["-Wl,-s"] if TARGET.startswith("linux") else []
        return [*fast, *STRICT, *BARE], strip
    compiling = [*STRICT, "-O1", "-g1", "-UNDEBUG" if DEBUG else "-DNDEBUG"]
    if DEBUG and supported(FILLED):
        compiling.append(FILLED)
    if not SANITIZE:
        return compiling, []
    sanitize = [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
    return compiling + sanitize, sanitize


def extensions():
    """Return the extensions; each level is translated into a separate folder."""
    compiling, linking = build_flags()
    parallel, with_openmp = openmp_flags()
    if not WINDOWS and supported(CLEARING):
        compiling.append(CLEARING)

    def extension(name, source, flags, macros=()):
        return Extension(
            f"cybn.{name}",
            [f"cybn/{source}.pyx"],
            include_dirs=[numpy.get_include()],  # to read fields of arrays, and to create arrays
            define_macros=[("Py_LIMITED_API", "0x030b0000")] * ABI3 + list(macros),
            py_limited_api=ABI3,
            extra_compile_args=compiling + parallel + flags,
            extra_link_args=linking + with_openmp,
        )

    def translated(modules, folder):
        folder = f"{FOLDER}/{folder}"
        flags = {module.name: module.extra_compile_args for module in modules}
        found = cythonize(modules, build_dir=folder, compiler_directives=DIRECTIVES, quiet=True)
        for module in found:  # cythonize keeps flags by source, and adds those of another level
            module.extra_compile_args = flags[module.name]
        return found

    host = extension("_kernels.host", "_kernels/host", [], [("CYBN_BUILD", f'"{BUILD}"')])
    small = ["-Os"]  # the dispatch is as fast, and half as large; plain.pyx need not be fast
    plain = extension("_kernels.plain", "_kernels/plain", small)
    dispatch = [extension(f"_dispatch.{name}", f"_dispatch/{name}", small) for name in DISPATCH]
    yield from translated([host, plain, *dispatch], "shared")
    if "baseline" in LEVELS and len(LEVELS) > 1 and not QUICK and supported(*OLDER):
        LEVELS["baseline"] = OLDER
    for level, flags in LEVELS.items():
        if flags and not supported(*flags):
            warn(f"The compiler does not know {level}: built without that level.")
            continue
        folder = level.replace("-", "_")
        inline = [("CYTHON_INLINE", ALWAYS)]
        modules = [
            extension(f"_kernels.{kernel}_{folder}", f"_kernels/{kernel}", flags, inline)
            for kernel in KERNELS
        ]
        yield from translated(modules, folder)


setup(
    long_description=description(),
    long_description_content_type="text/markdown",
    project_urls=urls(),
    ext_modules=list(extensions()) if compiles() else [],
    options={
        "build": {"build_base": FOLDER},
        "build_ext": {"parallel": os.cpu_count()},
        "bdist_wheel": {"py_limited_api": "cp311" if ABI3 else False},
    },
)
