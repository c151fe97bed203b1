"""PyTorch: its native operators, or its modules if the task is a layer.

On the CPU, `torch.nn.functional.batch_norm` calls `torch.native_batch_norm`. Here this gets no
running statistics, so it need not update them. Operators with an ``out=`` form are also timed in
this form; other calls always have a fresh output. Channels-last is PyTorch's memory format, not a
permuted copy. Activations follow the normalization, in place if PyTorch has such a form.
torch.compile is a separate peer.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from functools import partial
from math import prod
from typing import Any

from ..task import EPS, FIRST, FRESH, LAST, REUSED, Contestant, Data, Peer, Task, first_of

Call = Callable[[], Any]
ALL = [True, True, True]  # compute all three gradients
INPLACE = ("relu", "leaky_relu", "silu", "hardswish", "relu6")


class PyTorch(Peer):
    """PyTorch on the CPU, without autograd if possible."""

    name = "PyTorch"
    install = "pip install torch==2.13.0"
    order = 10
    note = "native operators; autograd for RMS norm, instance norm and the backward of activations"

    def __init__(self) -> None:
        self.torch = importlib.import_module("torch")
        self.version = str(self.torch.__version__)

    def contestants(self, task: Task, data: Data) -> Iterator[Contestant]:
        """Yield both memory formats, with fresh outputs and, if possible, reused ones."""
        before = partial(self.torch.set_num_threads, task.threads)
        images = len(task.shape) in (4, 5)  # only these have channels-last
        for layout in () if task.masked else task.layouts if images else [FIRST]:
            t = {k: self.tensor(v, layout) for k, v in data.arrays(task, layout)._asdict().items()}
            if task.norm != "batch":  # the other norms need parameters of x's type
                t |= {name: t[name].to(t["x"].dtype) for name in ("gamma", "beta")}
            for output, call in self.calls(
                task, t, self.tensor(data.get("out", task.dtype, layout), layout)
            ):
                yield Contestant(layout, output, call, partial(self.read, layout), before=before)

    def tensor(self, array: Any, layout: str) -> Any:
        """Return an array as a tensor that shares its memory, in the shape (N, C, ...)."""
        if array is None:
            return None
        torch, half = self.torch, array.dtype.name == "bfloat16"
        t = torch.from_numpy(array.view("int16") if half else array)
        t = t.view(torch.bfloat16) if half else t
        return t.movedim(-1, 1) if layout == LAST and t.ndim > 1 else t

    def read(self, layout: str, result: Any) -> Any:
        """Return the output in float64."""
        y = first_of(result).detach().double().numpy()
        return y.transpose(0, *range(2, y.ndim), 1) if layout == LAST else y

    def calls(self, task: Task, t: dict[str, Any], out: Any) -> Iterator[tuple[str, Call]]:
        """Yield outputs and calls, in one layout."""
        acts = task.activation or task.residual
        if task.module:
            yield FRESH, partial(self.module(task, t), t["x"])
        elif task.norm in ("rms", "instance") or (acts and task.operation == "backward"):
            yield FRESH, self.autograd(task, t)
        elif acts:
            yield FRESH, partial(self.fused, task, t["residual"], *self.native(task, t)[:2])
        else:
            operator, arguments, results = self.native(task, t)
            yield FRESH, partial(operator, *arguments)
            if task.norm != "batch":
                outs = {f"out{i}": self.torch.empty_like(r) for i, r in enumerate(results)}
                yield REUSED, partial(operator.out, *arguments, **outs)
            elif task.operation != "backward":  # the out= form of backward copies
                sizes = 0 if task.operation == "inference" else task.channels
                outs = {"out": (out, *(t["gamma"].new_empty(sizes) for _ in "ab"))}
                yield REUSED, partial(operator, *arguments, **outs)

    def native(self, task: Task, t: dict[str, Any]) -> tuple[Any, tuple[Any, ...], Any]:
        """Return an operator of ATen, its arguments, and tensors like its results."""
        aten = self.torch.ops.aten
        x, dy, gamma, beta = t["x"], t["dy"], t["gamma"], t["beta"]
        if task.norm == "batch":
            training = task.operation != "inference"
            statistics = (None, None) if training else (t["mean"], t["var"])
            options: tuple[Any, ...] = (x, gamma, beta, *statistics, training, 0.1, EPS)
            if task.operation != "backward":
                return self.torch.native_batch_norm, options, ()
            _, mean, rstd = self.torch.native_batch_norm(*options)
            given: tuple[Any, ...] = (dy, x, gamma, None, None, mean, rstd, True, EPS, ALL)
            return aten.native_batch_norm_backward.default, given, ()
        if task.norm == "layer":
            options = (x, [task.channels], gamma, beta, EPS)
            result = aten.native_layer_norm(*options)
            given = (dy, x, [task.channels], *result[1:], gamma, beta, ALL)
        else:
            n, c, *spatial = task.shape
            sizes = (n, c, prod(spatial), task.groups)
            options = (x, gamma, beta, *sizes, EPS)
            result = aten.native_group_norm(*options)
            given = (dy, x, *result[1:], gamma, *sizes, ALL)
        if task.operation == "forward":
            return getattr(aten, f"native_{task.norm}_norm"), options, result
        return getattr(aten, f"native_{task.norm}_norm_backward"), given, (x, gamma, beta)

    def act(self, task: Task, z: Any, **options: Any) -> Any:
        """Apply the activation."""
        f = self.torch.nn.functional
        return getattr(f, task.activation)(z, **options) if task.activation else z

    def fused(self, task: Task, residual: Any, normalize: Any, arguments: Any) -> Any:
        """Normalize, add the residual and activate, in place if possible."""
        z = normalize(*arguments)[0]
        options = {"inplace": True} if task.activation in INPLACE else {}
        return self.act(task, z.add_(residual) if task.residual else z, **options)

    def formula(self, task: Task) -> Callable[..., Any]:
        """Return the norm as a function of x, gamma, beta and residual."""
        f = self.torch.nn.functional

        def norm(x: Any, gamma: Any, beta: Any, residual: Any = None) -> Any:
            if task.norm == "rms":
                return f.rms_norm(x, [task.channels], gamma, EPS)
            if task.norm == "instance":
                return f.instance_norm(x, weight=gamma, bias=beta, eps=EPS)
            z = f.batch_norm(x, None, None, gamma, beta, True, 0.1, EPS)
            return self.act(task, z + residual if task.residual else z)

        return norm

    def autograd(self, task: Task, t: dict[str, Any], wrap: Any = lambda norm: norm) -> Call:
        """Return a call of forward without a graph, or of the gradients of a graph that is kept."""
        torch, norm = self.torch, wrap(self.formula(task))
        names = ["x", "gamma", *["beta"] * (task.norm != "rms"), *["residual"] * task.residual]
        if task.operation == "forward":
            return torch.no_grad()(partial(norm, **{"beta": None, **{n: t[n] for n in names}}))
        leaves = {name: t[name].detach().clone().requires_grad_() for name in names}
        y = norm(**{"beta": None, **leaves})
        wanted = tuple(leaves.values())
        return partial(torch.autograd.grad, y, wanted, t["dy"], retain_graph=True)

    def module(self, task: Task, t: dict[str, Any]) -> Any:
        """Return a layer with running statistics, as users of PyTorch have it."""
        nn = self.torch.nn
        kind = [nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d][len(task.shape) - 2]
        layer = kind(task.channels, eps=EPS, dtype=t["gamma"].dtype)
        layer.load_state_dict({"weight": t["gamma"], "bias": t["beta"]}, strict=False)
        return layer


class Compiled(PyTorch):
    """`torch.compile` with static shapes; backward is the function it compiles for autograd."""

    name = "torch.compile"
    install = "pip install torch==2.13.0, and a C++ compiler"
    order = 11
    note = "static shapes; takes some seconds a shape, which are not counted"
    quick = False

    def __init__(self) -> None:
        super().__init__()
        importlib.import_module("torch._dynamo").config.cache_size_limit = 1000
        # Backward runs many times on one graph here, so its tensors must not be reused.
        importlib.import_module("torch._functorch.config").donated_buffer = False

    def calls(self, task: Task, t: dict[str, Any], out: Any) -> Iterator[tuple[str, Call]]:
        """Yield training forward and backward of batch normalization in float32."""
        plain = task.norm == "batch" and task.dtype == "float32" and not task.module
        if plain and task.operation != "inference" and t["x"].numel() > 1 << 16:
            yield FRESH, self.autograd(task, t, partial(self.torch.compile, dynamic=False))
