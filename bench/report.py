"""Fill the tables of pages: ``python -m bench.report figures.json --pages README.md``.

``pytest bench --benchmark-json=figures.json`` writes the file. What is between two lines of a page
is replaced by a table::

    <!-- bench: bars -->
    <!-- end of bench -->
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

from .bars import ALONE, HEADS, Bar, Record, Where, verdicts
from .cases import MODES, SHAPES
from .peers.floor import FLOOR
from .task import FIRST, LAST, REUSED

MARKED = re.compile(r"^(<!-- bench: (.+) -->\n)((?:.*\n)*?)(<!-- end of bench -->)$", re.M)
START = re.compile(r"^<!-- bench: (.+) -->$", re.M)
NAMES = {"forward": "Training forward", "inference": "Inference", "backward": "Backward"}


@dataclass
class Run:
    """The records of a run, with the machine and the peers."""

    machine: dict[str, Any]
    peers: dict[str, str]
    cache: int
    records: list[Record]


def records_of(benchmarks: Sequence[dict[str, Any]]) -> list[Record]:
    """Return the records of a run, each with the median of its turns in seconds."""
    return [
        {**one["extra_info"], "seconds": one["stats"]["median"]}
        for one in benchmarks
        if one["extra_info"].get("group")
    ]


def read(path: Path) -> Run:
    """Read the file of a run; raise ValueError if it is another file."""
    stored = json.loads(path.read_text(encoding="utf-8"))
    info = stored.get("machine_info", {})
    if "peers" not in info:
        raise ValueError(f"{path} was not written by 'pytest bench --benchmark-json'")
    records = records_of(stored["benchmarks"])
    return Run(info["cybn"], info["peers"], info["last-level cache"], records)


# ---- tables --------------------------------------------------------------------------------------


def text_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in plain text."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)) for row in (heads, *rows))
    return "".join(line.rstrip() + "\n" for line in lines)


def markdown(heads: Sequence[str], rows: Sequence[Sequence[Any]], words: int = 1) -> str:
    """Return a table with `words` columns of words, then numbers; an empty text without rows."""
    rule = ["---" if i < words else "---:" for i in range(len(heads))]
    lines = [f"| {' | '.join(map(str, cells))} |" for cells in (heads, rule, *rows)]
    return "\n".join(lines) + "\n" if rows else ""


def number(value: float) -> str:
    """Return a number with about three digits, without an exponent."""
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 0.1 else 4
    return f"{value:.{digits}f}"


def columns(found: Sequence[Record], layout: str | None) -> Iterator[tuple[str, Where]]:
    """Yield the head of each column, and which records it shows.

    If `layout` is None, these are the records of the quickest layout. A peer with layouts of its
    own, such as oneDNN, shows its best layout in the tables of channels-first.
    """
    for peer in dict.fromkeys(r["peer"] for r in found):
        own = [r for r in found if r["peer"] == peer]
        blocked = layout == FIRST and any(r["layout"] not in (FIRST, LAST) for r in own)
        free = layout is None or blocked or peer == FLOOR
        where = {"peer": peer} if free else {"peer": peer, "layout": layout}
        name = f"{peer}, its best" if blocked else peer
        if peer == FLOOR:
            name = "`np.add`" if own[0]["operation"] == "backward" else "`np.copyto`"
        outputs = dict.fromkeys(r["output"] for r in own)
        for output in outputs:
            said = f", {'`out=`' if output == REUSED else output}" if len(outputs) > 1 else ""
            yield name + said, where | {"output": output}
            if (peer, output) == ("cybn", REUSED):
                yield "GB/s", where | {"output": output}


def times(run: Run, work: str, groups: Sequence[str], layout: str | None, factor: float) -> str:
    """Return a table of the times of some groups and one kind of work, with a row per shape."""
    found = [r for r in run.records if r["group"] in groups and r["work"] == work]
    least = min((r["threads"] for r in found), default=0)  # "one thread" also has two of cybn
    found = [r for r in found if r["threads"] == least]
    slowest_first = sorted(found, key=lambda r: -r["seconds"])  # the last, the quickest, is kept
    grid = {}
    for head, where in columns(found, layout):
        best = {}
        for r in (r for r in slowest_first if where.items() <= r.items()):
            speed = r["least_bytes"] / r["seconds"] / 1e9
            best[r["shape"]] = f"{speed:.0f}" if head == "GB/s" else number(r["seconds"] * factor)
        if best:
            grid[head] = best
    shapes = dict.fromkeys(r["shape"] for r in found)
    rows = [[shape, *(column.get(shape, "-") for column in grid.values())] for shape in shapes]
    return markdown(["shape", *grid], rows)


def block(
    *groups: str, works: Sequence[str] = (), layout: str | None = FIRST, factor: float = 1e3
) -> Callable[[Run], str]:
    """Return a function that makes a table of times, in milliseconds, for each kind of work."""

    def made(run: Run) -> str:
        tables = {work: times(run, work, groups, layout, factor) for work in works or NAMES}
        if len(works) == 1:
            return tables[works[0]]
        named = {NAMES.get(work, work.capitalize()): t for work, t in tables.items() if t}
        return "\n".join(f"### {name}\n\n{table}" for name, table in named.items())

    return made


def beside(*groups: str) -> Callable[[Run], str]:
    """Return a function that makes a table of times over those of plain work, and of peers."""

    def comparisons(found: Sequence[Record]) -> Iterator[Bar]:
        keys = ("group", "norm", "work", "dtype", "operation")
        others = dict.fromkeys((r["peer"], r["output"]) for r in found if r["peer"] != "cybn")
        for kind in dict.fromkeys(tuple(r[key] for key in keys) for r in found):
            group, norm, work, dtype, operation = kind
            here: Where = {"work": work, "dtype": dtype, "norm": norm}
            ours = ALONE | here | {"output": REUSED}
            plain = here | {"work": operation, "dtype": "float32"}
            title = ", ".join([norm, work, dtype] + [group] * (len(groups) > 1))
            if here != plain:
                yield Bar(f"{title} / plain", (group,), None, ours, ours | plain)
            for peer, output in others:
                theirs = {"peer": peer, "output": output, **here}
                name = f"{title} / {peer}, {output}"
                yield Bar(name, (group,), None, ours | {"output": output}, theirs)

    def made(run: Run) -> str:
        found = [r for r in run.records if r["group"] in groups]
        rows = []
        for v in filter(None, (bar.held(found) for bar in comparisons(found))):
            figures = (v.figure, v.pairs[0].ratio, v.pairs[-1].ratio)
            rows.append([v.bar.name, *(f"{f:.2f}" for f in figures), v.pairs[-1].place])
        return markdown(["time / time", "geometric mean", "lowest", "highest", "highest on"], rows)

    return made


def summary(run: Run) -> str:
    """Return cybn's time divided by PyTorch's best: a row per group, a column per operation."""
    rows = []
    ours, torch = {"peer": "cybn", "layout": FIRST, "output": REUSED}, {"peer": "PyTorch"}
    for group in dict.fromkeys(r["group"] for r in run.records):
        where = [{"work": work} for work in NAMES]
        every = [Bar("", (group,), None, ours | here, torch | here) for here in where]
        found = [bar.held(run.records) for bar in every]
        if any(found):
            rows.append([group, *(f"{v.figure:.2f}" if v else "-" for v in found)])
    return markdown(["group", *NAMES], rows)


def training(run: Run) -> str:
    """Return a table of training steps of whole networks, and of differences of the loss."""
    rows = []
    for r in (r for r in run.records if r["group"] == "training"):
        cells = [f"{r['shape']}, {'x'.join(map(str, r['sizes']))}", r["peer"]]
        cells += [f"{r['seconds']:.2f} s", *(f"{gain:.2f}" for gain in r["gains"])]
        cells += [f"{r['faults'] / 1000:.0f} k", f"{r['peak'] / 2**30:.1f} GiB"]
        rows.append([*cells, f"{r['apart']:.1e}"])
    heads = ["network", "", "step", "gain", "lowest", "highest", "page faults", "peak memory"]
    return markdown([*heads, "loss apart by at most"], rows, words=2)


def missed(run: Run) -> str:
    """Return the cases, without the worst, that miss a target that each case has to meet."""
    rows = [
        [verdict.bar.name, pair.place, f"{pair.ratio:.3f}{verdict.unit}"]
        for verdict in verdicts(run.records, run.cache)
        for pair in reversed(verdict.pairs[:-1])  # the table of targets has the worst
        if verdict.bar.how == "each" and pair.ratio > (verdict.bar.bound or inf)
    ]
    return markdown(["target", "case", "figure"], rows, words=2)


BLOCKS: dict[str, Callable[[Run], str]] = {
    "machine": lambda run: markdown(["", "this run"], list((run.machine | run.peers).items()), 2),
    "bars": lambda run: markdown(HEADS, [v.cells for v in verdicts(run.records, run.cache)], 2),
    "missed": missed,
    **{f"resnet50 {work}": block("resnet50", works=(work,)) for work in NAMES},
    "resnet50 channels-last": block("resnet50", layout=LAST),
    "resnet50 one thread": block("one thread"),
    "resnet50 float64": block("resnet50 float64"),
    "ratios": beside("resnet50"),
    "summary": summary,
    "groups": block(*SHAPES, layout=None),
    "tiny": block("tiny", works=(*NAMES, "forward, through a layer"), factor=1e6),
    "fused": beside("activations", "fused", "masks"),
    "half": beside("beyond", "half"),
    "family": beside("family"),
    "steps": block("steps"),
    "steps channels-last": block("steps", layout=LAST),
    "small": block("small", works=MODES, layout=None, factor=1e6),
    "training": training,
}


# ---- pages ---------------------------------------------------------------------------------------


def filled(run: Run, path: Path) -> str:
    """Return a page with its blocks filled; raise ValueError if a mark is unknown or has no end."""
    text = path.read_text(encoding="utf-8")
    if not (names := START.findall(text)):
        raise ValueError(f"{path} has no line <!-- bench: NAME -->; names: {', '.join(BLOCKS)}")
    if unknown := [name for name in names if name not in BLOCKS]:
        raise ValueError(f"{path} asks for {unknown[0]!r}; there are {', '.join(BLOCKS)}")
    if names != [found[2] for found in MARKED.finditer(text)]:
        raise ValueError(f"{path} has a <!-- bench: NAME --> without its <!-- end of bench -->")

    def replaced(found: re.Match[str]) -> str:
        table = BLOCKS[found[2]](run) or "Not measured in this run.\n"
        return f"{found[1]}\n{table}\n{found[4]}"

    return MARKED.sub(replaced, text)


def main(arguments: Sequence[str] | None = None) -> None:
    """Fill pages, and print the bars."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("figures", type=Path)
    parser.add_argument("--pages", nargs="+", type=Path, default=[])
    options = parser.parse_args(arguments)
    try:
        run = read(options.figures)
        pages = {page: filled(run, page) for page in options.pages}  # all of them, or none
    except (OSError, ValueError) as error:
        parser.error(str(error))
    for page, text in pages.items():
        page.write_text(text, encoding="utf-8")
    cells = [verdict.cells for verdict in verdicts(run.records, run.cache)]
    print(text_table(HEADS, cells), end="")


if __name__ == "__main__":
    main()
