"""The dependencies of cybn are few, and their versions are bounded."""

import re
import tomllib
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((HERE / "pyproject.toml").read_text("utf-8"))


@pytest.mark.parametrize("requirement", PROJECT["build-system"]["requires"])
def test_build_requirements_are_bounded(requirement):
    assert re.fullmatch(r"\w+>=[\d.]+,<\d+", requirement)


def test_one_requirement_at_run_time():
    assert [re.match(r"\w+", name)[0] for name in PROJECT["project"]["dependencies"]] == ["numpy"]


def test_every_other_requirement_has_a_least_version():
    for extra in PROJECT["project"]["optional-dependencies"].values():
        for requirement in extra:
            assert requirement.startswith("cybn[") or ">=" in requirement, requirement
