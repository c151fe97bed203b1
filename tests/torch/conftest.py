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
def borders():
    """Leave small calls to PyTorch, as `convert` does."""


@pytest.fixture(autouse=True)
def all_calls(request, monkeypatch):
    """Let cybn compute calls of any size, where a test does not take the fixture `borders`."""
    if "borders" not in request.fixturenames:
        from cybn.torch import _convert

        monkeypatch.setattr(_convert, "borders_of", lambda module: (0, 0, 0, 0))


@pytest.fixture
def fuse_all(monkeypatch):
    """Fuse calls of any size."""
    from cybn.torch import _fuse

    monkeypatch.setattr(_fuse, "LEAST", 0)
