"""PyTorch's own test samples of every norm, run with cybn's modules and functions, too.

`module_db` makes modules and inputs, `op_db` makes arguments of functions. Each sample runs with
both libraries, and results, gradients and buffers must agree. If PyTorch raises an error, cybn must
raise the same one.
"""

import copy

import pytest

torch = pytest.importorskip("torch")
module_db = pytest.importorskip("torch.testing._internal.common_modules").module_db
op_db = pytest.importorskip("torch.testing._internal.common_methods_invocations").op_db

from torch import nn  # noqa: E402

import cybn.torch  # noqa: E402
from cybn.torch import modules  # noqa: E402
from cybn.torch._functional import FUNCTIONS  # noqa: E402

MODULES = [info for info in module_db if issubclass(info.module_cls, tuple(modules.NORMS))]
OPERATORS = [info for info in op_db if info.name.removeprefix("nn.functional.") in FUNCTIONS]
BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 4e-2}
DTYPES = list(BOUNDS)
NOT_APPLICABLE = {
    "LazyBatchNorm": "it becomes a batch norm with its first data, and can be converted then",
    "LazyInstanceNorm": "it becomes an instance norm with its first data",
    "SyncBatchNorm": "it needs processes: tests/distributed",
    "LocalResponseNorm": "it has no mean and no variance",
    "CrossMapLRN2d": "it has no mean and no variance",
    "native_": "the operator beneath a function, which modules do not call",
    "_native_": "the operator beneath a function, which modules do not call",
    "_batch_norm_with_update": "the operator beneath a function, which modules do not call",
    "nn.functional.local_response_norm": "it has no mean and no variance",
    "nn.functional.normalize": "it divides by a length, and has no mean and no variance",
    "masked.norm": "a length, or a division by one",
    "linalg.": "a length",
    "norm": "a length",
    "renorm": "a division by a length",
}
NO_NORMS = {"normal", "log_normal"}  # random numbers

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).split(".")[1])
pytestmark = pytest.mark.filterwarnings("ignore")


def outcome(call, arguments, keywords):
    """Return the result of a call and the gradients of its tensors, or the error that it raises."""
    tensors = [t for t in (*arguments, *keywords.values()) if isinstance(t, torch.Tensor)]
    leaves = {id(t): t.detach().clone().requires_grad_(t.requires_grad) for t in tensors}
    arguments = [leaves.get(id(a), a) for a in arguments]
    keywords = {name: leaves.get(id(a), a) for name, a in keywords.items()}
    try:
        y = call(*arguments, **keywords)
    except Exception as error:
        return type(error), str(error)
    inputs = [t for t in leaves.values() if t.requires_grad]
    if not y.requires_grad:
        return [y]
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)
    return [y, *torch.autograd.grad(y, inputs, weights, allow_unused=True)]


def assert_same(ours, stock, dtype):
    if not isinstance(stock, list):
        assert ours == stock
        return
    for a, b in zip(ours, stock, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.stride() == b.stride() or a.numel() == 0
            scale = b.detach().abs().max().item() if b.numel() else 0
            bound = BOUNDS[dtype]
            torch.testing.assert_close(a, b, rtol=bound, atol=bound * (1 + scale), equal_nan=True)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("info", MODULES, ids=lambda info: info.name)
@each_dtype
def test_modules(info, dtype, training, kernel_calls):
    name = info.module_cls.__name__
    reason = next((why for known, why in NOT_APPLICABLE.items() if name.startswith(known)), None)
    if reason is not None:
        pytest.skip(reason)
    samples = info.module_inputs_func(
        info, device="cpu", dtype=dtype, requires_grad=True, training=training
    )
    count = 0
    for sample in samples:
        if sample.forward_input is None:
            continue
        made = sample.constructor_input
        stock = info.module_cls(*made.args, **{**made.kwargs, "dtype": dtype}).train(training)
        for p in stock.parameters():
            nn.init.uniform_(p, 0.5, 2)
        ours = cybn.torch.convert(copy.deepcopy(stock))
        given = sample.forward_input
        results = [outcome(m, list(given.args), given.kwargs) for m in (ours, stock)]
        assert_same(*results, dtype)
        for a, b in zip(ours.buffers(), stock.buffers(), strict=True):
            torch.testing.assert_close(a, b, rtol=BOUNDS[dtype], atol=BOUNDS[dtype])
        count += 1
    mode = "training" if training else "evaluation"
    print(f"{name}, {dtype}, {mode}: {count} samples passed; {len(kernel_calls)} kernel calls")
    assert count
    assert kernel_calls


@pytest.mark.parametrize("info", OPERATORS, ids=lambda info: info.name)
@each_dtype
def test_functions(info, dtype, kernel_calls):
    ours = FUNCTIONS[info.name.removeprefix("nn.functional.")]
    stock = getattr(nn.functional, ours.__name__)
    count = 0
    for sample in info.sample_inputs("cpu", dtype, requires_grad=True):
        arguments, keywords = [sample.input, *sample.args], sample.kwargs
        results = [outcome(f, arguments, keywords) for f in (ours, stock)]
        assert_same(*results, dtype)
        count += 1
    print(f"{info.name}, {dtype}: {count} samples passed; {len(kernel_calls)} kernel calls")
    assert count
    assert kernel_calls


def test_every_norm_is_listed():
    """Norms of either database that are not run are not applicable, for a reason."""
    norms = {info.module_cls.__name__ for info in module_db} | {info.name for info in op_db}
    norms = {name for name in norms - NO_NORMS if "norm" in name.lower() or "LRN" in name}
    run = {info.module_cls.__name__ for info in MODULES} | {info.name for info in OPERATORS}
    assert len(run) >= 14
    print()
    for name in sorted(norms - run):
        reasons = [why for known, why in NOT_APPLICABLE.items() if name.startswith(known)]
        assert reasons, name
        print(f"{name}: not applicable: {reasons[0]}")
