"""Check the types of the pages' examples: ``python tests/typing/check_pages.py``.

It runs mypy and pyright on README.md and those pages of docs/ that need no other framework. The
Python blocks of each page become one module, as in the tests. Both checkers are strict about types
that cybn takes and returns, but a reader's own functions need no annotations.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from doctest import script_from_examples
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.S | re.M)
MYPY = ("--strict", "--allow-redefinition", "--ignore-missing-imports")
MYPY += ("--allow-untyped-defs", "--allow-untyped-calls")


def main() -> int:
    """Write the modules, run both checkers on them, and return 1 if one of them finds an error."""
    with tempfile.TemporaryDirectory() as folder:
        written = []
        for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
            code = "\n".join(BLOCK.findall(page.read_text("utf-8")))
            code = script_from_examples(code) if ">>>" in code else code
            if code and not re.search(r"^import (torch|sklearn)|^from (torch|sklearn)", code, re.M):
                written.append(Path(folder, page.stem.lower().replace("-", "_") + ".py"))
                written[-1].write_text(code, "utf-8")
        print("pages:", *(path.stem for path in written))
        checkers = [[sys.executable, "-m", "mypy", *MYPY], ["pyright"]]
        found = [subprocess.run([*checker, *map(str, written)]).returncode for checker in checkers]
    return int(any(found))


if __name__ == "__main__":
    sys.exit(main())
