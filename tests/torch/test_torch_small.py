"""Small calls of converted modules: PyTorch computes them, bit for bit, and `report` shows it."""

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch_cases import each_rank, random_batch, random_module  # noqa: E402

import cybn.torch  # noqa: E402
from cybn.torch._small import SMALL, borders_of  # noqa: E402

pytestmark = pytest.mark.usefixtures("borders")

NORMS = {
    "batch": lambda: nn.BatchNorm2d(4),
    "layer": lambda: nn.LayerNorm((6, 6)),
    "layer, no bias": lambda: nn.LayerNorm(6, bias=False),
    "rms": lambda: nn.RMSNorm(6),
    "group": lambda: nn.GroupNorm(2, 4),
    "instance": lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
}
each_norm = pytest.mark.parametrize("make", NORMS.values(), ids=NORMS.keys())


def both(module, **options):
    return module, cybn.torch.convert(copy.deepcopy(module), **options)


def step(module, x, dy):
    """Return all results of a forward and a backward."""
    x = x.clone().requires_grad_()
    module.zero_grad()
    y = module(x)
    y.backward(dy)
    return [y, x.grad, *(p.grad for p in module.parameters()), *module.buffers()]


@each_rank
def test_random_batch_norms_are_those_of_pytorch(rank):
    rng = np.random.default_rng(rank)
    for _ in range(20):
        stock, ours = both(random_module(rng, rank, torch.float32))
        for training in (True, False, True):
            x, dy = random_batch(
                rng, stock.num_features, rank, torch.float32, bool(rng.integers(2))
            )
            found, wanted = (step(m.train(training), x, dy) for m in (ours, stock))
            for a, b in zip(found, wanted, strict=True):
                assert torch.equal(a, b)
                assert a.stride() == b.stride()
        assert [(row.computed_by, row.why) for row in cybn.torch.report(ours)] == [
            ("PyTorch", SMALL)
        ]


@each_norm
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_every_norm_is_that_of_pytorch(make, training, kernel_calls):
    stock, ours = both(make().train(training))
    x, dy = torch.randn(2, 3, 4, 6, 6)
    for a, b in zip(step(ours, x, dy), step(stock, x, dy), strict=True):
        assert torch.equal(a, b)
    with torch.no_grad():
        assert torch.equal(ours(x), stock(x))
    assert not kernel_calls
    assert ours.extra_repr() == stock.extra_repr()


def test_an_instance_norm_without_a_batch_axis(kernel_calls):
    stock, ours = both(nn.InstanceNorm2d(4))
    x = torch.randn(4, 6, 6)
    assert torch.equal(ours(x), stock(x))
    assert not kernel_calls


@each_norm
def test_the_border(make, kernel_calls):
    """cybn computes a call with as many values as the border, and PyTorch one with fewer."""
    module = cybn.torch.convert(make()).eval()
    border = borders_of(module)[0]
    sizes = -(-border // 144), border // 144 - 1
    for samples, kernels in zip(sizes, (1, 0), strict=True):
        kernel_calls.clear()
        with torch.no_grad():
            module(torch.randn(samples, 4, 6, 6))
        assert len(kernel_calls) == kernels
        (row,) = cybn.torch.report(module)
        assert row.computed_by == ("cybn" if kernels else "PyTorch")


@each_norm
def test_small_calls_can_be_computed_too(make, kernel_calls):
    module = cybn.torch.convert(cybn.torch.convert(make()), small_calls=True)
    module(torch.randn(3, 4, 6, 6))
    assert len(kernel_calls) == 1
    (row,) = cybn.torch.report(module)
    assert (row.computed_by, row.why) == ("cybn", "")


def test_modules_of_its_own_classes_compute_all_calls(kernel_calls):
    cybn.torch.BatchNorm2d(4)(torch.randn(3, 4, 6, 6))
    assert len(kernel_calls) == 1


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.BatchNorm2d(4), (1, 4, 1, 1)),
        (lambda: nn.BatchNorm2d(4), (3, 5, 6, 6)),
        (lambda: nn.BatchNorm2d(4), (4, 6)),
        (lambda: nn.LayerNorm(6), (3, 5)),
        (lambda: nn.RMSNorm(6), (3, 5)),
        (lambda: nn.GroupNorm(4, 4), (1, 4)),
        (lambda: nn.GroupNorm(2, 4), (3, 5)),
        (lambda: nn.InstanceNorm2d(4), (3, 4, 1, 1)),
        (lambda: nn.InstanceNorm2d(4, affine=True), (3, 5, 6, 6)),
    ],
)
def test_errors_are_those_of_pytorch(make, shape):
    texts = []
    for module in both(make()):
        with pytest.raises((ValueError, RuntimeError)) as caught:
            module(torch.randn(shape))
        texts.append(str(caught.value))
    assert texts[0] == texts[1]


def test_a_copy_and_a_pickle_hand_over_too(kernel_calls, tmp_path):
    module = cybn.torch.convert(nn.BatchNorm2d(4))
    torch.save(module, tmp_path / "module")
    x = torch.randn(3, 4, 6, 6)
    for other in (copy.deepcopy(module), torch.load(tmp_path / "module", weights_only=False)):
        other(x)
    cybn.torch.revert(module)(x)
    assert not kernel_calls
    assert not [name for name in vars(module) if name.startswith("_cybn")]


@pytest.mark.filterwarnings("ignore")  # PyTorch deprecates its own trace
def test_graphs_hold_the_kernels(kernel_calls):
    """Small calls are included, because the size may be different when the graph runs."""
    module = cybn.torch.convert(nn.BatchNorm2d(4)).eval()
    x = torch.randn(3, 4, 6, 6)
    torch._dynamo.reset()
    for graph in (torch.jit.trace(module, x).graph, torch.export.export(module, (x,)).graph):
        assert "cybn" in str(graph)


def test_a_small_call_leaves_what_fusing_has_learned():
    model = cybn.torch.convert(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()), fuse=True)
    large, small = torch.randn(600, 4, 16, 16), torch.randn(3, 4, 6, 6)
    for x in (large, small, large, large):
        model(x)
    (row,) = cybn.torch.report(model)
    assert (row.computed_by, row.fused_with) == ("cybn", "relu")


class Scaled(nn.BatchNorm2d):
    """A subclass whose forward calls another method that normalizes."""

    def normalized(self, x):
        return nn.functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training
        )

    def forward(self, x):
        return 2 * self.normalized(x)


def test_a_forward_in_parts_is_that_of_pytorch(kernel_calls):
    stock, ours = both(Scaled(4))
    x = torch.randn(3, 4, 6, 6)
    assert torch.equal(ours(x), stock(x))
    assert not kernel_calls
    (row,) = cybn.torch.report(ours)
    assert (row.computed_by, row.why) == ("PyTorch", SMALL)
