"""The kernels as operators of PyTorch, for graphs: torch.compile, torch.export, torch.jit.trace.

``torch.ops.cybn.normalize`` and ``torch.ops.cybn.normalize_backward`` have rules for the shapes of
their results (fake tensors), for their derivatives, and for batches of calls (torch.vmap). Eager
modules call the same kernels without operators. A saved program that contains the operators needs
``import cybn.torch`` before it is loaded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._moments import Moments
from ._autograd import Running
from ._calls import Inputs, Norm, backward, format_of, forward
from ._formulas import gradients

__all__ = ["normalize"]

_INPUTS = "Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? mean, Tensor? var"
_OPTIONS = "str kind, float eps, int dims, int groups, str? activation, float slope"

_library = torch.library.Library("cybn", "DEF")
_tags = (torch.Tag.pt2_compliant_tag,)
_library.define(f"normalize({_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor)", tags=_tags)
_library.define(
    f"normalize_backward(Tensor dy, {_INPUTS}, Tensor batch_mean, Tensor batch_m2, {_OPTIONS})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    tags=_tags,
)
_normalize = torch.ops.cybn.normalize.default
_normalize_backward = torch.ops.cybn.normalize_backward.default


def normalize(norm: Norm, inputs: Inputs, running: Running | None = None) -> Tensor:
    """Do what `_autograd.normalize` does, as operations of a graph."""
    y, batch_mean, batch_m2 = _normalize(*inputs, *norm)
    if running is not None:
        x = inputs.x
        count = x.numel() // x.shape[1]
        batch_mean, batch_m2 = batch_mean.detach(), batch_m2.detach()
        if norm.kind == "instance":
            batch_mean = batch_mean.view(x.shape[0], -1).mean(0)
            batch_m2 = batch_m2.view(x.shape[0], -1).mean(0)
            count = count // x.shape[0]
        momentum: Any = running.momentum
        if running.counter is not None:
            running.counter.add_(1)
            momentum = 1 / running.counter.double() if momentum is None else momentum
        pairs = (running.mean, batch_mean), (running.var, batch_m2 / (count - 1))
        for old, new in pairs:
            old.copy_((1 - momentum) * old.double() + momentum * new)
    return y


# ---- computation -------------------------------------------------------------------------


def _on_cpu(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    y, statistics = forward(Norm(*arguments[6:]), Inputs(*arguments[:6]))
    if statistics is None:
        return y, y.new_empty(0, dtype=torch.float64), y.new_empty(0, dtype=torch.float64)
    return y, *(torch.from_numpy(v.copy()) for v in (statistics.mean, statistics.m2))


def _backward_on_cpu(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dy, inputs, statistics, norm = _parted(arguments)
    moments = None
    if inputs.mean is None:
        count = inputs.x.numel() // statistics[0].numel()
        moments = Moments(count, *(v.numpy() for v in statistics))
    dx, dweight, dbias, dresidual = backward(norm, dy, inputs, moments)
    if inputs.weight is not None:
        dweight, dbias = dweight.to(inputs.weight.dtype), dbias.to(inputs.weight.dtype)
    return dx, dweight, dbias, dx.new_empty(0) if dresidual is None else dresidual


def _parted(arguments: Any) -> tuple[Tensor, Inputs, tuple[Tensor, Tensor], Norm]:
    """Return dy, the inputs of forward, the statistics, and the norm."""
    return arguments[0], Inputs(*arguments[1:7]), arguments[7:9], Norm(*arguments[9:])


_library.impl("normalize", _on_cpu, "CPU")
_library.impl("normalize_backward", _backward_on_cpu, "CPU")


# ---- shapes and types of results ---------------------------------------------------------


@torch.library.register_fake("cybn::normalize", lib=_library)
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, mean, norm = arguments[0], arguments[4], Norm(*arguments[6:])
    y = torch.empty_like(x, memory_format=format_of(norm, x))
    rows = 0 if mean is not None else _rows(norm, x)
    return y, *(x.new_empty(rows, dtype=torch.float64) for _ in range(2))


@torch.library.register_fake("cybn::normalize_backward", lib=_library)
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, (x, weight, _, residual, *_rest), _, norm = _parted(arguments)
    dx = torch.empty_like(x, memory_format=format_of(norm, x))
    if weight is not None:
        vectors = torch.empty_like(weight), torch.empty_like(weight)
    else:
        shape = x.shape[x.dim() - norm.dims :] if norm.dims else x.shape[1:2]
        dtype = x.dtype if x.dtype is torch.float64 else torch.float32
        vectors = x.new_empty(shape, dtype=dtype), x.new_empty(shape, dtype=dtype)
    return dx, *vectors, x.new_empty(0) if residual is None else torch.empty_like(dx)


def _rows(norm: Norm, x: Tensor) -> Any:
    """Return the number of means of a call."""
    if norm.kind == "batch":
        return x.shape[1]
    if norm.kind == "group":
        return x.shape[0] * norm.groups
    if norm.kind == "instance":
        return x.shape[0] * x.shape[1]
    rows = 1
    for size in x.shape[: x.dim() - norm.dims]:
        rows = rows * size
    return rows


# ---- derivatives -------------------------------------------------------------------------


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.norm = Norm(*inputs[6:])
    ctx.save_for_backward(*inputs[:6], *output[1:])


def _differentiate(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    found = _normalize_backward(dy, *ctx.saved_tensors, *ctx.norm)
    given = [t is not None for t in ctx.saved_tensors[:4]]
    return *(g if one else None for g, one in zip(found, given, strict=True)), *[None] * 8


torch.library.register_autograd(
    "cybn::normalize", _differentiate, setup_context=_setup, lib=_library
)


def _setup_again(ctx: Any, inputs: Any, output: Any) -> None:
    dy, tensors, _, ctx.norm = _parted(inputs)
    ctx.save_for_backward(dy, *tensors)


def _differentiate_again(ctx: Any, *changes: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return second derivatives, computed by PyTorch's own operations."""
    dy, *inputs = ctx.saved_tensors
    again = torch.is_grad_enabled()
    leaves: list[Any] = []
    with torch.enable_grad():
        for t in (dy, *inputs[:4]):
            leaf = t if t is None or again else t.detach().requires_grad_()
            leaves.append(leaf if leaf is None else leaf.view_as(leaf))
        wanted = [t is not None for t in leaves[1:]]
        again_inputs = Inputs(*leaves[1:], *inputs[4:])
        found = gradients(ctx.norm, leaves[0], again_inputs, wanted)
        pairs = [
            (g, d) for g, d in zip(found, changes, strict=True) if g is not None and d is not None
        ]
        sources = [t for t in leaves if t is not None and t.requires_grad]
        second = iter(
            torch.autograd.grad(
                [g for g, _ in pairs], sources, [d for _, d in pairs],
                create_graph=again, allow_unused=True,
            )
        )  # fmt: skip
    results = [None if t is None or not t.requires_grad else next(second) for t in leaves]
    return *results, *[None] * 10


torch.library.register_autograd(
    "cybn::normalize_backward", _differentiate_again, setup_context=_setup_again, lib=_library
)


# ---- batches of calls --------------------------------------------------------------------


def _one_by_one(op: Any) -> Any:
    def rule(info: Any, in_dims: Any, *arguments: Any) -> tuple[Any, Any]:
        calls = []
        for i in range(info.batch_size):
            one = [
                a if dim is None else a.select(dim, i)
                for a, dim in zip(arguments, in_dims, strict=True)
            ]
            calls.append(op(*one))
        results = tuple(torch.stack(parts) for parts in zip(*calls, strict=True))
        return results, (0,) * len(results)

    return rule


torch.library.register_vmap("cybn::normalize", _one_by_one(_normalize), lib=_library)
torch.library.register_vmap(
    "cybn::normalize_backward", _one_by_one(_normalize_backward), lib=_library
)
