"""The program that the processes of `test_torch_sync.py` run; see tests/helpers/ranks.py."""

import os
import signal
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from ranks import attempt, linger, report
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cybn.torch import SyncBatchNorm

RANK, SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
CUTS = {2: [0, 1, 11], 3: [0, 1, 1, 11]}[SIZE]  # one sample, possibly none, and the rest
LIMIT = 60.0  # seconds that the group waits; a machine may be busy


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.short = nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
        )

    def forward(self, x):
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + self.short(x)).relu()


def resnet():
    """Return a small ResNet in float64."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        Block(8, 8, 1),
        Block(8, 16, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    ).double()


def mine(t):
    return t[CUTS[RANK] : CUTS[RANK + 1]]


def same_everywhere(*tensors):
    """Return whether tensors are bitwise equal in every process."""
    bits = b"".join(t.detach().numpy().tobytes() for t in tensors)
    found = [None] * SIZE
    dist.all_gather_object(found, bits)
    return len(set(found)) == 1


def distance(a, b):
    return float((a - b).abs().max()) if a.numel() else 0.0


def ddp(channels_last):
    """Compare three steps of a ResNet under DDP with the whole batch in one process."""
    rng = torch.Generator().manual_seed(1)
    form = torch.channels_last if channels_last == "True" else torch.contiguous_format
    one = resnet().to(memory_format=form)
    model = SyncBatchNorm.convert_sync_batchnorm(resnet()).to(memory_format=form)
    model = DistributedDataParallel(model)
    gaps = {"loss": 0.0, "gradients": 0.0, "buffers": 0.0, "parameters": 0.0}
    optimizers = [torch.optim.SGD(m.parameters(), 0.05) for m in (one, model)]
    for _ in range(3):
        x = torch.randn(11, 3, 8, 8, dtype=torch.float64, generator=rng).to(memory_format=form)
        t = torch.randint(5, (11,), generator=rng)
        for optimizer in optimizers:
            optimizer.zero_grad()
        whole = nn.functional.cross_entropy(one(x), t, reduction="sum") / 11
        part = nn.functional.cross_entropy(model(mine(x)), mine(t), reduction="sum") / 11
        whole.backward()
        (part * SIZE).backward()  # because DDP averages over the processes
        total = part.detach().clone()
        dist.all_reduce(total)
        pairs = list(zip(one.parameters(), model.module.parameters(), strict=True))
        gaps["loss"] = max(gaps["loss"], distance(total, whole.detach()))
        gaps["gradients"] = max(gaps["gradients"], *(distance(a.grad, b.grad) for a, b in pairs))
        for optimizer in optimizers:
            optimizer.step()
        gaps["parameters"] = max(gaps["parameters"], *(distance(a, b) for a, b in pairs))
        buffers = list(zip(one.buffers(), model.module.buffers(), strict=True))
        gaps["buffers"] = max(gaps["buffers"], *(distance(a, b) for a, b in buffers))
    assert one.state_dict().keys() == model.module.state_dict().keys()
    assert same_everywhere(*model.module.buffers(), *model.module.parameters())
    model.eval()
    one.eval()
    with torch.no_grad():
        gaps["eval"] = distance(one(x), model.module(x))
    return gaps


def module():
    """Compare one module without DDP, in float32 and bfloat16: y, dx and sums of gradients."""
    rng = torch.Generator().manual_seed(2)
    x = torch.randn(11, 6, 5, generator=rng) * 3 + 20
    dy = torch.randn(11, 6, 5, generator=rng)
    found = {}
    for name, dtype in {"float32": torch.float32, "bfloat16": torch.bfloat16}.items():
        one, bn = nn.BatchNorm1d(6), SyncBatchNorm(6)
        whole, part = (v.to(dtype).detach().requires_grad_() for v in (x, mine(x)))
        y, ys = one(whole.float()).to(dtype), bn(part)
        y.backward(dy.to(dtype))
        ys.backward(mine(dy).to(dtype))
        gaps = [distance(mine(y), ys), distance(mine(whole.grad), part.grad)]
        for a, b in zip(one.parameters(), bn.parameters(), strict=True):
            dist.all_reduce(b.grad)
            gaps.append(distance(a.grad, b.grad))
        pairs = zip(one.buffers(), bn.buffers(), strict=True)
        gaps += [distance(a.float(), b.float()) for a, b in pairs]
        assert ys.dtype == dtype
        assert same_everywhere(*bn.buffers())
        found[name] = max(gaps)
    return found


def state(bn):
    return {name: v.detach().numpy().tobytes().hex() for name, v in bn.state_dict().items()}


def bad_input():
    """Give one process bad arguments: all raise an error, and nothing changes."""
    last = RANK == SIZE - 1
    bn = SyncBatchNorm(6)
    x = torch.randn(4, 6)
    bn(x)
    found = {}

    def tried(name, call):
        before = state(bn)
        found[name] = attempt(call)
        assert state(bn) == before, name

    tried("channels", lambda: bn(x[:, :3] if last else x))
    tried("rank", lambda: bn(x[0] if last else x))
    tried("dtype", lambda: bn(x.int() if last else x))
    tried("few", lambda: bn(x[:0]))
    h = x.clone().requires_grad_() * 1
    y = bn(h)
    if last:
        h.mul_(2)
    tried("changed", lambda: y.sum().backward())
    bn(x)  # the processes are still in step
    tried("trace", lambda: torch.jit.trace(bn, x))
    whole = torch.compile(bn, backend="eager", fullgraph=True)
    tried("one graph", lambda: whole(x))
    torch._dynamo.reset()
    compiled, before = torch.compile(bn, backend="eager"), int(bn.num_batches_tracked)
    assert torch.equal(compiled(x), bn(x))
    assert bn.num_batches_tracked == before + 2
    other = SyncBatchNorm(5 if last else 6)
    found["number"] = attempt(lambda: other(x[:, : other.num_features]))
    return found


def killed():
    """Kill a process: the others raise an error within the time limit of the group."""
    bn = SyncBatchNorm(6)
    x = torch.randn(4, 6)
    bn(x)
    before = state(bn)
    if RANK == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    begun = time.monotonic()
    raised = attempt(lambda: bn(x))
    assert state(bn) == before
    return {"raised": raised, "seconds": time.monotonic() - begun}


def contract():
    """Compare constructor, state dict and conversion with torch.nn.SyncBatchNorm."""
    stock = nn.SyncBatchNorm.convert_sync_batchnorm(resnet())
    ours = SyncBatchNorm.convert_sync_batchnorm(resnet())
    kinds = [[type(m) for m in model.modules()] for model in (stock, ours)]
    assert [SyncBatchNorm if kind is nn.SyncBatchNorm else kind for kind in kinds[0]] == kinds[1]
    for a, b in zip(stock.state_dict().items(), ours.state_dict().items(), strict=True):
        assert a[0] == b[0]
        assert torch.equal(a[1], b[1])
    ours.load_state_dict(stock.state_dict())
    plain = nn.BatchNorm2d(4, affine=False, momentum=None)
    converted = SyncBatchNorm.convert_sync_batchnorm(plain)
    assert converted.weight is None
    assert converted.momentum is None
    converted.eval()
    x = torch.randn(3, 4, 2, 2)
    assert distance(converted(x), plain.eval()(x)) < 1e-6
    half = dist.new_group([0, 1])
    bn = SyncBatchNorm(6, process_group=half)
    data = torch.randn(4, 6, generator=torch.Generator().manual_seed(RANK))
    if RANK < 2:
        bn(data)
        seeds = [torch.Generator().manual_seed(rank) for rank in (0, 1)]
        both = torch.cat([torch.randn(4, 6, generator=seed) for seed in seeds])
        assert distance(bn.running_mean, 0.1 * both.mean(0)) < 1e-6
    return {"extra": repr(bn)}


CASES = {f.__name__: f for f in (ddp, module, bad_input, killed, contract)}

if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{sys.argv[2]}/meeting",
        rank=RANK,
        world_size=SIZE,
        timeout=timedelta(seconds=LIMIT),
    )
    _, number = report(CASES, RANK)
    linger(sys.argv[2], number - (sys.argv[1] == "killed"), LIMIT)
    os._exit(0)
