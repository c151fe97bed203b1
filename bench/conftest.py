"""The plugin of pytest for the bench: options, the fixture `race`, and the summary."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from .bars import HEADS, bars, verdicts
from .machine import last_level_bytes, machine
from .peers import load
from .race import Race
from .report import records_of, text_table

QUICK, FULL = (0.25, 3), (1.5, 5)  # seconds of a race, about, and fewest rounds


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("cybn")
    group.addoption("--quick", action="store_true", help="the main cases only; under two minutes")
    group.addoption("--seconds", type=float, help="per race, about; default: 1.5, or 0.25 if quick")
    group.addoption("--peers", help="names such as numpy,onnxruntime; default: all")
    group.addoption("--batch", type=int, help="batch size of networks; default: one for each")
    group.addoption("--side", type=int, default=224, help="side of the images; default: 224")
    group.addoption("--ways", default="channels-last,convert,fuse,bare", help="to run networks")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "bars: cases that the speed targets need")
    config.addinivalue_line("markers", "quick: part of a quick run")
    config.addinivalue_line("filterwarnings", "default")  # warnings of peers do not end a run
    names = config.getoption("--peers")
    try:
        peers, missing = load(names.split(",") if names else None)
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error
    if not names and "bars" in config.option.markexpr:
        needed = {bar.theirs.get("peer") for bar in bars(0)} | {"cybn"}
        peers = [peer for peer in peers if peer.name in needed]
    elif not names and config.getoption("--quick"):
        missing += [f"{peer.name} is left out of a quick run" for peer in peers if not peer.quick]
        peers = [peer for peer in peers if peer.quick]
    if config.getoption("--quick") and "bars" not in (marks := config.option.markexpr):
        config.option.markexpr = f"quick and ({marks})" if marks else "quick"
    config.cybn_peers, config.cybn_missing = peers, missing
    if "--benchmark-columns" not in " ".join(sys.argv):
        config.option.benchmark_columns = ["min", "median", "rounds", "iterations"]


def pytest_report_header(config: pytest.Config) -> list[str]:
    peers = ", ".join(f"{peer.name} {peer.version}" for peer in config.cybn_peers)
    return [f"peers: {peers}", *config.cybn_missing]


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    machine_info["cybn"] = machine()
    machine_info["peers"] = {p.name: f"{p.version}; {p.note}" for p in config.cybn_peers}
    machine_info["missing"] = config.cybn_missing
    machine_info["last-level cache"] = last_level_bytes()


@pytest.hookimpl(tryfirst=True)
def pytest_benchmark_group_stats(benchmarks: list[dict[str, Any]]) -> None:
    """Add GB/s of the least traffic to each name; pytest-benchmark then makes the groups."""
    for one in benchmarks:
        if moved := one["extra_info"].get("least_bytes"):
            one["name"] = f"{one['name']}  {moved / one['median'] / 1e9:.1f} GB/s"
        if gains := one["extra_info"].get("gains"):  # the median, the lowest and the highest
            one["name"] += "  gain " + " ".join(f"{gain:.2f}" for gain in gains)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    found = [] if session is None else [one.as_dict() for one in session.benchmarks if one]
    table = verdicts(records_of(found), last_level_bytes())
    if table:
        terminalreporter.section("bars: time / time of the same race")
        terminalreporter.write(text_table(HEADS, [verdict.cells for verdict in table]))


@pytest.fixture
def race(request: pytest.FixtureRequest, benchmark: Any) -> Race:
    """Return an empty race."""
    seconds, fewest = QUICK if request.config.getoption("--quick") else FULL
    seconds = request.config.getoption("--seconds") or seconds
    return Race(benchmark, request.node.name, seconds, fewest)
