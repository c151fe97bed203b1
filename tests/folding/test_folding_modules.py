"""Which modules of PyTorch are folded: those that compute a batch norm and nothing more."""

import numpy as np
import pytest

from cybn import folding, interop

torch = pytest.importorskip("torch")
nn = torch.nn

W = np.random.default_rng(0).standard_normal((4, 3, 3, 3), dtype=np.float32)


class WithRelu(nn.BatchNorm2d):
    """A batch norm by class and state whose forward does more, like timm's BatchNormAct2d."""

    def forward(self, x):
        return super().forward(x).relu()


class Named(nn.BatchNorm2d):
    """A subclass that computes the same."""


class FrozenBatchNorm2d(nn.Module):
    """A frozen batch norm like those of torchvision and detectron2."""

    def __init__(self, channels):
        super().__init__()
        for name, value in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1)):
            self.register_buffer(name, torch.full((channels,), float(value)))
        self.eps = 1e-5

    def forward(self, x):
        raise NotImplementedError


def random(module):
    with torch.no_grad():
        for tensor in (module.weight, module.bias, module.running_mean):
            tensor.normal_()
        module.running_var.uniform_(0.5, 2)
    return module.eval()


def test_an_activation_inside_is_not_lost():
    bn = random(WithRelu(4))
    with pytest.raises(ValueError, match=r"WithRelu, whose forward is its own.*activation"):
        folding.fold_conv(W, None, bn)
    weight, bias = folding.fold_conv(W, None, interop.from_torch(bn.state_dict(), eps=bn.eps))
    x = torch.randn(2, 3, 8, 8)
    got = torch.nn.functional.conv2d(x, torch.tensor(weight), torch.tensor(bias)).relu()
    want = bn(torch.nn.functional.conv2d(x, torch.tensor(W)))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [nn.BatchNorm2d, Named, nn.SyncBatchNorm, FrozenBatchNorm2d])
def test_batch_norms_by_other_names(make):
    bn = random(make(4))
    plain = nn.BatchNorm2d(4)
    plain.load_state_dict(bn.state_dict(), strict=False)
    for one, other in zip(
        folding.fold_conv(W, None, bn), folding.fold_conv(W, None, plain), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_a_converted_module_is_a_batch_norm():
    from cybn.torch import convert

    bn = random(nn.BatchNorm2d(4))
    want = folding.fold_conv(W, None, bn)
    model = convert(nn.Sequential(nn.Conv2d(3, 4, 3), bn, nn.ReLU()).eval())
    for one, other in zip(folding.fold_conv(W, None, model[1]), want, strict=True):
        np.testing.assert_array_equal(one, other)
