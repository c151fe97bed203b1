"""cybn.torch.convert and revert: which modules are replaced, and the result of `report`."""

import copy
import io
import logging
import pickle

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402
from torch.nn.utils import parametrize  # noqa: E402
from torch_cases import twin  # noqa: E402

import cybn.torch  # noqa: E402
from cybn.torch import modules  # noqa: E402


def image(*shape, seed=1):
    return torch.randn(shape or (4, 3, 8, 8), generator=torch.Generator().manual_seed(seed))


def sequential():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU6(), nn.Conv2d(4, 2, 1))


class Mine(nn.BatchNorm2d):
    """A subclass that inherits forward."""

    def extra_repr(self):
        return "mine, " + super().extra_repr()


class Doubles(nn.BatchNorm2d):
    """A subclass whose forward calls the inherited one."""

    def forward(self, x):
        return 2 * super().forward(x)


class Own(nn.Module):
    """A module that normalizes by a function of PyTorch."""

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(channels) + 0.5)

    def forward(self, x, *, scale=1.0):
        return (
            functional.layer_norm(x.movedim(1, -1), self.weight.shape, self.weight).movedim(-1, 1)
            * scale
        )


class ByHand(nn.BatchNorm2d):
    """A subclass that normalizes by its own formulas."""

    def forward(self, x):
        mean = x.mean((0, 2, 3), keepdim=True)
        return (x - mean) / (x.var((0, 2, 3), keepdim=True) + self.eps).sqrt()


class FrozenBatchNorm2d(nn.Module):
    """A frozen batch norm as in detectron2, torchvision and DETR."""

    def __init__(self, channels, eps=1e-5):
        super().__init__()
        self.eps = eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels) + 0.5)

    def forward(self, x):
        w, b, rm, rv = (
            v.reshape(1, -1, 1, 1)
            for v in (self.weight, self.bias, self.running_mean, self.running_var)
        )
        scale = w * (rv + self.eps).rsqrt()
        return x * scale + (b - rm * scale)


class FrozenBatchNormOtherwise(FrozenBatchNorm2d):
    def forward(self, x):
        return super().forward(x) + 1


def same(model, x, kernel_calls=None):
    """Compare a converted copy with the model in both modes, and return the copy."""
    ours = twin(model)
    for training in (True, False):
        grads = []
        for m in (model.train(training), ours.train(training)):
            leaf = x.clone().requires_grad_()
            y = m(leaf)
            y.square().sum().backward()
            grads.append([y.detach(), leaf.grad, *m.buffers()])
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4)
    return ours


# ---- what is converted -------------------------------------------------------------------


@pytest.mark.parametrize("stock", modules.NORMS, ids=lambda c: c.__name__)
def test_a_model_that_is_a_norm(stock):
    norm = stock(2, 4) if stock is nn.GroupNorm else stock(4)
    new = cybn.torch.convert(norm)
    assert type(new) is modules.NORMS[stock] is getattr(cybn.torch, stock.__name__)
    assert type(cybn.torch.revert(new)) is stock


@pytest.mark.parametrize(
    "make",
    [
        lambda: Mine(3),
        lambda: Doubles(3),
        lambda: Own(3),
        lambda: FrozenBatchNorm2d(3),
        lambda: parametrize.register_parametrization(nn.BatchNorm2d(3), "weight", nn.Softplus()),
        lambda: nn.utils.parametrizations.weight_norm(nn.LayerNorm((8, 8))),
    ],
    ids=["inherits", "calls super", "functional", "frozen", "parametrized", "weight norm"],
)
def test_kinds_of_modules(make, kernel_calls):
    torch.manual_seed(0)
    module = make()
    ours = same(nn.Sequential(module), image())
    assert kernel_calls
    assert cybn.torch.report(ours).rows[0].computed_by == "cybn"
    assert isinstance(ours[0], type(module)) or parametrize.is_parametrized(ours[0])
    for how in (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))):
        if how is not copy.deepcopy and parametrize.is_parametrized(module):
            continue  # PyTorch cannot pickle these
        other = how(ours)
        torch.testing.assert_close(other.eval()(image()), ours.eval()(image()))
        assert type(other[0]) is type(ours[0])
        assert type(cybn.torch.revert(other)[0]) is type(module) or "Parametrized" in str(other)
    back = cybn.torch.revert(ours)
    assert type(back[0]).__mro__[0].__name__ == type(module).__name__
    assert not any("cybn" in cls.__module__ for cls in type(back[0]).__mro__)


def test_what_is_left_alone(caplog):
    kinds = [
        ByHand(3),
        nn.SyncBatchNorm(3),
        nn.LazyBatchNorm2d(),
        FrozenBatchNormOtherwise(3),
        nn.ReLU(),
    ]
    model = nn.Sequential(*kinds)
    types = [type(m) for m in model]
    with caplog.at_level(logging.DEBUG, "cybn.torch"), pytest.warns(UserWarning, match="nothing"):
        cybn.torch.convert(model, fuse=True)
    assert [type(m) for m in model] == types
    assert "0: left as it is; its forward does not call" in caplog.text
    found = cybn.torch.report(model)
    assert [row.computed_by for row in found] == ["PyTorch"] * 4
    reasons = "does not call", r"sync=True", "seen no data", "not compute the same"
    for row, reason in zip(found, reasons, strict=True):
        assert reason in row.why
    assert "0 of 4 norms computed by cybn, 0 fused" in str(found)


def test_a_model_without_norms_gives_a_warning():
    with pytest.warns(UserWarning, match=r"nothing was converted.*report"):
        cybn.torch.convert(nn.Linear(2, 2))


def test_lazy_modules_can_be_converted_once_they_are_real():
    model = nn.Sequential(nn.LazyBatchNorm2d(), nn.LazyInstanceNorm2d())
    model(image())
    assert [type(m) for m in cybn.torch.convert(model)] == [
        cybn.torch.BatchNorm2d,
        cybn.torch.InstanceNorm2d,
    ]


def test_memory_format(caplog):
    """Weights with as many axes as the format is for are converted, and the others stay."""
    formats = torch.channels_last, torch.channels_last_3d
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv3d(4, 2, 3), nn.BatchNorm2d(4))
    for converted in (1, 2):
        with caplog.at_level(logging.INFO, "cybn.torch"):
            cybn.torch.convert(model, memory_format=formats[converted - 1])
        assert f"{formats[converted - 1]}; give the inputs the same memory format" in caplog.text
        lies = [
            m.weight.is_contiguous(memory_format=f) for m, f in zip(model, formats, strict=False)
        ]
        assert sum(lies) == converted
    with pytest.raises(TypeError, match=r"memory_format is 'NHWC'.*torch.channels_last"):
        cybn.torch.convert(sequential(), memory_format="NHWC")


# ---- in place, and back ------------------------------------------------------------------


def test_in_place_and_back(caplog):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), sequential())
    model[3].eval()
    modules_before, parameters = list(model.modules()), list(model.parameters())
    types = [type(m) for m in modules_before]
    modes = [m.training for m in modules_before]
    keys = list(model.state_dict())
    with caplog.at_level(logging.DEBUG, "cybn.torch"):
        assert cybn.torch.convert(model) is model
    assert "3 norms converted" in caplog.text
    assert "3.1: computed by cybn" in caplog.text
    assert type(model[1]) is type(model[3][1]) is cybn.torch.BatchNorm2d
    assert cybn.torch.revert(model) is model
    assert [type(m) for m in model.modules()] == types
    assert all(a is b for a, b in zip(model.modules(), modules_before, strict=True))
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert [m.training for m in model.modules()] == modes
    assert list(model.state_dict()) == keys
    assert not any(key in m.__dict__ for m in model.modules() for key in modules.KEPT)


def test_twice_is_once():
    model = cybn.torch.convert(cybn.torch.convert(sequential()), fuse=True)
    assert len(cybn.torch.report(model)) == 1
    cybn.torch.convert(model, fuse=True)
    cybn.torch.revert(cybn.torch.revert(model))
    assert type(model[1]) is nn.BatchNorm2d


@pytest.mark.parametrize("first", ["convert", "parametrize"])
def test_parametrized_modules(first):
    model, stock = sequential(), sequential()
    stock.load_state_dict(model.state_dict())
    if first == "convert":
        cybn.torch.convert(model)
    for m in (model, stock):
        parametrize.register_parametrization(m[1], "weight", nn.Softplus())
    if first == "parametrize":
        cybn.torch.convert(model)
    torch.testing.assert_close(model(image()), stock(image()))
    assert cybn.torch.report(model).rows[0].computed_by == "cybn"
    other = copy.deepcopy(model)
    cybn.torch.revert(model)
    assert type(model[1]).__name__ == "ParametrizedBatchNorm2d"
    assert type(model[1]).__mro__[1] is nn.BatchNorm2d
    torch.testing.assert_close(model.eval()(image()), stock.eval()(image()))
    parametrize.remove_parametrizations(model[1], "weight")
    assert type(model[1]) is nn.BatchNorm2d
    parametrize.remove_parametrizations(other[1], "weight")
    assert type(other[1]) is cybn.torch.BatchNorm2d


def test_hooks_and_optimizers_stay():
    model = sequential()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    seen = []
    model[1].register_forward_hook(lambda *_: seen.append("forward"))
    model[1].register_full_backward_hook(lambda *_: seen.append("backward"))
    cybn.torch.convert(model, fuse=True)
    before = model[1].weight.detach().clone()
    model(image()).square().sum().backward()
    optimizer.step()
    assert seen == ["forward", "backward"]
    assert not torch.equal(model[1].weight, before)


def test_a_module_used_twice():
    bn = nn.BatchNorm2d(3)
    model = nn.Sequential(bn, nn.Conv2d(3, 3, 1), bn)
    other = twin(model)
    assert other[0] is other[2]
    torch.testing.assert_close(other(image()), model(image()), rtol=1e-4, atol=1e-5)
    assert other[0].num_batches_tracked == 2
    torch.testing.assert_close(other[0].running_var, bn.running_var)


def test_shared_weights():
    model = cybn.torch.convert(sequential())
    model[1].share_memory()
    assert model[1].weight.is_shared()


def test_a_whole_model_is_saved_after_revert():
    model = cybn.torch.convert(nn.Sequential(Mine(3), nn.LayerNorm(8)), fuse=True)
    for restored in (False, True):
        file = io.BytesIO()
        torch.save(cybn.torch.revert(model) if restored else model, file)
        assert (b"cybn" in file.getvalue()) is not restored
        file.seek(0)
        other = torch.load(file, weights_only=False)
        assert [type(m) for m in other] == [type(m) for m in model]


@pytest.mark.parametrize("f", [cybn.torch.convert, cybn.torch.revert, cybn.torch.report])
def test_not_a_module(f):
    with pytest.raises(TypeError, match=r"model is of type list; it must be a torch.nn.Module"):
        f([nn.BatchNorm2d(3)])


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.SyncBatchNorm, cybn.torch.BatchNorm2d])
def test_synchronized(kind):
    model = nn.Sequential(kind(3), nn.LayerNorm(8))
    cybn.torch.convert(model, sync=True, fuse=True)
    assert type(model[0]) is cybn.torch.SyncBatchNorm
    assert [row.computed_by for row in cybn.torch.report(model)] == ["cybn", "cybn"]
    stock = nn.Sequential(nn.BatchNorm2d(3), nn.LayerNorm(8))
    torch.testing.assert_close(model(image()), stock(image()), rtol=1e-4, atol=1e-5)
    cybn.torch.convert(model)
    assert type(model[0]) is cybn.torch.SyncBatchNorm
    assert type(cybn.torch.revert(model)[0]) is (
        nn.SyncBatchNorm if kind is nn.SyncBatchNorm else nn.BatchNorm2d
    )
