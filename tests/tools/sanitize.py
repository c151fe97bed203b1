"""Build cybn with checks compiled in, and run the tests on that build.

python tests/tools/sanitize.py address  address sanitizer, undefined-behaviour sanitizer, debug
python tests/tools/sanitize.py debug    Cython's bounds, None and initialization checks; assertions
python tests/tools/sanitize.py thread   ThreadSanitizer, on the parallel kernels

Each builds into a temporary folder, checks that planted faults are reported, and runs a chosen part
of the suite; with --whole, all of it that does not need foreign packages. A report ends the run and
makes it fail. Further arguments are passed to pytest: names of tests, or options.

It runs in the source tree, in an environment with `pip install '.[test]'`, and needs gcc, which
includes the sanitizers.
"""

import argparse
import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
SOURCES = Path(__file__).with_name("sanitizers")
ADDR_NO_RANDOMIZE = 0x0040000  # a flag of Linux's personality()

# These tests load hundreds of MB of compiled code from other packages.
FOREIGN = ["*torch*", "*keras*", "*peers*", "*onnx*", "*interop*", "pages"]
PTHREAD_OMP = "pthread_omp.so"
NOT = "not pytorch and not fence_holds"  # fence_holds touches a protected page on purpose
FEW_HALVES = "(not equals_float32_rounded or (silu and bfloat16))"  # only shapes matter to threads


class Kind(NamedTuple):
    """One way to build cybn and run the tests."""

    build: dict  # environment variables of the build
    libraries: list  # to be loaded before all others
    options: dict  # environment variables of the run
    faults: list  # calls of functions in planted.c; each must end the process
    tests: list  # the tests to run, unless --whole is given
    only: str = ""  # an expression for pytest's -k that selects from them


KINDS = {
    "address": Kind(
        {"CYBN_SANITIZE": "address,undefined,bounds-strict", "CYBN_DEBUG": "1"},
        ["libasan.so", "libstdc++.so"],  # both need to see exceptions thrown
        {
            # CPython never frees some allocations; test_memory.py looks for leaks instead.
            "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=1:exitcode=66",
            "UBSAN_OPTIONS": "print_stacktrace=1",
            "PYTHONMALLOC": "malloc",  # Python's own arenas would hide overruns
        },
        [
            "past_the_end()",
            "past_the_stack(33)",
            "overflow(ctypes.c_long(1 << 40))",
            "misaligned(1)",
        ],
        [
            *("tools/test_sanitizers.py", "machine/test_memory.py", "machine/test_guard_pages.py"),
            *("batch/test_oracle.py", "batch/test_masks.py", "layers/test_running.py"),
            "family/test_family_small.py",
            "batch/test_half.py::test_odd_sizes",
            "batch/test_half.py::test_rounding_to_nearest_even",
            "batch/test_activations.py::test_rules",
            "batch/test_activations.py::test_out_may_be_the_residual_or_x",
            "family/test_family_shapes.py::test_every_size_of_row",
            "family/test_family_shapes.py::test_every_number_of_positions",
            "family/test_family_half.py::test_in_place",
        ],
    ),
    "debug": Kind(
        {"CYBN_DEBUG": "1"}, [], {}, [], ["tools/test_sanitizers.py", "batch/test_shapes.py"]
    ),
    "thread": Kind(
        {"CYBN_SANITIZE": "thread"},
        ["libtsan.so"],
        {"TSAN_OPTIONS": "exitcode=66:halt_on_error=1:ignore_noninstrumented_modules=1"},
        ["racing_sum()"],
        [
            "machine/test_threads.py",
            "batch/test_bits.py::test_streamed_training_in_and_beside_place",
            "batch/test_half.py::test_equals_float32_rounded",
            "batch/test_masks.py::test_the_same_bits_on_any_number_of_threads",
            "batch/test_activations.py::test_same_bits_on_any_number_of_threads",
            "machine/test_guard_pages.py::test_several_threads",
            "family/test_family_bits.py::test_threads_and_levels",
            "family/test_family_half.py::test_in_place",
        ],
        FEW_HALVES,
    ),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--whole", action="store_true", help="run the whole suite")
    parser.add_argument("--folder", type=Path, help="build here, or use an earlier build")
    options, more = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        run(KINDS[options.kind], folder.resolve(), options.whole, more)


def run(kind, folder, whole, more):
    if not (folder / "cybn").is_dir():
        build(kind, folder)
    environment = environment_of(kind, folder)
    python = [sys.executable, "-P"]
    check_build(kind, python, environment)
    if "libtsan.so" in kind.libraries:
        check_replaced(folder)
    check_faults(kind, python, folder, environment)
    own = any(word.startswith("test") for word in more)
    tests = [] if own else chosen(kind, whole)
    only = NOT if own or whole or not kind.only else f"{NOT} and {kind.only}"
    shown = ["-q", "--capture=sys"]  # includes what C prints before it ends the process
    plain = ["-p", "no:cacheprovider", "-k", only]
    command = [*python, "-m", "pytest", *shown, *plain, *tests, *more]
    print("+", *command, flush=True)
    sys.exit(subprocess.run(command, cwd=ROOT, env=environment).returncode)


def build(kind, folder):
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder)]
    if all(map(importlib.util.find_spec, ("Cython", "setuptools"))):  # otherwise pip downloads them
        command.append("--no-build-isolation")
    print("+", *command, ".", flush=True)
    subprocess.run([*command, "."], cwd=ROOT, env=os.environ | kind.build, check=True)


def compiler():
    return os.environ.get("CC", "gcc").split()


def environment_of(kind, folder):
    """Return the environment in which Python imports this build, with all that it needs."""
    ours = ("CYBN_", "OMP_", "GOMP_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    libraries = [library(name) for name in kind.libraries]
    if "libtsan.so" in kind.libraries:
        # ThreadSanitizer needs fixed addresses, which some Linux kernels use for other memory.
        ctypes.CDLL(None).personality(ADDR_NO_RANDOMIZE)  # inherited by processes started from here
        threads = str(folder / PTHREAD_OMP)
        compile_c("pthread_omp.c", threads, kind, "-pthread")
        libraries.append(threads)
    path = os.pathsep.join([str(folder), *(str(TESTS / own) for own in ("helpers", "tools"))])
    return environment | kind.options | {"PYTHONPATH": path, "LD_PRELOAD": " ".join(libraries)}


def library(name):
    command = [*compiler(), f"-print-file-name={name}"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def compile_c(source, to, kind, *flags):
    sanitize = f"-fsanitize={kind.build['CYBN_SANITIZE']}"
    flags = ["-g", "-O1", "-shared", "-fPIC", sanitize, "-fno-sanitize-recover=all", *flags]
    subprocess.run([*compiler(), *flags, str(SOURCES / source), "-o", to], check=True)


def check_build(kind, python, environment):
    """Check that Python imports this build, not another cybn of the environment."""
    command = [*python, "-m", "cybn", "info"]
    info = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    print(info.stdout)
    sanitize = kind.build.get("CYBN_SANITIZE")
    wanted = ["debug"] * ("CYBN_DEBUG" in kind.build) + [f"sanitize={sanitize}"] * bool(sanitize)
    if re.search(r"^build +(.*)$", info.stdout, re.MULTILINE)[1].split() != wanted:
        sys.exit(f"the imported cybn is not the build {' '.join(wanted)}")


def check_replaced(folder):
    """Check that every OpenMP function that the kernels call is replaced; libgomp hides races."""
    kernels = folder.glob("cybn/_kernels/*.so")
    called = set().union(*(openmp_names(file, "--undefined-only") for file in kernels))
    missing = called - openmp_names(folder / PTHREAD_OMP, "--defined-only")
    if missing or not called:
        sys.exit(f"pthread_omp.c lacks {sorted(missing)}" if called else "built without OpenMP")
    print("replaced:", *sorted(called))


def openmp_names(file, which):
    command = ["nm", "-D", which, str(file)]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return set(re.findall(r" [UT] ((?:GOMP|omp)_\w+)", listed))


def check_faults(kind, python, folder, environment):
    """Check that each planted fault ends the process, and that code without a fault does not."""
    if not kind.faults:
        return
    planted = str(folder / "planted.so")
    compile_c("planted.c", planted, kind, "-fopenmp")
    for call in [*kind.faults, "ordered_sum()"]:
        code = f"import ctypes; print(ctypes.CDLL({planted!r}).{call})"
        done = subprocess.run(
            [*python, "-c", code], env=environment, capture_output=True, text=True
        )
        reported = done.returncode != 0
        if reported != (call in kind.faults):
            sys.exit(f"planted {call}: {done.returncode}\n{done.stdout}{done.stderr}")
        print(f"planted {call}: {'reported' if reported else 'no report, as there is no fault'}")


def chosen(kind, whole):
    if not whole:
        return [str(TESTS / name) for name in kind.tests]
    foreign = [f"--ignore-glob={TESTS}/*/test_{name}.py" for name in FOREIGN]
    return [str(TESTS), *foreign]


if __name__ == "__main__":
    if not shutil.which(compiler()[0]):
        sys.exit("needs gcc")
    main()
