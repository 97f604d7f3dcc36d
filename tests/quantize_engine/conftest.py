"""Marks and fixtures of the tests with llm-compressor, which `make test-quantize` runs."""

import importlib.util
from pathlib import Path

import pytest

from coprs_deploy.data.examples import write_examples
from coprs_deploy.data.synthetic import PLAIN
from coprs_deploy.data.synthetic.examples import SceneExamples

HERE = Path(__file__).parent
REASON = "llm-compressor is not installed; `make test-quantize` runs these tests"


def pytest_collection_modifyitems(items):
    is_absent = importlib.util.find_spec("llmcompressor") is None
    for item in items:
        if HERE not in item.path.parents:
            continue
        item.add_marker(pytest.mark.slow)
        item.add_marker(pytest.mark.filterwarnings("ignore"))  # llm-compressor's own
        if is_absent:
            item.add_marker(pytest.mark.skip(reason=REASON))


@pytest.fixture(scope="session")
def examples(tmp_path_factory):
    """Training scenes with their responses, one instruction each."""
    path = tmp_path_factory.mktemp("examples") / "scenes.jsonl"
    write_examples(path, SceneExamples(PLAIN, 32, 0))
    return path
