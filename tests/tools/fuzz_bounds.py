"""The exact results of a case and their error bounds, for any combination of options.

The plain bounds are those of docs/math.md (39) and (40) and of `cases.backward_bound`. With
u = 2**-24 or 2**-53, ulp = 8 u, and z = gamma * xhat + beta + residual:

residual     one more rounding, u * |z|
activation   the bound of z times the largest slope, and 8 u * |y| for the activation itself
gradients    g = dy * f'(z) may be off by dg: by |dy| times the change of f' within the bound of z
             (a jump if z may be on either side of a kink), and by 8 u * |dy|
half types   half a unit in the last place of each stored result
weights      means are weighted, as in (66)
stretched    all bounds are four times as wide if x or dy has an axis of stride 0 (math.md, 6.5)
"""

import ml_dtypes
import numpy as np
from bounds import REPEATED, ULP32, ULP64

from cybn import reference

LARGEST_SLOPE = {"silu": 1.1, "gelu": 1.13, "hardswish": 1.5}
KINKS = {"relu": (0,), "relu6": (0, 6), "leaky_relu": (0,), "hardswish": (-3, 3)}


def rows(array, axis):
    """Return an array in the shape (C, M)."""
    moved = np.moveaxis(array, axis, 0)
    return moved.reshape(len(moved), -1)


def widened(*arrays):
    """Return float64 arrays as long double and others as float64, for the reference."""
    return [
        None
        if a is None
        else np.asarray(a, np.longdouble if np.asarray(a).dtype == np.float64 else np.float64)
        for a in arrays
    ]


def stored(exact, bound, dtype):
    """Return the bound of a result that is rounded to `dtype`."""
    info = ml_dtypes.finfo(dtype)
    tiny = 4 * float(info.smallest_subnormal)
    if dtype.itemsize > 2:
        return bound + tiny
    return bound + float(info.eps) * 0.51 * (np.abs(exact) + bound) + tiny


class Bounds:
    """Exact results of one batch normalization and their bounds, as rows (C, M)."""

    def __init__(
        self,
        x,
        axis,
        eps,
        gamma,
        beta,
        options,
        fixed=None,
        moments=None,
        masked="normalize",
        repeated=False,
    ):
        self.axis = axis % x.ndim
        self.x = x
        self.eps, self.options, self.masked = eps, options, masked
        wide = np.longdouble if x.dtype == np.float64 else np.float64
        self.wide = wide
        self.smallest = 5e-324 if x.dtype == np.float64 else 2.0**-149
        self.double = x.dtype == np.float64
        self.ulp = (ULP64 if self.double else ULP32) * (REPEATED if repeated else 1)
        self.gamma, self.beta = (None if v is None else v.astype(wide) for v in (gamma, beta))
        self.given = moments
        self.fixed = None if fixed is None else [v.astype(wide) for v in fixed]
        self.act = options.get("activation")
        self.slope = options.get("slope", 0.01)
        self.g = 1.0 if gamma is None else self.gamma[:, None]
        self.b = 0.0 if beta is None else self.beta[:, None]
        self.selected = {k: options[k] for k in ("mask", "weights", "lengths") if k in options}
        self.w = reference._shares(
            x, self.axis, *(self.selected.get(k) for k in ("mask", "weights", "lengths"))
        )
        self.wx = x.astype(wide)
        with np.errstate(all="ignore"):
            self._statistics()

    def _statistics(self):
        r = rows(self.wx, self.axis)
        self.rows = np.where(self.w > 0, r, 0) if self.selected else r
        if self.given is not None:
            self.moments = self.given
            self.mean, self.var = self.given.mean[:, None], self.given.var()[:, None]
            self.constant = np.zeros(len(r), bool)
        elif self.fixed is None:
            self.moments = reference.moments(self.wx, axis=self.axis, **self.selected)
            total = self.w.sum()
            self.mean = (self.w * self.rows).sum(1, keepdims=True) / total
            e = self.rows - self.mean
            self.mean = self.mean + (self.w * e).sum(1, keepdims=True) / total
            self.var = (self.w * (self.rows - self.mean) ** 2).sum(1, keepdims=True) / total
            values = r[:, self.w[0] > 0]
            self.constant = (values == values[:, :1]).all(1)
        else:
            self.mean, self.var = (v[:, None] for v in self.fixed)
            self.constant = np.zeros(len(r), bool)
        self.r = 1 / np.sqrt(self.var + self.eps)
        self.xhat = (r - self.mean) * self.r
        self.off = np.abs(self.mean) * self.r
        # (39) is valid for means of up to a million standard deviations
        self.promised = self.double | (self.off[:, 0] <= 1e6)

    def keywords(self):
        options = {k: v for k, v in self.options.items() if k != "masked"}
        if options.get("residual") is not None:
            options["residual"] = options["residual"].astype(self.wide)
        return options | {"axis": self.axis, "eps": self.eps}

    def of_z(self, xhat):
        """Return z and its bound."""
        off = self.off if self.double else 0
        z = self.g * xhat + self.b
        bound = self.ulp * (np.abs(self.g * xhat) + np.abs(self.g) * (1 + off) + np.abs(self.b))
        residual = self.options.get("residual")
        if residual is not None:
            z = z + rows(residual.astype(self.wide), self.axis)
            bound = bound + self.ulp / 8 * np.abs(z)
        return z, bound

    @np.errstate(all="ignore")
    def forward(self):
        """Return y and its bound."""
        options = self.keywords() | {"masked": self.masked}
        if self.fixed is None:
            y, _ = reference.batch_norm(self.wx, self.gamma, self.beta, **options)
        else:
            y = reference.batch_norm_inference(
                self.wx, *self.fixed, self.gamma, self.beta, **options
            )
        y = rows(y, self.axis)
        _, bound = self.of_z(self.xhat)
        if self.act is not None:
            steep = (
                max(1.0, abs(self.slope))
                if self.act == "leaky_relu"
                else LARGEST_SLOPE.get(self.act, 1)
            )
            bound = steep * bound + self.ulp * np.abs(y)
        return y, stored(y, bound, self.x.dtype)

    @np.errstate(all="ignore")
    def backward(self, dy, from_output=False):
        """Return the exact gradients and their bounds: dx, dgamma, dbeta, and dresidual if any."""
        options = self.keywords() | {
            "from_output": from_output,
            "beta": self.beta,
            "masked": "zero",
        }
        dy = dy.astype(self.wide)
        if self.fixed is None:
            exact = reference.batch_norm_backward(dy, self.wx, self.moments, self.gamma, **options)
        else:
            exact = reference.batch_norm_inference_backward(
                dy, self.wx, *self.fixed, self.gamma, **options
            )
        exact = [rows(v, self.axis) if v.ndim > 1 else v for v in exact]
        xhat, rough, known = self.xhat, 0, None
        if from_output:
            z = self.rows
            if self.act is not None:
                z = np.where(z < 0, z / self.slope, z)
            xhat, rough, known = (z - self.b) / self.g, np.abs(z / self.g), z
        size = np.abs(xhat) + 1 + rough + (self.off if self.double else 0)
        g, dg = self._through(rows(dy, self.axis), xhat, known)
        r = self.r
        sums = np.abs(g).sum(1, keepdims=True), (np.abs(g) * size).sum(1, keepdims=True)
        slips = dg.sum(1, keepdims=True), (dg * size).sum(1, keepdims=True)
        db, dgm = (self.ulp * s + t for s, t in zip(sums, slips, strict=True))
        lost = self.smallest * g.shape[1]  # products may underflow
        db, dgm = db + lost, dgm + lost * (1 + r)
        share = self.w / self.w.sum() if self.fixed is None else 0
        dx = np.abs(self.g) * r * (self.ulp * np.abs(g) + dg + share * (db + size * dgm))
        dx = np.where(self.w > 0, dx, 0)
        bounds = [stored(exact[0], dx, self.x.dtype), dgm[:, 0], db[:, 0]]
        if len(exact) > 3:
            bounds.append(stored(exact[3], self.ulp * np.abs(g) + dg, self.x.dtype))
        return exact, bounds

    def _through(self, dy, xhat, known):
        """Return g = dy * f'(z) and its bound. If `known` is given, it is z as recovered from y."""
        z, bound = self.of_z(xhat)
        if known is not None:
            z, bound = known, 0 * bound
        _, slope = reference.activated(z, self.act, self.slope)
        counts = self.w > 0
        cut = (slope == 0) & (self.act in ("relu", "relu6", "hardswish"))
        g = np.where(counts & ~cut, dy * slope, 0)
        dg = 0 * g
        if self.act in KINKS:
            jump = {"leaky_relu": abs(1 - self.slope), "hardswish": 0.5}.get(self.act, 1)
            close = np.zeros(z.shape, bool)
            for kink in KINKS[self.act]:
                close |= np.abs(z - kink) <= bound
            dg = np.where(close, np.abs(dy) * jump, 0) + self.ulp * np.abs(g)
        if self.act not in (None, "relu", "relu6", "leaky_relu"):
            dg = dg + np.abs(dy) * (bound + self.ulp)
        dg = np.where(counts, dg, 0)
        if self.options.get("residual") is not None and self.x.dtype.itemsize == 2:
            info = ml_dtypes.finfo(self.x.dtype)  # dx is computed from the stored dresidual
            dg = dg + float(info.eps) * 0.51 * np.abs(g) + float(info.smallest_subnormal)
        return g, dg


def wrong(got, exact, bound, dtype):
    """Return a bool array, (C, M) or (C,): True where a result is outside its bound.

    A result that is too large for its type may be infinite. NaN must be where the reference
    has NaN.
    """
    got = got.astype(exact.dtype)
    largest = float(ml_dtypes.finfo(dtype).max)
    with np.errstate(all="ignore"):
        good = np.abs(got - exact) <= bound
        if good.all():
            return ~good
        good |= np.isnan(got) & np.isnan(exact)
        good |= np.isinf(got) & (
            (np.abs(exact) + bound > largest) & (np.sign(got) == np.sign(exact))
        )
        good |= ~np.isfinite(bound)
    return ~good
