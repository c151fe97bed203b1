"""Mutation testing: plant one fault at a time and see whether the tests find it.

    python tests/tools/mutate.py [--only NAME ...] [--list] [--again] [--jobs N]

For each fault of faults/*.toml, the script plants it in a copy of the source tree and runs tests:
first the test that found it last time, then the files that are most likely to find it, then all
others. tests/tools/mutation.json records which test found which fault. Faults that it contains are
not run again unless asked for. A fault that no test finds survives, and the exit code is then 1.

a. Kernels are built once with all of their faults in them. An `if` activates a fault when its
   number is in the variable CYBN_FAULT (mutant schemata: Untch, Offutt and Harrold, 1993). They are
   built at one instruction level and with -O1, because all levels share the source. If all faults
   to run are in Python files, kernels that are already built in the tree are used.
b. Tests run in processes forked from one that has already imported the slow packages.
c. Tests of PyTorch, Keras and Flax only run for faults in the code that they test.
"""

import argparse
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from anchors import anchored, replaced
from mutants import FAULTS
from schemata import switched

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
RESULTS = Path(__file__).with_name("mutation.json")
MISSING = "a test that does not exist"
LIMIT = 1800  # seconds for the tests of one fault; a hang counts as found

SOURCES = ("cybn", "setup.py", "pyproject.toml", "README.md", "LICENSE")
SUITE = ("tests", "docs", "pyproject.toml", "README.md")
PEERS = re.compile(r"test_torch_|_pytorch|_keras|_peers|test_mutation")
PRELOADED = ["numpy", "numpy.testing", "pytest", "hypothesis", "hypothesis.strategies"]

AS_CALLS = ('"inline __attribute__((always_inline, unused))"', '"inline"')  # faults double a loop

NUMBERS = {fault.name: number for number, fault in enumerate(FAULTS, 1)}


class Outcome(NamedTuple):
    """The result of a fault: the test that found it, or None if no test did."""

    name: str
    by: str | None


# ---- planting and building ---------------------------------------------------------------


def compiled(fault):
    """Return whether a fault is in a source that is compiled."""
    return not fault.file.endswith(".py")


def plant_switches(package):
    """Plant all faults of compiled sources, each behind its switch."""
    for name in sorted({fault.file for fault in FAULTS if compiled(fault)}):
        text = (package / name).read_text("utf-8")
        changes = {NUMBERS[f.name]: anchored(text, *f.anchor) for f in FAULTS if f.file == name}
        (package / name).write_text(switched(text, changes), "utf-8")


def copy(names, to, *left_out):
    """Copy files and folders of the source tree, except C files and those that match `left_out`."""
    ignore = shutil.ignore_patterns("__pycache__", "*.c", *left_out)
    for name in names:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, to / name, ignore=ignore, dirs_exist_ok=True)
        elif (ROOT / name).exists():
            shutil.copy2(ROOT / name, to / name)


def furnish(folder, faults=FAULTS):
    """Copy the tests into suite/ and the sources into sound/, built with inactive faults."""
    built = not any(map(compiled, faults)) and any(ROOT.glob("cybn/**/*.so"))
    for part, names in (("suite", SUITE), ("sound", SOURCES)):
        (folder / part).mkdir(parents=True, exist_ok=True)
        copy(names, folder / part, *([] if built else ["*.so", "*.pyd"]))
    if built:
        return
    setup = folder / "sound" / "setup.py"
    text = setup.read_text("utf-8")
    setup.write_text(replaced(text, "", *AS_CALLS), "utf-8")
    level = os.environ | {"CYBN_LEVELS": "baseline", "CYBN_QUICK": "1"}
    plant_switches(folder / "sound" / "cybn")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=folder / "sound", env=level, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the build failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")


@contextmanager
def workshop(faults=FAULTS):
    """Make a temporary folder with the tests and the sources."""
    with tempfile.TemporaryDirectory(prefix="mutate-") as name:
        furnish(Path(name), faults)
        yield Path(name)


@contextmanager
def planted(fault, folder):
    """Yield a tree that contains the fault, and the value of CYBN_FAULT that activates it."""
    if compiled(fault):
        yield folder / "sound", NUMBERS[fault.name]
        return
    with tempfile.TemporaryDirectory(dir=folder) as tree:
        shutil.copytree(folder / "sound" / "cybn", Path(tree, "cybn"), copy_function=os.link)
        file = Path(tree, "cybn", fault.file)
        text = fault.planted(file.read_text("utf-8"))
        file.unlink()  # a hard link: do not write to the original
        file.write_text(text, "utf-8")
        yield Path(tree), 0


# ---- testing -----------------------------------------------------------------------------


def file_of(name):
    """Return the test file of that name, given without test_, in any folder of tests."""
    (file,) = TESTS.glob(f"*/test_{name}.py")
    return file


def stages(fault, known=None):
    """Return lists of tests; give pytest one after the other until a test fails."""
    everything = sorted(str(file.relative_to(ROOT)) for file in TESTS.glob("*/test_*.py"))
    likely = [str(file_of(name).relative_to(ROOT)) for name in fault.likely()]
    others = [name for name in everything if name not in likely and not PEERS.search(name)]
    known = re.sub("^(crash|hang) in ", "", known or "")
    first = [[known]] if known.startswith("tests/") and "::" in known else []
    return [*first, likely, others]


def run_pytest(suite, tree, number, tests, log):
    """Run some tests in this process, then exit."""
    os.setsid()
    with open(log, "wb") as file:
        for output in (1, 2):
            os.dup2(file.fileno(), output)
    os.chdir(suite)
    sys.path.insert(0, str(tree))
    os.environ["PYTHONPATH"] = str(tree)
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    os.environ["CYBN_FAULT"] = str(number)
    sys.dont_write_bytecode = True
    import pytest

    options = ["-q", "-x", "--tb=no", "-rfE", "--no-header", "-p", "no:cacheprovider"]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # for preloaded modules
    os._exit(_flushed(pytest.main([*options, "--rootdir", ".", *tests])))


def _flushed(code):
    sys.stdout.flush()
    sys.stderr.flush()
    return int(code)


def failing_test(folder, tree, number, tests, limit=LIMIT):
    """Return the first of these tests that fails with the package in `tree`, or None."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        log = Path(name, "log")
        arguments = (folder / "suite", tree, number, tests, log)
        process = context.Process(target=run_pytest, args=arguments)
        process.start()
        process.join(limit)
        hangs = process.is_alive()
        if hangs:
            os.kill(process.pid, signal.SIGABRT)  # faulthandler then prints where it hangs
            process.join(10)
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
        output = log.read_text("utf-8", "replace") if log.exists() else ""
    return f"hang in {place(output, tests)}" if hangs else verdict(process.exitcode, tests, output)


def verdict(code, tests, output):
    """Return which test failed, by pytest's exit code and what it printed."""
    if code == 0:
        return None
    if code in (4, 5) and "::" in tests[0]:
        return MISSING
    found = re.search(r"^(?:FAILED|ERROR) (tests/.*?)(?: - .*)?$", output, re.MULTILINE)
    if found:
        return found[1]
    if code < 0 or code > 128:
        return f"crash in {place(output, tests)}"
    if "ImportError while loading conftest" in output:
        return "import of the package"
    raise RuntimeError(f"pytest did not run: exit code {code}\n{output}")


def place(output, tests):
    """Return the test in the traceback that faulthandler printed."""
    found = re.search(r'File ".*/(tests/\w+/test_\w+\.py)", line \d+ in (test_\w+)', output)
    if found:
        return f"{found[1]}::{found[2]}"
    return tests[0] if len(tests) == 1 else "an unknown test"


def outcome_of(fault, folder, known=None, limit=LIMIT, parts=None):
    """Plant one fault and run its tests, or only the first `parts` stages of them."""
    with planted(fault, folder) as (tree, number):
        for tests in stages(fault, known)[:parts]:
            by = failing_test(folder, tree, number, tests, limit)
            if by not in (None, MISSING):
                return Outcome(fault.name, by)
    return Outcome(fault.name, None)


def check_sound(folder, tests, limit=LIMIT):
    """Raise an error if a test fails without any fault: it would find them all."""
    by = failing_test(folder, folder / "sound", 0, tests, limit)
    if by is not None:
        raise RuntimeError(f"{by} fails without a fault")


# ---- running -----------------------------------------------------------------------------


def progress(iterable, total):
    """Show a progress bar if tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return iterable
    return tqdm(iterable, total=total, unit="fault")


def run(faults, known, folder, jobs, limit, likely=False):
    """Test the faults, and yield each outcome as soon as it is known."""
    with ThreadPoolExecutor(jobs) as pool:
        waiting = []
        for m in faults:
            by = known.get(m.name)
            parts = len(stages(m, by)) - 1 if likely else None
            waiting.append(pool.submit(outcome_of, m, folder, by, limit, parts))
        for done in progress(as_completed(waiting), len(waiting)):
            outcome = done.result()
            say = f"{outcome.name}: {'SURVIVED' if outcome.by is None else outcome.by}"
            print(say, file=sys.stderr, flush=True)
            yield outcome


def load(file):
    return json.loads(file.read_text("utf-8")) if file.exists() else {}


def save(file, results):
    """Write the results in the order of the list, without faults that no longer exist."""
    ordered = {m.name: results[m.name] for m in FAULTS if m.name in results}
    file.write_text(json.dumps(ordered, indent=1) + "\n", "utf-8")


def summary(results):
    """Return a text that counts killed and planted faults and names those that survived."""
    killed = [by for by in results.values() if by is not None]
    odd = {how: sum(by.startswith(how) for by in killed) for how in ("hang", "crash")}
    lines = [f"killed {len(killed)} of {len(results)} planted"]
    lines[0] += "".join(f", {number} by a {how}" for how, number in odd.items() if number)
    lines += [f"survived: {name}" for name, by in results.items() if by is None]
    return "\n".join(lines)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="test only these faults")
    parser.add_argument("--list", action="store_true", help="list the faults and what found them")
    parser.add_argument("--again", action="store_true", help="also test faults that have a result")
    parser.add_argument("--check", action="store_true", help="first run the tests without a fault")
    parser.add_argument("--likely", action="store_true", help="stop after the likely test files")
    parser.add_argument("--jobs", type=int, default=1, help="number of faults at a time, default 1")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds that count as a hang")
    parser.add_argument("--results", type=Path, default=RESULTS, help="default: %(default)s")
    return parser.parse_args()


def chosen(only, again, results):
    """Return the faults to test."""
    if not only:
        return [m for m in FAULTS if again or m.name not in results]
    named = {m.name: m for m in FAULTS}
    if not named.keys() >= set(only):
        sys.exit(f"no such fault: {sorted(set(only) - named.keys())}")
    return [named[name] for name in only]


def main():
    given = arguments()
    results = load(given.results)
    if given.list:
        for m in FAULTS:
            print(f"{m.name:34} {m.place:44} {m.why}  [{results.get(m.name, 'not run')}]")
        return
    faults = chosen(given.only, given.again, results)
    with workshop(faults) as folder:
        if given.check:
            check_sound(folder, sorted({t for m in faults for s in stages(m) for t in s}))
        for name, by in run(faults, results, folder, given.jobs, given.limit, given.likely):
            if by is not None or not given.likely:
                save(given.results, results := results | {name: by})
    print(summary(load(given.results)))
    sys.exit(any(by is None for by in results.values()))


if __name__ == "__main__":
    main()
