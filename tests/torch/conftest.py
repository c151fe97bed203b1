"""Fixtures that the tests of cybn.torch share."""

import pytest


@pytest.fixture
def kernel_calls(monkeypatch):
    """Return a list of the kernel calls of eager modules, as (pass, norm)."""
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
    """Let PyTorch compute small calls, as `convert` does by default."""


@pytest.fixture(autouse=True)
def all_calls(request, monkeypatch):
    """Let cybn compute calls of any size, unless a test uses the fixture `borders`."""
    if "borders" not in request.fixturenames:
        from cybn.torch import _convert

        monkeypatch.setattr(_convert, "borders_of", lambda module: (0, 0, 0, 0))


@pytest.fixture
def fuse_all(monkeypatch):
    """Fuse calls of any size."""
    from cybn.torch import _fuse

    monkeypatch.setattr(_fuse, "LEAST", 0)
