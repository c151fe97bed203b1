"""Random functions, shapes, layouts, values, options, threads, levels and out, all checked.

`fuzz_cases` draws a case and `fuzz_checks` compares it with the reference. To run many of them:
`python tests/tools/fuzz.py`.
"""

import random
import secrets
from collections import Counter

import fuzz
import pytest
from fuzz_cases import ACTIVATIONS, BATCH, DTYPES, FAMILY, KINDS, LEVELS, THREADS, draw
from fuzz_checks import check
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from levels import bind

from cybn import _runtime

pytestmark = pytest.mark.row(37)


@pytest.fixture(autouse=True)
def own_level():
    yield
    bind(_runtime.level)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.randoms(use_true_random=False))
@pytest.mark.parametrize("op", BATCH + FAMILY)
def test_any_case(op, dice):
    """Hypothesis runs few cases, but reduces a failing case to a small one."""
    check(draw(dice, op))


def run(cases, figure):
    seed = secrets.randbits(32)
    ran, failures = fuzz.run(seed, range(cases))
    print(f"fuzz: {ran} cases, {len(failures)} failures, seed {seed}")
    fuzz.report(seed, failures)
    figure(37, "cases", ran, how="sum")
    figure(37, "failures", len(failures), how="sum")
    figure(37, "last seed", str(seed), how="last")
    assert not failures, (
        f"to repeat one: python tests/tools/fuzz.py --seed {seed} --only {failures[0][0]}"
    )
    assert ran == cases


def test_some_cases(figure):
    run(300, figure)


@pytest.mark.slow
def test_20000_cases(figure):
    run(20_000, figure)


def test_a_case_comes_again():
    assert fuzz.case_of(5, 7) == fuzz.case_of(5, 7) != fuzz.case_of(5, 8)


def test_every_choice_is_drawn():
    """The cases that are drawn contain every choice."""
    cases = [draw(random.Random(k)) for k in range(4000)]
    seen = Counter(v for c in cases for v in (c.op, c.kind, c.level, c.threads, c.dtype))
    seen += Counter(c.flags.get("activation") for c in cases)
    assert {*BATCH, *FAMILY, *KINDS, *LEVELS, *THREADS, *DTYPES, *ACTIVATIONS} <= set(seen)
    flags = Counter(name for c in cases for name in c.flags)
    assert min(flags[f] for f in ("residual", "select", "from_output", "masked", "slope")) > 30
    outs = Counter(c.out for c in cases)
    assert min(outs[o] for o in ("new", "given", "overlap", "x", "dy", "residual")) > 30
    views = [c.views["x"] for c in cases]
    for strange in (
        lambda v: v.order != tuple(range(len(v.order))),
        lambda v: max(v.steps) > 1,
        lambda v: min(v.steps) < 0,
        lambda v: any(v.margins),
        lambda v: v.shift % 2,
        lambda v: v.stretched,
        lambda v: v.swapped,
        lambda v: v.read_only,
    ):
        assert sum(map(bool, map(strange, views))) > 50


FAULTS = {
    "a value off by a millionth": lambda v: v * (1 + 1e-6),
    "the last element forgotten": lambda v: v * (v != v.flat[-1]),
    "a channel too far": lambda v: v[::-1],
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_found(name, monkeypatch):
    """The fuzz test itself works: it rejects results that were changed on purpose."""
    import fuzz_checks

    honest = fuzz_checks.call

    def spoilt(case, arrays, threads, level):
        found = honest(case, arrays, threads, level)
        for key in ("y", "dx", "mean"):
            if key in found and found[key].size > 1 and found[key].dtype.itemsize > 2:
                if arrays.out is found[key]:
                    found[key][...] = FAULTS[name](found[key].copy())
                else:
                    found[key] = FAULTS[name](found[key]).astype(found[key].dtype)
        return found

    monkeypatch.setattr(fuzz_checks, "call", spoilt)
    _, failures = fuzz.run(1, range(60))
    assert len(failures) >= 10
