"""Swapping the batch norms of a model for those of cybn, in place, and back."""

from __future__ import annotations

import logging

from torch import nn

from ._graph import followers
from .modules import ACTIVATIONS, BATCH_NORMS, STOCK

__all__ = ["convert", "revert"]

logger = logging.getLogger("cybn.torch")


def convert(model: nn.Module, *, fuse: bool = False) -> nn.Module:
    """Let cybn compute every batch norm of a model; in place.

    A module stays the object that it is and changes its class, so its parameters, buffers, hooks,
    mode and name stay too, and so does what refers to it: optimizers, other modules.

    Parameters
    ----------
    model : torch.nn.Module
        Changed in place. `torch.nn.BatchNorm1d`, `2d` and `3d` are swapped; subclasses of those,
        lazy and synchronized batch norms are left as they are.
    fuse : bool, default False
        Compute a ReLU, ReLU6, SiLU or LeakyReLU *module* together with the batch norm before it,
        where all traces by `torch.fx` show that it alone takes what the batch norm returns, in the
        same call of the same module. A batch norm with an activation returns activated values;
        hooks on either of the two, which would see the difference, turn this off for as long as
        they are there. Surgery on a fused model (replacing the activation, slicing, taking
        features in between) needs `revert` first. False undoes an earlier True.

    Returns
    -------
    torch.nn.Module
        `model`.

    Raises
    ------
    TypeError
        If `model` is no module.

    Notes
    -----
    What changed is logged to the logger "cybn.torch": a summary at level INFO, and each module at
    level DEBUG. `revert` undoes it.
    """
    _check(model)
    norms = 0
    for name, module in model.named_modules():
        if type(module) in BATCH_NORMS:
            module.__class__ = BATCH_NORMS[type(module)]
            norms += 1
            logger.debug("%s: batch norm by cybn", name or "the model")
        elif isinstance(module, nn.modules.batchnorm._BatchNorm) and type(module) not in STOCK:
            logger.debug("%s: left as it is, a %s", name or "the model", type(module).__name__)
    fused = _fuse(model, followers(model) if fuse else {})
    logger.info("%d batch norms converted, %d with the activation after them", norms, fused)
    return model


def revert(model: nn.Module) -> nn.Module:
    """Undo `convert`, in place: every module has its class of before, and all else as it is now.

    Parameters
    ----------
    model : torch.nn.Module
        Changed in place.

    Returns
    -------
    torch.nn.Module
        `model`.

    Raises
    ------
    TypeError
        If `model` is no module.
    """
    _check(model)
    count = 0
    for name, module in model.named_modules():
        if type(module) in STOCK:
            module.__dict__.pop("follower", None)
            module.__class__ = STOCK[type(module)]
            count += 1
            logger.debug("%s: a %s of PyTorch again", name or "the model", type(module).__name__)
    logger.info("%d modules reverted", count)
    return model


def _check(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is of type {type(model).__name__}; it must be a torch.nn.Module")


def _fuse(model: nn.Module, found: dict[nn.Module, nn.Module | None]) -> int:
    """Give each batch norm the activation that was found to follow it; return how many."""
    names = {module: name for name, module in model.named_modules()}
    fused = 0
    for norm in model.modules():
        if type(norm) not in BATCH_NORMS.values():
            continue
        activation = found.get(norm)
        if activation is None:
            norm.__dict__.pop("follower", None)
            logger.debug("%s: no activation module is certain to follow", names[norm])
            continue
        activation.__class__ = ACTIVATIONS.get(type(activation), type(activation))
        norm.follower = (activation,)
        fused += 1
        logger.debug("%s: computes %s too", names[norm], names[activation])
    return fused
