"""Count the compiled copies of the kernels' loops, and name those that no call reaches.

    python tests/tools/copies.py [--level LEVEL] [--cases N] [TEST ...]

An inline function is compiled once for each of its calls. This script adds a mark to each function
with a loop: an instruction that sets a byte. It builds the kernels of one level with the flags of a
release; each copy that the compiler makes has its own byte. Then it runs the calls of digests.json,
random calls and tests. If the byte of a copy stays 0, no call needs the copy, or no test covers it.
The exit code is then 1.

It needs gcc, x86-64 and the environment of `pip install '.[test]'`.
"""

import argparse
import os
import re
import struct
import subprocess
import sys
import tempfile
from bisect import bisect_right
from collections import Counter
from pathlib import Path

from mutate import ROOT, SOURCES, copy

KERNELS = ("batch_norm", "layer_norm")
CONSTANTS = {"way", "bend", "step", "stream", "clamped", "added", "brain", "activation"}
NO_LOOP = ("clear", "end_of_run")  # gcc makes copies for length 0, without a loop
TESTS = ["tests/batch", "tests/family", "tests/layers", "tests/machine/test_digests.py"]

# A section contains, for each copy, the byte, the offset to the code, and the function and its
# arguments. An argument that is not known at compile time is shown as its register, such as %eax.
MARK = r"""
  __asm__ volatile("movb $1, 1f(%%rip)\n2:\n\t.pushsection cybn_copies, \"aw\"\n"
    "1: .byte 0\n\t.long 2b - .\n\t.asciz \"LABEL\"\n\t.popsection" : : VALUES);
"""
SAVE = r"""
#include <stdio.h>
#include <stdlib.h>
extern char __start_cybn_copies[], __stop_cybn_copies[];
__attribute__((destructor)) static void cybn_save_copies(void) {
  char name[4096];
  if (!getenv("CYBN_COPIES")) return;
  snprintf(name, sizeof name, "%s/KERNEL-XXXXXX", getenv("CYBN_COPIES"));
  FILE *file = fdopen(mkstemp(name), "wb");
  fwrite(__start_cybn_copies, 1, __stop_cybn_copies - __start_cybn_copies, file);
  fclose(file);
}
"""
FUNCTION = re.compile(
    r"^static [^\n(]+?\b(__pyx_(?:fuse_\d__pyx_)?f_4cybn_8_kernels_\w+)\(([^\n]*)\) \{$.*?^\}$",
    re.MULTILINE | re.DOTALL,
)


def name_of(symbol):
    """Return the name of a function in the sources, with its type if it is fused."""
    found = re.match(r"__pyx_(?:fuse_(\d)__pyx_)?f_4cybn_8_kernels_(\d+)([a-zA-Z_0-9]+)", symbol)
    if not found:
        return symbol
    kind = {None: "", "0": "[float]", "1": "[double]"}[found[1]]
    return found[3][int(found[2]) + 1 :] + kind


def marked(code, kernel):
    """Return the C source of a kernel with a mark in each function that has a loop."""

    def mark(found):
        if not re.search(r"\bfor \(", found[0]):
            return found[0]
        given = re.findall(r"(?:enum \w+|int|Py_ssize_t) __pyx_v_(\w+)", found[2])
        given = [name for name in given if name in CONSTANTS]
        label = [name_of(found[1]), *(f"{name}=%{i}" for i, name in enumerate(given))]
        values = [f'"g"((int) __pyx_v_{name})' for name in given]
        text = MARK.replace("LABEL", " ".join(label)).replace("VALUES", ", ".join(values))
        head, brace, body = found[0].partition("{\n")
        return head + brace + text + body

    return FUNCTION.sub(mark, code) + SAVE.replace("KERNEL", kernel)


def build(folder, level):
    """Build the sources in a folder, with marks in the kernels of one level."""
    copy(SOURCES, folder)
    setup = folder / "setup.py"
    setup.write_text(setup.read_text("utf-8").replace('["-Wl,-s"]', "[]"), "utf-8")
    own = os.environ | {"CYBN_LEVELS": level}
    run = [sys.executable, "setup.py", "-q", "build_ext"]
    subprocess.run(run, cwd=folder, env=own | {"CC": "true"}, check=True, capture_output=True)
    for file in (folder / "build" / level.replace("-", "_")).rglob("*.c"):  # not yet compiled
        file.write_text(marked(file.read_text("utf-8"), file.stem), "utf-8")
    subprocess.run([*run, "--inplace"], cwd=folder, env=own, check=True)


def symbols(library):
    """Return the address of the marks of a library, and its functions as (address, name)."""
    command = ["nm", str(library)]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = sorted((int(at, 16), name) for at, name in re.findall(r"(\w{16}) [tTdD] (.*)", listed))
    (start,) = (address for address, name in found if name == "__start_cybn_copies")
    return start, [(address, name) for address, name in found if name.startswith("__pyx")]


def copies(library, files):
    """Yield each copy in a library as (function it was inlined in, its label, whether it ran)."""
    start, functions = symbols(library)
    saved = [file.read_bytes() for file in files]
    at = 0
    while at < len(saved[0]):
        (apart,) = struct.unpack_from("<i", saved[0], at + 1)
        end = saved[0].index(b"\0", at + 5)
        inside = functions[bisect_right(functions, (start + at + 1 + apart, "~")) - 1][1]
        yield name_of(inside), saved[0][at + 5 : end].decode(), any(run[at] for run in saved)
        at = end + 1


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--level", default="x86-64-v3")
    parser.add_argument("--cases", type=int, default=40_000, help="number of random calls")
    parser.add_argument("--folder", type=Path, help="build here, or use an earlier build")
    parser.add_argument("tests", nargs="*", default=TESTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        if not (folder / "cybn").is_dir():
            build(folder, options.level)
        sys.exit(report(folder, options))


def report(folder, options):
    """Call the kernels and print the copies that were not reached; return whether there are any."""
    with tempfile.TemporaryDirectory() as saved:
        path = os.pathsep.join(map(str, (folder, ROOT / "tests/tools", ROOT / "tests/helpers")))
        own = os.environ | {"PYTHONPATH": path, "CYBN_COPIES": saved}
        calls = [
            ["tests/tools/digests.py"],
            ["tests/tools/fuzz.py", "--cases", str(options.cases)],
            ["-m", "pytest", "-q", *options.tests],
        ]
        for call in calls:
            subprocess.run([sys.executable, "-P", *call], cwd=ROOT, env=own, check=True)
        missed = 0
        for kernel in KERNELS:
            (library,) = folder.glob(f"cybn/_kernels/{kernel}_*.so")
            found = Counter(copies(library, sorted(Path(saved).glob(f"{kernel}-*"))))
            unreached = {
                (inside, what): n
                for (inside, what, ran), n in found.items()
                if not (ran or what.startswith(NO_LOOP))
            }
            missed += sum(unreached.values())
            print(f"{kernel}: {found.total()} copies, {sum(unreached.values())} not reached")
            for (inside, what), n in sorted(unreached.items()):
                print(f"    {n} x {what}, in {inside}")
    return missed > 0


if __name__ == "__main__":
    main()
