"""Random layers of every kind in random steps: each agrees with the functions and its copies."""

import copy
import pickle
import random

import numpy as np
import pytest
from layer_cases import snapshot

import cybn

pytestmark = [pytest.mark.row(37), pytest.mark.row(35)]

ACTIVATIONS = (None, None, "relu", "relu6", "leaky_relu", "sigmoid", "tanh", "silu")
RANKS = {"BatchNorm1d": (2, 3), "BatchNorm2d": (4,), "BatchNorm3d": (5,), "BatchNorm": (2, 3, 4, 5)}
RANKS |= {"InstanceNorm1d": (3, 2), "InstanceNorm2d": (4, 3), "InstanceNorm3d": (5, 4)}
KINDS = (*RANKS, "LayerNorm", "RMSNorm", "GroupNorm")


class Walk:
    """One layer, the shape of its input, and the results that are expected of it."""

    def __init__(self, kind, dice):
        self.dice, self.kind = dice, kind
        self.rng = np.random.default_rng(dice.getrandbits(32))
        self.options = {"eps": dice.choice((1e-5, 1e-3, 0.5))}
        self.options["dtype"] = dice.choice((np.float32, np.float64))
        self.x_dtype = dice.choice((np.float32, np.float64, np.float16))
        if kind.startswith(("BatchNorm", "Instance")):
            self.batch_kind()
        else:
            self.row_kind()
        for parameter in self.layer.parameters():
            parameter[...] = self.rng.uniform(0.5, 2, parameter.shape)

    def batch_kind(self):
        dice, options = self.dice, self.options
        self.channels = dice.randint(1, 7)
        ndim = dice.choice(RANKS[self.kind])
        options["axis"] = dice.choice((1, -1))
        options["momentum"] = dice.choice((0.1, None, 0.0, 1.0, 0.3))
        for name in ("affine", "track_running_stats"):
            options[name] = dice.random() < 0.7
        options["running_ddof"] = dice.choice((0, 1))
        self.instance = self.kind.startswith("Instance")
        if not self.instance:
            options["activation"] = dice.choice(ACTIVATIONS)
            options["slope"] = dice.choice((0.01, 0.2, 1.5))
            options["nan_policy"] = dice.choice(("propagate", "raise", "skip"))
            if dice.random() < 0.2:
                options["virtual_batch_size"] = dice.randint(2, 4)
            if dice.random() < 0.2 and options["track_running_stats"]:
                options["renorm"] = cybn.Renorm(dice.choice((1, 3)), dice.choice((0, 5)))
        self.layer = getattr(cybn, self.kind)(self.channels, **options)
        shape = [dice.randint(2, 6) for _ in range(ndim)]
        unbatched = self.instance and ndim == min(RANKS[self.kind])
        axis = options["axis"]
        if unbatched and axis == 1:
            axis = 0
        shape[axis] = self.channels
        self.shape = tuple(shape)
        if self.instance and self.x_dtype == np.float16:
            self.x_dtype = np.float32

    def row_kind(self):
        dice, options = self.dice, self.options
        if self.x_dtype == np.float16:
            self.x_dtype = np.float32
        lead = tuple(dice.randint(1, 4) for _ in range(dice.randint(1, 3)))
        if self.kind == "GroupNorm":
            groups, each = dice.randint(1, 4), dice.randint(1, 3)
            options["affine"] = dice.random() < 0.7
            options["axis"] = dice.choice((1, -1))
            shape = [dice.randint(2, 5) for _ in range(dice.randint(2, 4))]
            shape[options["axis"]] = groups * each
            self.shape = tuple(shape)
            self.layer = cybn.GroupNorm(groups, groups * each, **options)
            return
        last = tuple(dice.randint(1, 5) for _ in range(dice.randint(1, 2)))
        options["elementwise_affine"] = dice.random() < 0.7
        if self.kind == "LayerNorm":
            options["bias"] = dice.random() < 0.7
        elif dice.random() < 0.5:
            options["eps"] = None
        self.shape = lead + last
        self.layer = getattr(cybn, self.kind)(last, **options)

    # ---- one step ----

    def array(self):
        array = (3 * self.rng.standard_normal(self.shape) + 1).astype(self.x_dtype)
        return np.asfortranarray(array) if self.dice.random() < 0.3 else array

    def keywords(self):
        """Return the keywords of forward."""
        k = {"num_threads": self.dice.choice((1, 2, 3))}
        if self.kind.startswith("BatchNorm") and self.dice.random() < 0.4:
            k["residual"] = self.array()
        plain = not (self.options.get("virtual_batch_size") or self.options.get("renorm"))
        if self.kind.startswith("BatchNorm") and plain and self.dice.random() < 0.3:
            rest = list(self.shape)
            del rest[self.options["axis"]]
            mask = self.rng.random(rest) < 0.8
            mask.flat[:2] = True
            k["mask"] = mask
            k["masked"] = self.dice.choice(("zero", "normalize"))
        return k

    def step(self, layers):
        """Run a step of the layer and its copies; all must agree, also with the functions."""
        training = self.dice.random() < 0.6
        x, k = self.array(), self.keywords()
        results = [self.run(layer, training, x, dict(k)) for layer in layers]
        for other in results[1:]:
            assert [v.tobytes() for v in other[0]] == [v.tobytes() for v in results[0][0]]
            assert other[1] == results[0][1]
        if not (self.options.get("virtual_batch_size") or self.options.get("renorm")):
            self.compare(training, x, k, results[0][0])

    def run(self, layer, training, x, k):
        self.before = layer.state_dict()
        y = layer.train(training)(x, **k)
        threads = {"num_threads": k["num_threads"]}
        dy = np.cos(np.arange(x.size)).reshape(x.shape).astype(x.dtype)
        dx = layer.backward(dy, **threads)
        found = [y, *(dx if isinstance(dx, tuple) else (dx,))]
        return [*found, *(g.copy() for g in layer.gradients())], snapshot(layer)

    # ---- the functions ----

    def compare(self, training, x, k, got):
        dy = np.cos(np.arange(x.size)).reshape(x.shape).astype(x.dtype)
        if self.kind.startswith("BatchNorm"):
            wanted = self.batch_norm(training, x, dy, dict(k))
        elif self.kind.startswith("Instance"):
            wanted = self.instance_norm(training, x, dy)
        else:
            wanted = self.rows(x, dy)
        wanted = [v for v in wanted if v is not None]
        assert len(got) == len(wanted)
        for one, other in zip(got, wanted, strict=True):
            other = np.asarray(other)
            assert one.tobytes() == other.astype(one.dtype).tobytes()

    def affine(self):
        return self.layer.gamma, self.layer.beta

    def batch_norm(self, training, x, dy, k):
        k.pop("num_threads")
        o = self.options
        k |= {name: o[name] for name in ("axis", "eps", "activation", "slope")}
        gamma, beta = self.affine()
        back = k | {"beta": beta}
        if training or not o["track_running_stats"]:
            y, m = cybn.batch_norm(x, gamma, beta, **k)
            found = cybn.batch_norm_backward(dy, x, m, gamma, **back)
            if o["track_running_stats"]:
                self.check_running(m)
        else:
            fixed = self.before["running_mean"], self.before["running_var"]
            y = cybn.batch_norm_inference(x, *fixed, gamma, beta, **k)
            found = cybn.batch_norm_inference_backward(dy, x, *fixed, gamma, **back)
            self.unchanged()
        dx, dgamma, dbeta, *dresidual = found
        return [y, dx, *dresidual, *((dgamma, dbeta) if o["affine"] else ())]

    def check_running(self, m, var=None):
        """Check that running statistics were updated in float64 and rounded once."""
        layer, o = self.layer, self.options
        weight = o["momentum"]
        count = int(layer.num_batches_tracked)
        assert count == int(self.before["num_batches_tracked"]) + 1
        weight = 1 / count if weight is None else weight
        var = m.var(o["running_ddof"]) if var is None else var
        for name, new in (("running_mean", m.mean), ("running_var", var)):
            old = self.before[name].astype(np.float64)
            wanted = (1 - weight) * old + weight * new
            got = getattr(layer, name)
            size = np.abs((1 - weight) * old) + np.abs(weight * new)
            few = 1 if o["dtype"] == np.float32 else 4  # sums in float64, rounded once
            assert (np.abs(got - wanted) <= few * np.finfo(o["dtype"]).eps * size).all(), name

    def unchanged(self):
        now = self.layer.state_dict()
        for name, value in self.before.items():
            assert now[name].tobytes() == value.tobytes(), name

    def instance_norm(self, training, x, dy):
        o, (gamma, beta) = self.options, self.affine()
        batch = x.ndim == max(RANKS[self.kind])
        x, dy = (x, dy) if batch else (x[None], dy[None])
        k = {"axis": o["axis"], "eps": o["eps"]}
        if training or not o["track_running_stats"]:
            y, m = cybn.instance_norm(x, gamma, beta, **k)
            dx, *sums = cybn.instance_norm_backward(dy, x, m, gamma, **k)
            if o["track_running_stats"]:
                mean, var = (
                    v.reshape(len(x), -1).mean(0) for v in (m.mean, m.var(o["running_ddof"]))
                )
                self.check_running(cybn.Moments(m.count, mean, var), var)
        else:
            fixed = self.before["running_mean"], self.before["running_var"]
            y = cybn.batch_norm_inference(x, *fixed, gamma, beta, **k)
            dx, *sums = cybn.batch_norm_inference_backward(dy, x, *fixed, gamma, **k)
            self.unchanged()
        y, dx = (y, dx) if batch else (y[0], dx[0])
        return [y, dx, *(sums if o["affine"] else ())]

    def rows(self, x, dy):
        layer, (gamma, beta) = self.layer, self.affine()
        self.unchanged()
        if self.kind == "GroupNorm":
            k = {"num_groups": layer.num_groups, "axis": layer.axis, "eps": layer.eps}
            y, m = cybn.group_norm(x, gamma, beta, **k)
            dx, *sums = cybn.group_norm_backward(dy, x, m, gamma, **k)
        else:
            k = {"axis": -len(layer.normalized_shape), "eps": layer.eps}
            rms = self.kind == "RMSNorm"
            forward = cybn.rms_norm if rms else cybn.layer_norm
            backward = cybn.rms_norm_backward if rms else cybn.layer_norm_backward
            y, m = forward(x, *((gamma,) if rms else (gamma, beta)), **k)
            dx, *sums = backward(dy, x, m, gamma, **k)
        return [y, dx, *sums[: len(layer.parameters())]]


def twins(layer, make):
    """Return copies of a layer: by copy, deepcopy, pickle and state dict."""
    loaded = make()
    loaded.load_state_dict(layer.state_dict())
    loaded.train(layer.training)
    for mine, other in zip(loaded.gradients(), layer.gradients(), strict=True):
        mine[...] = other  # a state dict has no gradients, a snapshot does
    protocols = range(2, pickle.HIGHEST_PROTOCOL + 1)
    made = [loaded, copy.deepcopy(layer)]
    return made + [pickle.loads(pickle.dumps(layer, p)) for p in protocols]


def refuse(walk, layer, dice):
    """Check that a call that raises an error changes nothing, including the stored forward."""
    x, training = walk.array(), layer.training
    gradients = [g.copy() for g in layer.gradients()]
    y = layer.eval()(x)
    before = snapshot(layer)
    bad = dice.choice(
        (
            lambda: layer(np.zeros((), x.dtype)),
            lambda: layer(x.astype(complex)),
            lambda: layer(x, out=np.zeros(3)),
            lambda: layer(x, num_threads=0),
            lambda: layer.backward(x.astype(complex)),
            lambda: layer.load_state_dict({"nothing": np.ones(3)}),
            lambda: layer.load_state_dict(
                {k: np.full(v.shape, "a") for k, v in layer.state_dict().items()} or {"a": 1}
            ),
        )
    )
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        bad()
    assert snapshot(layer) == before
    layer.backward(y)  # for the forward before the error
    layer.train(training)
    for mine, kept in zip(layer.gradients(), gradients, strict=True):
        mine[...] = kept


def walk_along(kind, seed):
    dice = random.Random(f"{kind}-{seed}")
    walk = Walk(kind, dice)
    layer = walk.layer
    for _ in range(dice.randint(0, 2)):
        walk.step([layer])
    before = snapshot(layer)
    copies = twins(layer, lambda: copy.deepcopy(Walk(kind, random.Random(f"{kind}-{seed}")).layer))
    for twin in copies:
        assert snapshot(twin) == before
        assert type(twin) is type(layer)
    for _ in range(2):
        walk.step([layer, *copies])
        refuse(walk, layer, dice)
        refuse(walk, copies[0], dice)
    for twin in copies:
        assert snapshot(twin) == snapshot(layer)


@pytest.mark.parametrize("kind", KINDS)
def test_some_layers(kind, figure):
    for seed in range(12):
        walk_along(kind, seed)
    figure(37, "layers", 12, how="sum")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_200_layers(kind, figure):
    for seed in range(1000, 1200):
        walk_along(kind, seed)
    figure(37, "layers", 200, how="sum")
