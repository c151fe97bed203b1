"""Code that an error message advises runs and gives a valid array."""

import re

import numpy as np
import pytest

import cybn
from cybn import interop

X = np.arange(12, dtype=np.float32).reshape(4, 3)


def advised(call, name="x"):
    """Return the code at the end of the message of the error that `call` raises."""
    with pytest.raises((TypeError, ValueError), match=rf"^{name}\b") as caught:
        call()
    message = str(caught.value)
    return re.search(rf"((np\.|numpy\.|{name}\.)[^:]*\(.*\)$)", message).group(1)


def follow(given, name="x"):
    """Run the advice for `given`, check that batch_norm accepts the result, and return it."""
    code = advised(lambda: cybn.batch_norm(given), name)
    made = eval(code, {"np": np, "numpy": np, "x": given})
    cybn.batch_norm(made)
    return made


def pandas_frames(pd):
    frame = pd.DataFrame(X)
    with_gap = frame.astype("Float32")
    with_gap.iloc[0, 0] = pd.NA
    return {
        "Float32": frame.astype("Float32"),
        "mixed": frame.astype({0: "Float32", 1: "float64", 2: "Int64"}),
        "Int64": frame.astype("Int64"),
        "with a gap": with_gap,
        "digits": frame.astype(str),
    }


@pytest.mark.parametrize("kind", ["Float32", "mixed", "Int64", "with a gap", "digits"])
def test_pandas(kind):
    frame = pandas_frames(pytest.importorskip("pandas"))[kind]
    made = follow(frame)
    expected = X.copy()
    if kind == "with a gap":
        assert np.isnan(made[0, 0])
        expected[0, 0] = np.nan
    np.testing.assert_array_equal(made, expected)


def test_pandas_without_numbers_and_for_other_arguments():
    pd = pytest.importorskip("pandas")
    with pytest.raises(TypeError, match=r"x is .*It holds 'a', of type str, which is not a number"):
        cybn.batch_norm(pd.DataFrame({"a": ["a", "b"], "b": ["c", "d"]}, dtype=object))
    mask = pd.array([True, False, True, None], dtype="boolean")
    code = advised(lambda: cybn.batch_norm(X, mask=mask), "mask")
    assert eval(code).tolist() == [True, False, True, False]


@pytest.mark.parametrize("form", ["csr_matrix", "csr_array", "coo_array", "lil_matrix"])
def test_sparse_arrays_of_scipy(form):
    sparse = pytest.importorskip("scipy.sparse")
    given = getattr(sparse, form)(X)
    np.testing.assert_array_equal(follow(given), X)
    for call in (
        lambda: cybn.Moments.empty(3).update(given),
        lambda: cybn.BatchNorm(3)(given),
        lambda: cybn.layer_norm(given),
        lambda: interop.as_array(given, "x"),
    ):
        assert advised(call) == "x.toarray()"
    assert advised(lambda: cybn.BatchNorm(3).load_state_dict(
        cybn.BatchNorm(3).state_dict() | {"gamma": given}
    ), "gamma") == "gamma.toarray()"  # fmt: skip


TENSORS = {
    "bfloat16": lambda t: t.bfloat16(),
    "float8": lambda t: t.to(dtype=__import__("torch").float8_e4m3fn),
    "with a gradient": lambda t: t.clone().requires_grad_(),
    "sparse": lambda t: t.to_sparse(),
    "all of it": lambda t: t.bfloat16().to_sparse().requires_grad_(),
    "a list of them": lambda t: list(t.bfloat16()),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_of_pytorch(kind):
    torch = pytest.importorskip("torch")
    given = TENSORS[kind](torch.from_numpy(X))
    made = follow(given)
    np.testing.assert_array_equal(np.asarray(made), X)


@pytest.mark.parametrize(
    "given",
    [
        [[1.0, 2.0], [3.0]],
        [np.ones((2, 3), "f4"), np.ones((4, 3), "f4")],
        (np.ones((1, 2, 3)), np.ones((2, 2, 3))),
        np.array([np.ones((2, 3)), np.ones((4, 3))], dtype=object),
    ],
)
def test_ragged_lists(given):
    made = follow(given)
    assert made.shape[:2] == (2, max(map(len, given)))
    for part, of in zip(made, given, strict=True):
        np.testing.assert_array_equal(part[: len(of)], of)
        assert not part[len(of) :].any()


def test_ragged_beyond_help():
    with pytest.raises(
        ValueError, match=r"gamma, of type list.*is ragged.*shapes such as \(\), \(2,\)"
    ):
        cybn.batch_norm(X, [1.0, [2.0, 3.0], 4.0])
    with pytest.raises(
        ValueError, match=r"x, of type list.*is ragged.*its parts are ragged themselves"
    ):
        cybn.batch_norm([[[1.0], [1.0, 2.0]], [[1.0], [1.0]]])
    with pytest.raises(ValueError, match=r"x, of type list.*is ragged.*Give parts of one shape"):
        cybn.batch_norm([np.ones((2, 3)), np.ones((2, 4))])


@pytest.mark.parametrize(
    "given",
    [X.astype(int), X > 3, X.astype(np.longdouble), X.astype(object), X.astype(str), X + 1j],
    ids=lambda a: str(a.dtype),
)
def test_other_types_of_numpy(given):
    code = advised(lambda: cybn.batch_norm(given)).rpartition(", np.abs")
    cybn.batch_norm(eval(code[0] or code[2], {"np": np, "x": given}))


def test_records_and_what_is_no_array():
    records = np.zeros(4, [("a", "f4"), ("b", "f8")])
    assert follow(records).shape == (4, 2)
    with pytest.raises(TypeError, match=r"x is object.*None is not an array"):
        cybn.batch_norm(None)
    with pytest.raises(TypeError, match=r"x is .*It holds 'a', of type str_, which is not a"):
        cybn.batch_norm([["1", "a"], ["2", "3"]])
    with pytest.raises(TypeError, match=r"x is object.*of type generator, which is not a number"):
        cybn.batch_norm(row for row in X)


def test_layers_that_are_saved(tmp_path):
    """Errors say how to save a list of layers, and call a single layer "the layer"."""
    path, bn = tmp_path / "a.npz", cybn.BatchNorm(3)
    with pytest.raises(TypeError, match=r"type list; .* such as \{str\(i\): layer for i"):
        interop.save_layers(path, [bn])
    interop.save_layers(path, {str(i): layer for i, layer in enumerate([bn])})
    assert list(interop.load_layers(path)) == ["0"]
    bn.running_mean[0] = np.nan
    with pytest.raises(ValueError, match=r"^the layer could not be loaded again: running_mean is"):
        interop.save_layers(path, bn)
