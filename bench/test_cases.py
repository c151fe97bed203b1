"""Every case of `bench.cases`: `pytest bench -k "resnet50 and forward"`."""

from __future__ import annotations

from .race import Race


def test_case(field: Race) -> None:
    field.run()
