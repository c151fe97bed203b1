"""Faults that users met: cybn now gives PyTorch's result, or an error that names a solution."""

import copy
import os
import socket
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn.utils import parametrize  # noqa: E402
from torch_cases import bn2d, image, twin  # noqa: E402

import cybn.torch  # noqa: E402

SHARDED = """
import os, sys, torch, cybn.torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

dist.init_process_group("gloo")
torch.manual_seed(0)
def make():
    torch.manual_seed(0)
    norms = nn.BatchNorm1d(8), nn.LayerNorm(8)
    return nn.Sequential(nn.Linear(4, 8), norms[0], nn.ReLU(), norms[1], nn.Linear(8, 2))
found = []
for convert in (False, True):
    model = make()
    if convert:
        cybn.torch.convert(model, fuse=True)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for part in (model[1], model[3], model):
        fully_shard(part, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    losses = []
    for i in range(3):
        torch.manual_seed(i + 10 * dist.get_rank())
        loss = model(torch.randn(16, 4)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    found.append(losses)
    if convert:
        cybn.torch.revert(model)
        assert not any("cybn" in c.__module__ for m in model.modules() for c in type(m).__mro__)
        model(torch.randn(16, 4))
assert all(abs(a - b) < 1e-5 for a, b in zip(*found)), found
print("trained")
dist.destroy_process_group()
"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_1_storages_stay_resizable(kind, mode):
    x = torch.randn(4, 3)
    norm = getattr(cybn.torch, kind.__name__)(3).train(mode == "train")
    norm(x)
    x.resize_(8, 3)
    for p in norm.parameters():
        p.data.untyped_storage().resize_(0)


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
@pytest.mark.parametrize("processes", [1, 2])
def test_1_sharded_models_train(processes, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SHARDED)
    port = str(free_port())
    running = []
    for rank in range(processes):
        environment = os.environ | {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "RANK": str(rank),
            "WORLD_SIZE": str(processes),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, str(script)]
        running.append(
            subprocess.Popen(
                command,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    for process in running:
        text, _ = process.communicate(timeout=200)
        assert process.returncode == 0, text
        assert "trained" in text


def test_2_vectorized_jacobians():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.LayerNorm(4)).double()
    x = image(5, 3, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian
    wanted = jacobian(model, x, vectorize=True)
    torch.testing.assert_close(jacobian(twin(model), x, vectorize=True), wanted)


@pytest.mark.parametrize("training", [True, False])
def test_3_batch_norm_without_a_bias(training):
    try:
        stock = nn.BatchNorm2d(5, bias=False).train(training)
    except TypeError:
        pytest.skip("this PyTorch lacks the option")
    ours = twin(stock)
    torch.testing.assert_close(ours(image()), stock(image()), rtol=1e-4, atol=1e-5)
    assert ours.bias is None


@pytest.mark.parametrize("how", ["parametrized", "copied", "both"])
def test_4_revert_gives_back_the_class(how):
    model = cybn.torch.convert(nn.Sequential(nn.BatchNorm2d(5), nn.GroupNorm(1, 5)))
    if how != "copied":
        for m in model:
            parametrize.register_parametrization(m, "weight", nn.Softplus())
    if how != "parametrized":
        model = copy.deepcopy(model)
    cybn.torch.revert(model)
    for m in model:
        assert not any("cybn" in cls.__module__ for cls in type(m).__mro__)
    model(image())


def test_5_statistics_that_require_a_gradient():
    """The gradient, or the error, is the same as PyTorch's."""
    found = []
    for bn in (nn.BatchNorm2d(5), bn2d()):
        bn.eval()
        bn.running_mean.requires_grad_()
        try:
            bn(image()).square().sum().backward()
            found.append(bn.running_mean.grad)
        except RuntimeError as error:
            found.append(str(error))
    assert type(found[0]) is type(found[1])
    if isinstance(found[0], str):
        assert found[0] == found[1]


@pytest.mark.parametrize("fuse", [False, True])
def test_6_counters_under_checkpoints(fuse, fuse_all):
    counters = []
    model = nn.Sequential(nn.BatchNorm2d(5), nn.ReLU(), nn.BatchNorm2d(5), nn.ReLU())
    for m in (model, cybn.torch.convert(copy.deepcopy(model), fuse=fuse)):
        for _ in range(2):
            x = image().requires_grad_()
            torch.utils.checkpoint.checkpoint(m, x, use_reentrant=False).sum().backward()
        counters.append([int(m[i].num_batches_tracked) for i in (0, 2)])
        counters.append([m[i].running_mean.tolist() for i in (0, 2)])
    assert counters[2] == counters[0]
    assert torch.allclose(torch.tensor(counters[3]), torch.tensor(counters[1]), atol=1e-5)


# Fault 7, changes of fused models, is tested in test_torch_fuse.py.


@pytest.mark.filterwarnings("ignore:Using a non-full backward hook")
def test_8_backward_hooks_see_one_gradient():
    seen = []
    for bn in (nn.BatchNorm2d(5), bn2d()):
        bn.register_backward_hook(lambda m, i, o: seen.append(len(o)))
        bn(image().requires_grad_()).sum().backward()
    assert seen == [1, 1]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_8_script_of_a_subclass():
    class Mine(cybn.torch.BatchNorm2d):
        pass

    scripted = torch.jit.script(Mine(5).eval())
    torch.testing.assert_close(scripted(image()), nn.BatchNorm2d(5).eval()(image()))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_8_a_legacy_script_module():
    class Legacy(torch.jit.ScriptModule):
        def __init__(self, bn):
            super().__init__()
            self.bn = bn

        @torch.jit.script_method
        def forward(self, x):
            return self.bn(x)

    with pytest.raises(RuntimeError, match=r"cybn\.torch\.revert"):
        Legacy(bn2d())
    assert Legacy(cybn.torch.revert(bn2d()))(image()).shape == image().shape


# Fault 9, torch.save of a whole model, is tested in test_torch_convert.py.
