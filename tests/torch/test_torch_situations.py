"""Some forty situations: cybn computes the norm, or PyTorch does and `report` says why.

The table of docs/pytorch.md has a row for each situation.
"""

import contextlib
import copy
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch_cases import twin  # noqa: E402

import cybn.torch  # noqa: E402
from cybn import _dispatch  # noqa: E402
from cybn.torch._small import borders_of  # noqa: E402

DOCS = Path(__file__).parents[2] / "docs" / "pytorch.md"
BATCH, ROWS = (lambda: nn.BatchNorm2d(4)), (lambda: nn.LayerNorm(6))


def image(**options):
    return torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(0), **options)


class Situation:
    """A module, an input, the context and the form of the call, and why PyTorch computes it."""

    def __init__(
        self, x=image, make=BATCH, why="", around=contextlib.nullcontext, change=None, call=None
    ):
        self.x, self.make, self.why, self.around = x, make, why, around
        self.change = change or (lambda module: module)
        self.call = call or (lambda module, x: module(x))


class Subclass(torch.Tensor):
    pass


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


def forward_mode(module, x):
    with torch.autograd.forward_ad.dual_level():
        return module(torch.autograd.forward_ad.make_dual(x, x))


def with_statistics_that_require_gradients(module):
    module.eval().running_mean.requires_grad_()
    return module


def with_one_number(module):
    module.running_mean = torch.zeros(1).expand(4)
    return module


def as_convert_leaves_it(module):
    vars(module)["_cybn_borders"] = borders_of(module)  # ignored by PyTorch's own modules
    return module


def graph_of(module, x):
    torch._dynamo.reset()
    return torch.compile(module, backend="eager", fullgraph=True)(x)


def second(module, x):
    x = x.requires_grad_()
    (g,) = torch.autograd.grad(module(x).pow(3).sum(), x, create_graph=True)
    return torch.autograd.grad(g.square().sum(), x)[0]


def batched(module, x):
    x = x.requires_grad_()
    y = module(x)
    return torch.autograd.grad(y, x, torch.ones(2, *y.shape), is_grads_batched=True)[0]


def checkpoint(module, x):
    return torch.utils.checkpoint.checkpoint(module, x.requires_grad_(), use_reentrant=False)


CYBN = {
    "float32, training": Situation(),
    "float32, evaluation": Situation(change=lambda m: m.eval()),
    "float64": Situation(lambda: image(dtype=torch.float64), change=lambda m: m.double()),
    "bfloat16 input, float32 parameters": Situation(lambda: image().bfloat16()),
    "bfloat16 throughout": Situation(lambda: image().bfloat16(), change=lambda m: m.bfloat16()),
    "float16 throughout": Situation(lambda: image().half(), change=lambda m: m.half()),
    "under autocast": Situation(around=autocast),
    "channels-last": Situation(lambda: image().to(memory_format=torch.channels_last)),
    "any other strides": Situation(lambda: image().transpose(2, 3)),
    "an expanded input": Situation(lambda: image()[:1].expand(3, 4, 5, 6)),
    "no weight and bias": Situation(make=lambda: nn.BatchNorm2d(4, affine=False)),
    "no running statistics": Situation(make=lambda: nn.BatchNorm2d(4, track_running_stats=False)),
    "a cumulative average": Situation(make=lambda: nn.BatchNorm2d(4, momentum=None)),
    "layer norm": Situation(make=ROWS),
    "RMS norm": Situation(make=lambda: nn.RMSNorm(6)),
    "group norm": Situation(make=lambda: nn.GroupNorm(2, 4)),
    "instance norm": Situation(make=lambda: nn.InstanceNorm2d(4)),
    "instance norm without a batch axis": Situation(
        lambda: image()[0], make=lambda: nn.InstanceNorm2d(4)
    ),
    "inside torch.no_grad": Situation(around=torch.no_grad),
    "inside torch.inference_mode": Situation(around=torch.inference_mode),
    "non-reentrant checkpoint": Situation(call=checkpoint),
    "torch.func.functional_call": Situation(
        call=lambda m, x: torch.func.functional_call(m, dict(m.named_parameters()), (x,))
    ),
    "torch.compile": Situation(call=graph_of),
    "torch.export": Situation(
        change=lambda m: m.eval(), call=lambda m, x: torch.export.export(m, (x,)).module()(x)
    ),
    "torch.jit.trace": Situation(
        change=lambda m: m.eval(), call=lambda m, x: torch.jit.trace(m, x)(x)
    ),
}
PYTORCH = {
    "second derivatives": Situation(
        lambda: image(dtype=torch.float64), call=second, change=lambda m: m.double()
    ),
    "batched gradients": Situation(call=batched),
    "torch.jit.script": Situation(
        change=lambda m: m.eval(), call=lambda m, x: torch.jit.script(m)(x)
    ),
}
REASONS = {
    "torch.func.vmap": Situation(
        call=lambda m, x: torch.func.vmap(m)(x[:, None]),
        change=lambda m: m.eval(),
        why="a transform of torch.func",
    ),
    "torch.func.grad": Situation(
        call=lambda m, x: torch.func.grad(lambda v: m(v).sum())(x),
        change=lambda m: m.eval(),
        why="a transform of torch.func",
    ),
    "forward-mode derivatives": Situation(call=forward_mode, why="forward-mode derivatives"),
    "a small call": Situation(change=as_convert_leaves_it, why="the call is small"),
    "another device, such as meta": Situation(
        lambda: image().to("meta"), change=lambda m: m.to("meta"), why="the input is on meta"
    ),
    "a subclass of Tensor": Situation(
        lambda: image().as_subclass(Subclass), why="the input is a Subclass"
    ),
    "an empty batch": Situation(
        lambda: image()[:0], change=lambda m: m.eval(), why="no more than one value a channel"
    ),
    "one value a channel in training": Situation(
        lambda: image()[:1, :, :1, :1], why="no more than one value a channel"
    ),
    "eps of 0": Situation(make=lambda: nn.BatchNorm2d(4, eps=0.0), why="eps is 0.0"),
    "types of input and parameters that do not go together": Situation(
        lambda: image(dtype=torch.float64), why="the input is torch.float64, and a parameter"
    ),
    "channels that do not fit": Situation(lambda: image()[:, :3], why="has shape (4,)"),
    "a running statistic that requires a gradient": Situation(
        change=with_statistics_that_require_gradients, why="a running statistic requires"
    ),
    "one number as the statistic of all channels": Situation(
        change=with_one_number, why="one number is the running statistic"
    ),
}


def outcome(situation, module):
    try:
        with situation.around():
            y = situation.call(module, situation.x())
    except Exception as error:
        return type(error), str(error)
    return y


def assert_same(a, b):
    if isinstance(b, tuple):
        assert a == b
    elif b.is_meta:
        assert (a.shape, a.dtype, a.is_meta) == (b.shape, b.dtype, True)
    else:
        wide = 0.05 if b.dtype in (torch.bfloat16, torch.float16) else 1e-4
        torch.testing.assert_close(a, b, rtol=wide, atol=wide)


def run(situation):
    torch.manual_seed(0)
    stock = situation.make()
    ours = twin(stock)
    stock, ours = situation.change(copy.deepcopy(stock)), situation.change(ours)
    assert_same(outcome(situation, ours), outcome(situation, stock))
    return ours


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CYBN)
def test_by_cybn(name, monkeypatch):
    seen = []
    for entry in ("forward", "inference", "normalize_rows"):
        f = getattr(_dispatch, entry)
        monkeypatch.setattr(_dispatch, entry, lambda *a, _f=f: (seen.append(a), _f(*a))[1])
    module = run(CYBN[name])
    assert seen
    (row,) = cybn.torch.report(module)
    assert (row.computed_by, row.why) == ("cybn", "")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REASONS)
def test_by_pytorch(name, kernel_calls):
    situation = REASONS[name]
    module = run(situation)
    assert not kernel_calls
    (row,) = cybn.torch.report(module)
    assert row.computed_by == "PyTorch"
    assert situation.why in row.why


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PYTORCH)
def test_by_formulas_of_pytorch(name):
    run(PYTORCH[name])


def test_a_reason_goes_with_the_next_call():
    module = twin(nn.BatchNorm2d(4).eval())
    module(image()[:0])
    assert cybn.torch.report(module).rows[0].computed_by == "PyTorch"
    module(image())
    assert cybn.torch.report(module).rows[0] == ("(the model)", "BatchNorm2d", "cybn", "", "")


def test_the_table_has_them_all():
    names = [*CYBN, *PYTORCH, *REASONS]
    assert len(names) == 41
    table = DOCS.read_text("utf-8")
    missing = [name for name in names if f"| {name} |" not in table]
    assert not missing
