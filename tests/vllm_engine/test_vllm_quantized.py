"""vLLM's CPU backend runs what `coprs-deploy quantize` writes, each scheme of it.

The environment of `make test-quantize` writes the checkpoints; `make test-vllm` names its Python.
"""

import os
import subprocess

import numpy as np
import pytest

from coprs_deploy import demo
from coprs_deploy.checkpoint import read_checkpoint
from coprs_deploy.data.examples import write_examples
from coprs_deploy.data.synthetic import PLAIN
from coprs_deploy.data.synthetic.examples import SceneExamples, held_out_examples
from coprs_deploy.errors import PolicyError
from coprs_deploy.export.equivalence import cosine_similarity
from coprs_deploy.export.tolerances import QUANTIZED_POLICY_TOLERANCES
from coprs_deploy.policy import PolicyRequest
from coprs_deploy.policy.transformers_policy import TransformersPolicy
from coprs_deploy.policy.vllm_policy.quantized import check_processor
from coprs_deploy.policy.vllm_policy.settings import VllmSettings

PYTHON = os.environ.get("QUANTIZE_PYTHON", "")

pytestmark = pytest.mark.skipif(
    not PYTHON, reason="QUANTIZE_PYTHON is not set; `make test-vllm` sets it"
)


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    path = tmp_path_factory.mktemp("examples") / "scenes.jsonl"
    write_examples(path, SceneExamples(PLAIN, 32, 0))
    return path


def respond(kind, path, requests, **options):
    config = read_checkpoint(demo.CHECKPOINT).config
    limits = config.policy_image
    with kind(path, config.prompt, limits.min_pixels, limits.max_pixels, **options) as policy:
        results = [list(policy.stream(request))[-1] for request in requests]
    return policy.description, results


@pytest.mark.parametrize("scheme", QUANTIZED_POLICY_TOLERANCES)
def test_vllm_runs_the_quantized_demo_model(scheme, examples, tmp_path):
    from coprs_deploy.policy.vllm_policy.policy import VllmPolicy

    command = [PYTHON, "-m", "coprs_deploy", "quantize", str(demo.CHECKPOINT)]
    command += ["--scheme", scheme, "--calibration", str(examples), "--out", str(tmp_path / "out")]
    subprocess.run(command, check=True, timeout=300)
    path = read_checkpoint(tmp_path / "out").policy_path
    try:
        check_processor(path)
    except PolicyError as error:
        with pytest.raises(PolicyError, match="for which vLLM needs"):
            respond(VllmPolicy, path, [])
        pytest.skip(str(error))
    requests = [PolicyRequest(e.image, e.instruction) for e in held_out_examples(PLAIN, 6, 1)]
    description, found = respond(VllmPolicy, path, requests, settings=VllmSettings(num_threads=1))
    assert "quantization compressed-tensors" in description
    _, expected = respond(TransformersPolicy, demo.CHECKPOINT / "policy", requests)
    tolerance = QUANTIZED_POLICY_TOLERANCES[scheme]
    for result, wanted in zip(found, expected, strict=True):
        assert result.token_ids == wanted.token_ids
        assert result.concentrations.shape == wanted.concentrations.shape
        for row, state in zip(result.concentrations, wanted.concentrations, strict=True):
            assert cosine_similarity(row, state) >= tolerance.cosine
            assert np.abs(row - state).max() <= tolerance.relative_error * np.abs(state).max()
            assert not np.array_equal(row, state)
