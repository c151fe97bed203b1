"""The plot of drift: its dots and labels, and the error if matplotlib is missing."""

import builtins
import importlib
import sys

import numpy as np
import pytest

import cybn

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")
plot = importlib.import_module("cybn.plot")


def dots(panel):
    """Return the (channel, value) pairs of each row of dots."""
    return [line.get_xydata() for line in panel.lines if line.get_marker() == "."]


def test_one_layer():
    d = cybn.Drift(np.array([0.5, -2, np.nan, 0]), np.array([0.1, 0, 1, -3]))
    left, right = plot.drift(d, limit=1.5)
    np.testing.assert_array_equal(dots(left)[0], [[0, 0.5], [1, -2], [3, 0]])
    np.testing.assert_array_equal(dots(right)[0], [[0, 0.1], [1, 0], [2, 1], [3, -3]])
    assert left.get_legend_handles_labels()[1] == ["1 not finite"]
    assert right.get_legend() is None
    levels = {line.get_ydata()[0] for line in left.lines if line.get_linestyle() == "--"}
    assert levels == {-1.5, 1.5}
    matplotlib.pyplot.close("all")


def test_several_layers_on_given_axes():
    d = cybn.Drift(np.zeros(3), np.ones(3))
    figure, axes = matplotlib.pyplot.subplots(2, 1)
    assert plot.drift({"first": d, "second": d}, axes=axes) is axes
    assert axes[0].get_legend_handles_labels()[1] == ["first", "second"]
    matplotlib.pyplot.close(figure)


def test_without_matplotlib(monkeypatch):
    real = builtins.__import__

    def fake(name, *rest):
        if name.startswith("matplotlib"):
            raise ImportError(name=name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", fake)
    monkeypatch.delitem(sys.modules, "cybn.plot")
    with pytest.raises(ImportError, match=r"pip install 'cybn\[plot\]'"):
        importlib.import_module("cybn.plot")
