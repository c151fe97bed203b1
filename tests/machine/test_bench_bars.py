"""The bars: from made-up times, the figures and verdicts that a reader would work out by hand."""

from dataclasses import replace

import pytest
from bench_cases import CACHE, peaks, run, steady

from cybn.bench import plans
from cybn.bench.claims import BARS, lines
from cybn.bench.shapes import RESNET50
from cybn.bench.task import FIRST, FRESH, LAST, REUSED

LAYERS = {shape.name: shape.layers for shape in RESNET50}


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    monkeypatch.setattr(plans, "usable_cpus", lambda: 2)
    monkeypatch.setattr(plans, "last_level_bytes", lambda: CACHE)


def line(results, start):
    """Return the line of the bar of this name, or the one whose name starts so."""
    found = {x.bar.name: x for x in lines(results) if x.bar.name.startswith(start)}
    if start in found:
        return found[start]
    (one,) = found.values()
    return one


def slower(factor, **wanted):
    """Return times in which cybn takes `factor` times as long in the cases that fit."""

    def seconds(job, peer, layout, output):
        here = {**job.case._asdict(), "shape": job.shape.name, "layout": layout, "output": output}
        hit = peer == "cybn" and all(here[name] == value for name, value in wanted.items())
        return steady(job, peer, layout, output) * (factor if hit else 1)

    return seconds


def test_the_plan_for_the_bars_measures_every_bar():
    for found in lines(run(steady, bars=True)):
        assert len(found.figures) == found.expected > 0, found.bar.name
        assert found.verdict in ("met", "missed", "no bar")


def test_the_plan_for_the_bars_measures_no_more_than_a_full_run():
    few, all_jobs = plans.plan(bars=True).jobs, plans.plan().jobs
    assert {(job.case, job.shape) for job in few} < {(job.case, job.shape) for job in all_jobs}
    assert len(few) < len(all_jobs) / 2


def test_a_full_run_measures_every_bar():
    assert all(len(found.figures) == found.expected for found in lines(run(steady)))


def test_bounds():
    bounds = [(bar.name, bar.bound) for bar in BARS]
    assert bounds == [
        ("training forward / PyTorch, NCHW, fresh", "1/9"),
        ("backward / PyTorch, NCHW, fresh", "1/5"),
        ("inference / PyTorch, NCHW, fresh", "1/2"),
        ("training forward / PyTorch, NHWC, fresh", "1/3"),
        ("backward / PyTorch, NHWC, fresh", "2/5"),
        ("training forward / oneDNN, its best layout", "0.9"),
        ("backward / oneDNN, its best layout", "0.9"),
        ("training forward, NHWC / oneDNN, NHWC", "0.95"),
        ("training forward / copy floor, beyond the cache", "1.25"),
        ("training forward / copy floor", "2"),
        ("backward / add floor, beyond the cache", "1.25"),
        ("backward / add floor", "2"),
        ("inference / copy floor", "1.1"),
        ("any operation, channels-first / PyTorch, its best layout", "1"),
        ("any operation, channels-last / PyTorch, its best layout", "1"),
        ("forward + backward, summed, fresh / PyTorch, NCHW, fresh", "1/6"),
        ("forward + backward, summed, reused / PyTorch, NCHW, fresh", "1/6"),
        ("training forward, two threads / one", "0.55"),
        ("backward, two threads / one", "0.55"),
        ("inference, two threads / one", "0.55"),
        ("inference with out=", "2.5"),
        ("inference with out= / PyTorch's native call", "1/2"),
        ("training forward through a layer, fresh / PyTorch's module", "1/3"),
        (
            "peak extra memory of a training forward with out= / "
            "(64 KiB a thread + 1.1 KiB a channel)",
            "1",
        ),
        ("copy floor / training forward of PyTorch, NCHW, fresh", ""),
        ("add floor / backward of PyTorch, NCHW, fresh", ""),
        ("copy floor / inference of PyTorch, NCHW, fresh", ""),
        ("training forward / PyTorch, NCHW, fresh, float64", "1/3"),
        ("backward / PyTorch, NCHW, fresh, float64", ""),
        ("inference / PyTorch, NCHW, fresh, float64", ""),
        ("training forward / PyTorch, NHWC, fresh, float64", ""),
        ("backward / PyTorch, NHWC, fresh, float64", ""),
    ]


def test_figures_of_steady_times():
    figures = {found.bar.name: found.figure for found in lines(run(steady, bars=True))}
    for name, figure in figures.items():
        if "PyTorch" in name:
            assert figure == pytest.approx(0.1), name
        elif "oneDNN" in name or "two threads" in name:
            assert figure == pytest.approx(0.5), name
        elif "floor" in name or name == "inference with out=":
            assert figure == pytest.approx(1), name


def test_a_mean_over_layers_is_geometric():
    results = run(slower(512, shape="512x7x7", layout=FIRST, output=FRESH), bars=True)
    found = line(results, "training forward / PyTorch, NCHW, fresh")
    assert found.figure == pytest.approx(0.1 * 512 ** (1 / 9))
    assert found.verdict == "missed"
    assert found.worst == ("512x7x7", pytest.approx(51.2))
    assert found.offenders == []
    assert line(results, "training forward / PyTorch, NHWC, fresh").figure == pytest.approx(0.1)


def test_layers_larger_than_the_cache():
    results = run(slower(8, shape="256x56x56", layout=FIRST), bars=True)
    found = line(results, "training forward / copy floor, beyond the cache")
    assert set(found.figures) == {"64x112x112", "256x56x56", "512x28x28"}
    assert found.figure == pytest.approx(2)
    assert line(results, "backward, two threads").expected == 6
    results.settings["last-level cache"] = 1 << 40
    assert line(results, "backward / add floor, beyond").verdict == "no such shape"


def test_the_best_layout_of_onednn_is_picked_shape_by_shape():
    results = run(steady, bars=True)
    for record in results.records:
        best = {"64x56x56": "nChw16c", "512x7x7": LAST}.get(record.shape)
        if record.peer == "oneDNN" and record.layout == best:
            record.seconds /= 4
    found = line(results, "backward / oneDNN")
    assert found.figures["64x56x56"] == found.figures["512x7x7"] == pytest.approx(2)
    assert found.figures["2048x7x7"] == pytest.approx(0.5)


def test_all_53_layers_count_as_often_as_the_network_has_them():
    factor = 100
    results = run(slower(factor, shape="256x14x14", operation="backward", output=FRESH), bars=True)
    sizes = {shape.name: shape.size * shape.layers for shape in RESNET50}
    share = sizes["256x14x14"] / sum(sizes.values()) / 2
    expected = 0.1 * (1 + share * (factor - 1))
    assert line(results, "forward + backward, summed, fresh").figure == pytest.approx(expected)
    assert line(results, "forward + backward, summed, reused").figure == pytest.approx(0.1)
    assert sum(LAYERS.values()) == 53


def test_every_shape_by_itself():
    results = run(slower(11, shape="192x71x71", operation="inference", layout=LAST), bars=True)
    found = line(results, "any operation, channels-last")
    assert found.verdict == "missed"
    assert found.figure == pytest.approx(1.1)
    assert found.offenders == [("inception, 192x71x71, inference", pytest.approx(1.1))]
    assert line(results, "any operation, channels-first").verdict == "met"


def test_pytorchs_best_is_out_of_both_layouts_and_outputs():
    results = run(steady, bars=True)
    for r in results.records:
        if (r.peer, r.shape, r.layout, r.output) == ("PyTorch", "80x73x73", LAST, REUSED):
            r.seconds /= 20
    found = line(results, "any operation, channels-first")
    wrong = [shape for shape, _ in found.offenders]
    assert sorted(wrong) == ["inception, 80x73x73, forward", "inception, 80x73x73, inference"]


def test_small_calls_are_in_microseconds_and_on_one_thread():
    results = run(slower(3, group="tiny", shape="60x100", output=REUSED), bars=True)
    found = line(results, "inference with out=")
    assert found.figures == {"32x16": pytest.approx(1), "60x100": pytest.approx(3)}
    assert found.verdict == "missed"
    assert line(results, "inference with out= / PyTorch's").figure == pytest.approx(0.3)
    assert line(results, "training forward through a layer").figure == pytest.approx(0.1)


@pytest.mark.parametrize("measure", ["traced", "touched"])
def test_memory_takes_the_larger_measure(measure):
    results = run(steady, bars=True)
    assert line(results, "peak extra memory").verdict == "met"
    allowed = 2 * 65536 + 1152
    results.memory[-1] = replace(peaks()[-1], **{measure: allowed + 1})
    found = line(results, "peak extra memory")
    assert found.verdict == "missed"
    assert [shape for shape, _ in found.offenders] == [f"1x2048x2048 {LAST}"]


def test_half_a_run_meets_no_bar():
    results = run(steady, bars=True)
    results.records = [r for r in results.records if r.shape != "512x7x7"]
    assert line(results, "backward / PyTorch, NCHW, fresh").verdict == "only 8 of 9 measured"
    assert line(results, "forward + backward, summed, fresh").verdict == "not measured"
    assert line(results, "any operation, channels-first").verdict.startswith("only ")
    results.records = []
    for found in lines(results):
        assert found.verdict == ("met" if "memory" in found.bar.name else "not measured")


def test_what_was_not_timed_counts_for_nobody():
    results = run(steady, bars=True)
    for record in results.records:
        if (record.peer, record.shape) == ("PyTorch", "64x56x56"):
            record.seconds, record.error = None, "its result is wrong"
    assert "64x56x56" not in line(results, "backward / PyTorch, NCHW, fresh").figures
