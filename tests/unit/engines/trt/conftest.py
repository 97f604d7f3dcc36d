"""A machine with a TensorRT and a GPU that compute."""

import pytest

from tests.unit.engines.trt.engine_fakes import FakeMachine, install


@pytest.fixture
def machine(monkeypatch, tmp_path):
    machine = FakeMachine(tmp_path)
    for variant in ("tensorrt", "tensorrt-rtx"):
        install(monkeypatch, machine.library, variant)
    return machine
