"""Print the figures in docs/statistics.md: python tests/tools/statistics_figures.py.

The tests check the same comparisons against their bounds; this script prints the largest errors.
Keras is compared on the backend of KERAS_BACKEND: masks on numpy, renormalization on torch.
"""

import os
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
from mask_cases import FAMILIES, KINDS, batch, gathered, selection

import cybn

os.environ.setdefault("KERAS_BACKEND", "numpy")


def error(got, want):
    """Return the largest difference, relative to the largest value."""
    got, want = (np.asarray(v).astype(float) for v in (got, want))
    return np.abs(got - want).max() / max(1.0, np.abs(want).max()) if want.size else 0.0


def masks(rng):
    for dtype in (np.float32, np.float64):
        found = {"y": 0.0, "dx": 0.0, "dgamma": 0.0}
        for nsc in FAMILIES:
            for kind in ("mask", "lengths"):
                x, dy, _, gamma, beta = batch(rng, nsc, dtype)
                chosen, shares = selection(rng, nsc, kind)
                y, m = cybn.batch_norm(x, gamma, beta, masked="zero", **chosen)
                dx, dgamma, _ = cybn.batch_norm_backward(dy, x, m, gamma, **chosen)
                rows, above = gathered(x, shares), gathered(dy, shares)
                y2, m2 = cybn.batch_norm(rows, gamma, beta)
                dx2, dgamma2, _ = cybn.batch_norm_backward(above, rows, m2, gamma)
                pairs = (gathered(y, shares), y2), (gathered(dx, shares), dx2), (dgamma, dgamma2)
                for name, (got, want) in zip(found, pairs, strict=True):
                    found[name] = max(found[name], error(got, want))
        print(
            f"masked against gathered, {dtype.__name__}:",
            *map("{0[0]} {0[1]:.1e}".format, found.items()),
        )


def gradients(rng):
    worst, count, step = 0.0, 0, 2.0**-17
    for kind in KINDS:
        x, dy, _, gamma, beta = batch(rng, (4, 3, 5), np.float64)
        chosen, _ = selection(rng, x.shape, kind)

        def loss(x=x, dy=dy, gamma=gamma, beta=beta, chosen=chosen):
            return np.vdot(cybn.batch_norm(x, gamma, beta, masked="zero", **chosen)[0], dy)

        _, m = cybn.batch_norm(x, gamma, beta, **chosen)
        for values, gradient in zip(
            (x, gamma, beta), cybn.batch_norm_backward(dy, x, m, gamma, **chosen), strict=True
        ):
            for i in np.ndindex(values.shape):
                kept, sides = values[i], []
                for values[i] in (kept + step, kept - step):
                    sides.append(loss())
                values[i] = kept
                numeric = (sides[0] - sides[1]) / (2 * step)
                worst, count = (
                    max(worst, abs(gradient[i] - numeric) / (1 + abs(numeric))),
                    count + 1,
                )
    print(f"masked gradients, central differences: {count} of them, worst {worst:.1e}")


def one_nan(rng):
    x = rng.standard_normal((9, 4)).astype(np.float32)
    dirty = x.copy()
    dirty[2, 1] = np.nan
    for policy in ("skip", "raise", "propagate"):
        bn, clean = cybn.BatchNorm(4, nan_policy=policy), cybn.BatchNorm(4)
        bn(x), clean(x)
        if policy == "propagate":
            clean(x)
        try:
            bn(dirty)
        except FloatingPointError:
            assert policy == "raise"
        states = [list(layer.state_dict().values()) for layer in (bn, clean)]
        differ = sum(
            np.count_nonzero(np.atleast_1d(a).view(np.uint8) != np.atleast_1d(b).view(np.uint8))
            for a, b in zip(*states, strict=True)
        )
        nan = np.flatnonzero(np.isnan(bn.running_mean) & np.isnan(bn.running_var)).tolist()
        others = np.delete([bn.running_mean, bn.running_var], 1, 1) != np.delete(
            [clean.running_mean, clean.running_var], 1, 1
        )
        said = (
            f"NaN in channels {nan}, others that differ {others.sum()}"
            if policy == "propagate"
            else f"differing bytes of state {differ}"
        )
        print(f"a batch with one NaN in channel 1, {policy}: {said}")


def small_batches(rng):
    for name, options in (
        ("ghost with virtual_batch_size = N", lambda n: {"virtual_batch_size": n}),
        ("renorm with r_max = 1, d_max = 0", lambda n: {"renorm": cybn.Renorm(r_max=1, d_max=0)}),
    ):
        cases = differ = 0
        for nsc in FAMILIES:
            for dtype in (np.float32, np.float64):
                x, dy, _, gamma, beta = batch(rng, nsc, dtype)
                results = []
                for given in ({}, options(len(x))):
                    bn = cybn.BatchNorm(nsc[1], dtype=dtype, **given)
                    bn.gamma[:], bn.beta[:] = gamma, beta
                    results.append(
                        [bn(x), bn.backward(dy), *bn.gradients(), bn.running_mean, bn.running_var]
                    )
                differ += sum(a.tobytes() != b.tobytes() for a, b in zip(*results, strict=True))
                cases += len(results[0])
        print(f"{name} against plain: {cases} arrays, {differ} differ in a bit")


def keras_masks():
    import keras

    worst = 0.0
    for seed in range(50):
        rng = np.random.default_rng(seed)
        n, length, c = (int(size) for size in rng.integers(2, 9, 3))
        x = (rng.standard_normal((n, length, c)) * 2 + 1).astype(np.float32)
        mask = rng.random((n, length)) < rng.uniform(0.3, 1)
        mask.flat[:3] = True
        theirs, ours = keras.layers.BatchNormalization(), cybn.BatchNorm.like("keras", c, axis=-1)
        worst = max(worst, error(ours(x, mask=mask), theirs(x, training=True, mask=mask)))
        worst = max(worst, error(ours.running_mean, theirs.moving_mean))
        worst = max(worst, error(ours.running_var, theirs.moving_variance))
    print(f"masks as Keras, 50 cases: worst {worst:.1e}")


def keras_renorm():
    import keras
    import torch

    worst = 0.0
    for seed in range(50):
        rng = np.random.default_rng(seed)
        x, (mean, std) = rng.standard_normal((8, 3, 4)) * 2 + 1, rng.uniform(0.5, 2, (2, 3))
        r_max, d_max = rng.uniform(1, 3), rng.uniform(0, 3)
        clipping = {"rmin": 1 / r_max, "rmax": r_max, "dmax": d_max}
        theirs = keras.layers.BatchNormalization(axis=1, renorm=True, renorm_clipping=clipping)
        theirs.build(x.shape)
        for name, value in (("renorm_mean", mean), ("moving_mean", mean), ("renorm_stddev", std)):
            getattr(theirs, name).assign(value)
        ours = cybn.BatchNorm.like("keras", 3, dtype=float, renorm=cybn.Renorm(r_max, d_max))
        ours.running_mean, ours.running_var = mean, std**2 - ours.eps
        tx = torch.tensor(x.astype(np.float32), requires_grad=True)
        ty = theirs(tx, training=True)
        ty.backward(torch.ones_like(ty) * tx.detach())
        worst = max(worst, error(ours(x), ty.detach()), error(ours.backward(x), tx.grad))
    print(f"renormalization as Keras, 50 cases: worst {worst:.1e}")


if __name__ == "__main__":
    rng = np.random.default_rng(0)
    for figures in (masks, gradients, one_nan, small_batches):
        figures(rng)
    keras_masks() if os.environ["KERAS_BACKEND"] == "numpy" else keras_renorm()
