"""Fusing a batch norm with the activation after it, or with adding a residual and activating.

The operation that follows is observed, not guessed from the code. The first call in each mode
returns an ordinary tensor that notes the first operation that uses it (`Watched`). Later calls
return a tensor that is not computed yet (`Pending`). If the expected operation uses it, one pass
computes both. If another operation uses it first, the batch norm is computed as without fusing, and
fusing is turned off for that module. So the results are right even if an activation is replaced,
only a part of a model is called, or features are taken from between the two.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_map_only

from ._autograd import Running, needs_grad
from ._autograd import normalize as normalize_now
from ._calls import Inputs, Norm, format_of

__all__ = ["Fusing", "Pending", "normalize"]

LEAST = 1 << 14  # values of x; with fewer, fusing costs as much time as it saves

Activation = tuple[str, float]


class Fusing:
    """The operations that follow one module, as far as they are known."""

    def __init__(self) -> None:
        # By mode: the activation, and whether a residual is added before it; None to fuse nothing.
        self.expects: dict[bool, tuple[Activation, bool] | None] = {}
        self.why: dict[bool, str] = {}  # why nothing is fused, by mode
        self.follower: Any = None  # a weak reference to the activation's module, if it has one

    def __reduce__(self) -> Any:  # a copy starts without knowledge
        return Fusing, ()

    def describe(self) -> tuple[str, str]:
        """Return what is fused with the module, and if that is nothing, the reason."""
        found = [expected for expected in self.expects.values() if expected is not None]
        if found:
            (name, _), added = found[0]
            return f"add, {name}" if added else name, ""
        if self.why:
            return "", next(iter(self.why.values()))
        return "", f"no call of {LEAST} values or more, without hooks, has shown yet what follows"

    def learn(self, mode: bool, activation: Activation, added: bool) -> None:
        """Store which operation followed."""
        follower = _caller()
        self.follower = None if follower is None else weakref.ref(follower)
        self.expects[mode] = activation, added

    def refuse(self, mode: bool, why: str) -> None:
        """Turn fusing off in a mode, and store the reason."""
        self.expects[mode] = None
        self.why[mode] = why


def _caller() -> nn.Module | None:
    """Return the module without children whose forward is running, if there is one."""
    frame: Any = sys._getframe(2)
    for _ in range(8):
        if frame is None:
            return None
        if frame.f_code.co_name == "forward":
            module = frame.f_locals.get("self")
            leaf = isinstance(module, nn.Module) and not module._modules
            return module if leaf else None
        frame = frame.f_back
    return None


def normalize(
    fusing: Fusing,
    module: nn.Module,
    norm: Norm,
    inputs: Inputs,
    running: Running | None,
) -> Tensor:
    """Return the result, which is watched or pending if fusing can save time."""
    mode = module.training
    if norm.kind != "batch" and mode not in fusing.expects:
        fusing.refuse(mode, "only batch norms are computed together with what follows")
    if (
        norm.kind != "batch"
        or inputs.x.numel() < LEAST
        or _is_looked_at(module)
        or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    ):
        return normalize_now(norm, inputs, running)
    if mode not in fusing.expects:
        y = normalize_now(norm, inputs, running)
        y.__class__ = Watched
        y._cybn = fusing, mode, False
        return y
    expected = fusing.expects[mode]
    follower = None if fusing.follower is None else fusing.follower()
    if expected is None or (follower is not None and _is_looked_at(follower)):
        return normalize_now(norm, inputs, running)
    moves = [] if running is None else [running]
    return Pending.of(fusing, expected, norm, inputs, moves)


def _is_looked_at(module: nn.Module) -> bool:
    """Return whether hooks would see a pending result, or compiled code would get it."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module._compiled_call_impl is not None
        or nn.modules.module._has_any_global_hook()
    )


# ---- operations that can be computed together --------------------------------------------


def _relu6(args: Any, kwargs: Any) -> Activation | None:
    limits = [*args[1:3], kwargs.get("min_val", 0), kwargs.get("max_val", 6)][:2]
    return ("relu6", 0.0) if list(map(float, limits)) == [0.0, 6.0] else None


def _gelu(args: Any, kwargs: Any) -> Activation | None:
    return ("gelu", 0.0) if kwargs.get("approximate", "none") == "none" else None


def _leaky(args: Any, kwargs: Any) -> Activation:
    slope = args[1] if len(args) > 1 else kwargs.get("negative_slope", 0.01)
    return "leaky_relu", float(slope)


def _named(name: str) -> Callable[[Any, Any], Activation | None]:
    return lambda args, kwargs: (name, 0.0)


_nn = torch._C._nn
_ACTIVATIONS: dict[Any, Callable[[Any, Any], Activation | None]] = {
    **dict.fromkeys((functional.relu, torch.relu, Tensor.relu), _named("relu")),
    **dict.fromkeys((torch.relu_, Tensor.relu_), _named("relu")),
    **dict.fromkeys((functional.relu6, _nn.relu6), _named("relu6")),
    **dict.fromkeys((functional.silu, _nn.silu, _nn.silu_), _named("silu")),
    **dict.fromkeys((functional.hardswish, _nn.hardswish, _nn.hardswish_), _named("hardswish")),
    **dict.fromkeys((torch.sigmoid, Tensor.sigmoid, functional.sigmoid), _named("sigmoid")),
    **dict.fromkeys((torch.sigmoid_, Tensor.sigmoid_), _named("sigmoid")),
    **dict.fromkeys((torch.tanh, Tensor.tanh, functional.tanh), _named("tanh")),
    **dict.fromkeys((torch.tanh_, Tensor.tanh_), _named("tanh")),
    **dict.fromkeys((functional.hardtanh, _nn.hardtanh, _nn.hardtanh_), _relu6),
    **dict.fromkeys((functional.leaky_relu, _nn.leaky_relu, _nn.leaky_relu_), _leaky),
    functional.gelu: _gelu,
}
_ADDITIONS = {
    torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__
}  # fmt: skip
_IN_PLACE = {
    torch.relu_, Tensor.relu_, _nn.silu_, _nn.hardswish_, torch.sigmoid_, Tensor.sigmoid_,
    torch.tanh_, Tensor.tanh_, _nn.hardtanh_, _nn.leaky_relu_, Tensor.add_, Tensor.__iadd__,
}  # fmt: skip
_GETTERS = {
    Tensor.shape.__get__, Tensor.dtype.__get__, Tensor.device.__get__, Tensor.ndim.__get__,
    Tensor.layout.__get__, Tensor.is_cpu.__get__, Tensor.size, Tensor.dim, Tensor.numel,
    Tensor.stride, Tensor.is_contiguous, Tensor.is_floating_point, Tensor.__len__,
    torch.is_floating_point, torch.numel,
}  # fmt: skip


def _activation(func: Any, args: Any, kwargs: Any) -> tuple[Activation | None, bool]:
    """Return the activation that a call computes, and whether it writes over its input."""
    read = _ACTIVATIONS.get(func)
    if read is None or not args:
        return None, False
    inplace = func in _IN_PLACE or kwargs.get("inplace", False) or any(a is True for a in args)
    return read(args, kwargs), bool(inplace)


def _other(func: Any, args: Any, kwargs: Any, one: Tensor) -> Any:
    """Return the tensor of the same shape that a call adds to `one`, or None."""
    if func not in _ADDITIONS or kwargs or len(args) != 2 or args[0] is args[1]:
        return None
    other = args[1] if args[0] is one else args[0]
    fits = (
        type(other) in (Tensor, Watched)
        and other.shape == one.shape
        and other.dtype is one.dtype
        and other.is_cpu
        and other.layout is torch.strided
        and not other.is_neg()
        and (func not in _IN_PLACE or args[0] is one)
    )
    return other if fits else None


# ---- the first call ----------------------------------------------------------------------


class Watched(Tensor):
    """An ordinary tensor that notes the first operation that uses it."""

    _cybn: tuple[Fusing, bool, bool]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note `func`, and call it."""
        kwargs = kwargs or {}
        if func in _GETTERS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        watched: list[Watched] = []
        tree_map_only(Watched, watched.append, (args, kwargs))
        notes = []
        for t in watched:
            if t.__class__ is Watched:  # a tensor may be given twice
                t.__class__ = Tensor
                notes.append((t, *t.__dict__.pop("_cybn")))
        sums = None
        for t, fusing, mode, added in notes:
            activation, _ = _activation(func, args, kwargs)
            if activation is not None and args[0] is t:
                fusing.learn(mode, activation, added)
            elif not added and sums is None and _other(func, args, kwargs, t) is not None:
                sums = fusing, mode, True
            else:
                fusing.refuse(mode, f"{_name(func)} uses its output")
        y = func(*args, **kwargs)
        if sums is not None and type(y) is Tensor:
            y.__class__ = Watched
            y._cybn = sums
        return y


def _name(func: Any) -> str:
    name = getattr(func, "__name__", str(func))
    owner = getattr(func, "__self__", None)
    return getattr(owner, "__name__", name) if name == "__get__" else name


# ---- later calls -------------------------------------------------------------------------


class Pending(Tensor):
    """A result that is not computed, and has no memory, until the first operation uses it."""

    value: Tensor | None
    residual: Tensor | None

    @staticmethod
    def of(
        fusing: Fusing,
        expected: tuple[Activation, bool],
        norm: Norm,
        inputs: Inputs,
        moves: list[Running],
    ) -> Pending:
        """Return a pending result. Its computation updates the statistics in `moves`."""
        x, grad = inputs.x, torch.is_grad_enabled()
        with torch._C.DisableTorchFunctionSubclass():
            self = Tensor._make_wrapper_subclass(
                Pending, x.shape, _strides(norm, x), dtype=x.dtype, device=x.device,
                requires_grad=grad and needs_grad(inputs),
            )  # fmt: skip
            if self.requires_grad:
                self.register_hook(_lost)
        self.fusing, self.expected, self.moves = fusing, expected, moves
        self.norm, self.inputs = norm, inputs
        self.versions = _version(x), None
        self.grad_mode = grad
        self.residual = self.value = None
        return self

    def plain(self) -> Tensor:
        """Return the result without what follows, and turn fusing off."""
        if self.value is None:
            why = "another operation than before used its output"
            for mode, expected in self.fusing.expects.items():
                if expected is not None:
                    self.fusing.refuse(mode, why)
            self.value = self.compute(None, 0.0)
        return self.value

    def compute(self, activation: str | None, slope: float) -> Tensor:
        """Return the result, with the residual if there is one."""
        residual = self.residual
        if self.versions != (_version(self.inputs.x), _version(residual)):
            raise RuntimeError(
                "the input or the residual of a fused batch norm was changed in place before its "
                "result was used; convert the model without fuse=True"
            )
        running = self.moves.pop() if self.moves else None
        norm = self.norm._replace(activation=activation, slope=slope)
        with torch.set_grad_enabled(self.grad_mode):
            if activation is None and residual is not None:
                return normalize_now(norm, self.inputs, running) + residual
            return normalize_now(norm, self.inputs._replace(residual=residual), running)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute the expected operation in one pass, and others from the plain result."""
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func in _GETTERS:
                return func(*args, **kwargs)
            one = args[0] if args else None
            if type(one) is Pending and one.value is None:
                activation, inplace = _activation(func, args, kwargs)
                if activation and one.expected == (activation, one.residual is not None):
                    y = one.compute(*activation)
                    if inplace:
                        one.value = y
                    return y
            total = _sum(func, args, kwargs)
            if total is not None:
                return total
        args, kwargs = tree_map_only(Pending, Pending.plain, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Raise an error, because the call did not go through PyTorch's Python functions."""
        raise RuntimeError(
            f"{func} reached the pending result of a fused batch norm from outside Python's torch "
            "functions; convert the model without fuse=True"
        )


def _sum(func: Any, args: Any, kwargs: Any) -> Tensor | None:
    """Return a pending sum if a residual is added to a pending result that expects one."""
    for one in args[:2] if func in _ADDITIONS else ():
        if type(one) is Pending and one.value is None and one.residual is None and one.expected[1]:
            other = _other(func, args, kwargs, one)
            if other is None:
                continue
            total = one
            if func not in _IN_PLACE:
                total = Pending.of(one.fusing, one.expected, one.norm, one.inputs, one.moves)
                total.grad_mode = one.grad_mode
            total.residual, total.versions = other, (one.versions[0], _version(other))
            return total
    return None


def _version(x: Tensor | None) -> int | None:
    """Return how often a tensor was written to, or None if PyTorch does not count that."""
    return None if x is None or x.is_inference() else x._version


def _strides(norm: Norm, x: Tensor) -> tuple[int, ...] | None:
    if x.is_contiguous():
        return None
    like = torch.empty_like(x, memory_format=format_of(norm, x), device="meta")
    return like.stride()


def _lost(gradient: Tensor) -> None:
    raise RuntimeError(
        "a gradient reached the pending result of a fused batch norm, because something other "
        "than PyTorch's Python functions used it; convert the model without fuse=True"
    )
