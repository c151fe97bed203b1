"""A layer of four channels in the middle of its training, and batches for it."""

import numpy as np

import cybn

C = 4


def batch(rng, n=9, dtype=np.float32):
    return (rng.standard_normal((n, C)) * np.arange(1, C + 1) + 2).astype(dtype)


def trained(rng, **options):
    bn = cybn.BatchNorm(C, **options)
    if bn.affine:
        bn.gamma[:], bn.beta[:] = rng.uniform(-2, 2, C), rng.standard_normal(C)
    bn.running_mean, bn.running_var = rng.standard_normal(C), rng.uniform(0.5, 2, C)
    bn.num_batches_tracked = 3
    return bn
