"""Converting the norms of a model to those of cybn in place, and back."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch
from torch import nn

from ._classes import class_for, is_norm, why_not
from ._fuse import Fusing
from ._small import borders_of
from .modules import KEPT, Converted, stock_class
from .sync import SyncBatchNorm

__all__ = ["convert", "revert"]

logger = logging.getLogger("cybn.torch")


def convert(
    model: nn.Module,
    *,
    fuse: bool = False,
    memory_format: torch.memory_format | None = None,
    sync: bool = False,
    process_group: Any = None,
    small_calls: bool = False,
) -> nn.Module:
    """Convert every norm of a model in place, so that cybn computes it.

    A module stays the same object and gets another class. So its parameters, buffers, hooks, mode
    and name stay the same, and optimizers and other modules still refer to it.

    Parameters
    ----------
    model : torch.nn.Module
        Changed in place. Batch, layer, RMS, group and instance norms are converted; so is every
        module whose forward calls the functions of `torch.nn.functional` for these, such as timm's
        norms with an activation inside, and frozen batch norms.
    fuse : bool, default False
        Compute an activation, or the sum with a residual and an activation, together with the batch
        norm before it. The first call of each mode shows which operation follows. If another
        operation follows later, it gets correct values, and fusing is turned off for that module.
        False undoes an earlier True.
    memory_format : torch.memory_format, optional
        The memory format for the weights of convolutions, such as `torch.channels_last`. Convert
        the inputs, too: ``x = x.to(memory_format=torch.channels_last)``.
    sync : bool, default False
        Compute the statistics of batch norms over all processes of `torch.distributed`.
    process_group : ProcessGroup, optional
        The processes for `sync`. None means all.
    small_calls : bool, default False
        Compute small calls by cybn, too. By default PyTorch computes calls that are so small that
        PyTorch is faster, so their results are those of PyTorch. docs/pytorch.md lists the limits.

    Returns
    -------
    torch.nn.Module
        `model`.

    Raises
    ------
    TypeError
        If `model` is not a module, or `memory_format` is not a memory format.

    Warns
    -----
    UserWarning
        If nothing in the model is computed by cybn.

    Notes
    -----
    `report` says which library computes each norm, and why. `revert` undoes the conversion. Changes
    are logged to the logger "cybn.torch": a summary at level INFO, and each module at level DEBUG.

    Examples
    --------
    >>> import torch
    >>> import cybn.torch
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
    >>> model = cybn.torch.convert(model)
    >>> type(model[1]).__module__.startswith("cybn")
    True
    """
    _check(model)
    if memory_format is not None:
        _arrange(model, memory_format)
    norms = 0
    for name, module in model.named_modules():
        if sync and _synchronize(module, process_group):
            norms += 1
            continue
        cls = class_for(module)
        if cls is not None:
            module.__class__ = cls
            logger.debug("%s: computed by cybn", name or "the model")
        elif not isinstance(module, Converted | SyncBatchNorm):
            if is_norm(module):
                logger.debug("%s: left as it is; %s", name or "the model", why_not(module))
            continue
        norms += 1
        if small_calls or not isinstance(module, Converted):
            module.__dict__.pop("_cybn_borders", None)
        else:
            module.__dict__["_cybn_borders"] = borders_of(module)
        if fuse and isinstance(module, Converted):
            module.__dict__["_cybn_fusing"] = Fusing()
        else:
            module.__dict__.pop("_cybn_fusing", None)
    if not norms:
        warnings.warn(
            "nothing was converted: the model has no norm that cybn.torch knows; "
            "print(cybn.torch.report(model)) says why",
            stacklevel=2,
        )
    logger.info("%d norms converted", norms)
    return model


def _arrange(model: nn.Module, memory_format: torch.memory_format) -> None:
    """Convert the tensors that can have a memory format to it."""
    if not isinstance(memory_format, torch.memory_format):
        raise TypeError(
            f"memory_format is {memory_format!r}; it must be a torch.memory_format, such as "
            "torch.channels_last"
        )
    axes = {torch.channels_last: (4,), torch.channels_last_3d: (5,)}.get(memory_format, (4, 5))
    model._apply(lambda t: t.to(memory_format=memory_format) if t.dim() in axes else t)
    logger.info("weights are in %s; give the inputs the same memory format", memory_format)


def _synchronize(module: nn.Module, process_group: Any) -> bool:
    """Make a module synchronized if it is a batch norm, and return whether it is one."""
    if not isinstance(module, nn.modules.batchnorm._BatchNorm):
        return False
    stock = stock_class(type(module))
    if stock not in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm):
        return False
    module.__dict__["_cybn_before"] = stock
    module.__class__ = SyncBatchNorm
    module.process_group = process_group
    return True


def revert(model: nn.Module) -> nn.Module:
    """Undo `convert` in place: every module gets its former class, and nothing else changes.

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
        If `model` is not a module.

    Examples
    --------
    >>> import torch
    >>> import cybn.torch
    >>> model = cybn.torch.convert(torch.nn.Sequential(torch.nn.LayerNorm(8)))
    >>> type(cybn.torch.revert(model)[0]) is torch.nn.LayerNorm
    True
    """
    _check(model)
    count = 0
    for name, module in model.named_modules():
        before = module.__dict__.pop("_cybn_before", None)
        cls = stock_class(type(module)) if before is None else before
        for key in KEPT:
            module.__dict__.pop(key, None)
        if cls is type(module):
            continue
        module.__class__ = cls
        count += 1
        logger.debug("%s: a %s of PyTorch again", name or "the model", cls.__name__)
    logger.info("%d modules reverted", count)
    return model


def _check(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is of type {type(model).__name__}; it must be a torch.nn.Module")
