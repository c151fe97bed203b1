"""The field: one module a peer, all with the interface `cybn.bench.task.Peer`.

A peer is imported when it is made, and left out where it is not installed.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..task import Peer
from .cybn import Cybn
from .jax import Jax
from .numpy_formula import NumpyFormula
from .onednn import OneDNN
from .onnxruntime import OnnxRuntime
from .pytorch import PyTorch

__all__ = ["PEERS", "load"]

PEERS: dict[str, type[Peer]] = {
    "cybn": Cybn,
    "numpy": NumpyFormula,
    "pytorch": PyTorch,
    "jax": Jax,
    "onnxruntime": OnnxRuntime,
    "onednn": OneDNN,
}


def load(names: Sequence[str] | None = None) -> tuple[list[Peer], list[str]]:
    """Make the peers.

    Parameters
    ----------
    names : sequence of str, optional
        Keys of `PEERS`; all where None. cybn itself always comes first.

    Returns
    -------
    peers : list of Peer
        Those that are installed.
    missing : list of str
        A line for each of the others.

    Raises
    ------
    ValueError
        If a name is unknown.
    """
    wanted = list(PEERS) if names is None else list(names)
    if unknown := sorted(set(wanted) - set(PEERS)):
        raise ValueError(f"no peer is called {unknown[0]!r}; there are {', '.join(PEERS)}")
    peers: list[Peer] = []
    missing = []
    for name in dict.fromkeys(["cybn", *wanted]):
        try:
            peers.append(PEERS[name]())
        except (ImportError, OSError) as error:
            missing.append(f"{name} is left out ({error}): {PEERS[name].install}")
    return peers, missing
