"""Marks and fixtures of the tests with a real vLLM engine, which `make test-vllm` runs."""

import importlib.util
from pathlib import Path

import pytest

from coprs_deploy import demo
from coprs_deploy.bundle import open_bundle

HERE = Path(__file__).parent
REASON = "vLLM is not installed; `make test-vllm` runs these tests in a separate environment"


def pytest_collection_modifyitems(items):
    is_absent = importlib.util.find_spec("vllm") is None
    for item in items:
        if HERE not in item.path.parents:
            continue
        item.add_marker(pytest.mark.vllm)
        item.add_marker(pytest.mark.slow)
        item.add_marker(pytest.mark.filterwarnings("ignore"))  # vLLM's own
        if is_absent:
            item.add_marker(pytest.mark.skip(reason=REASON))


@pytest.fixture(scope="session")
def bundle_of(request):
    """Open a bundle by name: ``demo``, ``tiny`` or ``tiny_llava``."""

    def opener(name):
        if name == "demo":
            return open_bundle(demo.BUNDLE)
        return open_bundle(request.getfixturevalue(f"{name}_bundle"))

    return opener
