"""The bench itself: its shapes, its plans, and a run of tiny batches."""

import json
import mmap
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from cybn.bench import memory, plans, session, timing
from cybn.bench.plans import Plan, plan
from cybn.bench.shapes import ALL_GROUPS, GROUPS, RESNET50, Shape
from cybn.bench.task import FIRST, FRESH, LAST, REUSED, Contestant

PUBLISHED = json.loads((Path(__file__).parent / "shapes.json").read_text("utf-8"))
NAMES = {"inception_v3_odd": "inception", "few_channels": "few channels"}
CACHE = 32 << 20


@pytest.fixture
def machine(monkeypatch):
    monkeypatch.setattr(plans, "usable_cpus", lambda: 2)
    monkeypatch.setattr(plans, "last_level_bytes", lambda: CACHE)


# ---- shapes and plans ----------------------------------------------------------------------------


def published(name):
    """Return the shapes of a group of the published list; N is 32 where it does not say."""
    for entry in PUBLISHED[name]:
        spatial = tuple(entry[axis] for axis in ("l", "d", "h", "w") if axis in entry)
        yield Shape(entry.get("n", 32), entry["c"], spatial, entry.get("layers", 1))


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name != "source"])
def test_shapes_are_the_published_ones(name):
    assert GROUPS[NAMES.get(name, name)] == list(published(name))


def test_all_groups():
    assert len(PUBLISHED) - 1 == len(GROUPS)
    assert [s.channels_first for s in ALL_GROUPS["tiny"]] == [(32, 16), (60, 100)]
    assert len(RESNET50) == 9
    assert sum(shape.layers for shape in RESNET50) == 53


def test_names_tell_shapes_apart():
    names = [shape.name for shapes in GROUPS.values() for shape in shapes]
    assert len(set(names)) == len(names)


def test_a_full_plan_has_every_case(machine):
    jobs = plan().jobs
    have = {(*job.case, job.shape) for job in jobs}
    assert len(have) == len(jobs)
    for group, shapes in ALL_GROUPS.items():
        for shape in shapes:
            for operation in ("forward", "inference", "backward"):
                for dtype in ("float32", "float64"):
                    for threads in (1,) if group == "tiny" else (1, 2):
                        want = operation == "inference" or shape.channels_first != (1, 3, 1, 1)
                        assert ((group, operation, dtype, threads, shape) in have) == want
    assert all(job.peers is None for job in jobs)


def test_jobs_of_one_batch_lie_together(machine):
    for work in (plan(), plan(bars=True)):
        batches = [(job.case.group, job.shape, job.case.dtype) for job in work.jobs]
        changes = sum(a != b for a, b in pairwise(batches))
        assert changes == len(set(batches)) - 1


def test_quick_is_short(machine):
    work = plan(quick=True)
    assert {job.case.group for job in work.jobs} == {"resnet50", "tiny"}
    assert {job.case.dtype for job in work.jobs} == {"float32"}
    assert len(work.jobs) * work.seconds < 15


def test_choices_apply_to_the_bars_too(machine):
    jobs = plan(bars=True, groups=["resnet50"], operations=["backward"], dtypes=["float32"]).jobs
    assert {(j.case.operation, j.case.dtype) for j in jobs} == {("backward", "float32")}
    assert {j.peers for j in jobs} == {(), ("PyTorch", "oneDNN")}
    assert [j.shape.name for j in jobs if j.case.threads == 1] == [
        s.name for s in RESNET50 if s.size * 4 <= CACHE
    ]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"groups": ["vgg"]}, "vgg"),
        ({"operations": ["sideways"]}, "sideways"),
        ({"dtypes": ["float16"]}, "float16"),
        ({"layouts": ["diagonal"]}, "diagonal"),
        ({"threads": [2, 0]}, "at least 1"),
    ],
)
def test_unknown_names(options, word):
    with pytest.raises(ValueError, match=word):
        plan(**options)


# ---- measuring -----------------------------------------------------------------------------------


@pytest.fixture
def short(monkeypatch):
    """Make turns as short as a call."""
    for name in ("_WARM", "_TURN"):
        monkeypatch.setattr(timing, name, 1e-6)
    monkeypatch.setattr(session, "peaks", lambda threads: [])


def tiny_run(peers=(), **options):
    """Measure tiny calls, two rounds each."""
    jobs = plan(groups=["tiny"], dtypes=["float32"], **options).jobs
    kept = []
    results = session.run_all(Plan(jobs, None, 0.0, 2, False), peers, iter, kept.append)
    assert kept[-1] is results
    return results


def test_a_run_of_tiny_calls(short):
    results = tiny_run(["numpy"])
    assert not results.failures()
    assert not results.missing
    for record in results.records:
        assert 0 < record.minimum <= record.median == record.seconds
        assert record.turns == 2
    contestants = {r.contestant for r in results.records if r.operation == "forward"}
    assert contestants == {"floor", f"cybn {FIRST} {REUSED}", f"cybn {FIRST} {FRESH}"} | {
        f"NumPy {FIRST} {FRESH}"
    }
    for key in ("cpu", "cpus usable", "transparent huge pages", "compiler", "numpy", "kernel"):
        assert results.machine[key]
    assert set(results.peers) == {"cybn", "NumPy"}


class Liar:
    """A peer that is quick and wrong."""

    name, install, version, note = "Liar", "", "1", ""

    def variants(self, operation, dtype, threads):
        return [(FIRST, REUSED)]

    def prepare(self, task):
        out = task.data.out()

        def read(output, channels):
            return out[:, channels]

        return Contestant(self.name, FIRST, REUSED, lambda: out.fill(0.5), read)


class Refuser(Liar):
    """A peer that cannot."""

    name = "Refuser"

    def prepare(self, task):
        raise RuntimeError("not this shape")


def test_wrong_results_are_not_timed(short, monkeypatch):
    monkeypatch.setattr(session, "load", lambda names: ([Liar(), Refuser()], []))
    results = tiny_run(operations=["forward"])
    errors = {record.peer: record.error for record in results.failures()}
    assert set(errors) == {"Liar", "Refuser"}
    assert "wrong by" in errors["Liar"]
    assert errors["Refuser"] == "RuntimeError: not this shape"
    assert all(record.seconds is None for record in results.failures())


def test_peers_of_a_job(short, monkeypatch):
    liar, refuser = Liar(), Refuser()
    job = plan(groups=["resnet50"]).jobs[0]
    for wanted, names in [(None, ["Liar", "Refuser"]), (("Liar",), ["Liar"]), ((), [])]:
        found = session.entries(job._replace(peers=wanted), np.dtype("f4"), [liar, refuser])
        assert [peer.name for peer, _, _ in found] == names


def test_contestants_take_turns():
    order = []

    def contestant(name):
        one = Contestant(name, FIRST, REUSED, lambda: order.append(name), lambda *_: None)
        one.first = 1.0  # so long that a turn is one call
        return one

    timing.measure([contestant(name) for name in "abc"], seconds=0, fewest=3)
    assert order == list("abc" * 3)


# ---- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
def test_a_training_forward_takes_next_to_no_memory(threads):
    shapes = [Shape(16, 8, (128, 128)), Shape(64, 512, (7, 7))]
    for peak in memory.peaks(threads, shapes):
        assert max(peak.traced, peak.touched) <= threads * 65536 + 1152 * peak.channels, peak
        assert peak.ratio <= 1
        assert peak.traced > 0


def test_memory_does_not_grow_with_the_batch():
    sizes = [Shape(n, 2, (256, 256)) for n in (16, 64)]  # 8 and 32 MiB
    few, many = (memory.traced_by(memory.forward(s, LAST, "float32", 2)) for s in sizes)
    assert many <= few + 1024


TAKES = """
import numpy as np
from cybn.bench import memory
taken = 64 << 20  # more than the C library keeps, and in huge pages where the system has them
held = []
assert memory.traced_by(lambda: held.append(np.ones(taken, np.uint8))) >= taken
held.clear()
touched = memory.touched_by(lambda: held.append(np.ones(taken, np.uint8)))
assert touched >= taken * 15 // 16, touched
"""


def test_both_measures_see_what_is_taken():
    """In a process of its own: what others gave back there would be taken without being touched."""
    command = [sys.executable, "-P", "-c", TAKES]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_small_pages_are_counted_one_by_one():
    pages = 50
    with mmap.mmap(-1, pages * mmap.PAGESIZE) as fresh:

        def touch():
            for i in range(pages):
                fresh[i * mmap.PAGESIZE] = 1

        touched = memory.touched_by(touch)
    assert pages * mmap.PAGESIZE <= touched <= (pages + 50) * mmap.PAGESIZE
