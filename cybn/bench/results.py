"""What was measured, as plain records: kept in a file, read again, put together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from . import BenchError
from .task import OPERATIONS

__all__ = ["Case", "Peak", "Record", "Results", "merge"]

_PASSING = "load before"  # of the machine's record: what may differ between two runs


class Case(NamedTuple):
    """What all contestants of one row have in common."""

    group: str
    operation: str
    dtype: str
    threads: int


@dataclass
class Record:
    """The figure of one contestant on one shape; times are seconds for one call."""

    group: str
    shape: str
    sizes: tuple[int, ...]  # channels-first
    layers: int  # how often the network has the shape
    operation: str
    dtype: str
    threads: int
    peer: str
    layout: str
    output: str
    note: str
    seconds: float | None  # what the tables show: the median, or the minimum
    median: float | None
    minimum: float | None
    turns: int
    calls: int  # timed calls in a turn
    error: str

    @property
    def case(self) -> Case:
        """Everything but the shape and the contestant."""
        return Case(self.group, self.operation, self.dtype, self.threads)

    @property
    def contestant(self) -> str:
        """Peer, layout and output."""
        return " ".join(filter(None, (self.peer, self.layout, self.output)))

    @property
    def nbytes(self) -> int:
        """The size of x."""
        return prod(self.sizes) * {"float32": 4, "float64": 8}[self.dtype]

    @property
    def least_bytes(self) -> int:
        """What memory moves at least: x and y, or dy, x and dx."""
        return self.nbytes * OPERATIONS[self.operation]


@dataclass
class Peak:
    """The memory that one training forward with ``out=`` takes beside its arguments, in bytes."""

    shape: str
    channels: int
    layout: str
    dtype: str
    threads: int
    traced: int  # by Python and NumPy
    touched: int  # by the whole process: heap, stacks and all

    @property
    def allowed(self) -> int:
        """64 KiB a thread, and 144 float64 values a channel, however large N and S are.

        129 of those are partial sums (MOST_CHUNKS of the kernels), the others moments and vectors.
        """
        return self.threads * (64 << 10) + 144 * 8 * self.channels

    @property
    def ratio(self) -> float:
        """The larger of the two over what is allowed."""
        return max(self.traced, self.touched) / self.allowed


@dataclass
class Results:
    """All figures of one run on one machine."""

    machine: dict[str, Any]
    peers: dict[str, str]  # name: version and how it is called
    missing: list[str]
    settings: dict[str, Any]
    records: list[Record] = field(default_factory=list)
    memory: list[Peak] = field(default_factory=list)

    def cases(self) -> list[Case]:
        """Return the cases in the order in which they were measured."""
        return list(dict.fromkeys(record.case for record in self.records))

    def of(self, case: Case) -> list[Record]:
        """Return the records of one case."""
        return [record for record in self.records if record.case == case]

    def failures(self) -> list[Record]:
        """Return what was not timed because its result is wrong, or it cannot do the task."""
        return [record for record in self.records if record.error]

    @classmethod
    def read(cls, path: Path) -> Results:
        """Read what `save` has written."""
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            records = [Record(**r | {"sizes": tuple(r["sizes"])}) for r in stored.pop("records")]
            memory = [Peak(**p) for p in stored.pop("memory", [])]
            return cls(**stored, records=records, memory=memory)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BenchError(f"{path} is not a file that cybn bench --json has written") from error

    def save(self, path: Path) -> None:
        """Write everything as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def merge(runs: Sequence[Results]) -> Results:
    """Put runs of different groups or dtypes on one machine together.

    Parameters
    ----------
    runs : sequence of Results
        At least one. What stands under the heads comes from the first.

    Raises
    ------
    BenchError
        If they come from different machines, or with other versions or settings, or two of them
        hold the same group in the same dtype: a ratio compares times of one run.
    """
    first = runs[0]
    merged = Results(
        dict(first.machine), dict(first.peers), list(first.missing), dict(first.settings)
    )
    seen: set[tuple[str, str]] = set()
    for run in runs:
        _same("machines", merged.machine, run.machine)
        shared = merged.peers.keys() & run.peers.keys()
        _same("versions", *({n: r.peers[n] for n in shared} for r in (merged, run)))
        _same("settings", *({n: r.settings.get(n) for n in _COMMON} for r in (merged, run)))
        held = {(record.group, record.dtype) for record in run.records}
        if seen & held or (merged.memory and run.memory):
            twice = ", ".join(sorted({f"{g} in {d}" for g, d in seen & held})) or "memory"
            raise BenchError(f"two runs have {twice}; a ratio compares times of one run")
        seen |= held
        merged.peers |= run.peers
        merged.records += run.records
        merged.memory += run.memory
    return merged


_COMMON = ("shown", "last-level cache")  # settings without which figures do not compare


def _same(what: str, one: dict[str, Any], other: dict[str, Any]) -> None:
    """Refuse where two runs differ in anything that does not pass."""
    for name in sorted(one.keys() | other.keys()):
        if name != _PASSING and one.get(name) != other.get(name):
            raise BenchError(
                f"figures of different {what} do not go into one table: "
                f"{name} is {one.get(name)!r} in one run and {other.get(name)!r} in another"
            )
