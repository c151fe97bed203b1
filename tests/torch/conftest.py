"""A fixture that the tests of cybn.torch share."""

import pytest

from cybn import functional


@pytest.fixture
def kernel_calls(monkeypatch):
    """List the calls that reach cybn.functional."""
    calls = []
    for name in functional.__all__:
        f = getattr(functional, name)

        def call(*args, _f=f, _name=name, **kwargs):
            calls.append((_name, kwargs))
            return _f(*args, **kwargs)

        monkeypatch.setattr(functional, name, call)
    return calls
