"""Inputs that are not plain float arrays, for every function: one table of results.

`CONVERTED` lists inputs that give the results of the converted array. `REFUSED` lists those for
which an error names the argument and nothing changes.
"""

import decimal

import ml_dtypes
import numpy as np
import pytest
from cases import same_bits

import cybn

pytestmark = pytest.mark.row(22)
filter_matrix = pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")

GOOD = np.array([[1, 2.0], [3, 5], [2, 2]])
PLAIN32 = GOOD.astype(np.float32)


class Frame:
    """An object that only has `__array__`, like a data frame."""

    def __init__(self, values):
        self.values = values

    def __array__(self, dtype=None, copy=None):
        return np.array(self.values, dtype)


class Exported:
    """An object that only supports DLPack."""

    def __init__(self, values):
        self.values = values

    def __dlpack__(self, **k):
        return self.values.__dlpack__(**k)

    def __dlpack_device__(self):
        return self.values.__dlpack_device__()


class Tagged(np.ndarray):
    """A subclass of ndarray that does not change its meaning."""


def unaligned(values):
    room = np.zeros(values.nbytes + 1, np.uint8)[1:].view(values.dtype).reshape(values.shape)
    room[...] = values
    return room


MASKED = np.ma.masked_equal(GOOD, 5)
# Inputs that are converted, each with the plain array that it is equal to.
CONVERTED = {
    "list": (GOOD.tolist(), GOOD),
    "tuple of tuples": (tuple(map(tuple, GOOD.tolist())), GOOD),
    "list of arrays": (list(PLAIN32), PLAIN32),
    "list of float and int": ([[1.0, 2], [3, 5], [2, 2]], GOOD),
    "byte-swapped float32": (PLAIN32.astype(PLAIN32.dtype.newbyteorder()), PLAIN32),
    "byte-swapped float64": (GOOD.astype(GOOD.dtype.newbyteorder()), GOOD),
    "unaligned": (unaligned(GOOD), GOOD),
    "read-only": (np.broadcast_to(GOOD, GOOD.shape), GOOD),
    "np.matrix": (np.asarray(GOOD).view(np.matrix), GOOD),
    "another subclass": (GOOD.view(Tagged), GOOD),
    "__array__, as of a data frame": (Frame(GOOD), GOOD),
    "DLPack": (Exported(PLAIN32.copy()), PLAIN32),
    "memoryview": (memoryview(GOOD), GOOD),
}
HALVES = {
    "float16": GOOD.astype(np.float16),
    "byte-swapped float16": GOOD.astype(np.dtype(np.float16).newbyteorder()),
    "bfloat16": GOOD.astype(ml_dtypes.bfloat16),
}
REFUSED = {
    "long double": GOOD.astype(np.longdouble),
    "float8": GOOD.astype(ml_dtypes.float8_e4m3fn),
    "int64": GOOD.astype(int),
    "uint8": GOOD.astype(np.uint8),
    "bool": GOOD > 1,
    "complex64": GOOD.astype(np.complex64),
    "complex128": GOOD.astype(np.complex128),
    "object": GOOD.astype(object),
    "object of decimals": np.array([[decimal.Decimal(1)] * 2] * 3),
    "str": GOOD.astype(str),
    "bytes": GOOD.astype(bytes),
    "datetime64": GOOD.astype("datetime64[s]"),
    "timedelta64": GOOD.astype("timedelta64[s]"),
    "structured": np.zeros((3, 2), [("a", np.float32)]),
    "void": np.zeros((3, 2), "V4"),
    "list of int": GOOD.astype(int).tolist(),
    "list of None": [[None, None]] * 3,
    "a string": "batch",
    "a set": {1.0, 2.0},
    "a dict": {"x": GOOD},
    "a generator": (row for row in GOOD),
    "None": None,
    "masked array": MASKED,
    "masked array without a mask": np.ma.array(GOOD),
    "list of masked rows": list(MASKED),
    "nested list of masked rows": [(MASKED[0], MASKED[1]), (MASKED[1], MASKED[2])],
    "masked matrix": np.ma.array(GOOD.view(np.matrix)),
}
RAGGED = [[1.0, 2.0], [3.0]]

ONE = np.ones(2)
MOMENTS = cybn.moments(GOOD)
ROWS, GROUPS = cybn.layer_norm(GOOD)[1], cybn.group_norm(GOOD, num_groups=1)[1]
SQUARES = cybn.rms_norm(GOOD)[1]
CUBE = GOOD[:, :, np.newaxis] * np.ones(4)
SAMPLES = cybn.instance_norm(CUBE)[1]


def likewise(value):
    """Return GOOD in the dtype of another argument, for arguments whose dtypes must agree."""
    value = getattr(value, "values", value)
    dtype = getattr(np.asarray(value), "dtype", GOOD.dtype)
    return GOOD if dtype.kind not in "fV" or dtype.fields else GOOD.astype(plain_type(dtype))


def plain_type(dtype):
    return (
        dtype.newbyteorder("=") if dtype.name in ("float32", "float16", "bfloat16") else GOOD.dtype
    )


TENSORS = {  # arguments that are arrays of (3, 2)
    "batch_norm x": lambda v: cybn.batch_norm(v),
    "moments x": lambda v: cybn.moments(v),
    "Moments.update x": lambda v: cybn.Moments.empty(2).update(v),
    "batch_norm residual": lambda v: cybn.batch_norm(likewise(v), residual=v),
    "inference x": lambda v: cybn.batch_norm_inference(v, ONE, ONE),
    "inference residual": (lambda v: cybn.batch_norm_inference(likewise(v), ONE, ONE, residual=v)),
    "backward x": lambda v: cybn.batch_norm_backward(likewise(v), v, MOMENTS),
    "backward dy": lambda v: cybn.batch_norm_backward(v, likewise(v), MOMENTS),
    "backward residual": (
        lambda v: cybn.batch_norm_backward(
            likewise(v), likewise(v), MOMENTS, residual=v, activation="relu"
        )
    ),
    "inference_backward x": (
        lambda v: cybn.batch_norm_inference_backward(likewise(v), v, ONE, ONE)
    ),
    "inference_backward dy": (
        lambda v: cybn.batch_norm_inference_backward(v, likewise(v), ONE, ONE)
    ),
    "layer_norm x": lambda v: cybn.layer_norm(v),
    "layer_norm_backward x": lambda v: cybn.layer_norm_backward(likewise(v), v, ROWS),
    "layer_norm_backward dy": lambda v: cybn.layer_norm_backward(v, likewise(v), ROWS),
    "rms_norm x": lambda v: cybn.rms_norm(v),
    "rms_norm_backward x": lambda v: cybn.rms_norm_backward(likewise(v), v, SQUARES),
    "rms_norm_backward dy": lambda v: cybn.rms_norm_backward(v, likewise(v), SQUARES),
    "group_norm x": lambda v: cybn.group_norm(v, num_groups=1),
    "group_norm_backward x": (
        lambda v: cybn.group_norm_backward(likewise(v), v, GROUPS, num_groups=1)
    ),
    "group_norm_backward dy": (
        lambda v: cybn.group_norm_backward(v, likewise(v), GROUPS, num_groups=1)
    ),
    "BatchNorm x": lambda v: cybn.BatchNorm(2)(v),
    "BatchNorm residual": lambda v: cybn.BatchNorm(2)(likewise(v), residual=v),
    "LayerNorm x": lambda v: cybn.LayerNorm(2)(v),
    "RMSNorm x": lambda v: cybn.RMSNorm(2)(v),
    "GroupNorm x": lambda v: cybn.GroupNorm(1, 2)(v),
    "InstanceNorm1d x": lambda v: cybn.InstanceNorm1d(3)(v),
}
PARAMETERS = {  # arguments that are vectors of two
    "batch_norm gamma": lambda v: cybn.batch_norm(GOOD, v),
    "batch_norm beta": lambda v: cybn.batch_norm(GOOD, None, v),
    "inference mean": lambda v: cybn.batch_norm_inference(GOOD, v, ONE),
    "inference var": lambda v: cybn.batch_norm_inference(GOOD, ONE, v),
    "inference gamma": lambda v: cybn.batch_norm_inference(GOOD, ONE, ONE, v),
    "inference beta": lambda v: cybn.batch_norm_inference(GOOD, ONE, ONE, None, v),
    "backward gamma": lambda v: cybn.batch_norm_backward(GOOD, GOOD, MOMENTS, v),
    "backward beta": lambda v: cybn.batch_norm_backward(
        GOOD, GOOD, MOMENTS, beta=v, activation="relu"
    ),
    "inference_backward mean": lambda v: cybn.batch_norm_inference_backward(GOOD, GOOD, v, ONE),
    "inference_backward var": lambda v: cybn.batch_norm_inference_backward(GOOD, GOOD, ONE, v),
    "layer_norm gamma": lambda v: cybn.layer_norm(GOOD, v),
    "layer_norm beta": lambda v: cybn.layer_norm(GOOD, None, v),
    "layer_norm_backward gamma": lambda v: cybn.layer_norm_backward(GOOD, GOOD, ROWS, v),
    "rms_norm gamma": lambda v: cybn.rms_norm(GOOD, v),
    "rms_norm_backward gamma": lambda v: cybn.rms_norm_backward(GOOD, GOOD, SQUARES, v),
    "group_norm gamma": lambda v: cybn.group_norm(GOOD, v, num_groups=1),
    "group_norm beta": lambda v: cybn.group_norm(GOOD, None, v, num_groups=1),
    "instance_norm gamma": lambda v: cybn.instance_norm(CUBE, v),
    "instance_norm_backward gamma": lambda v: cybn.instance_norm_backward(CUBE, CUBE, SAMPLES, v),
}


def parts(result):
    """Return all arrays of a result."""
    if isinstance(result, tuple):
        return [array for part in result for array in parts(part)]
    if isinstance(result, cybn.Moments):
        return [np.asarray(result.count), result.mean, result.m2]
    return [result]


def equal(one, other):
    mine, wanted = parts(one), parts(other)
    assert [type(v) for v in mine] == [type(v) for v in wanted]
    for a, b in zip(mine, wanted, strict=True):
        assert same_bits(np.ascontiguousarray(a), np.ascontiguousarray(b))


@pytest.mark.parametrize("where", TENSORS)
def test_tensors_converted(where):
    call = TENSORS[where]
    for name, (odd, plain) in CONVERTED.items():
        print(name)
        equal(call(odd), call(plain))


@pytest.mark.parametrize("where", TENSORS)
def test_tensors_refused(where):
    call = TENSORS[where]
    argument = where.split()[-1]
    for name, odd in REFUSED.items():
        if name == "None" and argument == "residual":
            continue  # None is allowed: no residual
        scalar = where.split()[0] in ("LayerNorm", "RMSNorm", "InstanceNorm1d") and (
            not hasattr(odd, "ndim") and not isinstance(odd, list)
        )  # they check the shape first, which is ()
        error = ValueError if scalar else TypeError
        what = r"has shape \(\)" if scalar else "is .*(float|plain)"
        with pytest.raises(error, match=rf"^({argument}|x|dy|residual) {what}"):
            print(name, call(odd))
    with pytest.raises(ValueError, match="inhomogeneous"):
        call(RAGGED) if argument != "residual" else cybn.batch_norm(GOOD, residual=RAGGED)
    for name, odd in HALVES.items():
        native = odd.astype(odd.dtype.newbyteorder("=")) if "swapped" in name else odd
        equal(call(odd), call(native))


@pytest.mark.parametrize("where", PARAMETERS)
def test_parameters(where):
    call, argument = PARAMETERS[where], where.split()[-1]
    for name, (odd, plain) in CONVERTED.items():
        if name in ("np.matrix", "memoryview"):
            continue  # their rows are not vectors
        given = Exported(odd.values[0]) if isinstance(odd, Exported) else None
        given = Frame(odd.values[0]) if isinstance(odd, Frame) else given
        equal(call(odd[0] if given is None else given), call(plain[0]))
    with pytest.raises(ValueError, match=f"^{argument} has shape"):
        call(GOOD[:1].view(np.matrix))
    for name, odd in (REFUSED | HALVES).items():
        if name in ("None", "a set", "a dict", "a generator") or name.startswith(
            ("list", "nested")
        ):
            continue
        with pytest.raises(TypeError, match=f"^{argument} is .*(float|plain)"):
            print(name, call(odd if isinstance(odd, str) else odd[0]))
    for odd in (np.ma.array([1.0, 2.0]), [np.ma.array(1.0), np.ma.array(2.0)], {1.0}, {"a": 1.0}):
        with pytest.raises(TypeError, match=f"^{argument} is .*(float|plain)"):
            call(odd)


SELECTING = {
    "mask": np.array([True, False, True]),
    "weights": np.array([1.0, 0.5, 2.0]),
    "lengths": np.array([4, 1, 2]),
}


@pytest.mark.parametrize("name", SELECTING)
def test_what_selects(name):
    good = SELECTING[name]
    calls = [
        lambda v: cybn.batch_norm(CUBE, **{name: v}),
        lambda v: cybn.moments(CUBE, **{name: v}),
        lambda v: cybn.batch_norm_inference(CUBE, ONE, ONE, **{name: v}, masked="zero"),
        lambda v: cybn.BatchNorm(2)(CUBE, **{name: v}),
        lambda v: cybn.Moments.empty(2).update(CUBE, **{name: v}),
    ]
    plain = good if name == "lengths" else np.repeat(good[:, np.newaxis], 4, 1)
    per_value = np.broadcast_to(plain[:, None], CUBE.shape) if plain.ndim == 2 else plain
    refused = [
        (np.ma.array(plain), "masked array"),
        (list(np.ma.array(np.atleast_2d(plain))), "masked array"),
        (plain.astype(complex), "complex"),
        (plain.astype(object), "object"),
        (plain.astype(str), "<U"),
        (plain.astype("V8"), "V8"),
    ]
    if name == "mask":
        refused += [(plain.astype(int), "must be bool"), (plain.astype(float), "must be bool")]
    if name == "lengths":
        refused += [(plain.astype(float), "must be integers"), (plain > 1, "must be integers")]
    for call in calls:
        value = per_value if call is calls[-1] else plain
        equal(call(value.tolist()), call(value))
        equal(call(value.view(Tagged)), call(value))
        equal(call(value.astype(value.dtype.newbyteorder())), call(value))
        for odd, what in refused:
            with pytest.raises(TypeError, match=f"^{name} is .*{what}"):
                call(odd)


def test_moments_from_odd_vectors():
    for bad in (np.ma.array([1.0, 2.0], mask=[0, 1]), [np.ma.array(1.0), np.ma.array(2.0)]):
        for arguments in ((3, bad, ONE), (3, ONE, bad), (bad, ONE, ONE)):
            with pytest.raises(TypeError, match=r"^(mean|m2|count) is a masked array"):
                cybn.Moments(*arguments)


WRITERS = {
    "batch_norm": lambda out: cybn.batch_norm(GOOD, out=out)[0],
    "inference": lambda out: cybn.batch_norm_inference(GOOD, ONE, ONE, out=out),
    "backward": lambda out: cybn.batch_norm_backward(GOOD, GOOD, MOMENTS, out=out)[0],
    "fixed backward": lambda out: cybn.batch_norm_inference_backward(GOOD, GOOD, ONE, ONE, out=out)[
        0
    ],
    "layer_norm": lambda out: cybn.layer_norm(GOOD, out=out)[0],
    "layer_norm_backward": lambda out: cybn.layer_norm_backward(GOOD, GOOD, ROWS, out=out)[0],
    "rms_norm": lambda out: cybn.rms_norm(GOOD, out=out)[0],
    "rms_norm_backward": lambda out: cybn.rms_norm_backward(GOOD, GOOD, SQUARES, out=out)[0],
    "group_norm": lambda out: cybn.group_norm(GOOD, num_groups=1, out=out)[0],
    "group_norm_backward": lambda out: cybn.group_norm_backward(
        GOOD, GOOD, GROUPS, num_groups=1, out=out
    )[0],
    "BatchNorm": lambda out: cybn.BatchNorm(2)(GOOD, out=out),
    "LayerNorm": lambda out: cybn.LayerNorm(2)(GOOD, out=out),
}


@filter_matrix
@pytest.mark.parametrize("name", WRITERS)
def test_out_of_odd_kinds(name, tmp_path):
    call = WRITERS[name]
    right = call(None)
    rooms = {
        "np.matrix": np.zeros_like(GOOD).view(np.matrix),
        "another subclass": np.zeros_like(GOOD).view(Tagged),
        "memmap": np.memmap(tmp_path / "out", np.float64, "w+", shape=GOOD.shape),
        "unaligned": unaligned(np.zeros_like(GOOD)),
    }
    for kind, out in rooms.items():
        assert call(out) is out, kind
        assert same_bits(np.array(out), right), kind
    for out in (
        GOOD.tolist(),
        GOOD.astype(GOOD.dtype.newbyteorder()),
        PLAIN32.copy(),
        GOOD.astype(object),
        np.ma.array(GOOD.copy()),
        np.zeros(GOOD.shape, "V8"),
        Frame(GOOD),
        memoryview(bytearray(48)),
        GOOD.T.copy(),
    ):
        kept = np.array(out, copy=True) if not isinstance(out, Frame) else None
        with pytest.raises((TypeError, ValueError), match=r"^out "):
            call(out)
        assert kept is None or (kept == np.array(out)).all()


def test_the_table_is_all_kinds(figure):
    """Row 22 records how many kinds of input there are."""
    figure(22, "kinds of input", len(CONVERTED) + len(HALVES) + len(REFUSED) + 1)
    figure(22, "arguments", len(TENSORS) + len(PARAMETERS) + len(SELECTING) + len(WRITERS))


NUMBERS = {
    "eps": lambda v: cybn.batch_norm(GOOD, eps=v),
    "eps of layer_norm": lambda v: cybn.layer_norm(GOOD, eps=v),
    "eps of rms_norm": lambda v: cybn.rms_norm(GOOD, eps=v),
    "eps of a layer": lambda v: cybn.BatchNorm(2, eps=v)(GOOD),
    "slope": lambda v: cybn.batch_norm(GOOD, activation="leaky_relu", slope=v),
}
INTS = {
    "axis": lambda v: cybn.batch_norm(GOOD, axis=v),
    "axis of moments": lambda v: cybn.moments(GOOD, axis=v),
    "axis of layer_norm": lambda v: cybn.layer_norm(GOOD, axis=v),
    "axis of group_norm": lambda v: cybn.group_norm(GOOD, num_groups=1, axis=v),
    "num_groups": lambda v: cybn.group_norm(GOOD, num_groups=v),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_of_odd_kinds(name):
    call, argument = NUMBERS[name], name.split()[0]
    for same in (np.float64(0.5), np.float32(0.5), np.array(0.5), decimal.Decimal("0.5")):
        equal(call(same), call(0.5))
    for bad in ("0.5", b"0.5", [0.5], np.array([0.5, 0.5]), 1j):
        with pytest.raises(TypeError, match=f"^{argument} is .*must be a number"):
            call(bad)
    with pytest.raises(ValueError, match=f"^{argument} is an int beyond the largest float"):
        call(10**400)


@pytest.mark.parametrize("name", INTS)
def test_ints_of_odd_kinds(name):
    call, argument = INTS[name], name.split()[0]
    for same in (np.int64(1), np.uint8(1), np.array(1)):
        equal(call(same), call(1))
    for bad in ("1", 1.0, None, [1], np.array(1.0), np.array([1, 1])):
        with pytest.raises(TypeError, match=rf"^{argument} is .*\n?.*must be an int"):
            call(bad)
    with pytest.raises(ValueError, match=f"^{argument} is 10000000000000000000000"):
        call(10**22)
