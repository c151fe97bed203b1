"""Which batch norms hand all they compute to one activation.

The forward of the model is traced with stand-ins for its tensors (torch.fx), once for each mode,
with and without gradients, and for optional arguments given and not given: Python's branches on
those are not in a trace. Where a module cannot be traced, the modules in it that have a forward of
their own are, each taken to be called as a whole; containers in it may be called piece by piece.
A batch norm has its activation where it has one place in the model, every trace says the same,
and both are called in the same call of the same module, so no hook can ever look in between.
"""

from __future__ import annotations

import inspect
import itertools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from .modules import ACTIVATIONS

__all__ = ["followers"]

MOST_OPTIONAL = 4  # arguments of a forward; each doubles the traces

_KNOWN = (*ACTIVATIONS, *ACTIVATIONS.values())
_BASE = nn.modules.batchnorm._BatchNorm
_NOT_ITS_OWN = (nn.Sequential.forward, nn.Module.forward)  # the latter in lists and dicts too


class _Tracer(fx.Tracer):
    """Sees batch norms, activations and modules with hooks as one step each."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return (
            isinstance(m, _BASE)
            or type(m) in _KNOWN
            or _hooked(m)
            or super().is_leaf_module(m, module_qualified_name)
        )


def followers(model: nn.Module) -> dict[nn.Module, nn.Module | None]:
    """Return the activation of each batch norm that was seen, or None where it is not certain."""
    calls: dict[nn.Module, set[nn.Module | None]] = {}
    _visit(model, calls)
    places = Counter(module for _, module in model.named_modules(remove_duplicate=False))
    found: dict[nn.Module, nn.Module | None] = {}
    for norm, activations in calls.items():
        certain = len(activations) == 1 and places[norm] == 1
        found[norm] = next(iter(activations)) if certain else None
    return found


def _visit(root: nn.Module, calls: dict[nn.Module, set[nn.Module | None]]) -> None:
    """Note the calls in `root`, traced as a whole, or in its parts where that fails."""
    graphs = _traces(root)
    parts = set(_wholes(root) if graphs is None else ())
    for node in itertools.chain.from_iterable(graph.nodes for graph in graphs or ()):
        module = _called(root, node)
        if isinstance(module, _BASE):
            calls.setdefault(module, set()).add(_only_user(root, node))
        elif module is not None and any(True for _ in module.children()):
            parts.add(module)  # one step in the trace, of which nothing inside was seen
    for part in parts:
        _visit(part, calls)


def _wholes(root: nn.Module) -> Iterator[nn.Module]:
    """Yield the children that have a forward of their own, also those in containers."""
    for child in root.children():
        if type(child).forward in _NOT_ITS_OWN:
            yield from _wholes(child)
        else:
            yield child


def _traces(root: nn.Module) -> list[fx.Graph] | None:
    """Return the graphs of all modes and choices of optional arguments, or None."""
    if isinstance(root, _BASE) or not any(True for _ in root.children()):
        return None
    modules = list(root.modules())
    modes = [m.training for m in modules]
    graphs = []
    try:
        with torch.random.fork_rng(devices=[]):
            for setting in (modes, [True] * len(modes), [False] * len(modes)):
                for grad, given in itertools.product((True, False), _arguments(root)):
                    with _unchanged(modules), torch.set_grad_enabled(grad):
                        for module, training in zip(modules, setting, strict=True):
                            module.training = training
                        graphs.append(_Tracer().trace(root, given))
    except Exception:  # a user's forward may raise anything at a stand-in
        return None
    return graphs


@contextmanager
def _unchanged(modules: list[nn.Module]) -> Iterator[None]:
    """Undo what is done to attributes, to containers in them and to values of tensors."""
    modes = [m.training for m in modules]
    attributes = [(m.__dict__, dict(m.__dict__)) for m in modules]
    values = [v for _, saved in attributes for v in saved.values()]
    dicts = [(v, v.copy()) for v in values if isinstance(v, dict)]
    lists = [(v, v.copy()) for v in values if type(v) is list]
    sets = [(v, v.copy()) for v in values if type(v) is set]
    held = itertools.chain(values, *(m._buffers.values() for m in modules))
    tensors = [(t, t.detach().clone()) for t in held if _has_values(t)]
    try:
        yield
    finally:
        for now, before in [*attributes, *dicts, *sets]:
            now.clear()
            now.update(before)
        for sequence, elements in lists:
            sequence[:] = elements
        for tensor, value in tensors:
            if not torch.equal(tensor, value):
                tensor.data.copy_(value)
        for module, training in zip(modules, modes, strict=True):
            if module.training != training:  # scripted modules have theirs elsewhere
                module.training = training


def _has_values(t: Any) -> bool:
    return (
        isinstance(t, Tensor)
        and not nn.parameter.is_lazy(t)
        and not t.is_meta
        and t.layout is torch.strided
    )


def _arguments(root: nn.Module) -> Iterator[dict[str, Any]]:
    """Yield the choices of optional arguments that are left at their defaults."""
    parameters = inspect.signature(root.forward).parameters.values()
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        raise TypeError("any number of arguments")
    optional = [p for p in parameters if p.default is not p.empty]
    if len(optional) > MOST_OPTIONAL:
        raise TypeError("too many optional arguments")
    for chosen in itertools.product((True, False), repeat=len(optional)):
        yield {p.name: p.default for p, left in zip(optional, chosen, strict=True) if left}


def _called(root: nn.Module, node: fx.Node) -> nn.Module | None:
    return root.get_submodule(node.target) if node.op == "call_module" else None


def _only_user(root: nn.Module, node: fx.Node) -> nn.Module | None:
    """Return the activation that takes the output of `node`, alone, and in the same call."""
    users = list(node.users)
    if len(users) != 1 or users[0].args != (node,) or users[0].kwargs:
        return None
    user = _called(root, users[0])
    return user if type(user) in _KNOWN and _caller(node) == _caller(users[0]) else None


def _caller(node: fx.Node) -> list[str]:
    """Return the calls that lead to the one of `node`, by their names, which are unique."""
    return list(node.meta["nn_module_stack"])[:-1]


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)
