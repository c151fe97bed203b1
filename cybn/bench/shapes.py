"""Layer sizes of published networks, and the shapes where kernels tend to break.

Sources: He et al. 2016 (ResNet-50; the counts of its 53 layers are those of oneDNN's benchdnn
shape list), Szegedy et al. 2016 (Inception v3, the odd sizes). The rest are typical of tables,
sequences, volumes and images, and edges of the kernels.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

__all__ = ["ALL_GROUPS", "EDGE", "GROUPS", "INCEPTION", "RESNET50", "TINY", "Shape"]


class Shape(NamedTuple):
    """A batch of one layer: channels-first (N, C, *spatial)."""

    n: int
    c: int
    spatial: tuple[int, ...] = ()
    layers: int = 1  # how often the network has it

    @property
    def name(self) -> str:
        """Channels and spatial sizes, such as ``64x56x56``; (N, C) and sequences in full."""
        sizes = (
            (self.c, *self.spatial) if len(self.spatial) > 1 else (self.n, self.c, *self.spatial)
        )
        return "x".join(map(str, sizes))

    @property
    def channels_first(self) -> tuple[int, ...]:
        """(N, C, *spatial)."""
        return (self.n, self.c, *self.spatial)

    @property
    def channels_last(self) -> tuple[int, ...]:
        """(N, *spatial, C)."""
        return (self.n, *self.spatial, self.c)

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.channels_first)

    @property
    def trainable(self) -> bool:
        """Whether a channel has two values or more, and with them a variance."""
        return self.size > self.c


RESNET50 = [
    Shape(32, 64, (112, 112), 1),
    Shape(32, 256, (56, 56), 4),
    Shape(32, 64, (56, 56), 6),
    Shape(32, 512, (28, 28), 5),
    Shape(32, 128, (28, 28), 8),
    Shape(32, 1024, (14, 14), 7),
    Shape(32, 256, (14, 14), 12),
    Shape(32, 2048, (7, 7), 4),
    Shape(32, 512, (7, 7), 6),
]

INCEPTION = [
    Shape(32, c, (side, side))
    for c, side in [(32, 149), (64, 147), (80, 73), (192, 71), (96, 35), (384, 17), (448, 8)]
]

TABULAR = [Shape(60, 100), Shape(256, 256), Shape(4096, 512)]

SEQUENCES = [Shape(32, 256, (1000,))]

VOLUMES = [Shape(2, 32, (64, 96, 96)), Shape(8, 64, (16, 32, 32))]

FEW_CHANNELS = [Shape(8, 3, (512, 512)), Shape(1, 1, (2048, 2048))]

EDGE = [
    Shape(1, 3, (1, 1)),
    Shape(1, 24, (14, 14)),
    Shape(12, 4, (8, 8)),
    Shape(2, 251, (28, 28)),
    Shape(8, 322, (16, 16)),
    Shape(880801, 1, (1, 1)),
]

GROUPS = {
    "resnet50": RESNET50,
    "inception": INCEPTION,
    "tabular": TABULAR,
    "sequences": SEQUENCES,
    "volumes": VOLUMES,
    "few channels": FEW_CHANNELS,
    "edge": EDGE,
}

TINY = "tiny"  # calls that take as long as Python does; timed on one thread
ALL_GROUPS = {**GROUPS, TINY: [Shape(32, 16), Shape(60, 100)]}
