"""A layer in words: its repr, the formulas it computes, and how other libraries mean the same."""

from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from .._arguments import integer, number

if TYPE_CHECKING:
    from .batch_norm import BatchNorm
    from .instance_norm import InstanceNorm

Explained: TypeAlias = "BatchNorm | InstanceNorm"

__all__ = ["CONVENTIONS", "describe", "explain", "settings"]


# ---- repr --------------------------------------------------------------------------------


def describe(bn: Explained) -> str:
    """Return the call that makes such a layer, and the switches that are not at their defaults."""
    parts = [str(bn.num_features)]
    if bn.axis != 1:
        parts.append(f"axis={bn.axis}")
    parts += [f"eps={bn.eps:g}", f"momentum={bn.momentum}"]
    parts += [f"affine={bn.affine}", f"track_running_stats={bn.track_running_stats}"]
    if bn.running_ddof != 1:
        parts.append(f"running_ddof={bn.running_ddof}")
    more = []
    if bn.activation is not None:
        more.append(f"activation={bn.activation!r}")
        if bn.activation == "leaky_relu":
            more.append(f"slope={bn.slope:g}")
    if bn.nan_policy != "propagate":
        more.append(f"nan_policy={bn.nan_policy!r}")
    if bn.virtual_batch_size is not None:
        more.append(f"virtual_batch_size={bn.virtual_batch_size}")
    if bn.renorm is not None:
        more.append(f"renorm={bn.renorm!r}")
    switches = [
        f"{name}={getattr(bn, name)}"
        for name, usual in _SWITCHES.items()
        if getattr(bn, name) is not usual
    ]
    return bn._describe(*parts, more=more) + f" with {', '.join(switches)}" * bool(switches)


_SWITCHES = {"update_statistics": True, "use_batch_statistics": None, "train_affine": True}


# ---- conventions -------------------------------------------------------------------------


class Convention(NamedTuple):
    """What a library does where it is told nothing."""

    eps: float
    momentum: float | None  # as the library writes it
    weighs_old: bool  # whether its momentum is the weight of the old value
    running_ddof: int


CONVENTIONS = {
    "torch": Convention(1e-5, 0.1, False, 1),  # torch.nn.BatchNorm2d
    "keras": Convention(1e-3, 0.99, True, 0),  # keras.layers.BatchNormalization
    "onnx": Convention(1e-5, 0.9, True, 0),  # BatchNormalization, opset 15, training_mode=1
    "paper": Convention(1e-5, None, False, 1),  # Algorithm 2: the mean over batches, unbiased
}


def _weight_of_new(library: str, momentum: Any) -> float:
    """Return the weight of the new value from that of the old one."""
    weight = number("momentum", momentum)
    if not 0 <= weight <= 1:
        raise ValueError(
            f"momentum is {weight}; it must be in [0, 1], the weight of the old value in the "
            f"convention of {library}, or None for the mean of all batches"
        )
    return float(1 - Decimal(repr(weight)))  # 1 - 0.99 as written: 0.01, not 0.010000000000000009


def settings(library: str, given: dict[str, Any]) -> dict[str, Any]:
    """Return keywords of a layer that means `given` as `library` does."""
    if library not in CONVENTIONS:
        raise ValueError(f"library is {library!r}; it must be one of {', '.join(CONVENTIONS)}")
    convention = CONVENTIONS[library]
    momentum = given.get("momentum", convention.momentum)
    if momentum is not None and convention.weighs_old:
        momentum = _weight_of_new(library, momentum)
    defaults = {"eps": convention.eps, "running_ddof": convention.running_ddof}
    return defaults | given | {"momentum": momentum}


# ---- formulas ----------------------------------------------------------------------------


def explain(self: Explained, channel: int = 0) -> None:
    """Print the formulas of the next forward, with the numbers of this layer in.

    Parameters
    ----------
    channel : int, default 0
        Whose gamma, beta and running statistics to put in.

    Raises
    ------
    TypeError
        If `channel` is no int.
    ValueError
        If there is no such channel.
    """
    channel = integer("channel", channel)
    if not 0 <= channel < self.num_features:
        raise ValueError(f"channel is {channel}; it must be in 0..{self.num_features - 1}")
    print(_formulas(self, channel))


def _formulas(bn: Explained, channel: int) -> str:
    """Return what the next forward of `bn` computes, with the numbers of one channel."""
    running = bn._running
    by_batch = running.normalizes_by_batch(bn.training)
    learns = bn.training and running.tracks and running.updates
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


def _of(bn: Explained, in_parts: bool) -> str:
    """Return what is normalized by itself."""
    if bn._by_sample:
        return "each sample"
    return "each virtual batch" if in_parts else "the batch"


def _batch(bn: Explained, in_parts: bool) -> list[str]:
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


def _output(bn: Explained, by_batch: bool, c: int) -> list[str]:
    running = bn._running.values
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


def _activation(bn: Explained) -> tuple[str, list[str]]:
    """Return the name of what is normalized, and the line that makes y of it."""
    if bn.activation is None:
        return "y", []
    slope = f", slope {bn.slope:g}" if bn.activation == "leaky_relu" else ""
    return "z", [f"y    = {bn.activation}(z + residual{slope}), residual 0 where there is none"]


def _update(bn: Explained, c: int, in_parts: bool) -> list[str]:
    mean, var, batches = bn._running.values
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
