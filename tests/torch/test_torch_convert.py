"""cybn.torch.convert and revert: what is swapped, what stays, and what is fused."""

import copy
import logging

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch_cases import STOCK, twin  # noqa: E402

import cybn.torch  # noqa: E402
from cybn.torch import modules  # noqa: E402
from cybn.torch._graph import followers  # noqa: E402


def image(*shape, seed=1):
    return torch.randn(shape or (4, 3, 8, 8), generator=torch.Generator().manual_seed(seed))


def names(model):
    """Return the name of each batch norm's certain activation, by the batch norm's name."""
    by_module = {module: name for name, module in model.named_modules()}
    return {by_module[bn]: by_module.get(a) for bn, a in followers(model).items()}


def fused(model):
    """Return the names of batch norms that compute an activation too."""
    return [name for name, m in model.named_modules() if getattr(m, "follower", None)]


class Block(nn.Module):
    """A residual block whose one ReLU is used three times."""

    def __init__(self, activation=nn.ReLU, inplace=True):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv3, self.bn3 = nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3)
        self.act = activation(inplace=inplace)

    def forward(self, x):
        y = self.act(self.bn1(self.conv1(x)))
        y = self.act(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += x
        return self.act(y)


class Reads(nn.Module):
    """Holds a batch norm and an activation, and a forward given as a function."""

    def __init__(self, forward, **more):
        super().__init__()
        self.bn, self.act, self.f = nn.BatchNorm2d(3), nn.ReLU(), forward
        for name, module in more.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.f(self, x)


def sequential(activation=nn.ReLU6):
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), activation(), nn.Conv2d(4, 2, 1))


# ---- convert and revert ------------------------------------------------------------------


def test_in_place_and_back(caplog):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Block().conv1, sequential())
    model[3].eval()
    modules_before, parameters = list(model.modules()), list(model.parameters())
    types = [type(m) for m in modules_before]
    modes = [m.training for m in modules_before]
    keys = list(model.state_dict())
    with caplog.at_level(logging.DEBUG, "cybn.torch"):
        assert cybn.torch.convert(model) is model
    assert "2 batch norms converted" in caplog.text
    assert "3.1: batch norm by cybn" in caplog.text
    assert type(model[1]) is type(model[3][1]) is cybn.torch.BatchNorm2d
    assert cybn.torch.revert(model) is model
    assert [type(m) for m in model.modules()] == types
    assert all(a is b for a, b in zip(model.modules(), modules_before, strict=True))
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert [m.training for m in model.modules()] == modes
    assert list(model.state_dict()) == keys
    assert not any("follower" in m.__dict__ for m in model.modules())


@pytest.mark.parametrize("stock", dict.fromkeys(STOCK.values()), ids=lambda c: c.__name__)
def test_a_model_that_is_a_batch_norm(stock):
    bn = stock(4)
    new = cybn.torch.convert(bn)
    assert type(new) is modules.BATCH_NORMS[stock]
    assert type(cybn.torch.revert(new)) is stock


def test_twice_is_once():
    model = cybn.torch.convert(cybn.torch.convert(sequential()), fuse=True)
    assert fused(model) == ["1"]
    assert fused(cybn.torch.convert(model, fuse=True)) == ["1"]
    cybn.torch.revert(cybn.torch.revert(model))
    assert type(model[2]) is nn.ReLU6


def test_what_is_left_alone(caplog):
    class Mine(nn.BatchNorm2d):
        pass

    kinds = [Mine(3), nn.SyncBatchNorm(3), nn.LazyBatchNorm2d(), nn.InstanceNorm2d(3)]
    model = nn.Sequential(*kinds)
    types = [type(m) for m in model]
    with caplog.at_level(logging.DEBUG, "cybn.torch"):
        cybn.torch.convert(model, fuse=True)
    assert [type(m) for m in model] == types
    assert "0: left as it is, a Mine" in caplog.text


def test_lazy_modules_can_be_converted_once_they_are_real():
    model = nn.Sequential(nn.LazyBatchNorm2d())
    model(image())
    assert type(cybn.torch.convert(model)[0]) is cybn.torch.BatchNorm2d


def test_parametrized_modules():
    model = cybn.torch.convert(nn.Sequential(nn.BatchNorm2d(3)))
    nn.utils.parametrize.register_parametrization(model[0], "weight", nn.Softplus())
    stock = nn.Sequential(nn.BatchNorm2d(3))
    nn.utils.parametrize.register_parametrization(stock[0], "weight", nn.Softplus())
    torch.testing.assert_close(model(image()), stock(image()))
    assert type(cybn.torch.convert(stock)[0]).__name__ == "ParametrizedBatchNorm2d"


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


def test_distributed_copies_and_shared_weights():
    model = cybn.torch.convert(sequential())
    model[1].share_memory()
    assert model[1].weight.is_shared()


@pytest.mark.parametrize("f", [cybn.torch.convert, cybn.torch.revert])
def test_not_a_module(f):
    with pytest.raises(TypeError, match=r"model is of type list; it must be a torch.nn.Module"):
        f([nn.BatchNorm2d(3)])


# ---- which activation is certain to follow -----------------------------------------------


def test_followers_in_a_sequence():
    assert names(sequential()) == {"1": "2"}
    assert names(nn.Sequential(nn.BatchNorm1d(3), nn.GELU())) == {"0": None}
    assert names(nn.Sequential(nn.BatchNorm1d(3))) == {"0": None}


def test_followers_of_a_shared_activation():
    assert names(Block()) == {"bn1": "act", "bn2": "act", "bn3": None}


@pytest.mark.parametrize(
    "forward",
    [
        pytest.param(lambda m, x: nn.functional.relu(m.bn(x)), id="function"),
        pytest.param(lambda m, x: m.bn(x).relu(), id="method"),
        pytest.param(lambda m, x: (lambda y: m.act(y) + y)(m.bn(x)), id="used again"),
        pytest.param(lambda m, x: (lambda y: (m.act(y), y))(m.bn(x)), id="returned"),
        pytest.param(lambda m, x: m.act(m.bn(x) + x), id="sum"),
        pytest.param(lambda m, x: (m.act(m.bn(x)), m.bn(x)), id="called twice"),
        pytest.param(lambda m, x: (m.act(m.bn(x)), m.other(m.bn(x))), id="two activations"),
        pytest.param(lambda m, x: m.act(m.bn(x)) if m.training else m.bn(x), id="by mode"),
        pytest.param(lambda m, x: m.act(m.bn(x).add_(1)), id="in place"),
        pytest.param(lambda m, x: m.act(input=m.bn(x)), id="by keyword"),
    ],
)
def test_followers_that_are_not_certain(forward):
    model = Reads(forward, other=nn.ReLU())
    assert names(model) == {"bn": None}
    converted = copy.deepcopy(model)
    converted = cybn.torch.convert(converted, fuse=True)
    assert not fused(converted)


def test_optional_arguments_are_tried_both_ways():
    class Optional(Reads):
        def forward(self, x, scale=None):
            y = self.bn(x)
            if scale is None:
                y = y * 2
            return self.act(y)

    assert names(Optional(None)) == {"bn": None}


def test_what_cannot_be_traced_is_traced_in_parts():
    class Depends(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.bn, self.act = sequential(), Block(), nn.BatchNorm2d(2), nn.ReLU()

        def forward(self, x):
            x = self.b(x)
            return self.act(self.bn(self.a(x))) if x.sum() > 0 else x

    model = nn.Sequential(Depends())
    assert names(model) == {  # a, a container, may be called piece by piece
        "0.b.bn1": "0.b.act",
        "0.b.bn2": "0.b.act",
        "0.b.bn3": None,
    }


def test_a_batch_norm_with_a_place_that_was_not_traced():
    class Depends(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = Reads(lambda m, x: m.act(m.bn(x)))
            self.bn = self.a.bn

        def forward(self, x):
            return self.a(x) if x.sum() > 0 else self.bn(x)

    assert names(Depends()) == {"a.bn": None}


def test_a_block_with_a_hook_is_looked_at_alone():
    """What a hook on a block may see or change is the block's output, not what is inside."""
    model = nn.Sequential(sequential(), nn.Sequential(nn.BatchNorm2d(2)), nn.ReLU())
    model[0].register_forward_hook(lambda *_: None)
    model[1].register_forward_hook(lambda *_: None)
    assert names(model) == {"0.1": "0.2", "1.0": None}


def test_a_hook_can_never_come_between():
    """A norm whose enclosing module ends before the activation is not fused."""

    class Apart(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
            self.act = nn.SiLU()

        def forward(self, x):
            return self.act(self.block(x))

    model = Apart().eval()
    ours = cybn.torch.convert(copy.deepcopy(model), fuse=True)
    for m in (model, ours):
        m.block.register_forward_hook(lambda m, i, o: o * 1.0)
    assert not fused(ours)
    torch.testing.assert_close(ours(image()), model(image()))
    around = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(nn.SiLU()))
    assert names(around) == {"0": None}


def test_a_wrapper_of_the_activation_comes_between():
    model = Reads(lambda m, x: m.wrapped(m.bn(x)))
    model.wrapped = nn.Sequential(model.act)
    assert names(model) == {"bn": None}


def test_what_is_called_piece_by_piece_is_not_fused():
    class Mine(nn.Sequential):
        pass

    class Pieces(nn.Module):
        def __init__(self, kind):
            super().__init__()
            self.layers = kind(nn.BatchNorm2d(3), nn.SiLU())
            self.blocks = nn.ModuleList([kind(Block())])

        def forward(self, x, n):
            for i in range(n):
                x = self.layers[i](x)
            return x

    for kind in (nn.Sequential, Mine, lambda *m: nn.ModuleList(m)):
        model = Pieces(kind).eval()
        ours = cybn.torch.convert(copy.deepcopy(model), fuse=True)
        assert fused(ours) == ["blocks.0.0.bn1", "blocks.0.0.bn2"]
        for n in (1, 2):
            torch.testing.assert_close(ours(image(), n), model(image(), n))


def test_branches_on_gradients_are_seen():
    model = Reads(lambda m, x: m.act(m.bn(x)) if torch.is_grad_enabled() else m.bn(x))
    assert names(model) == {"bn": None}


def test_fuse_false_undoes_fuse_true():
    model = cybn.torch.convert(sequential(nn.SiLU), fuse=True)
    assert fused(model) == ["1"]
    assert fused(cybn.torch.convert(model)) == []
    assert fused(cybn.torch.convert(model, fuse=True)) == ["1"]


@pytest.mark.parametrize("fails", [False, True])
def test_side_effects_of_a_traced_forward_are_undone(fails):
    class Counts(Reads):
        def __init__(self):
            super().__init__(None)
            self.register_buffer("steps", torch.zeros((), dtype=torch.long))
            self.register_buffer("ema", torch.ones(3))
            self.register_buffer("last", None)
            self.calls, self.seen, self.by_name, self.kinds = 0, [], {}, set()
            self.plain = torch.ones(2)

        def forward(self, x):
            self.calls += 1
            self.steps.add_(1)
            self.ema.data.mul_(0.5)
            self.plain.zero_()
            self.last = self.y = self.act(self.bn(x))
            self.seen.append(x)
            self.by_name["x"] = x
            self.kinds.add(x)
            if fails and x.sum() > 0:
                return x
            return self.y

    model = Counts()
    attributes, buffers = list(model.__dict__), dict(model._buffers)
    cybn.torch.convert(model, fuse=True)
    assert fused(model) == ([] if fails else ["bn"])
    assert list(model.__dict__) == attributes
    assert all(model._buffers[name] is b for name, b in buffers.items())
    assert (model.steps, model.calls, model.last) == (0, 0, None)
    assert torch.equal(model.ema, torch.ones(3))
    assert torch.equal(model.plain, torch.ones(2))
    assert (model.seen, model.by_name, model.kinds) == ([], {}, set())
    copy.deepcopy(model)


def test_tracing_leaves_no_trace():
    class Draws(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = sequential().eval()

        def forward(self, x):
            return self.a(x + torch.rand(1))

    model = Draws()
    seen = []
    model.a.register_forward_hook(lambda *_: seen.append(1))
    state = torch.get_rng_state()
    modes = [m.training for m in model.modules()]
    assert names(model) == {"a.1": "a.2"}
    assert torch.equal(state, torch.get_rng_state())
    assert modes == [m.training for m in model.modules()]
    assert not seen
