"""Flax: scale and bias in params, mean and var in batch_stats; momentum weighs the old value."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from numpy.typing import ArrayLike, NDArray

from ..layers import BatchNorm, GroupNorm, LayerNorm, RMSNorm
from ._layers import FAMILY, INSTANCE, arrays_of, build, check_norm, needs_eps, other_momentum

Api = Literal["linen", "nnx"]

_DEEPEST = 100  # levels of nested dicts; models have about a dozen


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested dicts as a flat dict, with "/" between the keys and the same leaves.

    Parameters
    ----------
    nested : mapping
        Nested dicts, such as Flax's variables.
    prefix : str, optional
        A text that is put before each key.

    Returns
    -------
    dict
        The leaves by path.

    Raises
    ------
    ValueError
        If two leaves have the same path, as in ``{"a/b": 1, "a": {"b": 2}}``, or the dicts are
        nested more than 100 deep.

    Examples
    --------
    >>> from cybn.interop import flatten
    >>> flatten({"params": {"BatchNorm_0": {"scale": 1}}})
    {'params/BatchNorm_0/scale': 1}
    """
    flat: dict[str, Any] = {}
    for path, value in _leaves(nested, prefix, 0):
        if path in flat:
            raise ValueError(f"two values have the path {path!r}: a key has a / in it")
        flat[path] = value
    return flat


def _leaves(nested: Mapping[str, Any], prefix: str, depth: int) -> Iterator[tuple[str, Any]]:
    if depth > _DEEPEST:
        raise ValueError(f"the dicts are nested more than {_DEEPEST} deep, or without end")
    for key, value in nested.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{path}/", depth + 1)
        else:
            yield path, value


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return a flat dict, with "/" between the parts of its keys, as nested dicts.

    Parameters
    ----------
    flat : mapping of str
        A dict like those that `flatten` returns.

    Returns
    -------
    dict
        Nested dicts.

    Raises
    ------
    ValueError
        If a key is a leaf and also the beginning of another key.
    TypeError
        If a key is not a str.

    Examples
    --------
    >>> from cybn import interop
    >>> interop.unflatten({"params/Dense_0/bias": 1, "params/Dense_0/kernel": 2})
    {'params': {'Dense_0': {'bias': 1, 'kernel': 2}}}
    """
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        if not isinstance(key, str):
            raise TypeError(f"the key {key!r} is of type {type(key).__name__}; it must be a str")
        *way, last = key.split("/")
        branch = nested
        for part in way:
            branch = branch.setdefault(part, {})
            if not isinstance(branch, dict):
                raise ValueError(f"{key!r} leads through {part!r}, which has a value of its own")
        if last in branch:
            raise ValueError(f"{key!r} has a value, and keys below it")
        branch[last] = value
    return nested


def _form(api: str) -> str:
    if api not in ("linen", "nnx"):
        raise ValueError(f"api is {api!r}; it must be 'linen' or 'nnx'")
    return "flax" if api == "linen" else "nnx"


def from_flax(
    variables: Mapping[str, Any],
    prefix: str = "",
    *,
    epsilon: float | None = None,
    momentum: float = 0.99,
    axis: int = -1,
    api: Api = "linen",
    layer: type[Any] = BatchNorm,
    running_ddof: int | None = None,
    count: ArrayLike | None = None,
    state_ddof: int | None = None,
    num_groups: int | None = None,
) -> Any:
    """Return a layer with the variables of a Flax batch norm, or another of its normalizations.

    Parameters
    ----------
    variables : mapping
        In linen ``{"params": ..., "batch_stats": ...}``, nested, or flat with "/" between the keys.
        In nnx a pure dict of the module's state. `variables` is not changed.
    prefix : str, default ""
        The path of the module in `variables`, such as "Block_0/BatchNorm_0", without the
        collection.
    epsilon, momentum, axis
        The settings of the module, with Flax's meaning: `momentum` is the weight of the old value.
        An epsilon of None is Flax's default, 1e-5 for a batch norm and 1e-6 for all others.
    api : {"linen", "nnx"}
        The API of Flax that the module belongs to.
    layer, running_ddof, count, state_ddof, num_groups
        As in `from_keras`.

    Returns
    -------
    layer
        As from `from_keras`.

    Raises
    ------
    TypeError, ValueError
        As in `from_torch`.

    Examples
    --------
    >>> import cybn
    >>> from cybn import interop
    >>> interop.from_flax(interop.to_flax(cybn.BatchNorm2d(2))).num_features
    2
    """
    if not isinstance(variables, Mapping):
        raise TypeError(f"variables is of type {type(variables).__name__}; it must be a dict")
    if epsilon is None:
        epsilon = 1e-6 if issubclass(layer, (*INSTANCE, *FAMILY)) else 1e-5
    options: dict[str, Any] = {"eps": epsilon, "momentum": other_momentum(momentum), "axis": axis}
    given: Any = (layer, running_ddof, count, state_ddof, num_groups)
    return build(flatten(variables), _form(api), prefix, *given, **options)


def to_flax(
    bn: Any, prefix: str = "", *, api: Api = "linen", count: ArrayLike | None = None
) -> dict[str, Any]:
    """Return the state of a layer in Flax's form, as nested dicts.

    Parameters
    ----------
    bn, count
        As in `to_keras`.
    prefix : str, default ""
        The path of the module in the dict, with "/" between the parts.
    api : {"linen", "nnx"}
        "linen" gives ``{"params": {"scale", "bias"}, "batch_stats": {"mean", "var"}}``, with
        `prefix` below the collections. "nnx" gives all four in one dict.

    Returns
    -------
    dict
        Nested dicts with copies of the arrays.

    Raises
    ------
    TypeError, ValueError
        As in `to_keras`.

    Examples
    --------
    >>> import cybn
    >>> from cybn import interop
    >>> sorted(interop.to_flax(cybn.BatchNorm2d(2)))
    ['batch_stats', 'params']
    """
    flat: dict[str, NDArray[Any]] = arrays_of(bn, _form(api), prefix, count)
    return unflatten(flat)


def flax_options(bn: Any) -> dict[str, Any]:
    """Return the settings for the module of the same name in ``flax.linen`` or ``flax.nnx``.

    Parameters
    ----------
    bn : Layer
        Any layer of cybn.

    Returns
    -------
    dict
        Arguments of the module's constructor, by name.

    Raises
    ------
    TypeError, ValueError
        As in `torch_options`, and if the momentum or eps is None, because Flax supports neither the
        mean of all batches nor an epsilon that depends on the input's dtype.

    Examples
    --------
    >>> import cybn
    >>> from cybn import interop
    >>> interop.flax_options(cybn.BatchNorm2d(2))["momentum"]
    0.9
    """
    check_norm(bn)
    scale, bias = bn.gamma is not None, bn.beta is not None
    shared = {"epsilon": needs_eps(bn), "use_scale": scale, "use_bias": bias}
    if isinstance(bn, LayerNorm | RMSNorm):
        axes = tuple(range(-len(bn.normalized_shape), 0))
        if isinstance(bn, RMSNorm):
            del shared["use_bias"]
        return shared | {"reduction_axes": axes, "feature_axes": axes}
    if isinstance(bn, GroupNorm):
        return {"num_groups": bn.num_groups} | shared
    if isinstance(bn, INSTANCE):
        return {"feature_axes": bn.axis} | shared
    return {"axis": bn.axis, "momentum": other_momentum(bn.momentum)} | shared
