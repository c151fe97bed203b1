"""The normalizations of `torch.nn.functional`, with the same signatures, computed by cybn.

PyTorch computes the calls that the kernels cannot, and `cybn.torch.report` shows the reasons.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from math import inf, prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional

from . import _autograd, _fuse, _operators
from ._arrays import DTYPES
from ._autograd import Running
from ._calls import Inputs, Norm
from ._small import SMALL

__all__ = ["FUNCTIONS", "current"]

_PLAIN = (Tensor, nn.Parameter, nn.Buffer) if hasattr(nn, "Buffer") else (Tensor, nn.Parameter)
_HALF = (torch.float16, torch.bfloat16)
_EPS = {torch.float64: torch.finfo(torch.float64).eps}


class _Current(threading.local):
    """The module whose forward is running in this thread, if one is."""

    module: nn.Module | None = None
    small = False  # whether PyTorch is to compute the call


current = _Current()


# ---- which calls the kernels compute -----------------------------------------------------


def _refusal(
    x: Tensor, eps: float, shape: Sequence[int], vectors: tuple[Tensor | None, ...]
) -> str | None:
    """Return why the kernels cannot compute a call, or None if they can.

    `vectors` are weight, bias, mean and variance. Each is None or must have the shape `shape`.
    """
    eager = not torch.compiler.is_compiling()
    if eager and (why := _unusual(x)) is not None:
        return why
    if x.dtype not in DTYPES:
        if x.dtype is torch.bfloat16:
            return "bfloat16 needs the package ml_dtypes"
        return f"the input is {x.dtype}"
    if not x.is_cpu:
        return f"the input is on {x.device}"
    if not 0 < eps < inf:
        return f"eps is {eps}"
    dtype = None
    for v in vectors:
        if v is None:
            continue
        if eager and (type(v) not in _PLAIN or v.is_neg()) and not _is_traced(v):
            return f"a parameter or statistic is a {type(v).__name__}"
        if not v.is_cpu:
            return f"a parameter or statistic is on {v.device}"
        if v.dtype is not x.dtype and not (v.dtype is torch.float32 and x.dtype in _HALF):
            return f"the input is {x.dtype}, and a parameter or statistic {v.dtype}"
        if dtype is not None and v.dtype is not dtype:
            return "parameters and statistics are of two types"
        if v.shape != shape:
            return f"a parameter or statistic has shape {tuple(v.shape)}"
        dtype = v.dtype
    return None


def _unusual(x: Tensor) -> str | None:
    """Return what the kernels cannot handle in a tensor or a call outside graphs, or None."""
    if type(x) not in _PLAIN and not _is_traced(x):
        return f"the input is a {type(x).__name__}"
    if x.layout is not torch.strided or x.is_neg():
        return "the input is not a plain strided tensor"
    if forward_ad._current_level >= 0:
        return "forward-mode derivatives"
    if torch._C._are_functorch_transforms_active():
        return "a transform of torch.func"
    return None


def _checked(check: Callable[..., str | None], *arguments: Any) -> str | None:
    """Return what a check returns. torch.jit does not trace it, so sizes are numbers."""
    if torch.compiler.is_compiling():
        return check(*arguments)
    if current.small:
        return SMALL
    if not torch.jit.is_tracing():
        return check(*arguments)
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)
    try:
        return check(*arguments)
    finally:
        torch._C._set_tracing_state(state)


def _is_traced(x: Any) -> bool:
    return _traced() and isinstance(x, Tensor)


def _traced() -> bool:
    """Return whether operations are traced or intercepted, so that operators are needed."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
    )


def _explain(why: str | None) -> None:
    """Store the reason why PyTorch computed the last call of the module, or None."""
    if not torch.compiler.is_compiling():
        module = current.module
        if module is not None:
            module.__dict__["_cybn_reason"] = why


def _run(norm: Norm, inputs: Inputs, running: Running | None = None) -> Tensor:
    if _traced():
        return _operators.normalize(norm, inputs, running)
    module = current.module
    if module is not None:
        known = module.__dict__
        if known.get("_cybn_reason", known) is not None:
            known["_cybn_reason"] = None
        fusing = known.get("_cybn_fusing")
        if fusing is not None:
            return _fuse.normalize(fusing, module, norm, inputs, running)
    return _autograd.normalize(norm, inputs, running)


# ---- the functions -----------------------------------------------------------------------


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Do what `torch.nn.functional.batch_norm` does."""
    return counting_batch_norm(
        input, running_mean, running_var, weight, bias, training, momentum, eps, None
    )


def counting_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    counter: Tensor | None,
) -> Tensor:
    """Do what `batch_norm` does, and count the batch together with the statistics' update."""
    if type(x) is _fuse.Pending:
        x = x.plain()
    why = _checked(_batch_why, x, running_mean, running_var, weight, bias, training, eps)
    if why is not None:
        _explain(why)
        if counter is not None:
            counter.add_(1)
            momentum = 1 / float(counter) if momentum is None else momentum
        return functional.batch_norm(
            x, running_mean, running_var, weight, bias, training, momentum or 0.0, eps
        )
    norm = Norm("batch", eps)
    if not training:
        return _run(norm, Inputs(x, weight, bias, None, running_mean, running_var))
    running = None
    if running_mean is not None and running_var is not None:
        running = Running(running_mean, running_var, momentum, counter)
    return _run(norm, Inputs(x, weight, bias), running)


def _batch_why(
    x: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    eps: float,
    positions: bool = False,
) -> str | None:
    """Return why the kernels cannot compute a batch norm, or an instance norm if `positions`."""
    if x.dim() < 2 + positions:
        return f"the input has {x.dim()} axes"
    if (mean is None) != (var is None):
        return "one of the running statistics is missing"
    channels = x.shape[1]
    why = _refusal(x, eps, (channels,), (weight, bias, mean, var))
    if why is not None:
        return why
    samples = x.shape[0] if positions else 1
    if x.numel() <= (channels * samples if training else 0):
        return f"there is no more than one value a {'sample and ' * positions}channel"
    if mean is None or var is None:
        return None if training else "there are no running statistics"
    if mean.requires_grad or var.requires_grad:
        return "a running statistic requires a gradient"
    if training and channels > 1 and (mean.stride() == (0,) or var.stride() == (0,)):
        return "one number is the running statistic of all channels"
    return None


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Do what `torch.nn.functional.instance_norm` does."""
    x = input
    if type(x) is _fuse.Pending:
        x = x.plain()
    why = _checked(
        _batch_why, x, running_mean, running_var, weight, bias, use_input_stats, eps, True
    )
    if why is not None:
        _explain(why)
        return functional.instance_norm(
            x, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
        )
    if not use_input_stats:
        inputs = Inputs(x.contiguous(), weight, bias, None, running_mean, running_var)
        return _run(Norm("batch", eps), inputs)
    running = None
    if running_mean is not None and running_var is not None:
        running = Running(running_mean, running_var, momentum)
    return _run(Norm("instance", eps), Inputs(x, weight, bias), running)


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Do what `torch.nn.functional.group_norm` does."""
    x = input
    if type(x) is _fuse.Pending:
        x = x.plain()
    why = _checked(_group_why, x, num_groups, weight, bias, eps)
    if why is not None:
        _explain(why)
        return functional.group_norm(x, num_groups, weight, bias, eps)
    return _run(Norm("group", eps, groups=num_groups), Inputs(x, weight, bias))


def _group_why(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> str | None:
    if x.dim() < 2 or num_groups < 1 or x.shape[1] % num_groups:
        return f"the input has shape {tuple(x.shape)}"
    if x.numel() <= num_groups:
        return "there is no more than one value a group"
    return _refusal(x, eps, (x.shape[1],), (weight, bias))


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Do what `torch.nn.functional.layer_norm` does."""
    x = input
    if type(x) is _fuse.Pending:
        x = x.plain()
    why = _checked(_rows_why, x, eps, normalized_shape, weight, bias)
    if why is not None:
        _explain(why)
        return functional.layer_norm(x, normalized_shape, weight, bias, eps)
    return _run(Norm("layer", eps, len(normalized_shape)), Inputs(x, weight, bias))


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """Do what `torch.nn.functional.rms_norm` does."""
    x = input
    if type(x) is _fuse.Pending:
        x = x.plain()
    least = _EPS.get(x.dtype, torch.finfo(torch.float32).eps) if eps is None else eps
    why = _checked(_rows_why, x, least, normalized_shape, weight, None)
    if why is not None:
        _explain(why)
        return functional.rms_norm(x, normalized_shape, weight, eps)
    return _run(Norm("rms", least, len(normalized_shape)), Inputs(x, weight, None))


def _rows_why(
    x: Tensor, eps: float, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None
) -> str | None:
    dims = len(shape)
    if not 0 < dims <= x.dim() or tuple(x.shape[x.dim() - dims :]) != tuple(shape):
        return f"the input has shape {tuple(x.shape)}"
    if prod(x.shape) == 0:
        return "the input is empty"
    return _refusal(x, eps, torch.Size(shape), (weight, bias))


FUNCTIONS = {
    "batch_norm": batch_norm,
    "instance_norm": instance_norm,
    "group_norm": group_norm,
    "layer_norm": layer_norm,
    "rms_norm": rms_norm,
}
