"""Memory for large results: page faults cost more than the normalization itself.

What forward returns lives until backward, and comes from `np.empty`, which asks for huge pages.
The C library keeps some of that memory, and PyTorch's own tensors are then put on it, huge pages
and all. Keeping it here for the next forward was slower: PyTorch then had to get fresh memory.

What backward returns dies at once, and goes to the blocks that are used again (cybn._memory).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .._memory import ALIGNMENT, LEAST, blocks, empty_cache, on

__all__ = ["empty_cache", "empty_like"]


def empty_like(x: Tensor, *, brief: bool) -> Tensor:
    """Return an uninitialized tensor that lies in memory as `x` does; `brief` if it dies soon."""
    if x.nbytes < LEAST or not (
        x.is_contiguous()
        or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
        or (x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d))
    ):
        return torch.empty_like(x, requires_grad=False)
    like = x.detach().numpy()
    if brief:
        return torch.from_numpy(blocks.array(like))
    return torch.from_numpy(on(np.empty(like.nbytes + ALIGNMENT, np.uint8), like))
