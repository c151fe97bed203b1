"""The conventions of other libraries, and `explain`, which prints the formulas of a layer."""

import numpy as np
import pytest
from statistics_cases import C, batch, trained

import cybn


@pytest.mark.parametrize(
    ("library", "eps", "momentum", "ddof"),
    [("torch", 1e-5, 0.1, 1), ("keras", 1e-3, 0.01, 0), ("onnx", 1e-5, 0.1, 0)]
    + [("paper", 1e-5, None, 1)],
)
def test_like(library, eps, momentum, ddof):
    bn = cybn.BatchNorm2d.like(library, C)
    assert type(bn) is cybn.BatchNorm2d
    assert bn.eps == eps
    assert bn.momentum == pytest.approx(momentum)
    assert bn.running_ddof == ddof
    assert bn.axis == 1


def test_like_with_options():
    keras = cybn.BatchNorm.like("keras", C, momentum=0.75, axis=-1, eps=0.5, running_ddof=1)
    assert (keras.momentum, keras.axis, keras.eps, keras.running_ddof) == (0.25, -1, 0.5, 1)
    assert cybn.BatchNorm.like("torch", C, momentum=0.75).momentum == 0.75
    assert cybn.BatchNorm.like("onnx", C, momentum=0.75).momentum == 0.25
    assert cybn.BatchNorm.like("onnx", C, momentum=None).momentum is None
    with pytest.raises(ValueError, match="library is 'tf'; it must be one of torch, keras"):
        cybn.BatchNorm.like("tf", C)
    with pytest.raises(
        ValueError, match=r"momentum is 1\.5; .*old value in the convention of keras"
    ):
        cybn.BatchNorm.like("keras", C, momentum=1.5)


def test_like_gives_the_momentum_as_it_would_be_written():
    for library, given, momentum in [
        ("keras", None, 0.01),
        ("onnx", None, 0.1),
        ("keras", 0.9, 0.1),
        ("keras", 0.999, 0.001),
        ("keras", np.nextafter(1, 0), 2.0**-53),
        ("onnx", np.float32(0.5), 0.5),
    ]:
        options = {} if given is None else {"momentum": given}
        got = cybn.BatchNorm.like(library, C, **options).momentum
        assert abs(got - momentum) <= 2.0**-54 * (given is not None)
        if given is None:
            assert got == momentum


def explained(bn, capsys, **options):
    bn.explain(**options)
    return capsys.readouterr().out


def test_explain(capsys, rng):
    bn = cybn.BatchNorm(C, eps=0.25)
    text = explained(bn, capsys)
    assert "training mode, with the statistics of the batch" in text
    assert "y    = (x - mean) / sqrt(var + 0.25) * 1 + 0\n" in text
    assert "running_mean = 0.9 * 0 + 0.1 * mean\n" in text
    assert "running_var  = 0.9 * 1 + 0.1 * var * M / (M - 1)\n" in text
    bn.gamma[2], bn.beta[2], bn.running_mean[2], bn.running_var[2] = 3, -4, 1.5, 2
    text = explained(bn.eval(), capsys, channel=2)
    assert "y    = (x - 1.5) / sqrt(2 + 0.25) * 3 - 4\n" in text
    assert "the running statistics stay as they are" in text
    with pytest.raises(ValueError, match=r"channel is 4; it must be in 0\.\.3"):
        bn.explain(4)
    for channel in (1.5, "gamma", None):
        with pytest.raises(TypeError, match=r"channel is .*; it must be an int"):
            bn.explain(channel)


def test_explain_says_what_happens(capsys, rng):
    """A line is in the explanation if and only if a setting of the layer calls for it."""
    lines = {
        "all three are not changed, and it raises": {"nan_policy": "raise"},
        "cut into virtual batches of 2 samples": {"virtual_batch_size": 2},
        "M    = values of a channel in each virtual batch:": {"virtual_batch_size": 2},
        "running_mean = 0.9 * 0 + 0.1 * mean_all": {"virtual_batch_size": 2},
        "d    = clip((mean - 0) / sqrt(1 + 1e-05), -5, 5)": {"renorm": cybn.Renorm()},
        "with no gradient through r and d": {"renorm": cybn.Renorm()},
        "running_mean = 0 * 0 + 1 * mean": {"momentum": None},
        "y    = (x - mean) / sqrt(var + 1e-05)\n": {"affine": False},
    }
    plain = explained(cybn.BatchNorm(C), capsys)
    for line, options in lines.items():
        assert line in explained(cybn.BatchNorm(C, **options), capsys)
        assert line not in plain
    assert "M / (M - 1)" not in explained(cybn.BatchNorm(C, running_ddof=0), capsys)
    untracked = explained(cybn.BatchNorm(C, track_running_stats=False).eval(), capsys)
    assert "running" not in untracked.split("\n", 1)[1]
    frozen = explained(cybn.BatchNorm(C).freeze(), capsys)
    assert "gamma and beta are not trained" in frozen
    assert "y    = (x - 0) / sqrt(1 + 1e-05)" in frozen


def test_explain_is_what_is_computed(capsys, rng):
    """Evaluating the printed right-hand sides gives the results of the layer."""
    x = batch(rng, dtype=np.float64)
    for options in ({}, {"renorm": cybn.Renorm(1.5, 0.2)}, {"momentum": None, "running_ddof": 0}):
        bn = trained(rng, dtype=np.float64, **options)
        for _ in range(2):
            text = explained(bn, capsys, channel=1)
            names = {"x": x[:, 1], "M": len(x), "sum": np.sum, "sqrt": np.sqrt, "clip": np.clip}
            for line in text.splitlines():
                name, found, formula = line.partition("=")
                if found and name.strip().isidentifier() and "values of" not in line:
                    names[name.strip()] = eval(formula, {}, names)
            y = bn(x)
            np.testing.assert_allclose(y[:, 1], names["y"], rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(bn.running_mean[1], names["running_mean"], rtol=1e-4)
            np.testing.assert_allclose(bn.running_var[1], names["running_var"], rtol=1e-4)
            assert bn.num_batches_tracked == names["num_batches_tracked"]


def test_layer_norm_over_one_axis_that_is_not_the_last(rng):
    """The code that the docstring of `layer_norm` gives for Keras' ``axis=1`` is right."""
    x = rng.standard_normal((2, 5, 3))
    y = np.moveaxis(cybn.layer_norm(np.moveaxis(x, 1, -1))[0], -1, 1)
    want = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(y, want, rtol=1e-9, atol=1e-12)
