"""Shapes of layers in published networks and shapes where kernels tend to break: shapes.json."""

import json
from math import prod
from pathlib import Path
from typing import NamedTuple


class Shape(NamedTuple):
    """A batch of one layer: channels-first (N, C, *spatial)."""

    n: int
    c: int
    spatial: tuple[int, ...] = ()

    @property
    def name(self):
        """Return channels and spatial sizes, such as ``64x56x56``; (N, C) and sequences in full."""
        sizes = self.channels_first[1:] if len(self.spatial) > 1 else self.channels_first
        return "x".join(map(str, sizes))

    @property
    def channels_first(self):
        return (self.n, self.c, *self.spatial)

    @property
    def size(self):
        return prod(self.channels_first)


def shape_of(entry):
    """Return the shape of an entry of the file; the batch is 32 if the entry has none."""
    return Shape(entry.get("n", 32), entry["c"], tuple(entry[k] for k in "dhwl" if k in entry))


PUBLISHED = json.loads((Path(__file__).parent / "shapes.json").read_text("utf-8"))
GROUPS = {
    name: [shape_of(entry) for entry in entries]
    for name, entries in PUBLISHED.items()
    if name != "source"
}
