"""Compare the results of this build with tests/machine/digests.json, bit for bit.

    python tests/tools/digests.py              # count the calls that give their digests
    python tests/tools/digests.py --write      # write the file from the results of this build

It needs NumPy and cybn, and ml_dtypes for bfloat16, but not pytest. So it also runs under an
emulator, or in a build without OpenMP.
"""

import argparse
import json
import platform
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

from digest_cases import CALLS, digest
from levels import LEVELS, bind

from cybn import _runtime

FILE = Path(__file__).resolve().parents[1] / "machine" / "digests.json"


def load():
    """Return the digest of each call by its name."""
    return json.loads(FILE.read_text("utf-8"))


def differing(calls):
    """Return the names of the calls whose results have a different digest."""
    want = load()
    return [name for name, call in calls.items() if digest(call()) != want.get(name)]


def write():
    """Write the digests of this build at the lowest level."""
    bind(LEVELS[0])
    found = {name: digest(call()) for name, call in CALLS.items()}
    FILE.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the file from this build")
    if parser.parse_args().write:
        write()
    openmp = "with OpenMP" if _runtime.host.openmp() else "without OpenMP"
    failed = False
    for level in LEVELS:
        bind(level)
        wrong = differing(CALLS)
        failed |= bool(wrong)
        equal = len(CALLS) - len(wrong)
        print(f"{platform.machine()}, {level}, {openmp}: {equal} of {len(CALLS)} digests equal")
        for name in wrong:
            print("    differs:", name)
    sys.exit(failed)


if __name__ == "__main__":
    main()
