"""The extension list: each kernel source once per instruction level, with OpenMP if it works.

Everything that does not depend on the machine stands in pyproject.toml.
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

# Where the files of this tree are on the web, such as the address of its main branch. There is no
# such place yet; whoever releases from one names it in CYBN_HOME, or here.
HOME = os.environ.get("CYBN_HOME", "").rstrip("/")

# Floating point stays strict: no -ffast-math (it switches a whole process to flush-to-zero), no
# contraction (a fused multiply-add would give each level bits of its own).
STRICT = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]

# Builds to test with (docs/reliability.md). Same sources, folders of their own.
SANITIZE = os.environ.get("CYBN_SANITIZE", "")  # as -fsanitize: address,undefined or thread
DEBUG, QUICK = (os.environ.get(f"CYBN_{n}", "0") not in ("", "0") for n in ("DEBUG", "QUICK"))
KINDS = ["debug"] * DEBUG + [f"sanitize={SANITIZE}"] * bool(SANITIZE)
BUILD = " ".join(KINDS) or ("quick" if QUICK else "release")
FOLDER = "build" if BUILD == "release" else "build/" + BUILD.replace(" ", "-")

# What Cython checks where arrays come in; behind that door there are only pointers, and check.pxd.
DIRECTIVES = {
    "boundscheck": DEBUG,
    "initializedcheck": DEBUG,
    "nonecheck": DEBUG,
    "wraparound": False,
}
FILLED = "-ftrivial-auto-var-init=pattern"  # what is read before it is written is then odd

# What of -O3 makes the code longer and not faster: copies of loops and functions, and unrolling
# what has more rounds than a strip has vectors. It is half as many bytes again, and as much time.
SHORT = ["-O3", "--param=max-completely-peel-times=4", "-fno-ipa-cp-clone", "-fno-split-loops"]
SHORT += ["-fno-split-paths", "-fno-unswitch-loops", "-fno-version-loops-for-strides"]
SHORT += ["-fno-inline-functions"]  # but those that are declared inline

# No symbols, and no tables that exceptions find their way up the stack by: C throws none.
BARE = ["-g0", "-DNDEBUG", "-fno-asynchronous-unwind-tables"]

# Where there are other levels, baseline is for processors from before 2013: it is to be short.
OLDER = ["-O2", "-ftree-vectorize", "-fvect-cost-model=dynamic"]

# Lanes of 128 bytes are cleared by two vector stores. gcc would call memset, as a `rep stos` that
# takes longer than the sums of a short run: 10 to 30 % of group normalization on 16 x 16.
CLEARING = "-fno-tree-loop-distribute-patterns"

# What is built for. Cross-building names it in _PYTHON_HOST_PLATFORM, such as linux-aarch64, and
# the compiler in CC; then what a probe compiles cannot be run.
TARGET = sysconfig.get_platform()
CROSS = "_PYTHON_HOST_PLATFORM" in os.environ
WINDOWS = TARGET.startswith("win")  # Microsoft's compiler; untried, and its one level is baseline

# What is inline in a .pxd file is part of a hot loop; constants decide what is left of it.
ALWAYS = "__forceinline" if WINDOWS else "inline __attribute__((always_inline, unused))"

# Checks watch the source, which is the same at every level: one is enough, and a third of the time.
LEVELS = {"baseline": []}
if TARGET.endswith("x86_64") and not KINDS:
    LEVELS["x86-64-v3"] = ["-march=x86-64-v3"]
    LEVELS["x86-64-v4"] = ["-march=x86-64-v4", "-mprefer-vector-width=512"]

# CYBN_LEVELS=x86-64-v3 builds that level alone: a third of the time, for work on a kernel.
if wanted := os.environ.get("CYBN_LEVELS"):
    if unknown := set(wanted.split(",")) - set(LEVELS):
        sys.exit(f"CYBN_LEVELS has {', '.join(unknown)}; it takes {', '.join(LEVELS)}")
    LEVELS = {level: flags for level, flags in LEVELS.items() if level in wanted.split(",")}

# One wheel for every Python from 3.11 on; free-threaded builds have no limited API.
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
    """Return whether the compiler takes flags, without a warning."""
    return failure("int main(void) { return 0; }", ["-Werror", *flags]) is None


def description():
    """Return the README for the page of a package index, which has no files beside it.

    Links and pictures of the tree come from HOME. As long as there is none, the words of links are
    left alone, and pictures are left out with the lines below them.
    """
    text = Path(__file__).with_name("README.md").read_text("utf-8")
    text = re.sub(r"'\.(\[\w+\])'", r"'cybn\1'", text)
    if HOME:
        text = re.sub(r"!\[([^]]*)\]\(([^:)]+)\)", rf"![\1]({HOME}/\2?raw=true)", text)
        return re.sub(r"(?<!!)\[([^]]*)\]\((?!https?://|#)([^)]+)\)", rf"[\1]({HOME}/\2)", text)
    text = re.sub(r"!\[[^]]*\]\([^:)]+\)\n\n\*[^*]+\*\n\n", "", text)
    return re.sub(r"\[([^]]*)\]\((?!https?://|#)[^)]+\)", r"\1", text)


def urls():
    """Return what a package index shows beside the description."""
    pages = {"Homepage": "", "Documentation": "docs/index.md", "Changelog": "CHANGELOG.md"}
    return {name: f"{HOME}/{page}".rstrip("/") for name, page in pages.items() if HOME}


def compiles():
    """Return whether a command needs the extensions: translating them takes half a minute."""
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
    if TARGET.startswith("macosx"):  # Apple's clang, and libomp of wherever LDFLAGS say; untried
        compiling, linking = ["-Xpreprocessor", "-fopenmp"], ["-lomp"]
    why = failure(OPENMP_PROBE, compiling + linking, run=not CROSS)
    if why is None:
        return compiling, linking
    warn(
        "NO OPENMP. The kernels are built serial: one thread, whatever is asked for.",
        "Install a compiler with OpenMP (gcc with libgomp, clang with libomp) and build again.",
        why,
    )
    return [], []


def build_flags():
    """Return the flags of this kind of build, to compile with and to link with."""
    if WINDOWS:
        return ["/O2", "/fp:precise", "/DNDEBUG"], []
    if not KINDS:  # a quick build takes half as long, and its loops twice: to test, not to measure
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
    """Return the extensions; each level is translated into a folder of its own."""
    compiling, linking = build_flags()
    parallel, with_openmp = openmp_flags()
    if not WINDOWS and supported(CLEARING):
        compiling.append(CLEARING)

    def extension(name, source, flags, macros=()):
        return Extension(
            f"cybn.{name}",
            [f"cybn/{source}.pyx"],
            include_dirs=[numpy.get_include()],  # for an array's fields, and to make new ones
            define_macros=[("Py_LIMITED_API", "0x030b0000")] * ABI3 + list(macros),
            py_limited_api=ABI3,
            extra_compile_args=compiling + parallel + flags,
            extra_link_args=linking + with_openmp,
        )

    def translated(modules, folder):
        folder = f"{FOLDER}/{folder}"
        flags = {module.name: module.extra_compile_args for module in modules}
        found = cythonize(modules, build_dir=folder, compiler_directives=DIRECTIVES, quiet=True)
        for module in found:  # it keeps flags by source, and adds those of another level
            module.extra_compile_args = flags[module.name]
        return found

    host = extension("_kernels.host", "_kernels/host", [], [("CYBN_BUILD", f'"{BUILD}"')])
    small = ["-Os"]  # checks are as quick, and half as large; the textbook's loops are to be read
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
