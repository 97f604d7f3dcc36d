"""Names that vLLM resolves from strings, and the environment of its start; vLLM is not needed."""

import ast
import importlib
import importlib.util
import os
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

from coprs_deploy.policy.vllm_policy.engine import (
    ARCHITECTURES,
    engine_environment,
    register_architectures,
    visible_device,
)
from tests import ROOT


@pytest.fixture
def registry(monkeypatch):
    """Stand-in for ``vllm.ModelRegistry``; returns the registered classes by architecture."""
    registered = {}
    model_registry = SimpleNamespace(
        get_supported_archs=registered.keys, register_model=registered.__setitem__
    )
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(ModelRegistry=model_registry))
    return registered


def test_plugin_entry_point_resolves():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (entry_point,) = project["entry-points"]["vllm.general_plugins"].values()
    module, _, function = entry_point.partition(":")
    assert getattr(importlib.import_module(module), function) is register_architectures


def test_register_architectures_classes_resolve(registry):
    register_architectures()
    assert set(registry) == set(ARCHITECTURES.values())
    for name, reference in registry.items():
        module, _, class_name = reference.partition(":")
        spec = importlib.util.find_spec(module)
        assert spec is not None, f"{name}: there is no module {module}"
        tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
        assert class_name in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}


def test_register_architectures_twice_registers_once(registry):
    register_architectures()
    registry["QwenPolicy"] = "of another process"
    register_architectures()
    assert registry["QwenPolicy"] == "of another process"


def test_engine_environment_is_restored_after_the_block(monkeypatch):
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = dict(os.environ)
    with engine_environment(3):
        assert os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"
        assert os.environ["VLLM_LOGGING_LEVEL"] == "DEBUG"
        assert os.environ["OMP_NUM_THREADS"] == "3"
    assert dict(os.environ) == before


def test_engine_environment_without_a_number_keeps_the_users_threads(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    with engine_environment(None):
        assert os.environ["OMP_NUM_THREADS"] == "5"


@pytest.mark.parametrize(
    ("device_type", "index", "expected"), [("cuda", "1", "1"), ("cuda", "", "0"), ("cpu", "", "0")]
)
def test_visible_device_is_set_for_an_indexed_gpu_only(monkeypatch, device_type, index, expected):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with visible_device(device_type, index):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == expected
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"
