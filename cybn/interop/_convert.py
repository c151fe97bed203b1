"""Converting a whole model's state: the keys of batch norms are renamed, others do not change."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from ._forms import VAR, check_not_nested, computed, form, search, variance, write


class Converted(NamedTuple):
    """A converted state, with a record of the conversion.

    Attributes
    ----------
    state : dict
        The new state.
    taken : dict of str to dict of str to str
        By the prefix of each batch norm in the old state, a dict of the new key for each old key.
        The new key is None if the new form does not have the array.
    passed_over : dict of str to str
        By prefix, the reason why keys that include a running mean or variance were not converted.

    Examples
    --------
    >>> from cybn import interop
    >>> state = {"bn.running_mean": [0.0], "bn.running_var": [1.0], "fc.weight": [[1.0]]}
    >>> done = interop.convert(state, "torch", "keras")
    >>> sorted(done.state)
    ['bn/moving_mean', 'bn/moving_variance', 'fc.weight']
    >>> done.taken["bn"]["bn.running_mean"], done.passed_over
    ('bn/moving_mean', {})
    """

    state: dict[str, Any]
    taken: dict[str, dict[str, str | None]]
    passed_over: dict[str, str]


def find(
    state: Mapping[str, Any],
    form: str,
    *,
    only: Iterable[str] | None = None,
    skip: Iterable[str] = (),
) -> dict[str, tuple[str, ...]]:
    """Return the prefixes of the batch norms in a model's state, with the keys of each.

    Norms without running statistics, such as layer norms, are included only if `only` names them.
    An instance norm of PyTorch that tracks statistics has the same keys as a batch norm, so exclude
    it by `skip`.

    Parameters
    ----------
    state : mapping of str to array_like
        A flat dict.
    form : {"torch", "keras", "keras-h5", "flax", "nnx", "onnx", "mxnet", "cybn"}
        The library whose names to look for.
    only : iterable of str, optional
        The prefixes to include, and no others. Without `only`, two kinds of batch norms are left
        out: in "keras-h5", where keys are numbers, those without "batch_norm" in their name; in
        "nnx" and "onnx", those without scale and shift.
    skip : iterable of str, default ()
        Prefixes to leave out.

    Returns
    -------
    dict of str to tuple of str
        The keys by prefix, in the order of `state`.

    Raises
    ------
    TypeError
        If `state` is not a mapping.
    ValueError
        If `form` is unknown, `only` names a prefix that is not there, or `state` is nested, as a
        whole checkpoint is.

    Warns
    -----
    UserWarning
        If a batch norm of PyTorch is parametrized or pruned, and therefore left out.

    Examples
    --------
    A layer from each batch norm of a model:

    >>> from cybn import interop
    >>> state = {"bn.running_mean": [0.0], "bn.running_var": [1.0], "fc.weight": [[1.0]]}
    >>> layers = {p: interop.from_torch(state, p) for p in interop.find(state, "torch")}
    >>> {prefix: bn.num_features for prefix, bn in layers.items()}
    {'bn': 1}
    """
    found = search(state, form, only, skip)
    check_not_nested(state, found)
    for prefix, reason in (computed(state) if form == "torch" else {}).items():
        if prefix in found.passed_over:
            warnings.warn(f"{prefix!r} is passed over: {reason}", stacklevel=2)
    return {p: tuple(keys.values()) for p, keys in found.taken.items()}


def convert(
    state: Mapping[str, Any],
    source: str,
    target: str,
    *,
    only: Iterable[str] | None = None,
    skip: Iterable[str] = (),
    rename: Callable[[str], str] | None = None,
    count: Any = None,
    state_ddof: int | None = None,
) -> Converted:
    """Convert all batch norms of a model's state from one form to another.

    Parameters
    ----------
    state : mapping of str to array_like
        A flat dict, which is not changed.
    source, target : {"torch", "keras", "keras-h5", "flax", "nnx", "onnx", "mxnet", "cybn"}
        The forms of `state` and of the result.
    only, skip
        As in `find`.
    rename : callable, optional
        A function from the old prefix of a batch norm to the new one. None keeps the prefixes.
    count : int, array_like or mapping of str to these, optional
        The number of values per channel in a training batch, N * S, for all batch norms or by old
        prefix. If it is given and the two forms store different variances, the running variance is
        converted. Otherwise it is copied unchanged, and inference gives the same results. The form
        "cybn" can store either variance.
    state_ddof : {None, 0, 1}
        The kind of variance in `state`. None means the usual one of its form. Pass 1 for a Keras
        state from layers that used TensorFlow's fused kernel, as in `from_keras`.

    Returns
    -------
    Converted
        (state, taken, passed_over). The arrays in `state` are the given ones, not copies, except
        for converted variances, and for zeros and ones that replace missing arrays.

    Raises
    ------
    TypeError
        If `state` is not a mapping, or a variance to convert does not consist of floats.
    ValueError
        As in `find`, and if a new key is in `state` already.

    Examples
    --------
    >>> import cybn
    >>> from cybn import interop
    >>> state = interop.to_torch(cybn.BatchNorm2d(2), "bn1")
    >>> sorted(interop.convert(state, "torch", "nnx").state)
    ['bn1/bias', 'bn1/mean', 'bn1/scale', 'bn1/var']
    """
    if state_ddof not in (None, 0, 1):
        raise ValueError(f"state_ddof is {state_ddof}; it must be 0 (biased), 1 or None")
    old, new = form(source), form(target)
    had = old.ddof if state_ddof is None else state_ddof
    found = search(state, source, only, skip)
    check_not_nested(state, found)
    counts = count if isinstance(count, Mapping) else dict.fromkeys(found.taken, count)
    if unknown := sorted(set(counts) - set(found.taken)):
        raise ValueError(f"count is given for {unknown}, where no batch norm was found")
    gone = {key for keys in found.taken.values() for key in keys.values()}
    result = {key: value for key, value in state.items() if key not in gone}
    taken: dict[str, dict[str, str | None]] = {}
    for prefix, keys in found.taken.items():
        group = {role: state[key] for role, key in keys.items()}
        n = counts.get(prefix)
        if n is not None and had is not None and new.ddof is not None and VAR in group:
            group[VAR] = variance(group[VAR], had, new.ddof, n)
        name = prefix if rename is None else rename(prefix)
        written = write(group, target, name)
        if both := sorted(set(written) & set(result)):
            raise ValueError(
                f"the new key {both[0]!r} is in the state already; change it by rename="
            )
        result |= written
        taken[prefix] = {
            key: new.key(name, role) if role in new.roles else None for role, key in keys.items()
        }
    return Converted(result, taken, found.passed_over)
