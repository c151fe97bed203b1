"""The types of the pages' examples: ``python tests/typing/check_pages.py`` runs mypy and pyright.

Each page's Python blocks become one module, as the tests run them; those of README.md and
docs/*.md that need no other framework. Both checkers are strict about what cybn gives and takes: a
function of a reader's own need not be annotated.
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
    """Write the modules, run both checkers on them, and return 1 where one finds an error."""
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
