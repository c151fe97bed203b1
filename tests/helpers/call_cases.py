"""Every kind of call, good and bad, for tests of memory and of the floating-point environment.

`GOOD` and `BAD` are lists of functions without arguments. The arrays and layers that they are given
live in this module as long as the process does, so a test can watch their reference counts:
`ARGUMENTS`.
"""

import warnings
from functools import partial

import numpy as np

import cybn
from cybn import _arguments, functional


def within_samples(x):
    """Return the statistics that an instance norm learns from."""
    layer = cybn.InstanceNorm1d(x.shape[1], track_running_stats=True)
    return cybn.population_statistics(layer, [x])[layer]


C = 3
_rng = np.random.default_rng(34)

X, DY, R = _rng.standard_normal((3, 4, C, 5)).astype(np.float32)
OUT, OUT_R = np.zeros_like(X), np.zeros_like(X)
WIDE = np.zeros(X.shape)
HALF = X.astype(np.float16)
LARGE = _rng.standard_normal((64, 33, 64)).astype(np.float32)  # large enough for several threads
READ_ONLY = X.copy()
READ_ONLY.setflags(write=False)
BUFFER = np.ones((5, C, 5), np.float32)
INTEGERS = np.ones(X.shape, int)
MASKED = np.ma.masked_array(X)
LIST = X.tolist()
V, G = np.ones(C), np.full(C, 2, np.float32)
ZEROS, FOUR = np.zeros(C), np.ones(4)
MASK = np.arange(20).reshape(4, 5) % 3 > 0
BY_CHANNEL = X > 0
NOTHING = np.zeros((4, 5), bool)
WEIGHTS = MASK / 2
LENGTHS = np.array([5, 4, 3, 2])
MOST = np.full(C, np.iinfo(np.int64).max)
EMPTY = np.zeros((0, C, 5), np.float32)
ONE = np.ones((1, C), np.float32)
TINY = np.full(C, 1e-60)  # underflows to 0 in float32
HUGE = np.full((2, C), 3e38, np.float32) * np.array([[1], [-1]], np.float32)
BEYOND = 1 << 1024  # too large for a float
M = cybn.moments(X)
SAMPLES = within_samples(X)
SQUARES = cybn.rms_norm(X)[1]

ARGUMENTS = {k: v for k, v in globals().items() if isinstance(v, (np.ndarray, list, cybn.Moments))}

GOOD, BAD = [], []

forward = partial(cybn.batch_norm, X)
inference = partial(cybn.batch_norm_inference, X, V, V)
backward = partial(cybn.batch_norm_backward, DY, X, M)
inference_backward = partial(cybn.batch_norm_inference_backward, DY, X, V, V)
statistics = partial(cybn.moments, X)
BATCH_NORM = [forward, inference, backward, inference_backward]


def good(call, *arguments, **options):
    GOOD.append(partial(call, *arguments, **options))


def bad(call, *arguments, **options):
    BAD.append(partial(call, *arguments, **options))


# ---- the functions of batch normalization ------------------------------------------------

for call in BATCH_NORM:
    forwards = call in (forward, inference)

    def take(options, call=call):
        """Return the function to call; backward is given moments of the selected values."""
        selection = {k: options[k] for k in ("mask", "weights", "lengths") if k in options}
        m = cybn.moments(X, **selection)
        return partial(cybn.batch_norm_backward, DY, X, m) if call is backward else call

    for options in [
        {},
        {"gamma": G},
        {"gamma": V, "beta": V},
        {"activation": "relu"},
        {"activation": "silu", "residual": R},
        {"residual": R, "out": OUT} | ({} if forwards else {"out_residual": OUT_R}),
        {"mask": MASK},
        {"weights": WEIGHTS, "lengths": LENGTHS},
        {"mask": MASK, "masked": "zero"} if forwards else {"mask": MASK, "from_output": True},
    ]:
        good(take(options), **options)
        good(take(options), **options, num_threads=2)
    for options in [
        {"axis": 3},
        {"axis": "1"},
        {"eps": -1.0},
        {"eps": np.nan},
        {"eps": "small"},
        {"eps": BEYOND},
        {"activation": "softplus"},
        {"activation": "leaky_relu", "slope": np.inf},
        {"slope": "steep"} | {"activation": "leaky_relu"},
        {"gamma": FOUR},
        {"gamma": INTEGERS},
        {"beta": FOUR},
        {"residual": WIDE},
        {"residual": R[:2]},
        {"residual": MASKED},
        {"num_threads": 0},
        {"num_threads": 1.0},
        {"out": OUT[:2]},
        {"out": WIDE},
        {"out": LIST},
        {"out": READ_ONLY},
        {"mask": INTEGERS[:, 0]},
        {"mask": MASK[:, :4]},
        {"mask": BY_CHANNEL},
        {"mask": NOTHING[:, np.newaxis].repeat(2, 1)},
        {"weights": -WEIGHTS},
        {"weights": WEIGHTS[:, :4]},
        {"weights": WEIGHTS * 1e-60} | ({"masked": "zero"} if forwards else {}),
        {"weights": WEIGHTS * 1e308},
        {"lengths": LENGTHS + 1},
        {"lengths": LENGTHS[:2]},
        {"lengths": WEIGHTS[:, 0]},
    ]:
        bad(call, **options)

bad(forward, masked="one")
for call in (forward, backward, statistics):
    bad(call, mask=NOTHING)
for x in (None, ONE[0], INTEGERS, MASKED, [["a"]], X.astype("c8")):
    bad(cybn.batch_norm, x)
    bad(cybn.batch_norm_inference, x, V, V)
    bad(cybn.batch_norm_inference, x, V, V, out=OUT)
    bad(cybn.batch_norm_backward, x, X, M)
    bad(cybn.batch_norm_inference_backward, DY, x, V, V)
    bad(cybn.moments, x)
for x in (ONE, EMPTY):
    bad(cybn.batch_norm, x)
    bad(cybn.batch_norm_backward, x, x, M)
bad(cybn.moments, EMPTY)
bad(cybn.moments, ONE, lengths=[1])
bad(cybn.batch_norm_inference, X, None, V)
bad(cybn.batch_norm_inference, X, V, None, out=OUT)
bad(cybn.batch_norm, BUFFER[1:], out=BUFFER[:-1])
bad(cybn.batch_norm_backward, DY[:2], X, M)
bad(cybn.batch_norm_backward, WIDE, X, M)
bad(cybn.batch_norm_backward, DY, X, (V, V))
bad(cybn.batch_norm_backward, DY, X, cybn.Moments(19, V, V))
bad(backward, residual=R, out_residual=DY)
bad(backward, residual=R, from_output=True)
bad(backward, activation="silu", from_output=True)
bad(backward, gamma=ZEROS, from_output=True)

good(statistics)
good(statistics, mask=MASK)
good(cybn.moments, LARGE, num_threads=2)
good(cybn.batch_norm, LARGE, num_threads=2)
good(cybn.batch_norm, X[:, :, ::2])
good(cybn.batch_norm, HALF)
good(cybn.batch_norm, np.asfortranarray(X))
good(cybn.batch_norm, HUGE)
good(cybn.batch_norm_inference, EMPTY, V, V)
good(cybn.batch_norm_inference_backward, EMPTY, EMPTY, V, V)
good(cybn.batch_norm_inference, X, V, ZEROS, eps=0)
good(cybn.batch_norm_inference, X * 1e-42, V, V * 1e-300)

# ---- moments -----------------------------------------------------------------------------

good(M.merge, M)
good(M.update, X)
good(M.update, X, mask=MASK)
good(M.update, X, mask=MASK[:, np.newaxis])
good(M.update, X, mask=BY_CHANNEL)
good(M.update, X, weights=WEIGHTS[:, np.newaxis])
good(M.var, 1)
good(SAMPLES.merge, SAMPLES)
good(SAMPLES.merge, cybn.Moments.empty(C))
for m, of_another_kind in ((M, SAMPLES), (SAMPLES, M)):
    good(lambda m=m: m.from_state_dict(m.state_dict()))
    bad(m.from_state_dict, m.state_dict() | {"rest": FOUR})
    bad(m.from_state_dict, m.state_dict() | {"rest": V * np.nan})
    bad(m.from_state_dict, m.state_dict() | {"std": FOUR})
    bad(m.merge, of_another_kind)
    bad(m.merge, cybn.Moments.empty(4))
bad(SAMPLES.merge, within_samples(LARGE))
bad(SAMPLES.update, X)
good(type(SAMPLES).empty, C)
bad(type(SAMPLES), [4] * C, ZEROS, ZEROS, 2)
bad(type(SAMPLES), 4, ZEROS, ZEROS, 5)
bad(cybn.Moments, -1, V, V)
bad(cybn.Moments, "1", V, V)
bad(cybn.Moments, FOUR, V, V)
bad(cybn.Moments, np.inf, V, V)
bad(cybn.Moments, np.full(C, 1 << 63, np.uint64), V, V)
bad(cybn.Moments, 1, ["a"] * C, V)
bad(cybn.Moments, 1, V, FOUR)
bad(cybn.Moments, 1, V, X)
bad(cybn.Moments, 1, V, -V)
bad(M.merge, V)
bad(M.allreduce, 3)
bad(cybn.Moments(MOST, V, V).merge, cybn.Moments(MOST, V, V))
bad(cybn.Moments(BEYOND, V, V).merge, cybn.Moments(0.5, V, V))
bad(M.update, X, axis=0)
bad(M.update, INTEGERS.astype(complex))
bad(M.update, X, mask=INTEGERS)
bad(M.update, X, mask=MASK[:, :4])
bad(M.update, X, weights=-WEIGHTS)
bad(M.update, X, weights=WEIGHTS * 1e308)
bad(cybn.Moments.empty(C).var)
bad(cybn.Moments.from_state_dict, None)
bad(cybn.Moments.from_state_dict, {"count": 1})
bad(SAMPLES.from_state_dict, M.state_dict())
bad(setattr, M, "count", 2)
bad(delattr, M, "count")

# ---- the other norms ---------------------------------------------------------------------

good(cybn.layer_norm, X, out=OUT)
good(cybn.layer_norm_backward, DY, X, cybn.layer_norm(X)[1])
good(cybn.rms_norm, X)
good(cybn.rms_norm_backward, DY, X, SQUARES)
good(cybn.group_norm, X, G, V, num_groups=1)
good(cybn.group_norm_backward, DY, X, cybn.group_norm(X, num_groups=3)[1], num_groups=3)
good(cybn.instance_norm, LARGE, num_threads=2)
good(cybn.instance_norm_backward, DY, X, cybn.instance_norm(X)[1])
good(cybn.group_norm, X, TINY, TINY, num_groups=3)
good(cybn.group_norm, X, G, V, num_groups=1, lengths=[5, 1, 3, 5])
good(cybn.instance_norm, X, lengths=[5, 2, 3, 5], masked="zero")
good(
    cybn.instance_norm_backward,
    *(DY, X, cybn.instance_norm(X, lengths=[5, 2, 3, 5])[1]),
    lengths=[5, 2, 3, 5],
)
for call in (
    cybn.layer_norm,
    cybn.rms_norm,
    cybn.instance_norm,
    partial(cybn.group_norm, num_groups=3),
):
    good(call, HALF)
    for x in (None, INTEGERS, MASKED, X.astype("c8")):
        bad(call, x)
    for options in [
        {"axis": 3},
        {"axis": 1.0},
        {"eps": 0.0},
        {"eps": "small"},
        {"gamma": FOUR},
        {"num_threads": -1},
        {"out": READ_ONLY},
        {"out": X[:2]},
    ]:
        bad(call, X, **options)
bad(cybn.layer_norm, np.float32(1))
bad(cybn.instance_norm, X, axis=0)
bad(cybn.instance_norm, ONE)
bad(cybn.group_norm, X, num_groups=2)
bad(cybn.group_norm, X, num_groups=True)
bad(cybn.group_norm, ONE, num_groups=3)
bad(cybn.instance_norm, X, lengths=[5, 1, 3, 5])
bad(
    cybn.instance_norm_backward,
    *(DY, X, cybn.instance_norm(X, lengths=[5, 2, 3, 5])[1], FOUR),
    lengths=[5, 2, 3, 5],
)
bad(cybn.layer_norm_backward, DY, X, V)
bad(cybn.layer_norm_backward, DY, X, M)
bad(cybn.rms_norm_backward, DY, X, V)
bad(cybn.instance_norm_backward, DY[:2], X, M)

# ---- layers ------------------------------------------------------------------------------


def step(bn, x=X, **options):
    bn(x, **options)
    return bn.backward(DY)


BN = cybn.BatchNorm(C)
for bn in (
    BN,
    cybn.BatchNorm1d(C, activation="relu", momentum=None),
    cybn.BatchNorm(C, virtual_batch_size=2),
    cybn.BatchNorm(C, renorm=cybn.Renorm()),
    cybn.BatchNorm(C).eval(),
    cybn.LayerNorm(5),
    cybn.RMSNorm(5),
    cybn.GroupNorm(1, C),
    cybn.InstanceNorm1d(C, affine=True, track_running_stats=True),
):
    good(step, bn)
    bad(bn, None)
    bad(bn, X[:, :2, :4])
    bad(bn, INTEGERS)
    bad(bn, X, out=WIDE)
    bad(bn, X, num_threads=0)
    bad(step, bn, X[:2])
good(step, BN, mask=MASK)
good(step, BN, residual=R)
good(lambda: BN.load_state_dict(BN.state_dict()))
good(lambda: BN.restore(BN.snapshot()))
good(lambda: cybn.BatchNorm(C).set_statistics(cybn.Moments(2, TINY, TINY)))
good(lambda: setattr(cybn.BatchNorm(C), "running_mean", TINY))
for options in [
    {"num_features": 0},
    {"num_features": 2.0},
    {"axis": 1.5},
    {"eps": -1},
    {"eps": None},
    {"momentum": 2},
    {"running_ddof": 2},
    {"dtype": int},
    {"activation": "softplus"},
    {"nan_policy": "ignore"},
    {"virtual_batch_size": 0},
    {"virtual_batch_size": 1.0},
    {"renorm": 3},
    {"renorm": cybn.Renorm(), "track_running_stats": False},
]:
    bad(cybn.BatchNorm, **{"num_features": C} | options)
bad(cybn.BatchNorm.like, "tensorflow", C)
bad(cybn.BatchNorm.like, "keras", C, momentum=2)
bad(cybn.Renorm, r_max=0)
bad(setattr, cybn.Renorm(), "limit", 1)
bad(cybn.LayerNorm, "5")
bad(cybn.LayerNorm, ())
bad(cybn.GroupNorm, 2, C)
bad(cybn.GroupNorm, 0, C)
bad(cybn.GroupNorm, 1, C, axis="1")
bad(cybn.GroupNorm, True, C)
bad(cybn.LayerNorm, 5, dtype=int)
bad(cybn.LayerNorm, 5, eps=-1)
bad(cybn.BatchNorm(C).backward, X)
bad(cybn.LayerNorm(5).backward, X)
bad(cybn.BatchNorm(C), ONE)
bad(cybn.BatchNorm(C), EMPTY)
bad(cybn.BatchNorm(C, virtual_batch_size=1), X[:, :, :1])
bad(cybn.BatchNorm(C), X, weights=WEIGHTS / 100)
bad(cybn.BatchNorm(C, nan_policy="raise"), X * np.float32(np.nan))
bad(cybn.InstanceNorm1d(C, track_running_stats=True), EMPTY)
bad(lambda: step(cybn.BatchNorm(C), mask=NOTHING))
for state in (
    None,
    {},
    BN.state_dict() | {"running_var": -V},
    BN.state_dict() | {"running_mean": V * np.nan},
    BN.state_dict() | {"gamma": FOUR},
    BN.state_dict() | {"gamma": ["a"] * C},
    BN.state_dict() | {"num_batches_tracked": -1},
    BN.state_dict() | {"num_batches_tracked": 1.5},
):
    bad(BN.load_state_dict, state)
bad(setattr, BN, "num_features", C)
bad(setattr, cybn.InstanceNorm1d(C), "activation", "relu")
bad(setattr, BN, "running_mean", FOUR)
bad(setattr, BN, "running_var", -V)
bad(setattr, cybn.BatchNorm(C, track_running_stats=False), "running_var", V)
bad(BN.restore, V)
bad(BN.restore, cybn.BatchNorm(4).snapshot())
bad(BN.restore, cybn.BatchNorm(C, track_running_stats=False).snapshot())
bad(cybn.BatchNorm(C).drift)
bad(BN.drift, cybn.Moments.empty(4))
bad(cybn.BatchNorm(C, track_running_stats=False).drift)
bad(BN.explain, C)
bad(BN.set_statistics, SAMPLES)
bad(BN.set_statistics, V)
bad(BN.set_statistics, cybn.Moments(1, V, V))
bad(cybn.BatchNorm(C, track_running_stats=False).scale_shift)


def twice():
    preview = BN.preview()
    for _ in range(2):
        with preview:
            BN(X)


def overwritten(bn, again=False):
    x = X.copy()
    bn(x, out=x)
    if again:
        x += 1
    bn.backward(DY)


def previewed():
    with BN.preview():
        BN(X)
        BN.backward(DY)


def frozen(layer):
    layer.grad_gamma.setflags(write=False)
    step(layer)


bad(lambda: overwritten(cybn.BatchNorm(C, activation="silu")))
bad(lambda: overwritten(cybn.BatchNorm(C), again=True))
bad(lambda: overwritten(cybn.LayerNorm(5)))
bad(previewed)
bad(twice)
bad(lambda: frozen(cybn.BatchNorm(C)))
bad(lambda: frozen(cybn.LayerNorm(5)))

# ---- the rest ----------------------------------------------------------------------------

good(cybn.population_statistics, BN, [X, X])
bad(cybn.population_statistics, BN, [X], upstream="both")
bad(cybn.population_statistics, BN, [])
bad(cybn.population_statistics, np.ravel, [X])
bad(cybn.population_statistics, 1, [X])
bad(functional.absorb, ZEROS, V, cybn.Moments.empty(4), 0.1, 1)
bad(functional.absorb, ZEROS, FOUR, M, 0.1, 1)
bad(functional.absorb, ZEROS, G, M, 0.1, 1)
bad(cybn.set_num_threads, 0)
bad(cybn.set_num_threads, True)
bad(cybn.set_cache_limit, 1.5)
bad(cybn.set_cache_limit, -1)
bad(lambda: cybn.threads(0).__enter__())


def quietly(call):
    """Call it, and ignore the warnings of NumPy."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call()


REFUSALS = (TypeError, ValueError, RuntimeError, AttributeError, FloatingPointError, OverflowError)


def error_of(call):
    """Return the error that a bad call raises, or None if it raises nothing."""
    try:
        quietly(call)
    except REFUSALS as error:
        return error
    return None


# Checks in Python that the compiled dispatch calls, and functions that only cybn itself calls.
bad(cybn.batch_norm, X, axis=True)
bad(cybn.batch_norm, [[1.0], [1.0, 2.0]])
bad(cybn.batch_norm, X, out=np.lib.stride_tricks.as_strided(X.copy(), X.shape, (0,) * X.ndim))
bad(functional.is_zero, "nothing")
bad(_arguments.companion, "dy", X.astype(np.float64 if X.itemsize == 4 else np.float32), X)
bad(_arguments.parameters, C, mean=None)
bad(_arguments.check_degrees, 1.0, 1)
bad(_arguments.finite_sum, np.inf)
bad(_arguments.parameters, C, mean=np.ones(C + 1))
