"""The arrays of a fuzz case, as drawn or as plain copies."""

from dataclasses import dataclass, field

import numpy as np
from fuzz_bounds import rows
from fuzz_cases import DTYPES, FAMILY, Case, values

import cybn
from cybn import reference


@dataclass
class Arrays:
    """The arrays of a case. `buffers` are the memory that must not change, except through `out`."""

    x: np.ndarray
    dy: np.ndarray | None = None
    residual: np.ndarray | None = None
    out: np.ndarray | None = None
    out_residual: np.ndarray | None = None
    gamma: np.ndarray | None = None
    beta: np.ndarray | None = None
    fixed: tuple | None = None  # mean and var for inference
    moments: object = None  # for backward
    options: dict = field(default_factory=dict)
    buffers: list = field(default_factory=list)
    copied: bool = False  # whether cybn converts x to a copy first, so that out may overlap it


def build(case: Case) -> Arrays:
    rng = np.random.default_rng(case.seed)
    dtype = DTYPES[case.dtype]
    axis = case.axis if case.op not in FAMILY or case.groups else 0
    options = selection(case, rng)
    arrays = Arrays(values(case.kind, case.shape, axis, dtype, rng), options=options)
    shape = parameter_shape(case)
    gamma = rng.uniform(0.5, 2, shape) * rng.choice([1, 1, -1], shape)
    if rng.random() < 0.1 and gamma.size and "from_output" not in case.flags:
        gamma.flat[rng.integers(gamma.size)] = rng.choice([0.0, 1e-3, 1e3])
    arrays.gamma = parameter(case.gamma, gamma)
    arrays.beta = parameter(case.beta, rng.standard_normal(shape))
    if case.op not in FAMILY:
        arrays.options |= plain_options(case)
        arrays.x[hidden(case, arrays)] = np.nan
        prepare(case, arrays, rng)
    for name in ("dy", "residual"):
        if name in case.views:
            array = rng.standard_normal(case.shape).astype(dtype)
            setattr(arrays, name, array)
    if arrays.dy is not None:
        arrays.dy[hidden(case, arrays)] = np.nan
    lay_out(case, arrays)
    if case.flags.get("dy_is_x"):
        arrays.dy = arrays.x
    if case.flags.get("residual"):
        arrays.options["residual"] = arrays.x if arrays.residual is None else arrays.residual
    return arrays


def parameter_shape(case):
    if case.op.startswith(("layer", "rms")):
        return case.shape[case.axis :]
    return (case.shape[case.axis],)


def parameter(dtype, given):
    """Return gamma or beta; it has a stride of 2 if its length is odd."""
    if dtype is None:
        return None
    room = np.full((*given.shape, 1 + given.size % 2), np.nan, dtype)
    room[..., 0] = given
    return room[..., 0]


def plain_options(case):
    return {k: case.flags[k] for k in ("activation", "slope") if k in case.flags}


def selection(case, rng):
    """Return mask, weights and lengths, in any of the shapes that are allowed."""
    chosen = {}
    axis = case.axis % len(case.shape)
    for what in case.flags.get("select", "").split():
        if what == "lengths":
            batch, along = [i for i in range(len(case.shape)) if i != axis][:2]
            chosen[what] = rng.integers(0, case.shape[along] + 1, case.shape[batch])
            continue
        shape = case.flags["select_shape"]
        array = rng.random(shape) < 0.8
        if what == "weights":
            quarters = rng.integers(0, 9, shape) / 4
            array = (quarters if rng.random() < 0.8 else quarters * 1000).astype(np.float32)
        how = case.flags["select_axes"]
        if how == "all":
            array = np.expand_dims(array, axis)
        elif how == "fewer":
            while array.ndim and array.shape[0] == 1:
                array = array[0]
        chosen[what] = np.asfortranarray(array) if rng.random() < 0.3 else array
    return chosen


def unselected(case, arrays):
    """Return a bool array like x that is True for values that are masked or have weight 0."""
    chosen = [arrays.options.get(k) for k in ("mask", "weights", "lengths")]
    w = reference._shares(arrays.x, case.axis, *chosen)
    like = np.moveaxis(arrays.x, case.axis, 0)
    return np.moveaxis(np.broadcast_to((w == 0).reshape(like.shape[1:]), like.shape), 0, case.axis)


def hidden(case, arrays):
    """Return a bool array like x that is True for masked values that were set to NaN."""
    if case.flags.get("hidden"):
        return unselected(case, arrays)
    return np.zeros(arrays.x.shape, bool)


def prepare(case, arrays, rng):
    """Add further inputs of the operation: fixed statistics, or the result of a forward."""
    channels = case.shape[case.axis]
    if "inference" in case.op:
        wide = rows(arrays.x.astype(np.float64), case.axis)
        with np.errstate(all="ignore"):
            mean, var = wide.mean(1), wide.var(1)
        good = np.isfinite(mean) & np.isfinite(var) & (np.abs(mean) < 1e30) & (var < 1e30)
        mean, var = np.where(good, mean, 0.0), np.where(good & (var > 1e-30), var, 1.0)
        if rng.random() < 0.3:
            mean, var = rng.standard_normal(channels), rng.uniform(0.1, 4, channels)
        kind = rng.choice(["float32", "float64"])
        arrays.fixed = mean.astype(kind), var.astype(kind)
    if case.flags.get("from_output") and case.op == "backward" and acceptable(case, arrays):
        y, arrays.moments = cybn.batch_norm(
            arrays.x, arrays.gamma, arrays.beta, axis=case.axis, eps=case.eps, **arrays.options
        )
        arrays.x = y


def lay_out(case, arrays):
    """Put the arrays into memory as their views require, and choose out."""
    bases = {}
    for name in ("x", "dy", "residual"):
        if name in case.views:
            array, buffer, base = case.views[name].lay(getattr(arrays, name))
            setattr(arrays, name, array)
            arrays.buffers.append(buffer)
            bases[name] = base
    view = case.views["x"]
    arrays.copied = not arrays.x.flags.aligned or view.swapped
    if case.out in ("x", "dy", "residual"):
        arrays.out = getattr(arrays, case.out)
    elif (
        case.out == "overlap"
        and view.may_be_out
        and any(m and n > 1 for m, n in zip(view.margins, case.shape, strict=True))
    ):
        arrays.out = view.cut(bases["x"], case.shape, by=1)
    elif case.out in ("given", "overlap"):
        arrays.out = room_of(case, "out", arrays)
    if "out_residual" in case.views:
        arrays.out_residual = room_of(case, "out_residual", arrays)


def room_of(case, name, arrays):
    """Return a new array to write to, laid out as its view requires."""
    room, buffer, _ = case.views[name].lay(np.zeros(case.shape, DTYPES[case.dtype]))
    arrays.buffers.append(buffer)
    return room


def rooms(a):
    """Return the output arrays that the call was given, by the names of the results."""
    big = {"y": a.out, "dx": a.out, "dresidual": a.out_residual}
    return {name: room for name, room in big.items() if room is not None}


def plain(arrays):
    """Return copies of the arrays in native byte order, without out."""
    x = native(arrays.x)
    options = {k: native(v) if k == "residual" else v for k, v in arrays.options.items()}
    if arrays.options.get("residual") is arrays.x:
        options["residual"] = x
    dy = None if arrays.dy is None else np.ascontiguousarray(native(arrays.dy))
    return Arrays(
        x,
        dy,
        gamma=arrays.gamma,
        beta=arrays.beta,
        fixed=arrays.fixed,
        moments=arrays.moments,
        options=options,
    )


def native(array):
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    return array.copy(order="K")


def acceptable(case, a):
    """Return whether each channel or row has enough values for a variance."""
    if case.op in FAMILY:
        if case.op.startswith("group"):
            return case.shape[0] * a.x.size // max(1, case.shape[0] * case.groups) > 1
        if case.op.startswith("instance"):
            return a.x.size // (case.shape[0] * case.shape[case.axis]) > 1
        return True
    if "inference" in case.op:
        return True
    w = reference._shares(
        a.x, case.axis, *(a.options.get(k) for k in ("mask", "weights", "lengths"))
    )
    return np.count_nonzero(w) >= (1 if case.op == "moments" else 2)
