"""Sizes in a policy's configuration are compared with its weights before anything is allocated."""

import json
import re
import resource
import shutil
import time
from types import SimpleNamespace

import pytest

from coprs_deploy.conversion.policy_files import load_policy as load_policy_for_conversion
from coprs_deploy.conversion.random_policy import build_random_policy
from coprs_deploy.errors import ConversionError, PolicyError
from coprs_deploy.export.policy.graphs import load_policy as load_policy_for_export
from coprs_deploy.policy.policy_size import check_policy_size
from coprs_deploy.training.state import state_from_checkpoint

MAX_GROWTH_BYTES, MAX_SECONDS = 200 << 20, 10

TOO_LARGE = {
    "text_config.hidden_size": "describes .* parameters .the largest: .*, and the weights have",
    "text_config.vocab_size": r"describes .* \(649984, \d+\)\), and the weights have only",
    "text_config.num_hidden_layers": "num_hidden_layers(` .649984.| is 649984 .*: at most 1000)",
    "text_config.num_attention_heads": "is not valid|cannot be loaded",
    "vision_config.hidden_size": "describes .* parameters",
}


@pytest.fixture(scope="module", params=["tiny", "tiny-llava"])
def policy(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("policy") / "policy"
    build_random_policy(request.param).save(directory)
    return directory


@pytest.fixture
def changed(policy, tmp_path):
    """Return a function that copies the policy with another number in its configuration."""

    def change(name, value=649_984):
        directory = tmp_path / "changed"
        shutil.copytree(policy, directory)
        file = directory / "config.json"
        data = json.loads(file.read_text())
        section, key = name.split(".")
        data[section][key] = value
        file.write_text(json.dumps(data))
        return directory

    return change


def peak_bytes():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.parametrize("name", TOO_LARGE)
def test_load_policy_config_larger_than_weights_is_refused_without_allocation(changed, name):
    directory = changed(name)
    before, start = peak_bytes(), time.monotonic()
    for load, error in (
        (load_policy_for_conversion, ConversionError),
        (load_policy_for_export, PolicyError),
        (lambda path: state_from_checkpoint(SimpleNamespace(policy_path=path)), PolicyError),
    ):
        with pytest.raises(error, match=TOO_LARGE[name]):
            load(directory)
    assert peak_bytes() - before < MAX_GROWTH_BYTES
    assert time.monotonic() - start < MAX_SECONDS


def test_load_policy_config_larger_than_given_weights_is_refused(changed):
    directory = changed("text_config.vocab_size")
    weights = {"lm_head.weight": build_random_policy("tiny").model.lm_head.weight.detach()}
    with pytest.raises(ConversionError, match=r"the weights have only \d"):
        load_policy_for_conversion(directory, weights)


def test_check_policy_size_as_saved_is_accepted(policy):
    check_policy_size(policy)


def test_check_policy_size_depth_of_the_vision_tower_is_limited(tmp_path):
    config = {"vision_config": {"depth": 329_999}, "text_config": {"num_hidden_layers": 3}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    message = f"depth is 329999 in {tmp_path / 'config.json'}; accepted: at most 1000"
    with pytest.raises(PolicyError, match=re.escape(message)):
        check_policy_size(tmp_path)
