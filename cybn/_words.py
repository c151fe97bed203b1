"""The allowed values of options that are strings, for type checkers and editors."""

from typing import Literal

__all__ = ["Activation", "Masked", "NanPolicy"]

Activation = Literal["relu", "relu6", "leaky_relu", "sigmoid", "tanh", "silu", "gelu", "hardswish"]
Masked = Literal["normalize", "zero"]
NanPolicy = Literal["propagate", "raise", "skip"]
