"""Plots of drift, drawn by matplotlib, which the extra ``cybn[plot]`` installs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

import cybn

if TYPE_CHECKING:
    from matplotlib.axes import Axes

try:
    import matplotlib.pyplot as plt
except ImportError as error:
    raise ImportError(
        "cybn.plot needs matplotlib: pip install 'cybn[plot]'", name=error.name
    ) from error

__all__ = ["drift"]

_PANELS = (
    ("shift", "batch mean, in running standard deviations"),
    ("log_variance_ratio", "log(batch variance / running variance)"),
)


def drift(
    drifts: cybn.Drift | Mapping[str, cybn.Drift],
    *,
    limit: float = 1.0,
    axes: tuple[Axes, Axes] | None = None,
) -> tuple[Axes, Axes]:
    """Draw the drift of batch statistics from the running statistics, with a dot per channel.

    Parameters
    ----------
    drifts : Drift, or mapping of str to Drift
        The result of `BatchNorm.drift`, for one layer or for several by name.
    limit : float, default 1
        The value of the warning lines, on both sides of 0.
    axes : pair of matplotlib Axes, optional
        The axes to draw in. None means a new figure.

    Returns
    -------
    pair of matplotlib Axes
        The axes of the shift and of the log variance ratio. Channels whose values are not finite
        are not drawn, but counted in the legend.

    Examples
    --------
    >>> import numpy as np
    >>> import cybn, cybn.plot
    >>> bn = cybn.BatchNorm(64)
    >>> y = bn(np.random.default_rng(0).standard_normal((32, 64)))
    >>> left, right = cybn.plot.drift(bn.drift())
    """
    named = {"": drifts} if isinstance(drifts, cybn.Drift) else dict(drifts)
    if axes is None:
        _, made = plt.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
        axes = made[0], made[1]
    for panel, (field, label) in zip(axes, _PANELS, strict=True):
        for name, one in named.items():
            _dots(panel, name, np.asarray(getattr(one, field)))
        panel.axhline(0, color="0.6", linewidth=0.8, zorder=0)
        for level in (-limit, limit):
            panel.axhline(level, color="tab:red", linewidth=0.8, linestyle="--", zorder=0)
        panel.set(xlabel="channel", ylabel=label)
        if panel.get_legend_handles_labels()[1]:
            panel.legend(fontsize="small")
    return axes


def _dots(panel: Any, name: str, values: np.ndarray[Any, Any]) -> None:
    finite = np.isfinite(values)
    missing = values.size - int(finite.sum())
    words = [name] * bool(name) + [f"{missing} not finite"] * bool(missing)
    channels = np.flatnonzero(finite)
    panel.plot(channels, values[finite], ".", markersize=4, label=", ".join(words) or None)
