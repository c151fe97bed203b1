"""Descriptions of a layer: its repr, its formulas, and the conventions of other libraries."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from ._arguments import integer, number

__all__ = ["CONVENTIONS", "describe", "explain", "settings"]


# ---- repr --------------------------------------------------------------------------------


def describe(bn: Any) -> str:
    """Return the call that makes such a layer, and the switches that are not at their defaults."""
    always = [f"{name}={getattr(bn, name)}" for name in ("affine", "track_running_stats")]
    parts = [str(bn.num_features), *_unusual(bn, axis=1), f"eps={bn.eps:g}"]
    parts += [f"momentum={bn.momentum}", *always, *_unusual(bn, running_ddof=1)]
    more = _unusual(bn, activation=None)
    if bn.activation == "leaky_relu":
        more.append(f"slope={bn.slope:g}")
    more += _unusual(bn, nan_policy="propagate", virtual_batch_size=None, renorm=None)
    switches = _unusual(bn, update_statistics=True, use_batch_statistics=None, train_affine=True)
    return str(bn._describe(*parts, more=more)) + f" with {', '.join(switches)}" * bool(switches)


def _unusual(bn: Any, **usual: Any) -> list[str]:
    """Return the settings that differ from `usual`, as they are written in a call."""
    found = {name: getattr(bn, name) for name in usual}
    return [f"{name}={value!r}" for name, value in found.items() if value != usual[name]]


# ---- conventions -------------------------------------------------------------------------


# The defaults of each library: eps, momentum in its own convention, whether momentum is the weight
# of the old value, and running_ddof.
CONVENTIONS: dict[str, tuple[float, float | None, bool, int]] = {
    "torch": (1e-5, 0.1, False, 1),  # torch.nn.BatchNorm2d
    "keras": (1e-3, 0.99, True, 0),  # keras.layers.BatchNormalization
    "onnx": (1e-5, 0.9, True, 0),  # BatchNormalization, opset 15, training_mode=1
    "paper": (1e-5, None, False, 1),  # Algorithm 2: the mean over batches, unbiased
}


def settings(library: str, given: dict[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of a layer, given those in the conventions of `library`."""
    if library not in CONVENTIONS:
        raise ValueError(f"library is {library!r}; it must be one of {', '.join(CONVENTIONS)}")
    eps, momentum, weighs_old, running_ddof = CONVENTIONS[library]
    momentum = given.get("momentum", momentum)
    if momentum is not None and weighs_old:
        weight = number("momentum", momentum)
        if not 0 <= weight <= 1:
            raise ValueError(
                f"momentum is {weight}; it must be in [0, 1], the weight of the old value in the "
                f"convention of {library}, or None for the mean of all batches"
            )
        momentum = float(1 - Decimal(repr(weight)))  # 1 - 0.99 as written: 0.01, not 0.0100...09
    return {"eps": eps, "running_ddof": running_ddof} | given | {"momentum": momentum}


# ---- formulas ----------------------------------------------------------------------------


def explain(self: Any, channel: int = 0) -> None:
    """Print the formulas of the next forward pass with this layer's numbers filled in.

    Parameters
    ----------
    channel : int, default 0
        The channel whose gamma, beta and running statistics are filled in.

    Raises
    ------
    TypeError
        If `channel` is not an int.
    ValueError
        If there is no such channel.
    """
    channel = integer("channel", channel)
    if not 0 <= channel < self.num_features:
        raise ValueError(f"channel is {channel}; it must be in 0..{self.num_features - 1}")
    print("\n".join(_formulas(self, channel)).rstrip())


def _formulas(bn: Any, channel: int) -> list[str]:
    """Return the formulas of the next forward of `bn`, with the numbers of one channel."""
    running = bn._running
    by_batch = running.normalizes_by_batch(bn.training)
    learns = bn.training and running.tracks and running.updates
    in_parts = by_batch and bn.training and bn.virtual_batch_size is not None
    of = "each virtual batch" if in_parts else "each sample" if bn._by_sample else "the batch"
    axes = f"{'0 and ' * bn._by_sample}axis {bn.axis}"
    batch = [
        *[
            f"the batch is cut into virtual batches of {bn.virtual_batch_size} samples; the last "
            "has the samples that remain,",
            "and joins the one before if it has only one value per channel",
        ]
        * in_parts,
        f"M    = values of a channel in {of}: all axes but {axes}",
        "mean = sum(x) / M",
        "var  = sum((x - mean)**2) / M",
    ]
    still = "the running statistics stay as they are" * bn.track_running_stats
    trained = not bn.affine or bn.train_affine
    return [
        f"{bn!r}",
        f"in {'training' if bn.training else 'eval'} mode, with the statistics of "
        f"{of if by_batch else 'training so far'}; "
        f"each channel by itself, numbers of channel {channel}",
        "",
        *(batch if by_batch or learns else []),
        *_output(bn, by_batch, channel),
        "",
        *(_update(bn, channel, in_parts) if learns else [still]),
        *([] if trained else ["gamma and beta are not trained: their gradients are 0"]),
    ]


def _output(bn: Any, by_batch: bool, c: int) -> list[str]:
    mean, var, _ = bn._running.values
    gamma = "" if bn.gamma is None else f" * {bn.gamma[c]:g}"
    beta = "" if bn.beta is None else f" {_plus(bn.beta[c])}"
    y, activated = "y", []
    if bn.activation is not None:
        slope = f", slope {bn.slope:g}" if bn.activation == "leaky_relu" else ""
        rule = f"{bn.activation}(z + residual{slope}), where residual is 0 if there is none"
        y, activated = "z", [f"y    = {rule}"]
    std, m = f"sqrt({var[c]:g} + {bn.eps:g})", mean[c]
    off = f"+ {-m:g}" if m < 0 else f"- {m:g}"
    if not by_batch:
        return [f"{y}    = (x {off}) / {std}{gamma}{beta}", *activated]
    xhat = f"(x - mean) / sqrt(var + {bn.eps:g})"
    if bn.renorm is None or not bn.training:
        return [f"{y}    = {xhat}{gamma}{beta}", *activated]
    r, d = bn.renorm.r_max, bn.renorm.d_max
    return [
        f"r    = clip(sqrt(var + {bn.eps:g}) / {std}, {1 / r:g}, {r:g})",
        f"d    = clip((mean {off}) / {std}, {-d:g}, {d:g})",
        f"{y}    = ({xhat} * r + d){gamma}{beta}" if gamma or beta else f"{y}    = {xhat} * r + d",
        *activated,
        "with no gradient through r and d",
    ]


def _update(bn: Any, c: int, in_parts: bool) -> list[str]:
    """Return the formulas of the running statistics; `_all` marks values of the whole batch."""
    mean, var, batches = bn._running.values
    new = bn._running.weight(bn._running.values)
    mark, whole = "", []
    if in_parts:
        mark = "_all"
        whole = [
            f"M_all    = values of a channel in the whole batch: all axes but axis {bn.axis}",
            "mean_all = sum(x) / M_all",
            "var_all  = sum((x - mean_all)**2) / M_all",
        ]
    each = "average({})" if bn._by_sample else "{}"
    batch_var = each.format(f"var{mark}" + f" * M{mark} / (M{mark} - 1)" * bn.running_ddof)
    changed = "are not changed" + ", and it raises" * (bn.nan_policy == "raise")
    return [
        *whole,
        f"running_mean = {1 - new:g} * {mean[c]:g} + {new:g} * {each.format(f'mean{mark}')}",
        f"running_var  = {1 - new:g} * {var[c]:g} + {new:g} * {batch_var}",
        *["where average(...) is the mean over the samples"] * bn._by_sample,
        f"num_batches_tracked = {batches} + 1",
        *[f"if these are not finite in every channel, all three {changed}"]
        * (bn.nan_policy != "propagate"),
    ]


def _plus(value: float) -> str:
    return f"- {-value:g}" if value < 0 else f"+ {value:g}"
