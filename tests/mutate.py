"""Mutation testing: plant one fault at a time and see whether the tests find it.

    python tests/mutate.py [--only NAME ...] [--list] [--again] [--jobs N]

Each fault of `mutants.py` goes into a copy of the source tree, which is built where that is needed
and put to the tests: first the test that found the fault last time, then the files that are most
likely to, then all others. tests/mutation.json keeps which test found which fault; what it holds is
not done again unless asked for. A fault that no test finds survives, and the exit code is 1.

Kernels are built at one instruction level and with -O1: a fault in the source is in all of them.
Tests of PyTorch, Keras and Flax run for the faults that touch those.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

from mutants import LIKELY, MUTANTS

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).with_name("mutation.json")
LIMIT = 1800  # seconds for the tests of one fault: a hang has been found, too

SOURCES = ("cybn", "setup.py", "pyproject.toml", "README.md", "LICENSE")
SUITE = ("tests", "docs", "pyproject.toml", "README.md")
COMPILED = (".pyx", ".pxi", ".pxd")
PEERS = re.compile(r"test_torch_|test_pytorch|_pytorch|_keras|_peers|test_mutation")

QUICK_BUILD = [
    ('if platform.machine().lower() in ("x86_64", "amd64"):', "if False:"),
    ('"-O3"', '"-O1"'),
]


class Outcome(NamedTuple):
    """What became of a fault: the test that found it, None where none did."""

    name: str
    by: str | None


# ---- planting and building ---------------------------------------------------------------


def plant(file, old, new):
    """Replace `old` in a file by `new`; ValueError unless it occurs exactly once."""
    text = file.read_text("utf-8")
    if text.count(old) != 1:
        raise ValueError(f"{file} has {text.count(old)} times, not once: {old!r}")
    file.write_text(text.replace(old, new), "utf-8")


def build(tree):
    """Build in place what is older than its source."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, start_new_session=True)
    if done.returncode:
        raise RuntimeError(f"the build failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")


def copy(names, to):
    """Copy files and folders of the source tree, without what was compiled from them."""
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.c", "*.pyd")
    for name in names:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, to / name, ignore=ignore, dirs_exist_ok=True)
        elif (ROOT / name).exists():
            shutil.copy2(ROOT / name, to / name)


@contextmanager
def workshop():
    """Make a folder with the tests in suite/, and the tree, built, in sound/."""
    with tempfile.TemporaryDirectory(prefix="mutate-") as name:
        folder = Path(name)
        furnish(folder)
        yield folder


def furnish(folder):
    """Fill a folder to work in; what was built in it stays, so that only changes are built."""
    for part, names in (("suite", SUITE), ("sound", SOURCES)):
        (folder / part).mkdir(parents=True, exist_ok=True)
        copy(names, folder / part)
    for old, new in QUICK_BUILD:
        plant(folder / "sound" / "setup.py", old, new)
    build(folder / "sound")


# ---- testing -----------------------------------------------------------------------------


def stages(mutant, known=None):
    """Return what to give pytest, one list after the other, until a test fails."""
    everything = sorted(file.name for file in Path(__file__).parent.glob("test_*.py"))
    named = mutant.tests or LIKELY[mutant.file]
    likely = [f"test_{name}.py" for name in named.split()]
    others = [name for name in everything if name not in likely and not PEERS.search(name)]
    known = [[known]] if known and known.startswith("tests/") and "::" in known else []
    return [*known, *([f"tests/{name}" for name in names] for names in (likely, others))]


def failing_test(folder, tree, tests, limit):
    """Return the first test of these that fails with the package in `tree`, or None."""
    environment = os.environ | {
        "PYTHONPATH": str(tree),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONFAULTHANDLER": "1",
    }
    options = ["-q", "-x", "--tb=no", "-rfE", "--no-header", "-p", "no:cacheprovider"]
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "pytest", *options, "--rootdir", ".", *tests],
        cwd=folder / "suite",
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGABRT)  # then it says where it is
            try:
                output, _ = process.communicate(timeout=10)
            except subprocess.TimeoutExpired:
                output = ""
            os.killpg(process.pid, signal.SIGKILL)
            return f"hang in {place(output)}"
    if process.returncode == 0 or (process.returncode == 4 and "::" in tests[0]):
        return None  # 4: there is no such test any more
    found = re.search(r"^(?:FAILED|ERROR) (tests/.*?)(?: - .*)?$", output, re.MULTILINE)
    if found:
        return found[1]
    if process.returncode < 0 or process.returncode > 128:
        return f"crash in {place(output)}"
    return f"no test could run: {output.strip().splitlines()[-1]}"


def place(output):
    """Return the test that the traceback of a dying interpreter leads to."""
    found = re.search(r'File ".*/(test_\w+\.py)", line \d+ in (test_\w+)', output)
    return f"tests/{found[1]}::{found[2]}" if found else "an unknown test"


def outcome_of(mutant, folder, known=None, limit=LIMIT, parts=None):
    """Plant one fault in a copy of the tree, build, and test it, in so many parts of the tests."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        tree = Path(name, "tree")
        shutil.copytree(folder / "sound", tree)
        plant(tree / "cybn" / mutant.file, mutant.old, mutant.new)
        if mutant.file.endswith(COMPILED):
            build(tree)
        for tests in stages(mutant, known)[:parts]:
            by = failing_test(folder, tree, tests, limit)
            if by is not None:
                return Outcome(mutant.name, by)
    return Outcome(mutant.name, None)


def check_sound(folder, tests, limit=LIMIT):
    """Raise where a test fails without any fault: it would find them all."""
    by = failing_test(folder, folder / "sound", tests, limit)
    if by is not None:
        raise RuntimeError(f"fails without a fault: {by}")


# ---- running -----------------------------------------------------------------------------


def progress(iterable, total):
    """Draw a bar where tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return iterable
    return tqdm(iterable, total=total, unit="fault")


def run(mutants, known, folder, jobs, limit, likely=False):
    """Test the faults, and yield each outcome as it comes."""
    with ThreadPoolExecutor(jobs) as pool:
        waiting = []
        for m in mutants:
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
    """Write the results in the order of the list, without faults that it has no longer."""
    ordered = {m.name: results[m.name] for m in MUTANTS if m.name in results}
    file.write_text(json.dumps(ordered, indent=1) + "\n", "utf-8")


def summary(results):
    """Return killed and planted, how, and what survived."""
    killed = [by for by in results.values() if by is not None]
    odd = {how: sum(by.startswith(how) for by in killed) for how in ("hang", "crash")}
    lines = [f"killed {len(killed)} of {len(results)} planted"]
    lines[0] += "".join(f", {number} by a {how}" for how, number in odd.items() if number)
    lines += [f"survived: {name}" for name, by in results.items() if by is None]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these faults, done or not")
    parser.add_argument("--list", action="store_true", help="list the faults and what found them")
    parser.add_argument("--again", action="store_true", help="also what is done already")
    parser.add_argument("--check", action="store_true", help="first run the tests without a fault")
    parser.add_argument("--likely", action="store_true", help="stop after the likely test files")
    parser.add_argument("--jobs", type=int, default=1, help="faults at a time, default 1")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds that count as a hang")
    parser.add_argument("--folder", type=Path, help="work and build here, and leave it so")
    parser.add_argument("--results", type=Path, default=RESULTS, help="default: %(default)s")
    given = parser.parse_args()
    results = load(given.results)
    if given.list:
        for m in MUTANTS:
            print(f"{m.name:34} {m.file:28} {m.why}  [{results.get(m.name, 'not run')}]")
        return
    if given.only:
        chosen = [m for m in MUTANTS if m.name in given.only]
        if len(chosen) < len(set(given.only)):
            sys.exit(f"no such fault: {sorted(set(given.only) - {m.name for m in chosen})}")
    else:
        chosen = [m for m in MUTANTS if given.again or m.name not in results]
    with nullcontext(given.folder) if given.folder else workshop() as folder:
        if given.folder:
            furnish(folder)
        if given.check:
            tests = {test for m in chosen for part in stages(m) for test in part}
            check_sound(folder, sorted(tests), given.limit)
        for name, by in run(chosen, results, folder, given.jobs, given.limit, given.likely):
            if by is not None or not given.likely:
                save(given.results, results := results | {name: by})
    print(summary(load(given.results)))
    sys.exit(any(by is None for by in results.values()))


if __name__ == "__main__":
    main()
