"""How other libraries mean the same words: eps, momentum, and which variance runs."""

from __future__ import annotations

from decimal import Decimal
from typing import Any, NamedTuple

from .._arguments import number

__all__ = ["CONVENTIONS", "Convention", "settings"]


class Convention(NamedTuple):
    """What a library does where it is told nothing."""

    eps: float
    momentum: float | None  # as the library writes it
    weighs_old: bool  # whether its momentum is the weight of the old value
    running_ddof: int


CONVENTIONS = {
    "torch": Convention(1e-5, 0.1, False, 1),  # torch.nn.BatchNorm2d
    "keras": Convention(1e-3, 0.99, True, 0),  # keras.layers.BatchNormalization
    "onnx": Convention(1e-5, 0.9, True, 0),  # BatchNormalization, opset 15, training_mode=1
    "paper": Convention(1e-5, None, False, 1),  # Algorithm 2: the mean over batches, unbiased
}


def _weight_of_new(library: str, momentum: Any) -> float:
    """Return the weight of the new value from that of the old one."""
    weight = number("momentum", momentum)
    if not 0 <= weight <= 1:
        raise ValueError(
            f"momentum is {weight}; it must be in [0, 1], the weight of the old value in the "
            f"convention of {library}, or None for the mean of all batches"
        )
    return float(1 - Decimal(repr(weight)))  # 1 - 0.99 as written: 0.01, not 0.010000000000000009


def settings(library: str, given: dict[str, Any]) -> dict[str, Any]:
    """Return keywords of a layer that means `given` as `library` does."""
    if library not in CONVENTIONS:
        raise ValueError(f"library is {library!r}; it must be one of {', '.join(CONVENTIONS)}")
    convention = CONVENTIONS[library]
    momentum = given.get("momentum", convention.momentum)
    if momentum is not None and convention.weighs_old:
        momentum = _weight_of_new(library, momentum)
    defaults = {"eps": convention.eps, "running_ddof": convention.running_ddof}
    return defaults | given | {"momentum": momentum}
