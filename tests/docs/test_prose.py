"""The English of pages, docstrings and comments: spelling, usage, and private expressions."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")]
PAGES = [page for page in PAGES if page.exists()] + sorted(ROOT.glob("docs/*.md"))
GALLERY = sorted(ROOT.glob("docs/gallery/*.py"))
SOURCES = sorted(
    path for path in ROOT.glob("cybn/**/*.p[yx]*") if path.suffix in (".py", ".pyx", ".pxd")
)
# Pages of tables, in which readers look things up.
REFERENCE = {"reference.md", "performance-tables.md", "reliability-table.md"}
MOST_WORDS = 25_000

pytestmark = pytest.mark.skipif(not (ROOT / "docs").exists(), reason="needs docs/ beside the tests")

# Expressions that only their writer understands, and what to write instead.
PRIVATE = {
    r"\b(is|are) law\b": "state the rule",
    r"\bat the door\b|\bthe door (opens|refuses|checks)": "on entry; the function, the dispatch",
    r"\b(this|that|which|the|whose|other) rooms?\b": "module",
    r"\bslow minutes?\b": "while the machine was slow",
    r"(?<!there )\bis none\b": "is None; is not one; does not",
    r"\bis no (int|float|number|array|bool|str|string|dict|list|tuple|Moments)\b": "is not a",
    r"\bis no (mapping|module|layer|function|class|subclass|file|folder)\b": "is not a",
    r"\b(leave|leaves|without) (no|a) trace\b": "changes nothing, without side effects",
    r"\b[Tt]he slow twin\b": "the reference implementation",
    r"\b(let|lets) go of\b": "release",
    r"\b(has|have) not got\b": "does not contain",
    r"\bfor nothing\b": "at no cost",
    r"\bspeed of memory\b": "limited by memory bandwidth",
    r"\b(that|which) travels?\b": "is exchanged, is transferred",
    r"\b(alone minds|is minded)\b": "refuses, is handled",
    r"\bmend(s|ed)?\b": "fix",
    r"\b(spoilt|spoils)\b": "damaged",
    r"\bthat (are|is) gone\b": "that has been freed",
    r"\b[Ww]hole or not at all\b": "all or nothing",
    r"\bfacts alone\b": "only facts",
    r"\b[Ww]hat does not count\b": "masked values",
    r"\b[Ww]hat weighs nothing\b": "values with weight 0",
    r"\b(is|are) not looked at\b": "is ignored",
    r"\b(their|its) (like|kin)\b": "others of that kind",
    r"\bwhoever\b": "say who or what",
    r"\btravels together\b": "belongs together",
    r"\b(stay|stays) theirs\b": "keep",
}


def prose_of(path):
    """Return the English in a file: a page without its code, or the comments of a source."""
    text = path.read_text("utf-8")
    if path.suffix == ".md":
        text = re.sub(r"^(```|\$\$)(.*?)(```|\$\$)$", "", text, flags=re.S | re.M)
        text = re.sub(r'^\| ".*$', "", text, flags=re.M)  # expressions that are quoted as examples
        return re.sub(r"`[^`\n]*`|\]\([^)]*\)", " ", text)
    found = re.findall(r'"""((?:.|\n)*?)"""|# (.*)', text)
    return re.sub(r"`[^`\n]*`", " ", "\n".join(one or other for one, other in found))


@pytest.mark.parametrize(
    "path", [*PAGES, *GALLERY, *SOURCES], ids=lambda p: str(p.relative_to(ROOT))
)
def test_no_private_expressions(path):
    text = " ".join(prose_of(path).split())
    found = [
        f"'{text[max(0, m.start() - 40) : m.end() + 20]}': say {instead}"
        for pattern, instead in PRIVATE.items()
        for m in re.finditer(pattern, text)
    ]
    assert not found, "\n".join(found)


def words(page):
    """Count the words of a page with at least two letters, without code and formulas."""
    return len(re.findall(r"[A-Za-z][A-Za-z'-]*[A-Za-z]", prose_of(page)))


def test_the_pages_are_short_enough():
    pages = [page for page in PAGES if page.parent.name == "docs" and page.name not in REFERENCE]
    pages += GALLERY
    assert sum(map(words, pages)) <= MOST_WORDS


def test_spelling():
    pytest.importorskip("codespell_lib")
    checked = [*PAGES, *GALLERY, *SOURCES]
    command = [
        sys.executable,
        "-m",
        "codespell_lib",
        "--ignore-words-list",
        "bui",
        *map(str, checked),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_usage():
    """Run proselint, without its rules on quotes, on repeated titles, and on "very"."""
    pytest.importorskip("proselint")
    from proselint.checks import __register__
    from proselint.config import DEFAULT
    from proselint.registry import CheckRegistry
    from proselint.tools import LintFile

    CheckRegistry().register_many(__register__)
    checks = {"misc.phrasal_adjectives": False, **DEFAULT["checks"]}  # "cross-compiled" is fine
    for name in ("annotations", "dates_times", "lexical_illusions", "typography", "weasel_words"):
        checks[name] = False
    found = [
        f"{page.name}: {result}"
        for page in PAGES
        for result in LintFile(page).lint({"max_errors": 1000, "checks": checks})
    ]
    assert not found, "\n".join(found)
