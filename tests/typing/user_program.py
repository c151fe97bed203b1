"""A program like those of users, which mypy --strict and pyright must accept without errors."""

import numpy as np
from numpy.typing import NDArray

import cybn

rng = np.random.default_rng(0)
x = rng.standard_normal((8, 4, 6, 6), dtype=np.float32)

# A network is a list of layers; layers of every kind can be called.
network: list[cybn.Layer] = [
    cybn.BatchNorm(4, momentum=None, nan_policy="skip"),
    cybn.BatchNorm2d(4, activation="relu", virtual_batch_size=4),
    cybn.InstanceNorm2d(4, affine=True, track_running_stats=True),
    cybn.GroupNorm(2, 4),
    cybn.LayerNorm((6, 6)),
    cybn.RMSNorm(6, eps=None),
]
y = x
for layer in network:
    y = layer(y)
dy: NDArray[np.float32] = np.ones_like(x)
for layer in reversed(network):
    dy = layer.backward(dy)
    for p, g in zip(layer.parameters(), layer.gradients(), strict=True):
        p -= 0.1 * g

# Operations on gamma and the statistics need no assertions and no casts.
bn = cybn.BatchNorm2d(4, renorm=cybn.Renorm(r_max=1, d_max=0))
bn.gamma *= 0.5
bn.gamma[0] = 1
bn.beta = [0.0, 1.0, 2.0, 3.0]
bn.gamma -= 0.1 * bn.grad_gamma
largest = float(np.abs(bn.gamma).max())
spread = np.sqrt(bn.running_var + bn.eps)
bn.running_mean = spread - bn.running_mean
bn.eps, bn.activation, bn.momentum = 1e-3, "leaky_relu", 0.2
steps = bn.num_batches_tracked + 1

out = bn(x, residual=x, lengths=[6] * 8, masked="zero")
dx, dr = bn.backward(out, out_residual=np.empty_like(x))
only_dx: NDArray[np.float32] = bn.freeze().eval().backward(out) if steps < 0 else dx
with bn.unfreeze().train().preview() as same:
    same(x)
safe = bn.snapshot()
scale, shift = bn.restore(safe).scale_shift()
far: list[int] = bn.drift(cybn.moments(x)).beyond(shift=1).tolist()
missing = bn.load_state_dict(bn.state_dict(), strict=False).missing_keys

moments: cybn.Moments = cybn.moments(x).merge(cybn.Moments.empty(4).update(x))
for norm, found in cybn.population_statistics([bn], [x], upstream="running").items():
    norm.set_statistics(found)
normalized, of_batch = cybn.batch_norm(x, bn.gamma, bn.beta, activation="relu")
gradients = cybn.batch_norm_backward(x, x, of_batch, bn.gamma, activation="relu")
with cybn.threads(1):
    weight, bias = cybn.folding.fold_conv(np.ones((4, 3, 3, 3)), None, (scale, shift))
twin = cybn.interop.from_torch(cybn.interop.to_torch(cybn.BatchNorm(4)))
print(largest, far, missing, weight.shape, bias.shape, twin, len(gradients), normalized.dtype)
