"""Comparison of a policy with and without drafts."""

import json

import numpy as np
import pytest

from coprs_deploy.policy import PolicyRequest, PolicyResult
from tests.scripts import load_script

pytest.importorskip("openvino", reason="OpenVINO is not installed")

script = load_script("benchmarks/policy_drafts.py")


def run(capsys, *arguments):
    code = script.main([*arguments, "--policy", "openvino"])
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.slow
def test_modes_have_equal_responses_and_fewer_passes(capsys):
    code, results = run(capsys, "--count", "2", "--num-no-match", "1")
    assert code == 0
    assert [r["mode"] for r in results] == [m for m in script.MODES if m != script.STATIC]
    assert {(r["equal"], r["count"], r["other_tails"]) for r in results} == {(3, 3, 1)}
    none, tail, lookup, both = (r["tokens_per_pass"] for r in results)
    assert none < min(tail, lookup)
    assert max(tail, lookup) < both
    # With int8 units the inputs are rounded too, differently for several rows than for one.
    assert max(r["max_relative_error"] for r in results) < 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["none", "tail and lookup"])
def test_replay_writes_the_given_response(mode):
    written = "<think> red red circle red red circle </think> <REF_POS>"
    request = PolicyRequest(np.zeros((128, 128, 3), np.uint8), "the red circle")
    bundle = script.open_bundle(script.demo.BUNDLE)
    with script.open_policy(bundle, script.RuntimeOptions(), "openvino") as policy:
        policy.drafts_tail, has_lookup = script.MODES[mode]
        policy.prompt_lookup_num_tokens = 4 * has_lookup
        with script.replaying(policy, written):
            *_, result = policy.stream(request)
        assert isinstance(result, PolicyResult)
        assert result.response.text == written
        assert len(result.concentrations) == 1
        assert (result.num_passes < len(result.token_ids)) == has_lookup
        *_, own = policy.stream(request)
        assert own.response.text != written


def test_modes_without_the_comparison_are_refused():
    with pytest.raises(ValueError, match=r"--modes is \['tail'\]; accepted: none, and others"):
        script.main(["--modes", "tail"])
    with pytest.raises(ValueError, match="--modes has static; accepted with --policy transformers"):
        script.main(["--modes", "none,static"])


@pytest.mark.extended
def test_a_hundred_responses_are_equal(capsys):
    code, results = run(
        capsys, "--count", "90", "--num-no-match", "10", "--modes", "none,tail and lookup"
    )
    assert code == 0
    assert {r["equal"] for r in results} == {100}
