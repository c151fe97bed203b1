"""Run a fuzz case and compare its results with those of plain copies and with exact results.

The second call, the twin, has copies of the arrays, one thread, the caches of the machine, another
instruction level and no `out`; its results must be bitwise equal. The exact results come from
`fuzz_bounds` and `family_cases`.
"""

from dataclasses import replace

import family_cases
import numpy as np
from bounds import REPEATED, ULP32, ULP64
from fuzz_arrays import acceptable, build, hidden, native, plain, rooms
from fuzz_bounds import Bounds, rows, stored, wrong
from fuzz_cases import DTYPES, FAMILY, LEVELS, Case
from levels import bind, caches

import cybn

# ---- calling -----------------------------------------------------------------------------


def call(case, a, threads, level):
    """Call cybn and return the results by name."""
    bind(level)
    k = {"axis": case.axis, "eps": case.eps, "num_threads": threads, "out": a.out, **a.options}
    if "masked" in case.flags:
        k["masked"] = case.flags["masked"]
    if case.op == "moments":
        del k["eps"], k["out"]
        return of_moments(cybn.moments(a.x, **k))
    if case.op == "forward":
        y, moments = cybn.batch_norm(a.x, a.gamma, a.beta, **k)
        return {"y": y, **of_moments(moments)}
    if case.op == "inference":
        return {"y": cybn.batch_norm_inference(a.x, *a.fixed, a.gamma, a.beta, **k)}
    if case.op in FAMILY:
        return call_family(case, a, k)
    k |= {"beta": a.beta, "from_output": "from_output" in case.flags}
    k |= {"out_residual": a.out_residual, "masked": "zero"}
    if case.op == "backward":
        found = cybn.batch_norm_backward(a.dy, a.x, a.moments, a.gamma, **k)
    else:
        found = cybn.batch_norm_inference_backward(a.dy, a.x, *a.fixed, a.gamma, **k)
    return dict(zip(("dx", "dgamma", "dbeta", "dresidual"), found, strict=False))


def of_moments(m):
    return {"count": np.asarray(m.count), "mean": m.mean, "m2": m.m2}


def member_of(case):
    name = case.op.removesuffix("_backward")
    groups = case.groups if name == "group" else 0
    options = {} if case.eps is None else {"eps": case.eps}
    return family_cases.Case(name, case.shape, case.axis, groups, options)


def call_family(case, a, k):
    member = member_of(case)
    k = {name: k[name] for name in ("num_threads", "out")}
    if "backward" in case.op:
        found = member.backward(a.dy, a.x, a.moments, a.gamma, **k)
        return dict(zip(("dx", "dgamma", "dbeta"), found, strict=False))
    y, statistics = member.forward(a.x, a.gamma, a.beta, **k)
    if member.centred:
        return {"y": y, **of_moments(statistics)}
    return {"y": y, "mean_square": statistics}


# ---- checking ----------------------------------------------------------------------------


def same(a, b):
    """Return whether two arrays are bitwise equal, except for the bits of NaNs."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return a.tobytes() == b.tobytes() or bool(equal(a, b).all())


def equal(a, b):
    """Return where two arrays of one type have equal bits or both have NaN."""
    words = np.dtype(f"u{a.dtype.itemsize}")
    a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
    return (a.view(words) == b.view(words)) | ((a != a) & (b != b))


def check(case: Case) -> None:
    """Run a case; raise AssertionError if anything is wrong."""
    a = build(case)
    twin = plain(a)
    if not acceptable(case, a):
        if a.moments is None:
            a.moments = cybn.moments(np.zeros((3, 2)))  # the call raises before it reads them
        refused(case, a)
        return
    add_moments(case, a, twin)
    before = [b.tobytes() for b in a.buffers]
    kept = {name: room.copy() for name, room in rooms(a).items()}
    overlaps = a.out is not None and case.out == "overlap" and np.shares_memory(a.x, a.out)
    try:
        with caches(case.level, (1 << 12, 1 << 14) if case.small else None):
            got = call(case, a, case.threads, case.level)
    except ValueError:
        assert overlaps, "valid arguments were refused"
        assert before == [b.tobytes() for b in a.buffers], "an error changed an array"
        return
    assert not overlaps or a.copied or case.op == "moments", "an overlap was not refused"
    got = {name: taken(name, value, a, kept) for name, value in got.items()}
    assert before == [b.tobytes() for b in a.buffers], "memory outside the results was written to"
    compare_twin(case, a, got, twin)
    if case.op in FAMILY:
        check_family(case, twin, got)
    else:
        check_batch(case, twin, got)


def taken(name, value, a, kept):
    """Return a result after checking that it is the given array, or laid out as x is.

    The given array gets back the content that it had before the call.
    """
    room = rooms(a).get(name)
    if room is not None:
        assert value is room, f"{name} is not the array that was given for it"
        value = value.copy()
        room[...] = kept[name]
    elif name in ("y", "dx", "dresidual"):
        like = np.empty_like(a.x, native(a.x[:0]).dtype, subok=False)
        assert (value.dtype, steps(value)) == (like.dtype, steps(like)), "not in the layout of x"
    return value


def steps(array):
    """Return the strides of the axes that are longer than 1."""
    return [step for step, n in zip(array.strides, array.shape, strict=True) if n > 1]


def add_moments(case, a, twin):
    """Add the moments that a forward returns, for backward."""
    if "backward" not in case.op or a.fixed is not None or a.moments is not None:
        return
    if case.op in FAMILY:
        _, a.moments = member_of(case).forward(twin.x, num_threads=1)
    else:
        chosen = {k: v for k, v in a.options.items() if k in ("mask", "weights", "lengths")}
        a.moments = cybn.moments(twin.x, axis=case.axis, num_threads=1, **chosen)
    twin.moments = a.moments


def refused(case, a):
    before = [b.tobytes() for b in a.buffers]
    try:
        call(case, a, case.threads, case.level)
    except ValueError:
        assert before == [b.tobytes() for b in a.buffers], "an error changed an array"
    else:
        raise AssertionError("values without a variance were not refused")


def other_level(level):
    return LEVELS[(LEVELS.index(level) + 1) % len(LEVELS)]


def compare_twin(case, a, got, twin):
    """Check that plain copies, one thread and another level give equal bits, and that NaN stays."""
    other = call(case, twin, 1, other_level(case.level))
    assert got.keys() == other.keys()
    if case.op in FAMILY:
        compare_float32(case, twin, other)
    view = case.views["x"]
    moved = view.stretched or view.order != tuple(range(a.x.ndim))
    # dgamma and dbeta of the family add the rows in the order of memory
    summed = ("dgamma", "dbeta") if case.op in FAMILY and moved else ()
    for name, value in got.items():
        if name in summed:
            continue
        assert same(value, other[name]), f"{name} differs from the result of plain copies"
    spoilt = spoilt_rows(case, twin)
    if not spoilt.any():
        return
    if case.flags.get("from_output"):
        return
    clean = plain(twin)
    clean.moments = None
    clean.x[~(np.isfinite(clean.x) | hidden(case, clean))] = 0
    add_moments(case, clean, plain(clean))
    other = call(case, clean, 1, case.level)
    for name, value in got.items():
        if name in ("y", "dx", "dresidual"):
            one, two = (by_rows(case, v)[~spoilt] for v in (value, other[name]))
            assert same(one, two), f"a NaN changed {name} in another channel or row"


def compare_float32(case, twin, got):
    """Check that half types give the results of float32, rounded once."""
    if twin.x.itemsize > 2:
        return
    wide = replace(twin, x=twin.x.astype(np.float32))
    wide.dy = None if twin.dy is None else twin.dy.astype(np.float32)
    for name, value in call(case, wide, 1, case.level).items():
        if name in ("y", "dx"):
            with np.errstate(over="ignore"):
                value = value.astype(twin.x.dtype)
        assert same(got[name], value), f"{name} differs from the rounded result of float32"


def by_rows(case, array):
    """Return an array as (channels or rows, values); each has its own statistics."""
    if case.op not in FAMILY:
        return rows(array, case.axis)
    array = member_of(case).rows(array)
    return array.reshape(-1, array.shape[-1])


def spoilt_rows(case, a):
    """Return which channels or rows have a NaN or infinity that is not masked."""
    spoilt = ~np.isfinite(by_rows(case, a.x).astype(np.float64))
    return (spoilt & ~by_rows(case, hidden(case, a))).any(1)


# ---- comparison with exact results -------------------------------------------------------


def check_batch(case, a, got):
    options, dtype = dict(a.options), DTYPES[case.dtype]
    masked = case.flags.get("masked", "normalize")
    from_output = case.flags.get("from_output", False)
    fixed, given = a.fixed, a.moments if from_output and a.fixed is None else None
    exact = Bounds(
        a.x, case.axis, case.eps, a.gamma, a.beta, options, fixed, given, masked, repeated(case)
    )
    usable = ~spoilt_rows(case, a) & exact.promised
    if case.op in ("forward", "moments"):
        check_moments(exact, got, usable)
    if case.op in ("forward", "inference"):
        y, bound = exact.forward()
        compare("y", rows(got["y"], exact.axis), y, bound, usable, dtype)
        if case.op == "forward" and set(options) <= {"mask", "weights", "lengths"}:
            check_constant(exact, rows(got["y"], exact.axis))
    if "backward" in case.op:
        wanted, bounds = exact.backward(a.dy, from_output)
        for (name, value), w, b in zip(got.items(), wanted, bounds, strict=True):
            kind = dtype if value.ndim > 1 else value.dtype
            if value.ndim > 1:
                value = rows(value, exact.axis)
            elif value.dtype == np.float32 and dtype == np.float64:
                b = b + 2.0**-24 * np.abs(w) + 1e-45
            compare(name, value, w, b, usable, kind)


def compare(name, got, exact, bound, usable, dtype):
    bad = wrong(got, exact, bound, dtype)[usable]
    if bad.any():
        i = tuple(int(v[0]) for v in np.nonzero(bad))
        raise AssertionError(
            f"{name} at {i} is {got[usable][i]!r}, exactly {exact[usable][i]!r}, "
            f"may be off by {bound[usable][i]!r}; {bad.sum()} are wrong"
        )


def check_moments(exact, got, usable):
    """Check that the mean is within ulp standard deviations, and M2 to a few relative ulp."""
    std = np.sqrt(exact.var[:, 0])
    half = not exact.double
    near = 0 if half else np.abs(exact.mean[:, 0])
    compare(
        "mean",
        got["mean"],
        exact.mean[:, 0],
        exact.ulp * (std + near)
        + 2.0**-50 * np.abs(exact.mean[:, 0])
        + (2e-45 if half else 1e-320),
        usable,
        np.float64,
    )
    total = exact.w.sum()
    m2 = exact.var[:, 0] * total
    small = 2e-45 if half else 1e-320
    off = total * (ULP64 * exact.mean[:, 0]) ** 2
    bound = 4 * exact.ulp * m2 + off + small * total
    compare("m2", got["m2"], m2, bound, usable, np.float64)
    assert got["count"] == exact.moments.count


def check_constant(exact, y):
    beta = np.zeros(len(y)) if exact.beta is None else exact.beta
    with np.errstate(over="ignore"):
        beta = beta.astype(np.float64).astype(exact.x.dtype if y.dtype.itemsize > 2 else np.float32)
    beta = beta.astype(y.dtype)
    counts = exact.w[0] > 0
    for c in np.flatnonzero(exact.constant):
        if np.isfinite(exact.rows[c]).all():
            assert (y[c][counts] == beta[c]).all(), f"y of the constant channel {c} is not beta"


def repeated(case):
    """Return whether the same few values are summed many times."""
    return any(case.views[name].stretched for name in ("x", "dy") if name in case.views)


def check_family(case, a, got):
    member, dtype = member_of(case), DTYPES[case.dtype]
    computed = np.dtype(np.float64 if dtype == np.float64 else np.float32)
    if case.eps is None:
        member = replace(member, options={"eps": float(np.finfo(computed).eps)})
    x = a.x.astype(computed)
    rms = not member.centred
    spoilt = spoilt_rows(case, a)
    ones = np.ones(member.parameter_shape)
    gamma = ones if a.gamma is None else a.gamma
    beta = np.zeros_like(ones) if a.beta is None or rms else a.beta
    tiny = 8 * float(np.finfo(computed).smallest_subnormal)
    wider = REPEATED if repeated(case) else 1
    with np.errstate(all="ignore"):
        wide = member.rows(x.astype(np.longdouble))
        mean, std = family_cases.row_statistics(member, wide)
        usable = ~spoilt
        if computed == np.float32 and not rms:
            usable &= (np.abs(mean) <= 1e6 * std).reshape(-1)
        if "backward" not in case.op:
            exact, bound = family_cases.forward_bound(member, x, gamma, beta)
            bound = wider * bound
            # x * r may be subnormal before gamma makes it larger
            bound = bound + tiny * (1 + np.abs(member.along(gamma).astype(np.float64)))
            bound = flat(stored(exact, bound, dtype))
            compare("y", by_rows(case, got["y"]), flat(exact), bound, usable, dtype)
            return
        exact, bounds = family_cases.backward_bound(member, a.dy.astype(computed), x, gamma)
        bounds = [wider * b for b in bounds]
        lost = (
            tiny * x.size * (1 + float((1 / std)[std > 0].max(initial=0)))
        )  # products may underflow
        bound = stored(exact[0], bounds[0] + tiny, dtype)
    compare("dx", by_rows(case, got["dx"]), flat(exact[0]), flat(bound), usable, dtype)
    if not usable.all():
        return
    for name, w, b in zip(("dgamma", "dbeta"), exact[1:], bounds[1:], strict=False):
        value = got[name]
        if value.dtype == np.float32 and dtype == np.float64:
            b = b + 2.0**-24 * np.abs(w)
        every = np.ones(value.size, bool)
        compare(name, value.ravel(), w.ravel(), b.ravel() + lost, every, value.dtype)


def flat(v):
    return v.reshape(-1, v.shape[-1])


assert ULP32 > ULP64
