"""PyTorch under torch.compile: its formula of the norm, compiled for each shape."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from ..task import FRESH, Data, Task
from . import pytorch


class Compiled(pytorch.PyTorch):
    """`torch.compile` with static shapes; backward is what it compiles for autograd."""

    name = "torch.compile"
    install = "pip install torch==2.13.0, and a C++ compiler"
    order = 11
    note = "static shapes; takes some seconds a shape, which are not counted"
    quick = False

    def __init__(self) -> None:
        super().__init__()
        importlib.import_module("torch._dynamo").config.cache_size_limit = 1000
        # Backward runs many times on one graph here: its tensors must not be given away.
        importlib.import_module("torch._functorch.config").donated_buffer = False

    def calls(
        self, task: Task, t: dict[str, Any], data: Data, layout: str
    ) -> Iterator[tuple[str, Callable[[], Any]]]:
        """Yield training forward and backward of batch normalization in float32."""
        plain = task.norm == "batch" and task.dtype == "float32" and not task.module
        if plain and task.operation != "inference" and t["x"].numel() > 1 << 16:
            yield FRESH, self.autograd(task, t, partial(self.torch.compile, dynamic=False))
