"""Every compiler and processor gives the same bits: digests of the results of some hundred calls.

The results of every build are compared with one file, digests.json. If a change of a kernel changes
results on purpose, write the file again: `python tests/tools/digests.py --write`.
"""

import re
from pathlib import Path

import numpy as np
import pytest
from digest_cases import CALLS, bfloat16, digest, normal, words
from digests import differing, load
from levels import caches

import cybn


@pytest.fixture(params=["1 thread", "3 threads and small caches"])
def machine(request, level):
    """Run serially, then with other blocks of work and with results that bypass the caches."""
    sizes = (1 << 14, 1 << 16) if "small" in request.param else None
    with cybn.threads(int(request.param[0])), caches(level, sizes):
        yield


def test_digests(machine):
    wrong = differing(CALLS)
    assert not wrong, f"{len(wrong)} of {len(CALLS)} calls: {', '.join(wrong[:12])}"


def test_each_digest_has_a_call():
    named = {name for name in load() if bfloat16 is not None or "bfloat16" not in name}
    assert named == set(CALLS)
    assert len(set(load().values())) == len(load())


def test_inputs_depend_on_nothing():
    assert words(0, 2).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]  # as published
    assert normal(1, (9, 7)).tobytes() == normal(1, (9, 7), "float32").tobytes()
    wide = normal(1, 4000, "float64")
    assert abs(wide.mean()) < 0.05
    assert 1 < wide.std() < 1.3


def test_a_digest_sees_each_bit():
    a = np.arange(6, dtype=np.float32)
    negative_zero = np.where(a == 0, np.float32(-0.0), a)
    different = [a, negative_zero, np.nextafter(a, 9), a.astype(np.float64), a.reshape(2, 3)]
    assert len({digest((a, other)) for other in different}) == len(different)
    nan = np.full(1, np.nan, np.float32)
    assert digest(nan) == digest(-nan) == digest(nan.view(np.uint32).__or__(1).view(np.float32))


def test_no_loop_of_half_types_is_compiled_for_float64():
    """A choice by `way` alone would compile a copy for float64, which has no half types."""
    sources = sorted((Path(__file__).parents[2] / "cybn" / "_kernels").glob("*.p*"))
    if not sources:
        pytest.skip("needs the sources of the kernels")
    choices = [
        line.strip()
        for source in sources
        for line in source.read_text("utf-8").splitlines()
        if re.search(r"\b(?:el)?if .*way == B?FLOAT16", line)
    ]
    assert len(choices) > 10
    assert [line for line in choices if "T is float and" not in line] == []
