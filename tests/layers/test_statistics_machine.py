"""Random sequences of steps of a layer, compared with a plain NumPy model of the same rules."""

import copy
import pickle
from contextlib import nullcontext

import numpy as np
import pytest
from hypothesis import HealthCheck, settings, stateful
from hypothesis import strategies as st
from layer_cases import snapshot

import cybn

pytestmark = [pytest.mark.row(10), pytest.mark.row(31), pytest.mark.row(35)]

C = 3
REMEMBERED = (  # attributes in a snapshot
    *("gamma", "beta", "mean", "var", "batches", "seen", "training", "update", "use", "affine"),
)
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


LEARNING = st.tuples(
    st.sampled_from([0.1, 0.0, 1.0, 0.7, None]),
    st.sampled_from([1, 0]),
    st.sampled_from(["propagate", "raise", "skip"]),
)
GHOST = st.sampled_from([None, 2, 3, 50])
LIMITS = st.sampled_from([None, (1, 0), (2, 0.5)])
FORWARD = {
    "seed": st.integers(0, 999),
    "samples": st.sampled_from([2, 4, 7]),
    "length": st.sampled_from([1, 3]),
    "bad": st.sampled_from([None, None, np.nan, np.inf]),
    "out": st.sampled_from([None, "new", "x"]),
}


class Model:
    """The expected state and results of a layer, by the formulas of docs/math.md."""

    def __init__(self):
        self.gamma, self.beta = np.ones(C), np.zeros(C)
        self.mean, self.var, self.batches = np.zeros(C), np.ones(C), 0
        self.training, self.update, self.use, self.affine = True, True, None, True
        self.momentum, self.ddof, self.eps = 0.1, 1, 1e-5
        self.policy, self.ghost, self.renorm = "propagate", None, None
        self.saved = None  # (x, parts) or (x, (mean, var)) of the last forward
        self.seen = None  # (mean, var) of the last batch learnt from, and before it

    def by_batch(self, training):
        return training if self.use is None else self.use

    def parts(self, x, training):
        """Return the slices of samples that are normalized separately."""
        size = self.ghost
        if not training or size is None or size >= len(x):
            return [slice(0, len(x))]
        starts = list(range(0, len(x), size))
        each = x.size // (C * len(x))
        if (len(x) - starts[-1]) * each < 2:
            starts.pop()
        return [slice(a, b) for a, b in zip(starts, [*starts[1:], len(x)], strict=True)]

    def forward(self, x, training):
        """Return y and what backward needs, computed from the current state."""
        y, kept = np.empty_like(x), []
        if not self.by_batch(training):
            std = np.sqrt(self.var + self.eps)
            y = self.scaled((x - row(self.mean)) / row(std))
            return y, (x, self.mean, std)
        for part in self.parts(x, training):
            mean, std = x[part].mean((0, 2)), np.sqrt(x[part].var((0, 2)) + self.eps)
            r, d = np.ones(C), np.zeros(C)
            if training and self.renorm is not None:
                r_max, d_max = self.renorm
                running = np.sqrt(self.var + self.eps)
                r = np.clip(std / running, 1 / r_max, r_max)
                d = np.clip((mean - self.mean) / running, -d_max, d_max)
            xhat = (x[part] - row(mean)) / row(std)
            y[part] = self.scaled(xhat * row(r) + row(d))
            kept.append((part, xhat, std, r, d))
        return y, (x, kept)

    def scaled(self, xhat):
        return xhat * row(self.gamma) + row(self.beta)

    def learn(self, x):
        """Move the statistics and return "learnt", or return the policy if it refuses the batch."""
        mean, var = x.mean((0, 2)), x.var((0, 2), ddof=self.ddof)
        weight = 1 / (self.batches + 1) if self.momentum is None else self.momentum
        after = [
            old if weight == 0 else new if weight == 1 else (1 - weight) * old + weight * new
            for old, new in ((self.mean, mean), (self.var, var))
        ]
        if self.policy != "propagate" and not np.isfinite(after).all():
            return self.policy
        self.seen = (mean, var), (self.mean, self.var)
        (self.mean, self.var), self.batches = after, self.batches + 1
        return "learnt"

    def backward(self, dy):
        x, kept, *fixed = self.saved
        self.saved = None
        g = dy * row(self.gamma)
        if fixed:
            xhat = (x - row(kept)) / row(fixed[0])
            return g / row(fixed[0]), (dy * xhat).sum((0, 2)), dy.sum((0, 2))
        dx, dgamma, dbeta = np.empty_like(x), np.zeros(C), np.zeros(C)
        for part, xhat, std, r, d in kept:
            gr, m = g[part] * row(r), (0, 2)
            inner = gr - row(gr.mean(m)) - xhat * row((gr * xhat).mean(m))
            dx[part] = inner / row(std)
            dgamma += (dy[part] * (xhat * row(r) + row(d))).sum(m)
            dbeta += dy[part].sum(m)
        return dx, dgamma, dbeta


def row(vector):
    return vector[:, np.newaxis]


def same(got, want):
    """Assert that two arrays agree; NaN and infinities count as equal to each other."""
    got, want = (np.where(np.isfinite(v), v, np.nan) for v in (got, want))
    np.testing.assert_allclose(got, want, **CLOSE)


class Machine(stateful.RuleBasedStateMachine):
    """Each rule does one step of the layer and of the model; the invariant compares them."""

    def __init__(self):
        super().__init__()
        self.bn, self.model = cybn.BatchNorm1d(C, dtype=np.float64), Model()
        self.bn.gamma[:] = self.model.gamma = np.array([0.5, -2.0, 1.0])
        self.bn.beta[:] = self.model.beta = np.array([1.0, 0.0, -3.0])
        self.taken = []

    # ---- settings and switches ---------------------------------------------------------------

    @stateful.initialize(learning=LEARNING, ghost=GHOST, limits=LIMITS)
    def start(self, learning, ghost, limits):
        self.set_learning(*learning)
        self.set_small_batches(ghost, limits)

    @stateful.rule(training=st.booleans())
    def mode(self, training):
        self.bn.train(training)
        self.model.training = training

    @stateful.rule(update=st.booleans(), use=st.sampled_from([None, True, False]))
    def switches(self, update, use):
        self.bn.update_statistics = self.model.update = update
        self.bn.use_batch_statistics = self.model.use = use
        self.bn.train_affine = self.model.affine = update

    @stateful.rule(frozen=st.booleans())
    def freeze(self, frozen):
        model = self.model
        model.update = model.affine = not frozen
        model.use = False if frozen else None
        assert (self.bn.freeze() if frozen else self.bn.unfreeze()) is self.bn

    @stateful.rule(learning=LEARNING)
    def relearn(self, learning):
        self.set_learning(*learning)

    @stateful.rule(ghost=GHOST, limits=LIMITS)
    def regroup(self, ghost, limits):
        self.set_small_batches(ghost, limits)

    def set_learning(self, momentum, ddof, policy):
        self.bn.momentum, self.bn.running_ddof, self.bn.nan_policy = momentum, ddof, policy
        self.model.momentum, self.model.ddof, self.model.policy = momentum, ddof, policy

    def set_small_batches(self, ghost, limits):
        self.bn.virtual_batch_size = self.model.ghost = ghost
        self.model.renorm = limits
        self.bn.renorm = None if limits is None else cybn.Renorm(*limits)

    # ---- passes ------------------------------------------------------------------------------

    @stateful.rule(**FORWARD)
    def forward(self, **options):
        self.step(preview=False, **options)

    @stateful.rule(**FORWARD)
    def preview(self, **options):
        self.step(preview=True, **options)

    @stateful.rule(seed=st.integers(0, 999), bad=st.booleans())
    def train(self, seed, bad):
        """The most common step: a forward and its backward in training mode."""
        self.mode(training=True)
        bad = np.nan if bad else None
        self.step(seed=seed, samples=4, length=3, bad=bad, out=None, preview=False)
        self.backward(seed=seed)

    def step(self, seed, samples, length, bad, out, preview):
        rng, model, bn = np.random.default_rng(seed), self.model, self.bn
        x = rng.standard_normal((samples, C, length)) * [[1], [2], [3]] + rng.integers(-3, 3)
        if bad is not None:
            x[0, 1, 0] = bad
        training = model.training or preview
        learns = training and model.update and not preview
        before = copy.deepcopy((model.mean, model.var, model.batches, model.seen))
        with np.errstate(all="ignore"):
            want, saved = model.forward(x.copy(), training)
            outcome = model.learn(x) if learns else None
        given = x.copy()
        target = {None: None, "new": np.full_like(x, 7.0), "x": given}[out]
        with bn.preview() if preview else nullcontext():
            if outcome == "raise":
                remembered = snapshot(bn)
                with pytest.raises(FloatingPointError, match="channel 1"):
                    bn(given, out=target)
                assert snapshot(bn) == remembered
                if target is not None:
                    np.testing.assert_array_equal(target, x if out == "x" else 7.0)
                assert before[2] == model.batches
                return
            y = bn(given, out=target)
        same(y, want)
        if not preview:
            model.saved = saved

    @stateful.rule(seed=st.integers(0, 999))
    def backward(self, seed):
        if self.model.saved is None:
            with pytest.raises(RuntimeError, match="call forward before backward"):
                self.bn.backward(np.ones((2, C)))
            return
        dy = np.random.default_rng(seed).standard_normal(self.model.saved[0].shape)
        with np.errstate(all="ignore"):
            dx, dgamma, dbeta = self.model.backward(dy)
        same(self.bn.backward(dy), dx)
        trained = self.model.affine
        same(self.bn.grad_gamma, dgamma if trained else 0 * self.model.gamma)
        same(self.bn.grad_beta, dbeta if trained else 0 * self.model.gamma)

    # ---- state -------------------------------------------------------------------------------

    @stateful.rule()
    def take(self):
        self.taken.append((self.bn.snapshot(), copy.deepcopy(self.model), snapshot(self.bn)))

    @stateful.precondition(lambda self: self.taken)
    @stateful.rule(data=st.data())
    def restore(self, data):
        taken, model, _ = data.draw(st.sampled_from(self.taken))
        self.bn.restore(taken)
        for name in REMEMBERED:
            setattr(self.model, name, copy.deepcopy(getattr(model, name)))
        self.model.saved = None

    @stateful.rule()
    def scribble(self):
        """Writing to the layer's own arrays must not change any snapshot taken before."""
        self.bn.running_mean[:] = 0.5
        self.model.mean = np.full(C, 0.5)
        if self.bn._saved is None:  # otherwise backward needs gamma
            self.bn.gamma *= -1
            self.model.gamma = -self.model.gamma
        if self.model.saved is not None and len(self.model.saved) == 3:
            self.model.saved = None  # the running statistics of that forward have changed
            self.bn.backward(np.ones_like(self.bn._saved.x))

    @stateful.rule(how=st.sampled_from(["state_dict", "pickle", "deepcopy"]))
    def round_trip(self, how):
        bn, model = self.bn, self.model
        if how == "state_dict":
            state, twin = bn.state_dict(), copy.deepcopy(bn)
            before = snapshot(twin)
            if not (np.isfinite(model.mean).all() and np.isfinite(model.var).all()):
                with pytest.raises(ValueError, match="running_"):
                    twin.load_state_dict(state)
                assert snapshot(twin) == before
                return
            twin.reset_running_stats()
            twin.load_state_dict(state)
        else:
            twin = pickle.loads(pickle.dumps(bn)) if how == "pickle" else copy.deepcopy(bn)
        assert snapshot(twin) == snapshot(bn)
        self.bn, model.saved, model.seen = twin, None, None

    @stateful.rule(reset=st.booleans())
    def set_statistics(self, reset):
        model = self.model
        if reset:
            self.bn.reset_running_stats()
            model.mean, model.var, model.batches, model.seen = np.zeros(C), np.ones(C), 0, None
            return
        self.bn.set_statistics(cybn.Moments(5, np.arange(3.0), np.full(C, 20.0)))
        model.mean, model.var = np.arange(3.0), np.full(C, 20.0 / (5 - model.ddof))

    # ---- invariants --------------------------------------------------------------------------

    @stateful.invariant()
    def agrees(self):
        bn, model = self.bn, self.model
        same(bn.running_mean, model.mean)
        same(bn.running_var, model.var)
        assert bn.num_batches_tracked == model.batches
        assert bn.training is model.training
        assert len(bn.parameters()) == len(bn.gradients()) == 2 * model.affine

    @stateful.invariant()
    def drifts(self):
        if self.model.seen is None:
            with pytest.raises(RuntimeError, match="no batch has updated"):
                self.bn.drift()
            return
        if not np.isfinite(self.model.seen).all():
            return
        (mean, _), (running_mean, running_var) = self.model.seen
        want = (mean - running_mean) / np.sqrt(running_var + self.model.eps)
        same(self.bn.drift().shift, want)

    @stateful.invariant()
    def snapshots_stay(self):
        for taken, model, _ in self.taken:
            same(taken.running.mean, model.mean)
            same(taken.affine[0] if taken.affine else model.gamma, model.gamma)


Machine.TestCase.settings = settings(
    max_examples=80,
    stateful_step_count=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
TestMachine = Machine.TestCase
