"""A played library, and the file of a plan."""

import pytest

from tests.unit.engines.trt.engine_fakes import PLAN, FakeLibrary, play


@pytest.fixture
def library(monkeypatch):
    return play(monkeypatch, FakeLibrary())


@pytest.fixture
def plan(tmp_path):
    path = tmp_path / "prior.engine"
    path.write_bytes(PLAN)
    return path
