"""Fixtures that the tests of cybn.torch share."""

import pytest


@pytest.fixture
def kernel_calls(monkeypatch):
    """List the kernel calls of eager modules: which pass, and of which norm."""
    from cybn.torch import _autograd

    calls = []
    for name in ("forward", "backward"):
        f = getattr(_autograd, name)

        def call(norm, *args, _f=f, _name=name):
            calls.append((_name, norm))
            return _f(norm, *args)

        monkeypatch.setattr(_autograd, name, call)
    return calls


@pytest.fixture
def fuse_all(monkeypatch):
    """Fuse calls of any size."""
    from cybn.torch import _fuse

    monkeypatch.setattr(_fuse, "LEAST", 0)
