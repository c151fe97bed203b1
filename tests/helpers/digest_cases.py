"""Calls of every function that computes, and a digest of the results of each call.

Every build has to give the digests of tests/machine/digests.json: each compiler, each processor,
each instruction level, with OpenMP and without. NumPy's generators and the C library's functions
may change from one version to the next. So the inputs are made of integers, with additions,
multiplications and shifts of 64-bit words only.

`CALLS` contains the calls by name; `digest` makes a digest of a result.
"""

import hashlib
from functools import lru_cache, partial

import numpy as np

import cybn

try:
    from ml_dtypes import bfloat16
except ImportError:  # the calls that need it are then left out
    bfloat16 = None

CALLS = {}

TYPES = {"float32": np.float32, "float64": np.float64, "float16": np.float16}
if bfloat16 is not None:
    TYPES["bfloat16"] = bfloat16
SINGLE_DOUBLE = ("float32", "float64")
HALF = ("float16", "bfloat16")
ACTIVATIONS = ("relu", "relu6", "leaky_relu", "hardswish", "sigmoid", "tanh", "silu", "gelu")


# ---- inputs ------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def words(seed, count):
    """Return 64-bit words that look random: the splitmix64 output function of a counter."""
    z = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z += np.uint64(seed * 0xD1342543DE82EF95 % 2**64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def normal(seed, shape, dtype="float32"):
    """Return sums of four random parts, nearly standard normal and exact in float32."""
    z = words(seed, int(np.prod(shape)))
    parts = sum((z >> np.uint64(16 * k) & np.uint64(0xFFFF)).astype(np.int64) for k in range(4))
    v = (parts - 2 * 0xFFFF).reshape(shape) / 2.0**15
    if dtype == "float64":
        v += (z & np.uint64(0xFFFFFF)).astype(np.int64).reshape(shape) / 2.0**45
    return v.astype(TYPES[dtype])


def parameters(seed, shape, dtype):
    """Return gamma, from 1/2 to 2, and beta. For half types both are float32."""
    dtype = "float64" if dtype == "float64" else "float32"
    z = (words(seed, int(np.prod(shape))) >> np.uint64(44)).astype(np.int64).reshape(shape)
    gamma = (0.5 + z * 1.5 / 2.0**20).astype(TYPES[dtype])
    return gamma, normal(seed + 1, shape, dtype)


def lay(array, axis):
    """Return a channels-first array in C order with its channel axis moved to `axis`."""
    return np.ascontiguousarray(np.moveaxis(array, 1, axis))


# ---- digests -----------------------------------------------------------------------------


def digest(result):
    """Return the first 32 digits of the SHA-256 of all that a call returned.

    All NaNs count as equal, because processors give them different signs.
    """
    sha = hashlib.sha256()
    for part in flat(result):
        a = np.ascontiguousarray(part)
        if a.dtype.kind not in "biu":
            a = np.where(a != a, np.array(np.nan, a.dtype), a)
        sha.update(f"{a.dtype.name}{a.shape}".encode())
        sha.update(a.astype(a.dtype.newbyteorder("<"), copy=False).tobytes())
    return sha.hexdigest()[:32]


def flat(result):
    """Yield the arrays and numbers of a result."""
    if isinstance(result, tuple | list):
        for part in result:
            yield from flat(part)
    elif isinstance(result, dict):
        yield from flat([result[name] for name in sorted(result)])
    elif isinstance(result, cybn.Moments):
        yield from (np.asarray(result.count), result.mean, result.m2)
    elif result is not None and not isinstance(result, str):
        yield np.asarray(result)


# ---- batch normalization -----------------------------------------------------------------

# One shape for each path through the kernels, as (N, C, S): rows, channels of one column, runs,
# tails of runs, chunks of N, chunks of S, enough rows of one column for chunks of rows, and few
# columns.
FAMILIES = [
    (9, 6, 7),
    (200, 33, 1),
    (3, 5, 512),
    (3, 5, 1071),
    (270, 2, 490),
    (3, 2, 45000),
    (1, 2, 131073),
    (4097, 33, 1),
    (20001, 3, 1),
]
FUNCTIONS = ("forward", "backward", "inference", "inference_backward")


def batch(function, shape, axis, dtype, offset=0, x=None, **options):
    """Call one of the functions of batch normalization."""
    c = shape[1]
    x = normal(1, shape, dtype) if x is None else x
    x = lay(x + x.dtype.type(offset), axis)
    dy = lay(normal(2, shape, dtype), axis)
    gamma, beta = parameters(3, c, dtype)
    options["axis"] = axis
    if options.pop("residual", False):
        options["residual"] = lay(normal(5, shape, dtype), axis)
    if function == "forward":
        return cybn.batch_norm(x, gamma, beta, **options)
    if function == "inference":
        return cybn.batch_norm_inference(x, beta, gamma, gamma, beta, **options)
    if function == "backward":
        selection = {k: v for k, v in options.items() if k in ("mask", "weights", "lengths")}
        m = cybn.moments(x, axis=axis, **selection)
        return m, cybn.batch_norm_backward(dy, x, m, gamma, beta=beta, **options)
    return cybn.batch_norm_inference_backward(dy, x, beta, gamma, gamma, beta=beta, **options)


def add_batch(function, shape, axis, dtype, *words, **options):
    if dtype in TYPES:
        where = "first" if axis == 1 else "last"
        name = [function, "x".join(map(str, shape)), where, dtype, *words]
        CALLS[" ".join(name)] = partial(batch, function, shape, axis, dtype, **options)


for dtype in SINGLE_DOUBLE:
    for axis in (1, -1):
        for shape in FAMILIES:
            for function in FUNCTIONS[:2]:
                add_batch(function, shape, axis, dtype)
for dtype in SINGLE_DOUBLE:
    for axis in (1, -1):
        for shape in FAMILIES[:3]:
            for function in FUNCTIONS[2:]:
                add_batch(function, shape, axis, dtype)
for dtype in HALF:
    for axis in (1, -1):
        for shape in ((9, 6, 7), (3, 5, 1071), (4097, 33, 1)):
            for function in FUNCTIONS[:2]:
                add_batch(function, shape, axis, dtype)
        for function in FUNCTIONS[2:]:
            add_batch(function, (9, 6, 7), axis, dtype)

for number, activation in enumerate(ACTIVATIONS):
    for function in FUNCTIONS[:2]:
        for shape, axis, dtype in (
            ((3, 5, 1071), 1, "float32"),
            ((40, 6, 17), -1, "float32"),
            ((9, 6, 47), 1, "float64"),
            ((3, 5, 512), 1, "float64"),
            ((9, 6, 47), (-1, 1)[number % 2], HALF[number % 2]),
        ):
            residual = (number + shape[0]) % 2 == 0 or dtype == "float64"
            named = [activation] + ["residual"] * residual
            add_batch(
                function, shape, axis, dtype, *named, activation=activation, residual=residual
            )
for function in FUNCTIONS:
    add_batch(function, (3, 5, 1071), 1, "float32", "residual", residual=True)
    add_batch(function, (40, 6, 17), -1, "float64", "residual", residual=True)
    add_batch(
        function, (40, 6, 17), -1, "float16", "residual gelu", residual=True, activation="gelu"
    )

# 11 samples of 4 channels and 60 positions. Masked values are NaN.
MASK = words(7, 11 * 60).reshape(11, 60) % np.uint64(3) > 0
WEIGHTS = MASK * (words(8, 11 * 60).reshape(11, 60) >> np.uint64(60)).astype(np.int64) / 8.0
LENGTHS = (words(9, 11) % np.uint64(59)).astype(np.int64) + 2
SELECTIONS = {"mask": MASK, "weights": WEIGHTS, "lengths": LENGTHS}


def selected(function, axis, dtype, by, masked):
    """Call a function of batch normalization with a mask, weights or lengths."""
    x = normal(1, (11, 4, 60), dtype)
    counts = np.arange(60) < LENGTHS[:, np.newaxis] if by == "lengths" else SELECTIONS[by] > 0
    x = np.where(counts[:, np.newaxis], x, np.array(np.nan, x.dtype))
    options = {by: SELECTIONS[by], "masked": masked, "activation": "silu"}
    return batch(function, (11, 4, 60), axis, dtype, x=x, **options)


for dtype, axis in (("float32", 1), ("float32", -1), ("float64", 1), ("bfloat16", -1)):
    for by in SELECTIONS:
        for masked in ("normalize", "zero"):
            for function in FUNCTIONS[:2] if dtype in TYPES else ():
                name = f"{function} {by} {masked} {'first' if axis == 1 else 'last'} {dtype}"
                CALLS[name] = partial(selected, function, axis, dtype, by, masked)


def special(function, dtype, axis):
    """Call with channels of ordinary, far, tiny, huge, constant, NaN and infinite values."""
    x = normal(1, (40, 8, 70), dtype)
    largest = np.finfo(x.dtype).max
    x[:, 1] += x.dtype.type(1e6)
    x[:, 2] *= np.finfo(x.dtype).smallest_normal
    x[:, 3] *= largest / 8
    x[:, 4] = -3.3
    x[7, 5, 3] = np.nan
    x[7, 6, 3] = np.inf
    x[:, 7] = np.where(x[:, 7] > 0, x.dtype.type(0), x.dtype.type(-0.0))
    with np.errstate(all="ignore"):
        return batch(function, (40, 8, 70), axis, dtype, x=x, activation="gelu")


for dtype in SINGLE_DOUBLE:
    for axis in (1, -1):
        for function in FUNCTIONS:
            where = "first" if axis == 1 else "last"
            CALLS[f"{function} special {where} {dtype}"] = partial(special, function, dtype, axis)


# ---- arrays with other strides -----------------------------------------------------------


def strided(way, dtype):
    """Call forward and backward on views that are not contiguous, native and writable."""
    a, dy = normal(1, (12, 10, 30), dtype), normal(2, (12, 10, 30), dtype)
    view = {
        "step along N": lambda v: v[::2],
        "slice along C": lambda v: v[:, 3:8],
        "step along S": lambda v: v[:, :, ::3],
        "backwards": lambda v: v[::-1, ::-1, ::-1],
        "Fortran order": np.asfortranarray,
        "turned": lambda v: v.transpose(2, 1, 0),
        "byte-swapped": lambda v: v.astype(v.dtype.newbyteorder()),
        "read-only": lambda v: np.broadcast_to(v[:, :, :1], v.shape),
    }[way]
    x, dy = view(a), view(dy)
    gamma, _ = parameters(3, x.shape[1], dtype)
    y, m = cybn.batch_norm(x, gamma)
    return y, m, cybn.batch_norm_backward(dy, x, m, gamma)


for dtype in SINGLE_DOUBLE:
    for way in ("step along N", "slice along C", "step along S", "backwards", "Fortran order",
                "turned", "byte-swapped", "read-only"):  # fmt: skip
        CALLS[f"strided {way} {dtype}"] = partial(strided, way, dtype)


# ---- the other norms ---------------------------------------------------------------------

ROWS = [
    ("layer", (9, 7), -1, {}),
    ("layer", (300, 33), -1, {}),
    ("layer", (67, 1025), -1, {}),
    ("layer", (2, 70001), -1, {}),
    ("rms", (9, 7), -1, {}),
    ("rms", (300, 130), -1, {}),
    ("rms", (2, 70001), -1, {}),
    ("group", (3, 12, 7, 7), 1, {"num_groups": 4}),
    ("group", (300, 8, 5, 5), 1, {"num_groups": 4}),
    ("group", (2, 6, 515), 1, {"num_groups": 3}),
    ("group", (3, 5, 7, 8), -1, {"num_groups": 2}),
    ("group", (1, 400, 33), -1, {"num_groups": 11}),
    ("instance", (3, 5, 11), 1, {}),
    ("instance", (2, 3, 25, 25), 1, {}),
    ("instance", (1, 2, 131073), 1, {}),
    ("instance", (5, 70, 3), -1, {}),
]


def rows(member, shape, axis, dtype, more):
    """Call forward and backward of a member of the family."""
    x, dy = normal(1, shape, dtype), normal(2, shape, dtype)
    whole = member in ("layer", "rms")
    gamma, beta = parameters(3, shape[axis:] if whole else (shape[axis],), dtype)
    given = (gamma,) if member == "rms" else (gamma, beta)
    y, statistics = getattr(cybn, f"{member}_norm")(x, *given, axis=axis, **more)
    backward = getattr(cybn, f"{member}_norm_backward")
    return y, statistics, backward(dy, x, statistics, gamma, axis=axis, **more)


for number, (member, shape, axis, more) in enumerate(ROWS):
    for dtype in (*SINGLE_DOUBLE, HALF[number % 2]):
        if dtype in TYPES:
            name = f"{member} {'x'.join(map(str, shape))} {axis} {dtype}"
            CALLS[name] = partial(rows, member, shape, axis, dtype, more)


# ---- statistics and layers ---------------------------------------------------------------


def merged(dtype):
    """Merge and update Moments of batches whose means differ a lot."""
    parts = [normal(k, (5 * k, 6, 40), dtype) + np.float32(k) for k in (1, 2, 3)]
    m = cybn.Moments.empty(6)
    for part in parts:
        m = m.merge(cybn.moments(part))
    updated = cybn.Moments.empty(6)
    for part in parts:
        updated = updated.update(part)
    weights = (words(4, 5 * 40).reshape(5, 40) >> np.uint64(61)).astype(np.int64)
    return m, updated, updated.update(parts[0], weights=weights), m.var(1)


def trained(layer, shape, dtype):
    """Train a layer for three steps, then call it in eval mode."""
    results = []
    for k in range(3):
        y = layer(normal(10 + k, shape, dtype) + TYPES[dtype](k))
        results += [y, layer.backward(normal(20 + k, shape, dtype)), layer.gradients()]
        for parameter, gradient in zip(layer.parameters(), layer.gradients(), strict=True):
            parameter -= TYPES[dtype](0.125) * gradient
    layer.eval()
    y = layer(normal(1, shape, dtype))
    return results, y, layer.backward(normal(2, shape, dtype)), layer.state_dict()


LAYERS = {
    "BatchNorm": lambda **k: cybn.BatchNorm(6, activation="tanh", **k),
    "BatchNorm cumulative": lambda **k: cybn.BatchNorm(6, momentum=None, **k),
    "BatchNorm virtual": lambda **k: cybn.BatchNorm(6, virtual_batch_size=5, **k),
    "BatchNorm renorm": lambda **k: cybn.BatchNorm(6, renorm=cybn.Renorm(), **k),
    "InstanceNorm": lambda **k: cybn.InstanceNorm1d(6, affine=True, track_running_stats=True, **k),
    "GroupNorm": lambda **k: cybn.GroupNorm(3, 6, **k),
    "LayerNorm": lambda **k: cybn.LayerNorm((6, 50), **k),
    "RMSNorm": lambda **k: cybn.RMSNorm((6, 50), **k),
}

for dtype in SINGLE_DOUBLE:
    CALLS[f"moments merged {dtype}"] = partial(merged, dtype)
    for name, make in LAYERS.items():
        CALLS[f"trained {name} {dtype}"] = lambda make=make, dtype=dtype: trained(
            make(dtype=TYPES[dtype]), (13, 6, 50), dtype
        )
