"""Random sequences over every attribute and option of every layer, beside a model in NumPy.

A step assigns, freezes, saves, loads, copies, folds, converts or passes forward or backward; the
layer then is what the model is, and what is refused has changed nothing.
"""

import contextlib
import copy
import pickle
import random

import numpy as np
import pytest
from layer_cases import snapshot
from settings_model import ARRAYS, Model, agree, shares_of

import cybn

pytestmark = [pytest.mark.row(37), pytest.mark.row(31)]

CLOSE = {"rtol": 1e-7, "atol": 1e-7}
C = 4
SHAPES = {
    "BatchNorm": [(5, C), (4, C, 3), (3, C, 2, 2)],
    "BatchNorm1d": [(6, C), (4, C, 3)],
    "BatchNorm2d": [(3, C, 2, 3)],
    "BatchNorm3d": [(3, C, 2, 2, 2)],
    "InstanceNorm1d": [(3, C, 5)],
    "InstanceNorm2d": [(3, C, 2, 3)],
    "InstanceNorm3d": [(2, C, 2, 2, 2)],
    "GroupNorm": [(3, C, 3), (2, C)],
    "LayerNorm": [(3, 2, C), (2, C)],
    "RMSNorm": [(3, 2, C), (2, C)],
}
GOOD = {
    "eps": (1e-5, 0.5, np.float32(0.25), 1),
    "momentum": (0.1, None, 0, 1, 0.7),
    "running_ddof": (0, 1),
    "nan_policy": ("propagate", "raise", "skip"),
    "activation": (None, "relu", "relu6", "leaky_relu", "sigmoid", "tanh", "silu"),
    "slope": (0.01, 0.3, 1.5),
    "virtual_batch_size": (None, 1, 2, 3, 50),
    "renorm": (None, cybn.Renorm(1, 0), cybn.Renorm(1.5, 0.5)),
    "track_running_stats": (True, False, 1),
    "update_statistics": (True, False, np.True_),
    "use_batch_statistics": (None, True, False, 0),
    "train_affine": (True, False),
    "training": (True, False, 1, 0),
}
BAD = {
    "eps": (-1.0, np.nan, np.inf, "1", None, [1]),
    "momentum": (-0.1, 1.5, "0.1", np.nan),
    "running_ddof": (2, -1, None, "1"),
    "nan_policy": ("ignore", None, 0),
    "activation": ("swish", 1, "RELU", b"relu"),
    "slope": (np.nan, np.inf, "0.1", None),
    "virtual_batch_size": (0, -1, 2.5, True, "2"),
    "renorm": ((3, 5), 3, "3"),
    "axis": (1.0, None, "1"),
    "track_running_stats": ("no", None, 2, []),
    "update_statistics": ("no", None, 0.5),
    "use_batch_statistics": ("no", 2, []),
    "train_affine": ("no", None, 3),
    "training": ("no", None, 2),
    "num_features": (4, 5),
    "num_channels": (4, 8),
    "num_groups": (1, 2),
    "normalized_shape": (4, (2, 4)),
    "affine": (True, False),
    "elementwise_affine": (True, False),
    "dtype": (float, np.float32),
    "running_mean": (np.ones(C + 1), np.full(C, np.nan), "a", np.ones(C, int), None),
    "running_var": (np.full(C, -1.0), np.ones((1, C)), np.full(C, np.inf)),
    "num_batches_tracked": (-1, 1.5, "3", 2**63, True),
}
REFUSED = (TypeError, ValueError, AttributeError)


class Walk:
    """One layer, its model, and the steps that both take."""

    def __init__(self, seed):
        self.dice = random.Random(seed)
        self.rng = np.random.default_rng(self.dice.getrandbits(32))
        self.kind = self.dice.choice(list(SHAPES))
        options = {"dtype": np.float64}
        if self.kind in ("LayerNorm", "RMSNorm"):
            arguments = (C,)
            options["elementwise_affine"] = self.dice.random() < 0.8
        elif self.kind == "GroupNorm":
            arguments, options["affine"] = (2, C), self.dice.random() < 0.8
        else:
            arguments, options["affine"] = (C,), self.dice.random() < 0.8
            options["track_running_stats"] = self.dice.random() < 0.8
        self.layer = getattr(cybn, self.kind)(*arguments, **options)
        self.model = Model(self.layer)
        self.taken = []

    def vector(self):
        return self.rng.uniform(-2, 2, C)

    def refuses(self, action, errors=REFUSED):
        """The action raises, and leaves all as it is."""
        before = snapshot(self.layer)
        with pytest.raises(errors):
            action()
        assert snapshot(self.layer) == before

    # ---- assigning -----------------------------------------------------------------------

    def assign(self):
        name = self.dice.choice([n for n in GOOD if hasattr(self.layer, n)])
        value = self.dice.choice(GOOD[name])
        if self.kind.startswith("Instance") and name in (
            "activation",
            "virtual_batch_size",
            "renorm",
        ):
            value = None
        setattr(self.layer, name, value)
        setattr(self.model, name, value)

    def assign_axis(self):
        if hasattr(self.layer, "axis"):
            self.layer.axis = self.model.axis = self.dice.choice((1, -1))

    def assign_badly(self):
        name = self.dice.choice([n for n in BAD if hasattr(self.layer, n)])
        value = self.dice.choice(BAD[name])
        if name == "eps" and self.kind == "RMSNorm" and value is None:
            return
        self.refuses(lambda: setattr(self.layer, name, value))

    def assign_array(self):
        name = self.dice.choice(ARRAYS)
        value = self.vector()
        if getattr(self.layer, name) is None:
            self.refuses(lambda: setattr(self.layer, name, value), AttributeError)
            return
        bad = self.dice.choice([np.ones(C + 1), 1.0, None, "abcd", np.ones(C, int), [[1.0] * C]])
        self.refuses(lambda: setattr(self.layer, name, bad))
        given = value if self.dice.random() < 0.5 else value.tolist()
        changes = getattr(self.layer, name).tobytes() != value.tobytes()
        setattr(self.layer, name, given)
        setattr(self.model, name, value.copy())
        value[:] = 99  # a copy was taken
        if changes and self.layer._saved is not None and name in ("gamma", "beta"):
            self.changed(name)

    def changed(self, name):
        """A forward has gone before: its backward sees the change where it matters."""
        if name == "gamma" or self.layer._saved.marks[2] is not None:
            dy = np.ones_like(self.layer._saved.x)
            self.refuses(lambda: self.layer.backward(dy), RuntimeError)
            self.layer._saved = self.model.saved = None

    def assign_statistics(self):
        if not self.model.tracked:
            return
        mean, var, n = self.vector(), self.rng.uniform(0.5, 2, C), self.dice.randint(0, 9)
        for name, place, value in [
            ("running_mean", "mean", mean),
            ("running_var", "var", var),
            ("num_batches_tracked", "batches", n),
        ]:
            if not self.layer.track_running_stats:
                self.refuses(lambda n=name, v=value: setattr(self.layer, n, v), AttributeError)
            elif self.dice.random() < 0.5:
                setattr(self.layer, name, value)
                setattr(self.model, place, value)

    def switch(self):
        frozen = self.dice.random() < 0.5
        if not self.model.tracked:
            assert self.layer.train(frozen) is self.layer
            self.model.training = frozen
            return
        assert (self.layer.freeze() if frozen else self.layer.unfreeze()) is self.layer
        switches = (False, False, False) if frozen else (True, None, True)
        m = self.model
        m.update_statistics, m.use_batch_statistics, m.train_affine = switches

    # ---- passes --------------------------------------------------------------------------

    def batch(self):
        shape = self.dice.choice(SHAPES[self.kind])
        x = self.rng.standard_normal(shape) * 2 + self.dice.randint(-3, 3)
        return np.ascontiguousarray(np.moveaxis(x, 1, self.axis)) if self.axis else x

    @property
    def axis(self):
        return getattr(self.layer, "axis", 0)

    def options(self, x):
        """Return what selects positions, and a residual."""
        k = {}
        if not self.kind.startswith("BatchNorm"):
            return k
        if self.dice.random() < 0.3:
            k["residual"] = self.rng.standard_normal(x.shape)
        if self.dice.random() < 0.3:
            rest = list(x.shape)
            del rest[self.axis % x.ndim]
            k["mask"] = self.rng.random(rest) < 0.7
        if self.dice.random() < 0.2:
            rest = list(x.shape)
            del rest[self.axis % x.ndim]
            k["weights"] = self.rng.uniform(0.5, 2, rest) * (self.rng.random(rest) < 0.9)
        if self.dice.random() < 0.2 and x.ndim > 2:
            along = [n for i, n in enumerate(x.shape) if i != self.axis % x.ndim]
            k["lengths"] = self.rng.integers(0, along[1] + 1, along[0])
        if self.dice.random() < 0.5:
            k["masked"] = self.dice.choice(("zero", "normalize"))
        return k

    def impossible(self, x, k, training):
        """Whether a forward has to be refused."""
        model, chosen = self.model, {n: k[n] for n in ("mask", "weights", "lengths") if n in k}
        if not self.kind.startswith("BatchNorm"):
            return False
        learns = training and model.track_running_stats and model.update_statistics
        by_batch = model.by_batch(training)
        if not by_batch and not learns:
            return False
        shares = shares_of(x, self.axis % x.ndim, **chosen)
        values = x.size // C if shares is None else np.count_nonzero(shares)
        parts = training and by_batch
        if parts and model.renorm is not None and not model.track_running_stats:
            return True
        size = model.virtual_batch_size
        each = x.size // (C * len(x))
        if parts and size is not None and size < len(x) and size * each < 2:
            return True
        if values < 2:
            return True
        return learns and "weights" in k and shares.sum() <= model.running_ddof

    def forward(self, preview=False):
        x = self.batch()
        k = self.options(x)
        training = True if preview else self.model.training
        out = np.full_like(x, 7.0) if self.dice.random() < 0.3 else None
        context = self.layer.preview if preview else contextlib.nullcontext
        if preview and self.impossible(x, k, training):
            return
        if self.impossible(x, k, training):
            self.refuses(lambda: self.layer(x, out=out, **k), ValueError)
            assert out is None or (out == 7).all()
            return
        want, back, batch = self.model.forward(x.copy(), training, **copy.deepcopy(k))
        with context():
            y = self.layer(x, out=out, num_threads=self.dice.choice((None, 1)), **k)
        np.testing.assert_allclose(y, want, **CLOSE)
        if preview:
            return
        if self.model.learns():
            assert self.model.learn(batch)
        chosen = {n: k[n] for n in ("mask", "weights", "lengths") if n in k}
        self.counts = shares_of(x, self.axis % x.ndim, **chosen) if chosen else None
        self.model.saved, self.x = back, x

    def preview(self):
        if not self.model.tracked:
            return
        self.forward(preview=True)
        with self.layer.preview():
            self.refuses(lambda: self.layer.backward(np.ones((2, C))), RuntimeError)

    def backward(self):
        if self.model.saved is None:
            self.refuses(lambda: self.layer.backward(np.ones((2, C))), RuntimeError)
            return
        dy = self.rng.standard_normal(self.x.shape)
        if self.counts is not None:
            dy = dy * (self.counts != 0)
        if self.dice.random() < 0.2:
            self.refuses(lambda: self.layer.backward(dy[:-1]), ValueError)
        if self.dice.random() < 0.1:
            self.x += 1
            self.refuses(lambda: self.layer.backward(dy), RuntimeError)
            self.layer._saved = self.model.saved = None
            return
        want = self.model.backward(dy)
        got = self.layer.backward(dy)
        for a, b in zip(got if isinstance(got, tuple) else (got,), want, strict=True):
            np.testing.assert_allclose(a, b, **CLOSE)

    def train(self):
        self.forward()
        self.backward()

    # ---- state ---------------------------------------------------------------------------

    def duplicate(self):
        how = self.dice.choice((copy.copy, copy.deepcopy, lambda b: pickle.loads(pickle.dumps(b))))
        old, self.layer = self.layer, how(self.layer)
        assert snapshot(old) == snapshot(self.layer)
        for array in old.parameters() + old.gradients():
            array[...] = 99
        if self.model.tracked:
            self.model.renorm = self.layer.renorm  # a copy has limits of its own
            old.freeze()
            if old.track_running_stats:
                old.running_mean[:] = 5
        self.model.saved = None

    def load(self):
        state = self.layer.state_dict()
        if self.dice.random() < 0.3:
            self.refuses(lambda: self.layer.load_state_dict(state | {"weight": np.ones(C)}))
        if not all(np.isfinite(v).all() for v in state.values()):
            return
        strict = self.dice.random() < 0.5
        for array in self.layer.parameters():
            array += 1
        given = state if strict else state | {"more": 1}
        keys = self.layer.load_state_dict(given, strict=strict)
        assert keys == ([], [] if strict else ["more"])
        if self.model.saved is not None:  # gamma is what it was: so is the forward
            self.backward()

    def back_and_forth(self):
        if not self.model.tracked:
            return
        if self.taken and self.dice.random() < 0.5:
            taken, model = self.dice.choice(self.taken)
            if taken.tracks != self.model.track_running_stats:
                self.refuses(lambda: self.layer.restore(taken), ValueError)
                return
            self.layer.restore(taken)
            names = (*ARRAYS, "mean", "var", "batches", "training", "update_statistics")
            for name in (*names, "use_batch_statistics", "train_affine"):
                setattr(self.model, name, copy.deepcopy(getattr(model, name)))
            self.model.saved = None
            return
        model = copy.copy(self.model)
        model.saved = None
        self.taken.append((self.layer.snapshot(), copy.deepcopy(model)))

    def set_statistics(self):
        if not self.model.tracked:
            return
        m = cybn.Moments(5, self.vector(), self.rng.uniform(1, 9, C))
        if not self.layer.track_running_stats:
            self.refuses(lambda: self.layer.set_statistics(m), AttributeError)
            return
        if self.dice.random() < 0.3:
            self.layer.reset_running_stats()
            self.model.mean, self.model.var, self.model.batches = np.zeros(C), np.ones(C), 0
            return
        self.layer.set_statistics(m)
        self.model.mean, self.model.var = m.mean.copy(), m.var(self.model.running_ddof)

    # ---- what reads the state ------------------------------------------------------------

    def fold(self):
        if not self.model.tracked:
            return
        weight, bias, x = self.rng.standard_normal((C, 3)), self.vector(), self.vector()[:3]
        if self.model.by_batch(False):
            self.refuses(self.layer.scale_shift, ValueError)
            self.refuses(lambda: cybn.folding.fold_linear(weight, bias, self.layer), ValueError)
            return
        scale, shift = self.layer.scale_shift()
        folded = cybn.folding.fold_linear(weight, bias, (scale, shift))
        z, activation = weight @ x + bias, getattr(self.model, "activation", None)
        self.model.activation = None
        shape = [1, 1, 1, 1, 1][: len(SHAPES[self.kind][0])]
        shape[self.axis] = C
        want, _, _ = self.model.forward(z.reshape(shape), training=False)
        self.model.activation = activation
        np.testing.assert_allclose(folded[0] @ x + folded[1], want.ravel(), **CLOSE)

    def convert(self):
        bn = self.layer
        if not self.kind.startswith("BatchNorm") or bn.activation is not None:
            return
        if not (np.isfinite(self.model.mean).all() and np.isfinite(self.model.var).all()):
            return
        if not bn.affine or not bn.track_running_stats:
            return
        if bn.use_batch_statistics is True:
            with pytest.raises(ValueError, match="use_batch_statistics is True"):
                cybn.interop.to_torch(bn)
            return
        made = cybn.interop.from_torch(cybn.interop.to_torch(bn), running_ddof=1)
        for name, value in bn.state_dict().items():
            np.testing.assert_array_equal(made.state_dict()[name], value)

    def describe(self):
        assert type(self.layer).__name__ in repr(self.layer)
        if self.model.tracked and self.model.use_batch_statistics is not None:
            assert f"use_batch_statistics={bool(self.model.use_batch_statistics)}" in repr(
                self.layer
            )

    STEPS = (
        *(assign, assign, assign, assign_axis, assign_badly, assign_badly, assign_array, switch),
        *(assign_statistics, forward, forward, forward, backward, backward, train, train, preview),
        *(duplicate, load, back_and_forth, set_statistics, fold, convert, describe),
    )


def walk(seed, steps=14):
    one = Walk(seed)
    for _ in range(steps):
        step = one.dice.choice(one.STEPS)
        try:
            step(one)
            agree(one.layer, one.model)
        except Exception as error:
            error.add_note(f"seed {seed}, {one.kind}, in {step.__name__}: {one.layer!r}")
            raise


def test_150_sequences(figure):
    for seed in range(150):
        walk(seed)
    figure(37, "sequences of settings", 150, how="sum")


@pytest.mark.slow
def test_2000_sequences(figure):
    for seed in range(10_000, 12_000):
        walk(seed, steps=25)
    figure(37, "sequences of settings", 2000, how="sum")
