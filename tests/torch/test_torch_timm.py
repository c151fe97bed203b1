"""Thirty models of timm: results are equal, and most norms are converted and fused."""

import copy

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm_models")

from timm_models import MODELS, timm  # noqa: E402
from torch import nn  # noqa: E402

import cybn.torch  # noqa: E402
from cybn.torch._formulas import ACTIVATIONS  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fuse_all")]

SHARES: dict[str, tuple[int, int, int, int]] = {}


def make(name):
    options = dict(MODELS[name])
    side = options.pop("side", options.get("img_size", 64))
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, **options).double()
    for module in model.modules():  # dropped paths and units are random
        for rate in ("p", "drop_prob", "drop_rate"):
            if isinstance(getattr(module, rate, None), float):
                setattr(module, rate, 0.0)
    x = torch.randn(3, 3, side, side, dtype=torch.float64)
    return model, x


def step(model, x):
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = model(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return [y.detach(), x.grad, *grads, *model.buffers()]


@pytest.mark.parametrize("name", MODELS)
def test_model(name):
    model, x = make(name)
    ours = cybn.torch.convert(copy.deepcopy(model), fuse=True)
    for training in (True, False):
        for _ in range(2):  # the first call learns what follows
            pairs = zip(step(ours.train(training), x), step(model.train(training), x), strict=True)
            for a, b in pairs:
                scale = b.abs().max().item() + 1 if b.numel() else 1
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * scale)
    rows = cybn.torch.report(ours).rows
    alone = [row for row in rows if not row.fused_with]
    missed = [row for row in alone if row.why.split()[0].rstrip("_") in {*ACTIVATIONS, "hardtanh"}]
    by_cybn = sum(row.computed_by == "cybn" for row in rows)
    batch = sum(
        isinstance(ours.get_submodule(row.module), nn.modules.batchnorm._BatchNorm) for row in rows
    )
    SHARES[name] = len(rows), by_cybn, batch, len(rows) - len(alone), len(missed)
    print(f"{name}: norms, by cybn, batch norms, fused, missed: {SHARES[name]}")
    for row in alone[:4]:
        print("   ", row)


def test_shares():
    """At least 95 % of all norms are converted, and 80 % of those that can be fused are fused."""
    assert set(SHARES) == set(MODELS), "run the whole file"
    norms, by_cybn, batch, fused, missed = map(sum, zip(*SHARES.values(), strict=True))
    print(f"{norms} norms, {by_cybn} by cybn; {batch} batch norms, {fused} fused, {missed} missed")
    assert by_cybn >= 0.95 * norms
    assert fused >= 0.8 * (fused + missed)
