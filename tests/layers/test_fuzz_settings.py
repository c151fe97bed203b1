"""Random sequences over every attribute and option of every layer, compared with a NumPy model.

A step assigns, freezes, saves, loads, copies, folds, converts, or calls forward or backward. After
each step the layer and the model must agree, and a step that was refused must not change anything.
"""

import contextlib
import copy
import inspect
import io
import pickle
import random
import re

import numpy as np
import pytest
from layer_cases import snapshot
from settings_cases import BAD, GOOD, SHAPES, C
from settings_model import ARRAYS, Model, agree, shares_of

import cybn
from cybn import interop

pytestmark = [pytest.mark.row(37), pytest.mark.row(31)]

LIBRARIES = ("torch", "keras", "flax", "onnx")
REFUSED = (TypeError, ValueError, AttributeError)
ELSEWHERE = [name for name, v in vars(cybn.Layer).items() if isinstance(v, property)]
ELSEWHERE.remove("dtype")


class Walk:
    """One layer, its model, and the steps that both take."""

    def __init__(self, seed):
        self.dice = random.Random(seed)
        self.rng = np.random.default_rng(self.dice.getrandbits(32))
        self.kind = self.dice.choice(list(SHAPES))
        options = {"dtype": self.dice.choice((np.float64, np.float64, np.float32))}
        unit = 1e-7 if options["dtype"] == np.float64 else 1e-5
        self.close = {"rtol": unit, "atol": unit}
        if self.kind in ("LayerNorm", "RMSNorm"):
            arguments = (C,)
            options["elementwise_affine"] = self.dice.random() < 0.8
            if self.kind == "LayerNorm":
                options["bias"] = self.dice.random() < 0.8
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
        """Check that the action raises an error and changes nothing."""
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
        name = self.dice.choice(ELSEWHERE)
        if not hasattr(self.layer, name):  # a name of other layers or libraries
            self.refuses(lambda: setattr(self.layer, name, self.vector()), AttributeError)

    def assign_array(self):
        name = self.dice.choice(ARRAYS)
        value = self.vector()
        if getattr(self.layer, name) is None:
            self.refuses(lambda: setattr(self.layer, name, value), AttributeError)
            return
        bad = self.dice.choice([np.ones(C + 1), 1.0, None, "abcd", np.ones(C, int), [[1.0] * C]])
        self.refuses(lambda: setattr(self.layer, name, bad))
        given = value if self.dice.random() < 0.5 else value.tolist()
        rounded = value.astype(self.layer.dtype)
        changes = getattr(self.layer, name).tobytes() != rounded.tobytes()
        setattr(self.layer, name, given)
        setattr(self.model, name, value.copy())
        value[:] = 99  # the layer must have copied it
        if changes and self.layer._saved is not None and name in ("gamma", "beta"):
            self.changed(name)

    def changed(self, name):
        """Check that backward raises an error if its result depends on the changed parameter."""
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
        """Return a random selection of positions, and a residual."""
        k, axis, rest = {}, self.axis % x.ndim, list(x.shape)
        if self.kind in ("LayerNorm", "RMSNorm"):
            return k
        del rest[axis]
        if self.dice.random() < 0.3:
            k["mask"] = self.rng.random(rest) < 0.7
        if self.dice.random() < 0.2 and x.ndim > 2:
            k["lengths"] = self.rng.integers(0, rest[1] + 1, rest[0])
        if self.dice.random() < 0.5:
            k["masked"] = self.dice.choice(("zero", "normalize"))
        if self.kind.startswith("BatchNorm"):
            if self.dice.random() < 0.3:
                k["residual"] = self.rng.standard_normal(x.shape)
            if self.dice.random() < 0.2:
                k["weights"] = self.rng.uniform(0.5, 2, rest) * (self.rng.random(rest) < 0.9)
        return k

    def impossible(self, x, k, training, preview=False):
        """Return whether forward must raise an error."""
        model, chosen = self.model, {n: k[n] for n in ("mask", "weights", "lengths") if n in k}
        learns = model.tracked and training and model.track_running_stats
        learns, by_batch = learns and model.update_statistics, model.by_batch(training)
        if not by_batch and not (learns or (preview and model.kind.startswith("Instance"))):
            return False
        shares = shares_of(x, self.axis % x.ndim, **chosen)
        if not self.kind.startswith("BatchNorm"):
            each = C // model.num_groups if self.kind == "GroupNorm" else 1
            return (
                bool(chosen) and (np.count_nonzero(shares.reshape(len(x), -1), 1) * each < 2).any()
            )
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
        k, out = self.options(x), None
        training = True if preview else self.model.training
        over = self.dice.random()
        if over < 0.2:
            out = np.full_like(x, 7.0)
        elif over < 0.3 and not preview:
            out = x
        elif over < 0.4 and not {"mask", "weights", "lengths"} & set(k):
            x.reshape(-1)[self.rng.integers(x.size)] = self.dice.choice((np.nan, np.inf))
        before = None if out is None else out.copy()
        context = self.layer.preview if preview else contextlib.nullcontext
        if self.impossible(x, k, training, preview):
            if not preview:
                self.refuses(lambda: self.layer(x, out=out, **k), ValueError)
                assert out is None or (out == before).all()
            return
        want, back, batch = self.model.forward(x.copy(), training, **copy.deepcopy(k))
        if not preview and self.model.learns() and not self.model.learn(batch):
            self.refuses(lambda: self.layer(x, out=out, **k), FloatingPointError)
            assert out is None or (out == before).all()
            return
        with context():
            y = self.layer(x, out=out, num_threads=self.dice.choice((None, 1, 2)), **k)
        np.testing.assert_allclose(y, want, **self.close)
        if preview:
            return
        self.model.saved, self.x, self.lost = back, x, out is x and not self.inverts(k)

    def inverts(self, k):
        """Return whether backward can recover x from y."""
        m = self.model
        leaky = m.kind.startswith("BatchNorm") and m.activation == "leaky_relu" and m.slope > 0
        by_batch = m.kind.startswith("BatchNorm") or (m.tracked and not m.by_batch(m.training))
        plain = by_batch and (getattr(m, "activation", None) is None or leaky)
        return plain and "residual" not in k

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
        if self.lost:
            self.refuses(lambda: self.layer.backward(dy), RuntimeError)
            self.layer._saved = self.model.saved = None
            return
        if self.dice.random() < 0.2:
            self.refuses(lambda: self.layer.backward(dy[:-1]), ValueError)
        if self.dice.random() < 0.1:
            self.x.reshape(-1)[:] = 9
            self.refuses(lambda: self.layer.backward(dy), RuntimeError)
            self.layer._saved = self.model.saved = None
            return
        want = self.model.backward(dy)
        got = self.layer.backward(dy)
        for a, b in zip(got if isinstance(got, tuple) else (got,), want, strict=True):
            np.testing.assert_allclose(a, b, **self.close)

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
            self.model.renorm = self.layer.renorm  # a copy has its own limits
            old.freeze()
            if old.track_running_stats:
                old.running_mean[:] = 5
        self.model.saved = None

    def file(self):
        """Save and load the layer; a layer that could not be loaded again is not saved."""
        file, kind = io.BytesIO(), self.dice.choice(("npz", "safetensors"))
        m = self.model
        lost = m.tracked and m.track_running_stats and not m.finite()
        if lost or (getattr(m, "renorm", None) is not None and not m.track_running_stats):
            self.refuses(lambda: interop.save_layers(file, self.layer, format=kind), ValueError)
            assert not file.getvalue()
            return
        interop.save_layers(file, {"a": self.layer}, format=kind)
        file.seek(0)
        old, self.layer = self.layer, interop.load_layers(file)["a"]
        assert type(self.layer) is type(old)
        for name in ("grad_gamma", "grad_beta"):  # not in a file
            setattr(self.layer, name, getattr(old, name))
        assert snapshot(self.layer) == snapshot(old)
        if m.tracked:
            m.renorm = self.layer.renorm
            if not m.track_running_stats:  # running statistics are then not in the file
                m.mean, m.var, m.batches = np.zeros(C), np.ones(C), 0
        m.saved = None

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
        if self.model.saved is not None:  # gamma is restored, so backward is still possible
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

    # ---- steps that read the state -------------------------------------------------------

    def fold(self):
        if not self.model.tracked:
            return
        weight, bias, x = self.rng.standard_normal((C, 3)), self.vector(), self.vector()[:3]
        fold, bn = cybn.folding.fold_linear, self.layer
        if self.model.by_batch(False):
            self.refuses(bn.scale_shift, ValueError)
            self.refuses(lambda: fold(weight, bias, bn), ValueError)
            return
        scale, shift = bn.scale_shift(np.float64)
        if not self.model.finite():
            self.refuses(lambda: fold(weight, bias, (scale, shift)), ValueError)
            return
        folded = fold(weight, bias, (scale, shift))
        activation = getattr(self.model, "activation", None)
        if activation is not None:
            self.refuses(lambda: fold(weight, bias, bn), ValueError)
            self.model.activation = None
        else:
            np.testing.assert_array_equal(fold(weight, bias, bn)[0], folded[0])
        shape = [1, 1, 1, 1, 1][: len(SHAPES[self.kind][0])]
        shape[self.axis] = C
        want, _, _ = self.model.forward((weight @ x + bias).reshape(shape), training=False)
        if activation is not None:
            self.model.activation = activation
        np.testing.assert_allclose(folded[0] @ x + folded[1], want.ravel(), **self.close)

    def convert(self):
        """Convert to another library and back: inference is equal, or conversion is refused."""
        layer, m, library = self.layer, self.model, self.dice.choice(LIBRARIES)
        to, back = getattr(interop, f"to_{library}"), getattr(interop, f"from_{library}")
        tracks = m.tracked and bool(m.track_running_stats)
        batch = m.kind.startswith("BatchNorm")
        lost = getattr(m, "activation", None) is not None
        lost |= tracks and m.use_batch_statistics is True
        lost |= library != "torch" and m.tracked and batch is not tracks
        if lost or (library == "onnx" and m.eps is None):
            self.refuses(lambda: to(layer), ValueError)
            return
        if library != "onnx":
            options = getattr(interop, f"{library}_options")
            if library != "torch" and (m.eps is None or (batch and m.momentum is None)):
                self.refuses(lambda: options(layer), ValueError)
            else:
                assert options(layer)
        if (tracks and not m.finite()) or not (layer.state_dict() or library == "onnx"):
            return
        k = {"layer": type(layer)} if library != "onnx" or m.tracked else {}
        if m.kind == "GroupNorm" and library != "onnx":
            k["num_groups"] = m.num_groups
        made = back(to(layer), axis=getattr(layer, "axis", 1), **k).eval()
        made.eps, x = layer.eps, self.batch()
        if m.kind == "LayerNorm" or m.tracked or m.kind == "GroupNorm":
            assert type(made) is type(layer)
        np.testing.assert_allclose(made(x), m.forward(x, training=False)[0], **self.close)

    def describe(self):
        text, before = io.StringIO(), snapshot(self.layer)
        assert type(self.layer).__name__ in repr(self.layer)
        if not self.model.tracked:
            return
        with contextlib.redirect_stdout(text):
            self.layer.explain()
        assert text.getvalue()
        if self.model.use_batch_statistics is not None:
            switch = bool(self.model.use_batch_statistics)
            assert f"use_batch_statistics={switch}" in repr(self.layer)
        x, m = self.batch(), self.model
        if not m.track_running_stats:
            self.refuses(lambda: self.layer.drift(x), RuntimeError)
            return
        if m.finite():
            batch = m.measured(x)
            drift, std = self.layer.drift(x), np.sqrt(m.var + m.eps)
            np.testing.assert_allclose(drift.shift, (batch[0] - m.mean) / std, **self.close)
            ratio = np.log((batch[1] + m.eps) / (m.var + m.eps))
            np.testing.assert_allclose(drift.log_variance_ratio, ratio, **self.close)
        if not self.impossible(x, {}, training=True):
            found = cybn.population_statistics(self.layer, [x, x])[self.layer]
            np.testing.assert_allclose(found.mean, m.measured(x)[0], **self.close)
        assert snapshot(self.layer) == before

    STEPS = (
        *(assign, assign, assign, assign_axis, assign_badly, assign_badly, assign_array, switch),
        *(assign_statistics, forward, forward, forward, backward, backward, train, train, preview),
        *(duplicate, file, load, back_and_forth, set_statistics, fold, convert, describe),
    )


def walk(seed, steps=14):
    one = Walk(seed)
    for _ in range(steps):
        step = one.dice.choice(one.STEPS)
        try:
            step(one)
            agree(one.layer, one.model)
        except (Exception, pytest.fail.Exception) as error:
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


def test_every_attribute_and_option_of_every_layer_has_a_step():
    """Every attribute and option is in a table, or a step mentions it."""
    kinds = [k for n in cybn.__all__ if inspect.isclass(k := getattr(cybn, n))]
    kinds = {k.__name__: k for k in kinds if issubclass(k, cybn.Layer) and k is not cybn.Layer}
    assert set(SHAPES) == set(kinds)
    steps = set(re.findall(r"\w+", inspect.getsource(Walk) + inspect.getsource(Model)))
    known = steps | set(GOOD) | set(BAD) | set(ARRAYS) | set(ELSEWHERE)
    for kind in kinds.values():
        names = {n for n in dir(kind) if not n.startswith("_")}
        for function in (kind, kind.forward, kind.backward):
            names |= set(inspect.signature(function).parameters)
        assert names - known <= {"self", "like", "elementwise_affine", "out_residual"}, kind
