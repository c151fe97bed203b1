"""The forms of a batch norm's state: how each library names its arrays, and its kind of variance.

===========  ========================================================================  ==========
form         keys of a batch norm with the prefix p                                    variance
===========  ========================================================================  ==========
cybn         p.gamma  p.beta  p.running_mean  p.running_var  p.num_batches_tracked     the layer's
torch        p.weight p.bias  p.running_mean  p.running_var  p.num_batches_tracked     unbiased
keras        p/gamma  p/beta  p/moving_mean   p/moving_variance; read with tails too   biased
keras-h5     p/vars/0 p/vars/1  p/vars/2      p/vars/3                                 biased
flax         params/p/scale  params/p/bias  batch_stats/p/mean  batch_stats/p/var      biased
nnx          p/scale  p/bias  p/mean          p/var                                    biased
onnx         p.scale  p.B     p.input_mean    p.input_var; read as p.mean, p.var too   biased
mxnet        p_gamma  p_beta  p_moving_mean   p_moving_var; read as p_running_... too  biased
===========  ========================================================================  ==========

A *role* is the name of an array in cybn's own state, and a *group* is a dict of the arrays of one
batch norm by role. Keys of Keras may have one of TensorFlow's tails when they are read: ``:0``,
``/ExponentialMovingAverage`` or ``/.ATTRIBUTES/VARIABLE_VALUE``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ._arrays import as_array, as_floats

GAMMA, BETA, MEAN, VAR, BATCHES = (
    "gamma",
    "beta",
    "running_mean",
    "running_var",
    "num_batches_tracked",
)
ROLES = (GAMMA, BETA, MEAN, VAR, BATCHES)
Group = dict[str, Any]


@dataclass(frozen=True)
class Form:
    """How one library names the arrays of a batch norm."""

    leaves: dict[str, str]  # last part of a key -> role; the first one of a role is written
    separator: str
    ddof: int | None  # of the running variance; None means that of the layer
    tails: tuple[str, ...] = ()  # ends of a key that are ignored
    heads: tuple[str, ...] = ()  # beginnings of a key that are ignored
    collections: dict[str, str] | None = None  # first part of the key, by role
    tracked: bool = True  # whether it always has running statistics
    affine: bool = False  # whether it always has gamma and beta
    lone: bool = False  # whether it may be written with only one of gamma and beta
    hint: str = ""  # text that a prefix must contain, if the keys are ambiguous
    sure: bool = True  # whether mean and variance are enough to recognize a batch norm

    def parse(self, key: str) -> tuple[str, str] | None:
        """Return the prefix and the role of a key, or None if it is not from a batch norm."""
        if not isinstance(key, str):
            return None
        for head in self.heads:
            key = key.removeprefix(head)
        for tail in self.tails:
            key = key.removesuffix(tail)
        for leaf, role in self.leaves.items():
            head = key.removesuffix(leaf)
            if head == key or (head and not head.endswith(self.separator)):
                continue
            if self.collections is not None:
                collection = self.collections[role] + self.separator
                if not head.startswith(collection):
                    continue
                head = head.removeprefix(collection)
            return head.removesuffix(self.separator), role
        return None

    def key(self, prefix: str, role: str) -> str:
        """Return the key that is written for a role."""
        leaf = next(leaf for leaf, of in self.leaves.items() if of == role)
        parts = [prefix, leaf] if prefix else [leaf]
        if self.collections is not None:
            parts.insert(0, self.collections[role])
        return self.separator.join(parts)

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that the form has keys for, in the order in which they are written."""
        return tuple(dict.fromkeys(self.leaves.values()))


FORMS = {
    "cybn": Form(
        {role: role for role in ROLES},
        ".",
        ddof=None,
        tracked=False,
    ),
    "torch": Form(
        {"weight": GAMMA, "bias": BETA, MEAN: MEAN, VAR: VAR, BATCHES: BATCHES},
        ".",
        ddof=1,
        tracked=False,
    ),
    "keras": Form(
        {
            "gamma": GAMMA,
            "beta": BETA,
            "moving_mean": MEAN,
            "moving_variance": VAR,
            "scale": GAMMA,  # of an RMSNormalization
        },
        "/",
        ddof=0,
        tails=(":0", "/.ATTRIBUTES/VARIABLE_VALUE", "/ExponentialMovingAverage"),
        lone=True,
    ),
    "keras-h5": Form(
        {"vars/0": GAMMA, "vars/1": BETA, "vars/2": MEAN, "vars/3": VAR},
        "/",
        ddof=0,
        affine=True,
        hint="batch_norm",
    ),
    "flax": Form(
        {"scale": GAMMA, "bias": BETA, "mean": MEAN, "var": VAR},
        "/",
        ddof=0,
        collections={GAMMA: "params", BETA: "params", MEAN: "batch_stats", VAR: "batch_stats"},
        lone=True,
    ),
    "nnx": Form(
        {"scale": GAMMA, "bias": BETA, "mean": MEAN, "var": VAR},
        "/",
        ddof=0,
        lone=True,
        sure=False,
    ),
    "onnx": Form(
        {
            "scale": GAMMA,
            "B": BETA,
            "input_mean": MEAN,
            "input_var": VAR,
            "mean": MEAN,
            "var": VAR,
        },
        ".",
        ddof=0,
        affine=True,
        sure=False,
    ),
    "mxnet": Form(
        {
            "gamma": GAMMA,
            "beta": BETA,
            "moving_mean": MEAN,
            "moving_var": VAR,
            "running_mean": MEAN,
            "running_var": VAR,
        },
        "_",
        ddof=0,
        heads=("arg:", "aux:"),
        affine=True,
    ),
}

# PyTorch's keys at a prefix if weight or bias is computed from other arrays.
_COMPUTED = re.compile(
    r"(?:(.*)\.)?(?:parametrizations\.(?:weight|bias)\..*|(?:weight|bias)_(?:orig|mask|g|v|u))"
)


def computed(state: Mapping[str, Any]) -> dict[str, str]:
    """Return an explanation for each prefix at which PyTorch parametrized or pruned a module."""
    found = {}
    for key in state:
        if isinstance(key, str) and (match := _COMPUTED.fullmatch(key)):
            found[match[1] or ""] = (
                f"{key!r} shows that the module is parametrized or pruned, so the state has "
                "only the arrays that weight or bias is computed from. Before state_dict(), call "
                "torch.nn.utils.parametrize.remove_parametrizations(module, name), or "
                "torch.nn.utils.prune.remove(module, name)"
            )
    return found


def form(name: str) -> Form:
    """Return the form with this name. Raise ValueError if the name is unknown."""
    if name not in FORMS:
        raise ValueError(f"the form is {name!r}; it must be one of {', '.join(FORMS)}")
    return FORMS[name]


class Found(NamedTuple):
    """The keys of a state that belong to batch norms, and why others were passed over."""

    taken: dict[str, dict[str, str]]  # prefix -> role -> key
    passed_over: dict[str, str]  # prefix -> why it was not taken


def search(
    state: Mapping[str, Any], name: str, only: Iterable[str] | None, skip: Iterable[str]
) -> Found:
    """Return the batch norms in a flat state."""
    _check_flat(state)
    known, wanted, skip = form(name), None if only is None else set(only), set(skip)
    groups: dict[str, dict[str, str]] = {}
    for key in state:
        if state[key] is not None and (parsed := known.parse(key)) is not None:
            prefix, role = parsed
            if role in groups.setdefault(prefix, {}):
                other = groups[prefix][role]
                raise ValueError(
                    f"the keys {other!r} and {key!r} name the same array; leave out the keys of "
                    "one kind, such as {k: v for k, v in state.items() if k.endswith(...)}"
                )
            groups[prefix][role] = key
    found, hidden = Found({}, {}), computed(state) if name == "torch" else {}
    for prefix, keys in groups.items():
        named = wanted is not None and prefix in wanted
        if not {MEAN, VAR} & set(keys) and not named:
            continue  # a layer norm or a linear layer, which is not reported
        if prefix in skip or (wanted is not None and prefix not in wanted):
            found.passed_over[prefix] = "not asked for"
            continue
        sure = wanted is not None
        doubts = _doubts(state, known, prefix, keys, sure)
        if reason := hidden.get(prefix) or next(doubts, ""):
            found.passed_over[prefix] = reason
        else:
            found.taken[prefix] = keys
    if wanted is not None and (lost := sorted(wanted - set(found.taken))):
        why = {p: found.passed_over.get(p, "no such keys") for p in lost}
        raise ValueError(f"no batch norm of the form {name!r} at {why}")
    return found


def _check_flat(state: Any) -> None:
    """Raise TypeError if the state is not a mapping, and say how to get one from a module."""
    if isinstance(state, Mapping):
        return
    text = f"the state is of type {type(state).__name__}; it must be a flat dict"
    if callable(getattr(state, "state_dict", None)):
        text += ". Give its state_dict(). from_torch also needs eps= and momentum= of the module"
    elif callable(getattr(state, "get_weights", None)):
        text += '. Give {w.path: w.numpy() for w in layer.weights}, which has the form "keras"'
    raise TypeError(text)


def check_not_nested(state: Mapping[str, Any], found: Found) -> None:
    """Raise ValueError if nothing was found because the arrays are in dicts within the state."""
    inner = [key for key, value in state.items() if isinstance(value, Mapping) and value]
    arrays = [v for v in state.values() if isinstance(v, list | tuple) or getattr(v, "ndim", None)]
    if inner and not (found.taken or found.passed_over or arrays):
        flax = {"params", "batch_stats"} & set(inner)
        raise ValueError(
            f"the state is nested, with dicts at {inner[:3]}; it must be flat: give "
            + ("interop.flatten(state)" if flax else f"one of them, such as state[{inner[0]!r}]")
        )


def _doubts(
    state: Mapping[str, Any], known: Form, prefix: str, keys: dict[str, str], sure: bool
) -> Iterator[str]:
    """Yield reasons why a group is not a batch norm. `sure` means that the caller named it."""
    tracks = {MEAN, VAR} & set(keys)
    if len(tracks) == 1:
        yield "it has a mean or a variance, but not both"
    affine = {GAMMA, BETA} & set(keys)
    if known.hint and len(affine) != 2:
        yield "its numbered keys fit other layers as well"
    if not sure and known.hint and known.hint not in prefix:
        yield f"its name has no {known.hint!r} in it: name it in only="
    if not sure and not known.sure and not affine:
        yield "it has a mean and a variance, but no scale or shift: name it in only="
    shapes = {np.shape(state[key]) for role, key in keys.items() if role != BATCHES}
    if len(shapes) != 1 or (tracks and len(next(iter(shapes))) != 1):
        yield f"its arrays are not of one shape (C,): {sorted(shapes)}"


def read(state: Mapping[str, Any], name: str, prefix: str, tracks: bool = True) -> Group:
    """Return the group at a prefix, as NumPy arrays.

    Raise ValueError if the form always has running statistics and the group has none, unless
    `tracks` is False, as for layers that never have them.
    """
    _check_flat(state)
    known = form(name)
    group: Group = {}
    for key, value in state.items():
        if value is None:  # the attribute of a PyTorch module that lacks the array
            continue
        if (parsed := known.parse(key)) is not None and parsed[0] == prefix:
            if parsed[1] in group:
                raise ValueError(f"the key {key!r} names an array that another key has named")
            group[parsed[1]] = as_floats(value, key)
    if name == "torch" and prefix in (hidden := computed(state)):
        raise ValueError(hidden[prefix])
    if not group:
        raise ValueError(_nothing_there(state, name, prefix))
    for one, other in ((MEAN, VAR), (VAR, MEAN)):
        if one in group and other not in group:
            missing = known.key(prefix, other)
            raise ValueError(f"{known.key(prefix, one)!r} is there, but not {missing!r}")
    if BATCHES in group:
        group[BATCHES] = counter(group[BATCHES])
    if known.tracked and tracks and MEAN not in group:
        raise ValueError(
            f"there is no {known.key(prefix, MEAN)!r}, so no batch norm is at prefix {prefix!r}"
        )
    return group


def _nothing_there(state: Mapping[str, Any], name: str, prefix: str) -> str:
    """Return an error message that says where, or in which form, batch norms were found."""
    others = ", ".join(map(repr, search(state, name, None, ()).taken)) or "none"
    text = f"no batch norm of the form {name!r} at prefix {prefix!r}; there are: {others}"
    for form_name in FORMS if others == "none" else ():
        try:
            like = search(state, form_name, None, ()).taken
        except ValueError:
            continue
        if like:
            return f"{text}. The keys are those of the form {form_name!r}, at {next(iter(like))!r}"
    for key, value in state.items() if others == "none" else ():
        if isinstance(value, Mapping) and value:
            return f"{text}; there is a dict in it: give state[{key!r}]"
    return text


def counter(value: Any) -> NDArray[Any]:
    """Return a number of batches as an integer. In averaged checkpoints it is a float."""
    count = as_floats(value, "num_batches_tracked")
    if count.size != 1 or count.dtype.kind != "f" or not abs(count.item()) < 2**63:
        return count
    return np.asarray(np.rint(count).astype(np.int64))


def write(group: Group, name: str, prefix: str, whole: bool = True) -> dict[str, Any]:
    """Return a group under the keys of a form.

    A missing scale or shift becomes 1 or 0 if the form always has both, or cannot have only one of
    them, unless `whole` is False.
    """
    known = form(name)
    group = {role: value for role, value in group.items() if role in known.roles}
    if BATCHES in known.roles and VAR in group:
        group.setdefault(BATCHES, np.array(0, np.int64))
        if "float" in str(getattr(group[BATCHES], "dtype", "")):
            group[BATCHES] = counter(group[BATCHES])
    affine = {GAMMA, BETA} & set(group)
    if whole and (known.affine or (affine and not known.lone)):
        like = as_array(group[VAR] if VAR in group else group[next(iter(affine))])
        group.setdefault(GAMMA, np.ones_like(like))
        group.setdefault(BETA, np.zeros_like(like))
    return {known.key(prefix, role): group[role] for role in known.roles if role in group}


def variance(var: Any, ddof: int, to: int, count: Any) -> NDArray[Any]:
    """Return a running variance with another ddof: times n / (n - 1), or times the inverse.

    The result is computed in long double and rounded once.
    """
    array = as_floats(var, "running_var")
    if ddof == to:
        return array
    if array.dtype.kind != "f":
        raise TypeError(
            f"the running variance is {array.dtype}, which cannot hold a converted one; make it "
            "float32 or float64 first"
        )
    n = np.asarray(as_array(count, "count"), np.float64)
    if n.shape not in ((), array.shape) or not (np.isfinite(n) & (n > 1)).all():
        raise ValueError(
            f"count is {count!r}; it must be the number of values of a channel in a training "
            f"batch, N * S: above 1, one number or one per channel"
        )
    above, below = (n - 1, n) if ddof == 1 else (n, n - 1)
    return np.asarray((array.astype(np.longdouble) * above / below).astype(array.dtype))
