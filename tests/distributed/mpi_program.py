"""The program that the ranks of `test_mpi.py` run under ``mpiexec``; see tests/helpers/ranks.py."""

import copy
import itertools
import os
import pickle
import signal
import sys
import time

import numpy as np
import pytest
from bounds import forward_bound, worst
from cases import backward_bound
from mpi4py import MPI
from ranks import attempt, linger, report

import cybn
from cybn.mpi import Ranks, SyncBatchNorm, SyncBatchNorm1d, SyncBatchNorm2d

COMM = MPI.COMM_WORLD
CUTS = {  # borders of the samples of each rank; some ranks have one sample or none
    1: [0, 13],
    2: [0, 1, 13],
    3: [0, 1, 1, 13],
    4: [0, 1, 1, 6, 13],
    7: [0, 1, 1, 3, 5, 9, 10, 13],
}
LIMIT = 3.0  # seconds that a rank waits for a missing one


def mine(array):
    """Return the samples of this rank."""
    cuts = CUTS[COMM.size]
    return None if array is None else array[cuts[COMM.rank] : cuts[COMM.rank + 1]]


def same_everywhere(*arrays):
    """Return whether arrays are bitwise equal on every rank."""
    bits = [np.asarray(a).tobytes() for a in arrays]
    return len(set(map(tuple, COMM.allgather(bits)))) == 1


def batch(rng, dtype, axis, C=6):
    shape = (13, C, 5, 4) if axis == 1 else (13, 5, 4, C)
    x, dy, r = (rng.standard_normal(shape).astype(dtype) for _ in range(3))
    gamma, beta = rng.uniform(0.5, 2, C), rng.standard_normal(C)
    return (x * 3 + 20).astype(dtype), dy, r, gamma, beta


def layers(C, axis, dtype, gamma, beta, **options):
    """Return a layer for all ranks together, and an equal one for a single process."""
    kind = np.float64 if dtype == np.float64 else np.float32
    both = (
        SyncBatchNorm(C, axis=axis, dtype=kind, timeout=120, **options),
        cybn.BatchNorm(C, axis=axis, dtype=kind, **options),
    )
    for layer in both:
        layer.gamma, layer.beta = gamma, beta
    return both


def equal():
    """Compare the plain layer with long double; return the largest ratio of error to bound."""
    fractions = []
    for dtype, axis in itertools.product((np.float32, np.float64), (1, -1)):
        x, dy, _, gamma, beta = batch(np.random.default_rng(1), dtype, axis)
        bn, one = layers(6, axis, dtype, gamma, beta)
        gamma, beta = one.gamma, one.beta
        y = bn(mine(x))
        dx = bn.backward(mine(dy))
        one(x)
        exact, bound = forward_bound(x, gamma, beta, axis)
        gradients, bounds = backward_bound(dy, x, gamma, axis)
        if len(y):
            fractions += [worst(y, mine(exact), mine(bound))]
            fractions += [worst(dx, mine(gradients[0]), mine(bounds[0]))]
        fractions += [worst(bn.grad_gamma, gradients[1], bounds[1])]
        fractions += [worst(bn.grad_beta, gradients[2], bounds[2])]
        eps = np.finfo(dtype).eps
        np.testing.assert_allclose(bn.running_mean, one.running_mean, rtol=4 * eps)
        np.testing.assert_allclose(bn.running_var, one.running_var, rtol=4 * eps)
        assert y.dtype == dx.dtype == dtype
        assert same_everywhere(bn.running_mean, bn.running_var, bn.grad_gamma, bn.grad_beta)
    return {"worst": max(fractions)}


def options():
    """Compare residuals, activations, masks and weights with those in one process."""
    rng = np.random.default_rng(2)
    choices = itertools.product(
        (np.float32, np.float64, np.float16),
        (1, -1),
        (None, "relu", "gelu", "leaky_relu"),
        (False, True),
        (None, "mask", "zero", "weights"),
    )
    worst_of, count = {}, 0
    for dtype, axis, activation, residual, selected in choices:
        x, dy, r, gamma, beta = batch(rng, dtype, axis)
        x -= dtype(20)
        bn, one = layers(6, axis, dtype, gamma, beta, activation=activation, running_ddof=0)
        given = {"residual": r if residual else None}
        places = (13, 5, 4)
        if selected in ("mask", "zero"):
            given["mask"] = rng.random(places) < 0.6
        if selected == "weights":
            given["weights"] = rng.random(places) * (rng.random(places) < 0.8)
        masked = "zero" if selected == "zero" else "normalize"
        part = {name: mine(value) for name, value in given.items()}
        y, ys = one(x, masked=masked, **given), bn(mine(x), masked=masked, **part)
        found, wanted = bn.backward(mine(dy)), one.backward(dy)
        if not residual:
            found, wanted = (found,), (wanted,)
        pairs = [(ys, mine(y)), *((f, mine(w)) for f, w in zip(found, wanted, strict=True))]
        pairs += [(bn.grad_gamma, one.grad_gamma), (bn.grad_beta, one.grad_beta)]
        pairs += [(bn.running_mean, one.running_mean), (bn.running_var, one.running_var)]
        for a, b in pairs:
            if a.size:
                a, b = a.astype(np.float64), b.astype(np.float64)
                off = np.abs(a - b).max() / max(1.0, np.abs(b).max()) / np.finfo(dtype).eps
                name = np.dtype(dtype).name
                worst_of[name] = max(worst_of.get(name, 0.0), float(off))
        assert same_everywhere(bn.running_mean, bn.running_var, bn.grad_gamma, bn.grad_beta)
        count += 1
    return {"worst": worst_of, "cases": count}


def huge():
    """Compare results for values whose variance or products overflow with those in one process."""
    rng = np.random.default_rng(9)
    choices = itertools.product(
        ((np.float32, 1e13), (np.float32, 1e30), (np.float64, 1e125), (np.float64, 1e200)),
        (None, "silu", "leaky_relu"),
        (False, True),
        (None, "mask", "weights"),
        (False, True),
    )
    off = []
    for (dtype, scale), activation, residual, selected, in_place in choices:
        x, dy, r, gamma, beta = batch(rng, np.float64, 1, 4)
        x = ((x - 20) * np.array([1, scale, 1, scale])[:, None, None]).astype(dtype)
        x[:, 3] += dtype(2 * scale)
        dy, r = dy.astype(dtype), r.astype(dtype)
        bn, one = layers(4, 1, dtype, gamma, beta, activation=activation, running_ddof=0)
        given = {"residual": r if residual else None}
        if selected:
            values = rng.random((13, 5, 4))
            given[selected] = values < 0.6 if selected == "mask" else values
        part = {name: mine(value) for name, value in given.items()}
        here, there = mine(x).copy(), mine(dy).copy()
        from_y = in_place and not residual and activation != "silu" and dtype == np.float64
        with np.errstate(all="ignore"):
            y = one(x, **given)
            wanted = one.backward(dy)
            ys = bn(here, out=here if from_y else None, **part)
            found = bn.backward(there, out=there if in_place else None)
        if not residual:
            found, wanted = (found,), (wanted,)
        pairs = [(ys, mine(y)), *((f, mine(w)) for f, w in zip(found, wanted, strict=True))]
        pairs += [
            (getattr(bn, n)[None], getattr(one, n)[None]) for n in ("grad_gamma", "grad_beta")
        ]
        for a, b in pairs:
            a, b = (np.moveaxis(v, 1, 0).reshape(4, -1).astype(np.longdouble) for v in (a, b))
            if a.size:
                gap = np.abs(a - b).max(1) / np.maximum(np.abs(b).max(1), np.finfo(dtype).tiny)
                off.append(float(gap.max() / np.finfo(dtype).eps))
    return {"off": max(off), "cases": len(off)}


def repeats():
    """Count different results of repeats in which other ranks are late."""
    x, dy, _, gamma, beta = batch(np.random.default_rng(3), np.float32, 1)
    seen = set()
    for turn in range(6):
        bn, _ = layers(6, 1, np.float32, gamma, beta)
        time.sleep(0.02 * ((COMM.rank + turn) % COMM.size))
        y = bn(mine(x))
        time.sleep(0.02 * ((COMM.rank * 3 + turn) % COMM.size))
        dx = bn.backward(mine(dy))
        arrays = y, dx, bn.running_mean, bn.running_var, bn.grad_gamma, bn.grad_beta
        seen.add(tuple(a.tobytes() for a in arrays))
    return {"different": len(seen)}


def state(bn):
    """Return the bits of the complete state of a layer."""
    kept = [*bn.state_dict().values(), *bn.gradients()]
    return [bn._saved is None, *(np.asarray(v).tobytes().hex() for v in kept)]


def bad_input():
    """Give one rank bad arguments: all ranks raise an error, and nothing changes."""
    last, first = COMM.rank == COMM.size - 1, COMM.rank == 0
    x, dy, *_ = batch(np.random.default_rng(4), np.float32, 1)
    x, dy = mine(x), mine(dy)
    bn = SyncBatchNorm2d(6, timeout=120)
    bn(x)
    bn.backward(dy)
    found = {}

    def tried(name, call):
        before = state(bn)
        found[name] = attempt(call)
        assert state(bn) == before, name

    tried("shape", lambda: bn(x[:, :3] if last else x))
    tried("rank", lambda: bn(x[0] if last and len(x) else x if not last else x[..., 0]))
    tried("dtype", lambda: bn(x.astype(int) if first else x))
    tried("residual", lambda: bn(x, residual=x[..., :2] if first else x))
    out = np.full_like(x, 7)
    tried("out", lambda: bn(x, out=out[..., :1] if first else out))
    assert (out == 7).all(), "out was written to"
    tried("mask", lambda: bn(x, mask=np.ones((2, 2)) if last else None))
    tried("backward first", lambda: bn.backward(dy))
    bn(x)
    before = bn._saved
    tried("dy", lambda: bn.backward(dy[:, :2] if last else dy))
    assert bn._saved is before
    out = np.full_like(dy, 7)
    tried("dy, out", lambda: bn.backward(dy[:, :2] if last else dy, out=out))
    assert (out == 7).all(), "out was written to"
    bn.backward(dy)  # the ranks are still in step
    bn.nan_policy = "raise"
    out = np.full_like(x, 7)
    tried("nan", lambda: bn(np.full_like(x, np.nan) if first else x, out=out))
    assert (out == 7).all(), "out was written to"
    tried("few", lambda: bn(x[:0]))
    bn.nan_policy = "propagate"
    one = np.zeros(x.shape[0:1] + x.shape[2:])
    tried("weights", lambda: bn(x, weights=one if not first else one + 1e-3, out=out))
    assert (out == 7).all(), "out was written to"
    return found


def out_of_step():
    """Let ranks call different passes, or use different numbers of channels."""
    x = np.random.default_rng(5).standard_normal((4, 6))
    found = {}
    bn = SyncBatchNorm1d(6, timeout=LIMIT)
    bn(x)
    found["pass"] = attempt(lambda: bn(x) if COMM.rank else bn.backward(x))
    sizes = [(6, 5), (64, 128)]
    for here, there in sizes:
        C = there if COMM.rank else here
        bn = SyncBatchNorm1d(C, timeout=LIMIT)
        before = state(bn)
        found[f"{here}, {there}"] = attempt(lambda bn=bn, C=C: bn(np.ones((4, C))))
        assert state(bn) == before
    return found


def killed(where):
    """Kill a rank: the others raise an error within the limit, and nothing changes."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # mpiexec's signal that a rank was killed
    x = np.random.default_rng(6).standard_normal((4, 6))
    bn = SyncBatchNorm(6, timeout=LIMIT)
    bn.backward(bn(x))
    if where == "backward":
        bn(x)
    before = state(bn)
    if COMM.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    begun = time.monotonic()
    call = bn.backward if where == "backward" else bn
    first = attempt(lambda: call(x))
    took = time.monotonic() - begun
    assert state(bn) == before
    return {"first": first, "seconds": took, "second": attempt(lambda: call(x))}


def modes():
    """Compare eval, freezing, previews, copies, pickles and state dicts with those of BatchNorm."""
    x, dy, _, gamma, beta = batch(np.random.default_rng(7), np.float64, 1)
    bn, one = layers(6, 1, np.float64, gamma, beta)
    for layer, data in ((bn, mine(x)), (one, x)):
        layer(data)
        layer.eval()

    def alike(a, b):
        np.testing.assert_allclose(a, mine(b), rtol=1e-13, atol=1e-13)

    if COMM.rank == 0:  # no messages in eval mode: the other ranks do not take part
        alike(bn(mine(x)), one(x))
        alike(bn.backward(mine(dy)), one.backward(dy))
    for layer in (bn, one):
        layer.train()
        layer.use_batch_statistics = False  # running statistics still learn
    alike(bn(mine(x)), one(x))
    np.testing.assert_allclose(bn.running_mean, one.running_mean, rtol=1e-14)
    np.testing.assert_allclose(bn.running_var, one.running_var, rtol=1e-13)
    alike(bn.backward(mine(dy)), one.backward(dy))
    bn.freeze()
    one.freeze()
    alike(bn(mine(x)), one(x))
    bn.unfreeze()
    one.unfreeze()
    with bn.preview(), one.preview():
        alike(bn(mine(x)), one(x))
        with pytest.raises(RuntimeError, match="no backward in a preview"):
            bn.backward(mine(dy))
    for other in (copy.copy(bn), copy.deepcopy(bn), pickle.loads(pickle.dumps(bn))):
        assert other.comm == COMM
        assert other.state_dict().keys() == one.state_dict().keys()
        other.load_state_dict(one.state_dict())
        alike(other(mine(x)), copy.deepcopy(one)(x))
    settings = [attempt(lambda: setattr(bn, "virtual_batch_size", 2))]
    settings += [attempt(lambda: setattr(bn, "renorm", cybn.Renorm()))]
    settings += [attempt(lambda: SyncBatchNorm(2, comm="world"))]
    settings += [attempt(lambda: SyncBatchNorm(2, timeout=0))]
    return {"settings": settings, "repr": repr(bn), "number": bn.num_batches_tracked}


def statistics():
    """Test `Moments.allreduce`, and statistics of a dataset that is spread over the ranks."""
    x, *_ = batch(np.random.default_rng(8), np.float64, 1)
    whole = cybn.Moments.empty(6).update(x)
    for comm in (COMM, Ranks(COMM, 60)):
        found = cybn.Moments.empty(6).update(mine(x)).allreduce(comm)
        assert found.count == whole.count
        np.testing.assert_allclose(found.mean, whole.mean, rtol=1e-15)
        np.testing.assert_allclose(found.m2, whole.m2, rtol=1e-13)
        assert same_everywhere(found.mean, found.m2)
    batches = [x + i for i in range(3)]
    here, all_parts = [], []
    for rank in range(COMM.size):
        parts = [b[: 5 + rank] for b in batches]
        all_parts += parts
        here = parts if rank == COMM.rank else here
    plain = cybn.BatchNorm2d(6)
    wanted = cybn.population_statistics(plain, all_parts)[plain]
    for bn in (cybn.BatchNorm2d(6), SyncBatchNorm2d(6, timeout=120)):
        found = cybn.population_statistics(bn, here, comm=COMM)[bn]
        assert found.count == wanted.count
        np.testing.assert_allclose(found.mean, wanted.mean, rtol=1e-14)
        np.testing.assert_allclose(found.m2, wanted.m2, rtol=1e-12)
        assert same_everywhere(found.mean, found.m2)
    data = [] if COMM.rank == 0 else here
    return {"raised": attempt(lambda: cybn.population_statistics(plain, data, comm=COMM))}


def _network(rng, norm, dtype):
    from cybn.demo.network import AveragePool, Conv3x3, Dense, Flatten, Network

    network = Network(
        Conv3x3(rng, 1, 8, 0.3, bias=False),
        norm(8),
        AveragePool(),
        Conv3x3(rng, 8, 16, 0.12, bias=False),
        norm(16),
        Flatten(),
        Dense(rng, 256, 10, 0.06),
    )
    for layer in network.layers:
        if isinstance(layer, Conv3x3 | Dense):  # their weights are float32 by default
            arrays = {k: v for k, v in vars(layer).items() if isinstance(v, np.ndarray)}
            vars(layer).update({name: array.astype(dtype) for name, array in arrays.items()})
    return network


def digits(activation, dtype, networks):
    """Train digits networks for 200 steps, with the batch on all ranks and in one process."""
    from cybn.demo.data import batches, load_digits
    from cybn.demo.network import softmax_cross_entropy

    data, link = load_digits(0), Ranks(COMM, 600)
    size, steps, kind = 64, 200, np.dtype(dtype).type
    here = np.array_split(np.arange(size), COMM.size)[COMM.rank]

    def train(seed, norm, mine_of):
        network = _network(np.random.default_rng(seed), norm, kind)
        order = batches(np.random.default_rng(seed + 1), len(data.train_x), size)
        losses = []
        for _ in range(steps):
            chosen = next(order)[mine_of]
            share = len(chosen) / size
            loss, dlogits = softmax_cross_entropy(
                network(data.train_x[chosen].astype(kind)), data.train_y[chosen]
            )
            network.backward(dlogits * kind(share))
            if mine_of is here:
                plain = [v for v in network.layers if not isinstance(v, SyncBatchNorm)]
                gradients = [g for layer in plain for g in layer.gradients()]
                row = np.concatenate([[loss * share], *(g.ravel() for g in gradients)])
                row = link.gather(row.astype(np.float64)).sum(0)  # in the order of the ranks
                loss, ends = float(row[0]), np.cumsum([g.size for g in gradients])[:-1]
                for gradient, total in zip(gradients, np.split(row[1:], ends), strict=True):
                    gradient[...] = total.reshape(gradient.shape)
            network.descend(0.1)
            losses.append(loss)
        statistics = [
            v
            for layer in network.layers
            if hasattr(layer, "running_mean")
            for v in (layer.running_mean, layer.running_var)
        ]
        return losses, statistics

    def norm(of, **options):
        return lambda C: of(C, activation=activation, dtype=kind, **options)

    found = {"together": [], "same": True}
    for seed in range(int(networks)):
        losses, statistics = train(seed, norm(SyncBatchNorm, timeout=600), here)
        found["together"].append(losses)
        found["same"] &= same_everywhere(*statistics)
    for name, which in (("alone", slice(None)), ("turned", slice(None, None, -1))):
        own = range(COMM.rank, int(networks), COMM.size)
        found[name] = {seed: train(seed, norm(cybn.BatchNorm), which)[0] for seed in own}
    return found


CASES = {
    f.__name__: f
    for f in (
        *(equal, options, huge, repeats, bad_input, out_of_step, killed, modes, statistics, digits),
    )
}

if __name__ == "__main__":
    _, number = report(CASES, COMM.rank)
    if sys.argv[1] in ("killed", "out_of_step"):  # MPI can no longer be finalized
        linger(sys.argv[2], number - (sys.argv[1] == "killed"), 60)
        os._exit(0)
