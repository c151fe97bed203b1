"""Which batch norms are certain to hand all they compute to one activation.

The forward of the model is traced with stand-ins for its tensors (torch.fx), once for each mode and
for optional arguments given and not given: Python's branches on those are not in a trace. Where the
model cannot be traced, its parts are, each taken to be called as a whole. A batch norm has its
activation for certain where every trace says the same, and every place that holds it was traced.
"""

from __future__ import annotations

import inspect
import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

from .modules import ACTIVATIONS

__all__ = ["followers"]

MOST_OPTIONAL = 4  # arguments of a forward; each doubles the traces

_KNOWN = (*ACTIVATIONS, *ACTIVATIONS.values())
_BASE = nn.modules.batchnorm._BatchNorm


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
    covered: Counter[nn.Module] = Counter()
    _visit(model, calls, covered)
    places = Counter(_places(model))
    found: dict[nn.Module, nn.Module | None] = {}
    for norm, activations in calls.items():
        certain = len(activations) == 1 and covered[norm] == places[norm]
        found[norm] = next(iter(activations)) if certain else None
    return found


def _visit(
    root: nn.Module, calls: dict[nn.Module, set[nn.Module | None]], covered: Counter[nn.Module]
) -> None:
    """Note the calls in `root`, traced as a whole, or in its parts where that fails."""
    graphs = _traces(root)
    parts = set(root.children() if graphs is None else ())
    if graphs is not None:
        covered.update(_places(root))
        for node in itertools.chain.from_iterable(graph.nodes for graph in graphs):
            module = _called(root, node)
            if isinstance(module, _BASE):
                calls.setdefault(module, set()).add(_only_user(root, node))
            elif module is not None and any(True for _ in module.children()):
                parts.add(module)  # one step in the trace, of which nothing inside was seen
        for part in parts:
            covered.subtract(_places(part))
    for part in parts:
        _visit(part, calls, covered)


def _traces(root: nn.Module) -> list[fx.Graph] | None:
    """Return the graphs of all modes and choices of optional arguments, or None."""
    if isinstance(root, _BASE) or not any(True for _ in root.children()):
        return None
    modes = [(m, m.training) for m in root.modules()]
    try:
        with torch.random.fork_rng(devices=[]):
            graphs = [_Tracer().trace(root, given) for given in _arguments(root)]
            for training in (True, False):
                for module, _ in modes:
                    module.training = training
                graphs += [_Tracer().trace(root, given) for given in _arguments(root)]
    except Exception:  # a user's forward may raise anything at a stand-in
        return None
    finally:
        for module, training in modes:
            module.training = training
    return graphs


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


def _places(root: nn.Module) -> Iterator[nn.Module]:
    """Yield each module of `root` as often as it has a name."""
    return (module for _, module in root.named_modules(remove_duplicate=False))


def _called(root: nn.Module, node: fx.Node) -> nn.Module | None:
    return root.get_submodule(node.target) if node.op == "call_module" else None


def _only_user(root: nn.Module, node: fx.Node) -> nn.Module | None:
    """Return the activation that takes the output of `node` and is alone in that."""
    users = list(node.users)
    if len(users) != 1 or users[0].args != (node,) or users[0].kwargs:
        return None
    user = _called(root, users[0])
    return user if type(user) in _KNOWN else None


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)
