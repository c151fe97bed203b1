"""A report on which library computes each norm of a model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from ._classes import is_norm, why_not
from .modules import Converted
from .sync import SyncBatchNorm

__all__ = ["Report", "Row", "report"]


class Row(NamedTuple):
    """One module of a report."""

    module: str  # its name in the model
    type: str  # the name of its class
    computed_by: str  # "cybn" or "PyTorch"
    fused_with: str  # such as "relu" or "add, relu"; empty if it is not fused
    why: str  # the reason why PyTorch computes it, or why it is not fused


class Report:
    """A table of norms: ``print(report)``, or iterate over its rows.

    Attributes
    ----------
    rows : list of Row
        One row per norm.
    """

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        titles = ("module", "type", "computed by", "fused with", "why not")
        table = [titles, *(tuple(cell or "-" for cell in row) for row in self.rows)]
        widths = [max(len(row[i]) for row in table) for i in range(len(titles) - 1)]
        lines = [
            "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[-1]])
            for row in table
        ]
        ours = sum(row.computed_by == "cybn" for row in self.rows)
        fused = sum(bool(row.fused_with) for row in self.rows)
        lines.append(f"{ours} of {len(self.rows)} norms computed by cybn, {fused} fused")
        return "\n".join(lines)

    __repr__ = __str__


def report(model: nn.Module) -> Report:
    """Return a table of which library computes each norm of a model, with reasons.

    Parameters
    ----------
    model : torch.nn.Module
        The model, converted or not.

    Returns
    -------
    Report
        One row per norm. If PyTorch computed the last call of a module because of its arguments,
        the row has the reason.

    Raises
    ------
    TypeError
        If `model` is not a module.

    Examples
    --------
    >>> import torch
    >>> import cybn.torch
    >>> model = cybn.torch.convert(torch.nn.Sequential(torch.nn.LayerNorm(8)))
    >>> [row.computed_by for row in cybn.torch.report(model)]
    ['cybn']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is of type {type(model).__name__}; it must be a torch.nn.Module")
    rows = []
    for name, module in model.named_modules():
        kept = module.__dict__
        fused = why = ""
        if isinstance(module, Converted):
            fusing = kept.get("_cybn_fusing")
            why = kept.get("_cybn_reason") or ""
            if not why and fusing is not None:
                fused, why = fusing.describe()
            by = "PyTorch" if kept.get("_cybn_reason") else "cybn"
        elif isinstance(module, SyncBatchNorm):
            by = "cybn"
        elif is_norm(module):
            by, why = "PyTorch", why_not(module)
        else:
            continue
        rows.append(Row(name or "(the model)", type(module).__name__, by, fused, why))
    return Report(rows)
