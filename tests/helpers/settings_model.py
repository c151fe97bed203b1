"""A layer in plain NumPy: its state as attributes, its formulas from `cybn.reference`."""

import copy

import numpy as np

import cybn
from cybn import reference


class Model:
    """A layer of any kind; `kind` is the class name. Attributes that the layer lacks are None."""

    def __init__(self, layer):
        self.kind = type(layer).__name__
        names = ("num_features", "num_channels", "normalized_shape")
        shape = next(getattr(layer, name) for name in names if hasattr(layer, name))
        self.shape = shape if isinstance(shape, tuple) else (shape,)
        for name in SETTINGS:
            if hasattr(layer, name):
                setattr(self, name, getattr(layer, name))
        for name in ARRAYS:
            setattr(self, name, copy.deepcopy(getattr(layer, name)))
        if self.tracked:
            self.mean, self.var, self.batches = np.zeros(self.shape), np.ones(self.shape), 0
        self.saved = None  # the function of dy that backward calls

    @property
    def tracked(self):
        return self.kind.startswith(("BatchNorm", "InstanceNorm"))

    # ---- passes --------------------------------------------------------------------------

    def by_batch(self, training):
        if not self.tracked or not self.track_running_stats:
            return True
        return training if self.use_batch_statistics is None else self.use_batch_statistics

    def forward(self, x, training=None, residual=None, **selected):
        """Return y, a function of dy, and the moments that the running statistics learn from."""
        training = self.training if training is None else training
        gamma, beta = copy.deepcopy((self.gamma, self.beta))
        if not self.tracked:
            return (*self.rows(x, gamma, beta, selected), None)
        if self.kind.startswith("Instance"):
            return self.instance(x, gamma, beta, training, selected)
        k = {"axis": self.axis, "eps": self.eps, "activation": self.activation}
        k |= {"slope": self.slope, "residual": residual}
        masked = {"masked": selected.pop("masked", "normalize")}
        batch = reference.moments(x, axis=self.axis, **selected) if self.learns() else None
        if not self.by_batch(training):
            fixed = self.mean, self.var
            y = reference.batch_norm_inference(x, *fixed, gamma, beta, **k, **selected, **masked)

            def back(dy):
                function = reference.batch_norm_inference_backward
                return function(dy, x, *fixed, gamma, beta=beta, **k, **selected, **masked)

            return y, back, batch
        return (*self.in_parts(x, gamma, beta, training, k, selected, masked), batch)

    def in_parts(self, x, gamma, beta, training, k, selected, masked):
        """Return y and a function of dy; each part has its own statistics and renorm correction."""
        axis, residual = self.axis % x.ndim, k.pop("residual")
        first = 1 if axis == 0 else 0
        shares = shares_of(x, axis, **selected)
        y, steps = np.empty_like(x), []
        for i in self.parts(x, first, shares, training):
            index = (slice(None),) * first + (i,)
            part, r = x[index], None if residual is None else residual[index]
            mine = {} if shares is None else {"weights": shares[index]}
            m = reference.moments(part, axis=axis, **mine)
            g, b, turn, d = gamma, beta, np.ones(self.shape), np.zeros(self.shape)
            if training and self.renorm is not None:
                std, running = np.sqrt(m.var() + self.eps), np.sqrt(self.var + self.eps)
                limits = self.renorm
                turn = np.clip(std / running, 1 / limits.r_max, limits.r_max)
                d = np.clip((m.mean - self.mean) / running, -limits.d_max, limits.d_max)
                one = np.ones(self.shape) if gamma is None else gamma
                g, b = turn * one, d * one + (0 if beta is None else beta)
            fixed = m.mean, m.var()
            y[index] = reference.batch_norm_inference(
                part, *fixed, g, b, residual=r, **k, **mine, **masked
            )
            steps.append((index, part, m, g, b, turn, d, r, mine))

        def back(dy):
            dx, dr = np.empty_like(x), np.empty_like(x)
            dgamma, dbeta = np.zeros(self.shape), np.zeros(self.shape)
            for index, part, m, g, b, turn, d, r, mine in steps:
                found = reference.batch_norm_backward(
                    dy[index], part, m, g, beta=b, residual=r, **k, **mine, **masked
                )
                dx[index], dscale, dshift = found[:3]
                if r is not None:
                    dr[index] = found[3]
                dgamma, dbeta = dgamma + turn * dscale + d * dshift, dbeta + dshift
            return (dx, dgamma, dbeta) + ((dr,) if residual is not None else ())

        return y, back

    def parts(self, x, first, shares, training):
        """Return the slice of samples of each part."""
        n, size = x.shape[first], self.virtual_batch_size
        if not training or size is None or size >= n:
            return [slice(0, n)]
        count = np.full(n, x.size // (n * self.shape[0]))
        if shares is not None:
            count = np.count_nonzero(np.moveaxis(shares, first, 0).reshape(n, -1), axis=1)
        parts, start = [], 0
        for end in [*range(size, n, size), n]:
            if count[start:end].sum() >= 2:
                parts.append(slice(start, end))
                start = end
        if start < n and parts:
            parts[-1] = slice(parts[-1].start, n)
        return parts or [slice(0, n)]

    def instance(self, x, gamma, beta, training, selected):
        k = {"axis": self.axis, "eps": self.eps}
        batch = self.measured(x, **selected) if self.learns() else None
        if not self.by_batch(training):
            fixed = self.mean, self.var
            y = reference.batch_norm_inference(x, *fixed, gamma, beta, **k, **selected)

            def back(dy):
                function = reference.batch_norm_inference_backward
                return function(dy, x, *fixed, gamma, **k, **selected)

            return y, back, batch
        k |= selected
        y, m = reference.instance_norm(x, gamma, beta, **k)
        return y, lambda dy: reference.instance_norm_backward(dy, x, m, gamma, **k), batch

    def measured(self, x, mask=None, lengths=None, masked=None):
        """Return mean and variance, within samples for an instance norm, with `running_ddof`."""
        axis = self.axis % x.ndim
        if not self.kind.startswith("Instance"):
            m = reference.moments(x, axis=axis)
            return m.mean, m.var(self.running_ddof)
        shares = shares_of(x, axis, mask, None, lengths)
        used = np.broadcast_to(True if shares is None else shares > 0, x.shape)
        values, used = (np.moveaxis(v, axis, 1).reshape(len(x), *self.shape, -1) for v in (x, used))
        counts = used.sum(2)
        with np.errstate(all="ignore"):
            means = np.where(used, values, 0).sum(2) / counts
            means += 0 * means  # the mean of values that are not finite is NaN
            m2 = (np.where(used, values - means[..., np.newaxis], 0) ** 2).sum((0, 2))
            total, samples = counts.sum(0), np.count_nonzero(counts, axis=0)
            mean = np.where(counts, means * counts, 0).sum(0) / total
            return mean, m2 / (total - self.running_ddof * samples)

    def finite(self):
        return bool(np.isfinite(self.mean).all() and np.isfinite(self.var).all())

    def rows(self, x, gamma, beta, selected):
        if self.kind == "GroupNorm":
            k = {"num_groups": self.num_groups, "axis": self.axis, "eps": self.eps} | selected
            y, m = reference.group_norm(x, gamma, beta, **k)
            return y, lambda dy: reference.group_norm_backward(dy, x, m, gamma, **k)
        k = {"axis": -len(self.shape), "eps": self.eps}
        if self.kind == "RMSNorm":
            y, m = reference.rms_norm(x, gamma, **k)
            return y, lambda dy: reference.rms_norm_backward(dy, x, m, gamma, **k)
        y, m = reference.layer_norm(x, gamma, beta, **k)
        return y, lambda dy: reference.layer_norm_backward(dy, x, m, gamma, **k)

    # ---- learning ------------------------------------------------------------------------

    def learns(self):
        return (
            self.tracked and self.training and self.track_running_stats and (self.update_statistics)
        )

    def learn(self, batch):
        """Move the running statistics; return False if the NaN policy refuses the batch."""
        mean, var = batch if isinstance(batch, tuple) else (batch.mean, None)
        if var is None:
            with np.errstate(all="ignore"):
                var = batch.m2 / (batch.count - self.running_ddof)
        weight = 1 / (self.batches + 1) if self.momentum is None else self.momentum
        after = [
            old if weight == 0 else new if weight == 1 else (1 - weight) * old + weight * new
            for old, new in ((self.mean, mean), (self.var, var))
        ]
        if self.nan_policy != "propagate" and not np.isfinite(after).all():
            return self.nan_policy != "raise"
        (self.mean, self.var), self.batches = after, self.batches + 1
        return True

    def backward(self, dy):
        """Set the gradients; return dx, and dresidual if there was a residual."""
        dx, *rest = self.saved(dy)
        self.saved = None
        for name, value in zip(("gamma", "beta"), rest, strict=False):
            if getattr(self, name) is not None:
                setattr(self, f"grad_{name}", value if self.trains else np.zeros(self.shape))
        return (dx, *rest[2:])

    @property
    def trains(self):
        return not self.tracked or self.train_affine


ARRAYS = ("gamma", "beta", "grad_gamma", "grad_beta")
SWITCHES = ("update_statistics", "use_batch_statistics", "train_affine")
SETTINGS = (
    *("training", "axis", "eps", "momentum", "running_ddof", "nan_policy", "activation", "slope"),
    *("virtual_batch_size", "renorm", "track_running_stats", "num_groups", *SWITCHES),
)


def shares_of(x, axis, mask=None, weights=None, lengths=None):
    """Return the weight of each position, as x with one channel, or None if all are 1."""
    if mask is None and weights is None and lengths is None:
        return None
    one = (*x.shape[:axis], 1, *x.shape[axis + 1 :])
    shares = np.ones(one)
    for given in (mask, weights):
        if given is not None:
            shares = shares * np.expand_dims(given, axis)
    if lengths is not None:
        batch, along = [i for i in range(x.ndim) if i != axis][:2]
        places = np.arange(x.shape[along]).reshape([-1 if i == along else 1 for i in range(x.ndim)])
        ends = np.reshape(lengths, [-1 if i == batch else 1 for i in range(x.ndim)])
        shares = shares * (places < ends)
    return shares


def agree(layer, model):
    """Assert that every public attribute of the layer equals that of the model."""
    unit = 1e-8 if layer.dtype == np.float64 else 1e-5
    close = {"rtol": unit, "atol": unit}
    for name in SETTINGS:
        if hasattr(layer, name):
            assert getattr(layer, name) == getattr(model, name), name
    for name in ARRAYS:
        got, want = getattr(layer, name), getattr(model, name)
        assert (got is None) is (want is None), name
        if got is not None:
            np.testing.assert_allclose(got, want, **close, err_msg=name)
    trained = [getattr(layer, n) for n in ARRAYS[:2] if getattr(layer, n) is not None]
    trained = trained if model.trains else []
    assert [id(p) for p in layer.parameters()] == [id(p) for p in trained]
    assert len(layer.gradients()) == len(trained)
    if not model.tracked:
        return
    if not model.track_running_stats:
        assert layer.running_mean is layer.running_var is layer.num_batches_tracked is None
        return
    np.testing.assert_allclose(layer.running_mean, model.mean, **close)
    np.testing.assert_allclose(layer.running_var, model.var, **close)
    assert layer.num_batches_tracked == model.batches
    assert isinstance(layer, cybn.Layer)
