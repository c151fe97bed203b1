"""The reliability matrix: its 39 rows, and the figures that the tests of each row record.

A test names its row with `@pytest.mark.row(23)` and records a figure with the fixture `figure`.
`pytest --matrix=FILE` adds the results of the run to FILE, so that several runs fill one table.
`python tests/tools/matrix.py FILE...` prints the table, and fails if a row failed or was never run.
`pytest --row=23` only runs the tests of that row.
"""

import json
import operator
import sys
from pathlib import Path

import pytest

ROWS = {
    1: "exact data: mean and variance bit-equal",
    2: "exact integers: dgamma and dbeta bit-equal",
    3: "random data: within the error bound",
    4: "offsets 10^0 to 10^7",
    5: "constant channels give exactly beta",
    6: "extremes: std 1e-18 and 1e18, 3e38",
    7: "NaN and Inf stay in their channel",
    8: "NaN outside the view has no effect",
    9: "subnormals are not flushed",
    10: "running statistics: closed form",
    11: "gradients: central differences",
    12: "identities of the gradient, invariance",
    13: "more than 2^24 values a channel",
    14: "every S in 1..70, C in 1..40, N in 1..5",
    15: "unusual shapes",
    16: "around every block border",
    17: "strides: sliced, negative, transposed, broadcast",
    18: "alignment: off by 1, 2, 4, 8 bytes",
    19: "read-only input and memmaps",
    20: "overlap of out and x",
    21: "more than 2^31 elements",
    22: "wrong and unusual dtypes",
    23: "thread counts: the same bits",
    24: "instruction levels: the same bits",
    25: "repeats under load: the same bits",
    26: "fork after a parallel call",
    27: "one layer, eight Python threads",
    28: "beside joblib, executors, PyTorch, scikit-learn, numba",
    29: "OMP_NUM_THREADS, threadpoolctl, affinity, quota",
    30: "the floating-point environment does not change",
    31: "after interrupts and errors a state is the old or the new one",
    32: "guard pages around arrays, all tails",
    33: "sanitizers and bounds checks",
    34: "many calls with errors: memory and counts flat",
    35: "state: round trips, damaged and hostile files",
    36: "mutation: planted faults are caught",
    37: "property fuzz against the reference",
    38: "two threads where other processes keep the cores busy",
    39: "ranks: one is killed, has bad input, or other shapes",
}

HOW = {"max": max, "min": min, "sum": lambda a, b: a + b, "last": lambda a, b: b}


class Matrix:
    """The results of one run: for each row the outcomes of its tests and their figures."""

    def __init__(self):
        self.rows = {}

    def row(self, number):
        if number not in ROWS:
            raise ValueError(f"the matrix has rows 1 to {len(ROWS)}, not {number}")
        empty = {"passed": 0, "failed": 0, "skipped": {}, "figures": {}}
        return self.rows.setdefault(number, empty)

    def note(self, number, name, value, how="max"):
        """Record a figure; `how` combines the values if several tests record the same figure."""
        figures = self.row(number)["figures"]
        value = plain(value)
        figures[name] = [HOW[how](figures[name][0], value) if name in figures else value, how]

    def outcome(self, number, report):
        row = self.row(number)
        if report.failed:
            row["failed"] += 1
        elif report.skipped:
            reason = report.longrepr[2].removeprefix("Skipped: ")
            row["skipped"][reason] = row["skipped"].get(reason, 0) + 1
        elif report.when == "call":
            row["passed"] += 1

    def add(self, rows):
        """Add the rows of another run."""
        for number, other in rows.items():
            row = self.row(int(number))
            row["passed"] += other["passed"]
            row["failed"] += other["failed"]
            for reason, times in other["skipped"].items():
                row["skipped"][reason] = row["skipped"].get(reason, 0) + times
            for name, (value, how) in other["figures"].items():
                self.note(int(number), name, value, how)

    def table(self):
        """Return the table in Markdown."""
        lines = ["| # | what | tests | figures |", "|---|---|---|---|"]
        for number, title in ROWS.items():
            row = self.row(number)
            ran = f"{row['passed']} passed"
            if row["failed"]:
                ran += f", {row['failed']} FAILED"
            if not row["passed"] and not row["failed"]:
                ran = "; ".join(f"skipped: {reason}" for reason in row["skipped"]) or "NOT RUN"
            figures = (f"{name}: {shown(value)}" for name, (value, _) in row["figures"].items())
            lines.append(f"| {number} | {title} | {ran} | {'; '.join(figures)} |")
        return "\n".join(lines)

    def holes(self):
        """Return the rows that failed or were never run; a row that was skipped is not a hole."""
        rows = {n: self.row(n) for n in ROWS}
        return [n for n, r in rows.items() if r["failed"] or not (r["passed"] or r["skipped"])]


def plain(value):
    """Return the value as Python's own str, int or float."""
    if isinstance(value, str):
        return str(value)
    return operator.index(value) if hasattr(value, "__index__") else float(value)


def shown(value):
    return f"{value:.3g}" if isinstance(value, float) else str(value)


RUN = Matrix()


@pytest.fixture
def figure(request):
    """Record a figure of the reliability matrix: `figure(23, "differing bytes", 0, how="sum")`."""

    def note(number, name, value, how="max"):
        Matrix().note(number, name, value, how)  # raises if the row or the value is wrong
        value = plain(value)  # other types cannot be sent between processes
        request.node.user_properties.append(("figure", (number, name, value, how)))

    return note


def pytest_addoption(parser):
    parser.addoption("--matrix", metavar="FILE", help="add the results to the matrix in FILE")
    text = "only tests of this row of the matrix; may be given several times"
    parser.addoption("--row", type=int, action="append", choices=ROWS, metavar="N", help=text)


def pytest_configure(config):
    config.addinivalue_line("markers", "row(number, ...): rows of the reliability matrix")


def pytest_collection_modifyitems(config, items):
    wanted = config.getoption("--row")
    chosen, others = [], []
    for item in items:
        rows = {number for mark in item.iter_markers("row") for number in mark.args}
        item.user_properties += [("row", number) for number in sorted(rows)]
        (others if wanted and rows.isdisjoint(wanted) else chosen).append(item)
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = chosen


def pytest_runtest_logreport(report):
    """Collect the reports in the main process, where those of xdist's workers arrive, too."""
    for kind, value in report.user_properties:
        if kind == "row":
            RUN.outcome(value, report)
        elif kind == "figure" and report.when == "call":
            RUN.note(*value)


def pytest_sessionfinish(session):
    name = session.config.getoption("--matrix")
    if name and not hasattr(session.config, "workerinput"):  # not in a worker of pytest-xdist
        file = Path(name)
        if file.exists():
            RUN.add(json.loads(file.read_text("utf-8")))
        file.write_text(json.dumps(RUN.rows, indent=1), "utf-8")


def main(names):
    matrix = Matrix()
    for name in names:
        matrix.add(json.loads(Path(name).read_text("utf-8")))
    print(matrix.table())
    holes = matrix.holes()
    if holes:
        sys.exit(f"rows that failed or were never run: {holes}")


if __name__ == "__main__":
    main(sys.argv[1:])
