"""The formulas of a layer, as they will be computed, with its numbers in."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .batch_norm import BatchNorm

__all__ = ["explain"]


def explain(bn: BatchNorm, channel: int) -> str:
    """Return what the next forward of `bn` computes, with the numbers of one channel."""
    by_batch, learns = bn._by_batch(bn.training), bn._learns(bn.training)
    in_parts = by_batch and bn.training and bn.virtual_batch_size is not None
    lines = [
        f"{bn!r}",
        f"in {'training' if bn.training else 'eval'} mode, with the statistics of "
        f"{_of(bn, in_parts) if by_batch else 'training so far'}; "
        f"each channel by itself, numbers of channel {channel}",
        "",
        *(_batch(bn, in_parts) if by_batch or learns else []),
        *_output(bn, by_batch, channel),
    ]
    if learns:
        lines += ["", *_update(bn, channel, in_parts)]
    else:
        lines += ["", "the running statistics stay as they are" * bn.track_running_stats]
    if bn.affine and not bn.train_affine:
        lines.append("gamma and beta are not trained: their gradients are 0")
    return "\n".join(lines).rstrip()


def _of(bn: BatchNorm, in_parts: bool) -> str:
    """Return what is normalized by itself."""
    if bn._by_sample:
        return "each sample"
    return "each virtual batch" if in_parts else "the batch"


def _batch(bn: BatchNorm, in_parts: bool) -> list[str]:
    others = f"all axes but {'0 and ' * bn._by_sample}axis {bn.axis}"
    cut = (
        f"the batch is cut into virtual batches of {bn.virtual_batch_size} samples; the last has "
        "what is left,\nwhich joins the one before where it is one value a channel"
    )
    return [
        *([cut] if in_parts else []),
        f"M    = values of a channel in {_of(bn, in_parts)}: {others}",
        "mean = sum(x) / M",
        "var  = sum((x - mean)**2) / M",
    ]


def _output(bn: BatchNorm, by_batch: bool, c: int) -> list[str]:
    running = bn._running
    gamma = "" if bn.gamma is None else f" * {bn.gamma[c]:g}"
    beta = "" if bn.beta is None else f" {_plus(bn.beta[c])}"
    y, activated = _activation(bn)
    if not by_batch:
        x, var = f"(x {_minus(running.mean[c])})", running.var[c]
        return [f"{y}    = {x} / sqrt({var:g} + {bn.eps:g}){gamma}{beta}", *activated]
    xhat = f"(x - mean) / sqrt(var + {bn.eps:g})"
    if bn.renorm is None or not bn.training:
        return [f"{y}    = {xhat}{gamma}{beta}", *activated]
    limits, std = bn.renorm, f"sqrt({running.var[c]:g} + {bn.eps:g})"
    return [
        f"r    = clip(sqrt(var + {bn.eps:g}) / {std}, {1 / limits.r_max:g}, {limits.r_max:g})",
        f"d    = clip((mean {_minus(running.mean[c])}) / {std}, "
        f"{-limits.d_max:g}, {limits.d_max:g})",
        f"{y}    = ({xhat} * r + d){gamma}{beta}" if gamma or beta else f"{y}    = {xhat} * r + d",
        *activated,
        "with no gradient through r and d",
    ]


def _activation(bn: BatchNorm) -> tuple[str, list[str]]:
    """Return the name of what is normalized, and the line that makes y of it."""
    if bn.activation is None:
        return "y", []
    slope = f", slope {bn.slope:g}" if bn.activation == "leaky_relu" else ""
    return "z", [f"y    = {bn.activation}(z + residual{slope}), residual 0 where there is none"]


def _update(bn: BatchNorm, c: int, in_parts: bool) -> list[str]:
    mean, var, batches = bn._running
    new = 1 / (batches + 1) if bn.momentum is None else bn.momentum
    mark = "_all" if in_parts else ""
    whole = [
        f"M_all    = values of a channel in the whole batch: all axes but axis {bn.axis}",
        "mean_all = sum(x) / M_all",
        "var_all  = sum((x - mean_all)**2) / M_all",
    ]
    batch_mean = f"mean{mark}"
    batch_var = f"var{mark}" + f" * M{mark} / (M{mark} - 1)" * bn.running_ddof
    if bn._by_sample:
        batch_mean, batch_var = f"average({batch_mean})", f"average({batch_var})"
    lines = [
        *(whole if in_parts else []),
        f"running_mean = {1 - new:g} * {mean[c]:g} + {new:g} * {batch_mean}",
        f"running_var  = {1 - new:g} * {var[c]:g} + {new:g} * {batch_var}",
        *(["where average(...) is that over the samples"] if bn._by_sample else []),
        f"num_batches_tracked = {batches} + 1",
    ]
    if bn.nan_policy != "propagate":
        does = "are not changed" if bn.nan_policy == "skip" else "are not changed, and it raises"
        lines.append(f"where that is not finite in every channel, all three {does}")
    return lines


def _plus(value: float) -> str:
    return f"- {-value:g}" if value < 0 else f"+ {value:g}"


def _minus(value: float) -> str:
    return f"+ {-value:g}" if value < 0 else f"- {value:g}"
