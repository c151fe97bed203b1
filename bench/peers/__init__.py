"""The peers: libraries to compare. To add one, add a file with a subclass of `Peer`."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence

from ..task import Peer


def load(names: Sequence[str] | None = None) -> tuple[list[Peer], list[str]]:
    """Create the peers with these names (lower case, no spaces), or all if `names` is None.

    Return those that are installed, and a line about each of the others. cybn and the floor
    always take part. Raise ValueError if a name is unknown.
    """
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    known = {kind.name.lower().replace(" ", ""): kind for kind in Peer.kinds}
    for name in names or []:
        if name not in known:
            raise ValueError(f"no peer is called {name!r}; there are {', '.join(sorted(known))}")
    peers: list[Peer] = []
    missing = []
    for name, kind in known.items():
        if names is None or name in ("cybn", "floor", *names):
            try:
                peers.append(kind())
            except (ImportError, OSError) as error:
                missing.append(f"{kind.name} is left out ({error}): {kind.install}")
    return sorted(peers, key=lambda peer: peer.order), missing
