"""What a layer learns, and which statistics it uses: three switches and two shorthands."""

from __future__ import annotations

from typing import Self

__all__ = ["Switches"]


class Switches:
    """The switches of a layer; they are independent of each other and of the mode.

    Attributes
    ----------
    update_statistics : bool
        Whether a training forward moves the running statistics.
    use_batch_statistics : bool or None
        Whether a batch is normalized with its own statistics (True) or the running ones (False).
        None, the default: with its own in training mode, with the running ones in eval mode.
    train_affine : bool
        Whether gamma and beta are trained. Where they are not, `parameters` and `gradients` are
        empty, and `backward` sets their gradients to 0, for optimizers that hold the arrays.
    """

    update_statistics: bool = True
    use_batch_statistics: bool | None = None
    train_affine: bool = True

    def freeze(self) -> Self:
        """Let nothing in the layer change, in either mode; return the layer.

        Batches are normalized with the running statistics, which stay as they are, as do gamma
        and beta. Gradients still flow through to the input. Sets all three switches.
        """
        self.update_statistics, self.use_batch_statistics, self.train_affine = False, False, False
        return self

    def unfreeze(self) -> Self:
        """Put all three switches back to where they are in a new layer; return the layer."""
        self.update_statistics, self.use_batch_statistics, self.train_affine = True, None, True
        return self

    def _switches(self) -> tuple[bool, bool | None, bool]:
        return self.update_statistics, self.use_batch_statistics, self.train_affine
