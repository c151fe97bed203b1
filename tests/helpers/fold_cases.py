"""Random layers to fold, for the tests with other libraries and those without."""

from typing import Any, NamedTuple

import numpy as np

import cybn
from cybn import folding

CASES = 500
KINDS = ["conv1d", "conv2d", "conv3d", "transposed1d", "transposed2d", "transposed3d", "linear"]
MOST_EPS = 4  # times eps, times the sum of the absolute terms of an output: the allowed error


class Case(NamedTuple):
    """A linear map, its geometry, and the batch norm after it."""

    kind: str
    weight: Any  # in PyTorch's layout
    bias: Any
    bn: cybn.BatchNorm
    groups: int
    stride: int
    padding: int
    dilation: int

    @property
    def transposed(self):
        return self.kind.startswith("transposed")

    @property
    def inputs(self):
        return self.weight.shape[0] if self.transposed else self.weight.shape[1] * self.groups

    @property
    def outputs(self):
        return self.bn.num_features

    @property
    def fold(self):
        if self.kind == "linear":
            return folding.fold_linear
        return folding.fold_conv_transpose if self.transposed else folding.fold_conv

    @property
    def options(self):
        return {} if self.kind == "linear" else {"groups": self.groups}

    def measure(self, **changes):
        geometry = {} if self.kind == "linear" else self.geometry
        return folding.measure(
            self.fold, self.weight, self.bias, self.bn, **geometry, **self.options, **changes
        )

    @property
    def geometry(self):
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}


def random_norm(rng, channels, dtype, affine=True):
    """Return a batch norm with statistics of many sizes, some means far from zero."""
    bn = cybn.BatchNorm(channels, affine=affine, eps=10 ** rng.uniform(-5, -2), dtype=dtype)
    bn.running_mean = rng.standard_normal(channels) * np.exp2(rng.uniform(-4, 8, channels))
    bn.running_var = np.exp2(rng.uniform(-8, 8, channels))
    if affine:
        bn.gamma[:], bn.beta[:] = rng.standard_normal((2, channels))
    return bn


def random_case(rng, index, dtype):
    kind = KINDS[index % len(KINDS)]
    groups = 1 if kind == "linear" else int(rng.choice([1, 1, 2, 3, 4, 6]))
    each_in, each_out = (int(n) for n in rng.integers(1, 5, 2))
    dims = 0 if kind == "linear" else int(kind[-2])
    taps = [int(k) for k in rng.integers(1, 3 if dims == 3 else 5, dims)]
    dilation = int(rng.integers(1, 4))
    reach = min([(k - 1) * dilation + 1 for k in taps], default=1)
    wide, narrow = each_in * groups, each_out
    if not kind.startswith("transposed"):
        wide, narrow = each_out * groups, each_in
    outputs = each_out * groups
    return Case(
        kind,
        rng.standard_normal((wide, narrow, *taps)).astype(dtype),
        rng.standard_normal(outputs).astype(dtype) if rng.random() < 0.5 else None,
        random_norm(rng, outputs, dtype, affine=rng.random() < 0.9),
        groups,
        stride=int(rng.integers(1, 4)),
        padding=int(rng.integers(0, (reach + 1) // 2)),
        dilation=dilation,
    )


def random_cases(dtype):
    rng = np.random.default_rng([20150211, np.dtype(dtype).itemsize])
    return [random_case(rng, i, dtype) for i in range(CASES)]
