"""PyTorch: its native operators, and its module for the operation "layer".

`torch.native_batch_norm` is what `torch.nn.functional.batch_norm` ends up calling on the CPU.
It is given no running statistics, which spares it their update. Its ``out=`` form writes in
place; the backward operator has none that does not copy, so its output is always fresh.
"""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import numpy as np

from ..task import EPS, FIRST, FRESH, LAST, REUSED, Contestant, Task, pick

__all__ = ["PyTorch"]


class PyTorch:
    """PyTorch on the CPU; channels-last is its memory format, not a permuted copy."""

    name = "PyTorch"
    install = "pip install torch --index-url https://download.pytorch.org/whl/cpu"
    note = "torch.native_batch_norm, no running statistics, saved mean and invstd for backward"

    def __init__(self) -> None:
        self.torch = importlib.import_module("torch")
        self.version = str(self.torch.__version__)

    def variants(self, operation: str, dtype: np.dtype[Any], threads: int) -> list[tuple[str, str]]:
        """Return both layouts; reused output where an operator writes in place."""
        outputs = [REUSED, FRESH] if operation in ("forward", "inference") else [FRESH]
        return [(layout, output) for layout in (FIRST, LAST) for output in outputs]

    def prepare(self, task: Task) -> Contestant:
        """Wrap the shared arrays as tensors and bind the arguments."""
        torch, data, layout = self.torch, task.data, task.layout
        torch.set_num_threads(task.threads)

        def tensor(array: Any) -> Any:
            t = torch.from_numpy(array)
            return t.movedim(-1, 1) if layout == LAST and array.ndim > 1 else t

        x, gamma, beta = map(tensor, (data.x(layout), data.gamma, data.beta))
        if task.operation == "layer":
            call = partial(self._module(data.shape.c, gamma, beta, len(data.shape.spatial)), x)
        elif task.operation == "backward":
            _, mean, invstd = torch.native_batch_norm(x, gamma, beta, None, None, True, 0.1, EPS)
            backward = torch.ops.aten.native_batch_norm_backward.default
            all_three = [True, True, True]
            call = partial(
                backward,
                *(tensor(data.dy(layout)), x, gamma, None, None, mean, invstd),
                *(True, EPS, all_three),
            )
        else:
            training = task.operation == "forward"
            statistics = (None, None) if training else (tensor(data.mean), tensor(data.var))
            arguments = (x, gamma, beta, *statistics, training, 0.1, EPS)
            call = partial(torch.native_batch_norm, *arguments)
            if task.output == REUSED:
                saved = [torch.empty_like(gamma) if training else gamma.new_empty(0) for _ in "ab"]
                out = (tensor(data.out(layout)), *saved)
                call = partial(torch.native_batch_norm, *arguments, out=out)

        def read(output: Any, channels: Any) -> Any:
            y = output[0] if isinstance(output, tuple) else output
            return pick(y.detach().numpy(), FIRST, channels)

        return Contestant(self.name, layout, task.output, call, read)

    def _module(self, c: int, gamma: Any, beta: Any, rank: int) -> Any:
        nn = self.torch.nn
        kind = [nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d][rank]
        module = kind(c, eps=EPS, dtype=gamma.dtype)
        module.load_state_dict({"weight": gamma, "bias": beta}, strict=False)
        return module
