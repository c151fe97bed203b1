"""The field: a module a peer, found by itself. To add one, add a file with a `Peer` in it."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Sequence

from ..task import Peer


def load(names: Sequence[str] | None = None) -> tuple[list[Peer], list[str]]:
    """Make the peers, each named by its module; all where `names` is None.

    Returns those that are installed, and a line about each of the others. cybn and the floor
    always take part. An unknown name is a ValueError.
    """
    known = [module.name for module in pkgutil.iter_modules(__path__)]
    for name in names or []:
        if name not in known:
            raise ValueError(f"no peer is called {name!r}; there are {', '.join(known)}")
    peers: list[Peer] = []
    missing = []
    for name in known:
        if names is not None and name not in ("cybn_itself", "floor", *names):
            continue
        module = importlib.import_module(f"{__name__}.{name}")
        (kind,) = (
            value
            for value in vars(module).values()
            if inspect.isclass(value) and value.__module__ == module.__name__
            if issubclass(value, Peer)
        )
        try:
            peers.append(kind())
        except (ImportError, OSError) as error:
            missing.append(f"{kind.name} is left out ({error}): {kind.install}")
    return sorted(peers, key=lambda peer: peer.order), missing
