"""The report of the vLLM policy: parts are added to it, and its text follows its numbers."""

import json
from pathlib import Path

import pytest

from tests.scripts import load_script

ROOT = Path(__file__).parents[2]

policy_serving = load_script("benchmarks/policy_serving.py")


CAPTURE = {
    "pairs": 120,
    "decode_ms": 101.0,
    "plain_decode_ms": 100.0,
    "share": 0.004,
    "share_interval": [-0.002, 0.009],
    "steps": 27,
    "microseconds_a_step": 15.0,
    "engine_pairs": 60,
    "engine_shares": [-0.02, 0.0, 0.03],
    "engine_share": 0.0,
    "sixteen_pairs": 20,
    "sixteen_share": 0.01,
    "sixteen_share_interval": [-0.03, 0.04],
    "limit": 0.01,
}
LOAD = {
    "requests": 200,
    "at_once": 16,
    "outcomes": {"abandoned": 20, "equal": 180},
    "left_in_the_engine": {"unfinished": 0, "unfetched": 0},
    "seconds": 30.5,
    "resident_mib": [2000, 2010, 2012, 2012, 2013],
    "growth_of_the_last_half": 0.0005,
}


def test_run_adds_parts_to_the_report(tmp_path, monkeypatch):
    rounds = []
    parts = {"capture": lambda n: rounds.append(n) or CAPTURE, "load": lambda n: LOAD}
    monkeypatch.setattr(policy_serving, "PARTS", parts)
    policy_serving.run(tmp_path, ["capture"], 7)
    report = policy_serving.run(tmp_path, ["load"], 3)
    assert rounds == [7]
    written = json.loads((tmp_path / "policy-serving.json").read_text())
    assert written == json.loads(json.dumps(report))
    assert report["capture"]["pairs"] == 120
    text = (tmp_path / "policy-serving.md").read_text()
    assert "+0.4% [-0.2%, +0.9%] of 100.0 ms decoding" in text
    assert "20 abandoned, 180 equal" in text
    assert "2000 -> 2010 -> 2012 -> 2012 -> 2013 (+0.1% in the last half)" in text


@pytest.mark.parametrize(("share", "verdict"), [(0.01, "is kept"), (0.011, "is not kept")])
def test_render_compares_with_the_limit(share, verdict):
    machine = {"processor": "a processor"}
    text = policy_serving.render(
        {"capture": {"machine": machine, **CAPTURE, "share": share}}, ["capture", "load"]
    )
    assert f"The limit of 1% for one request {verdict} in one engine." in text
    assert "Not measured yet: load." in text


def test_questions_differ_and_can_be_skipped():
    requests = policy_serving.questions(4)
    assert len({request.image.tobytes() for request in requests}) == 4
    assert policy_serving.questions(2, skip=2)[0].instruction == requests[2].instruction


def test_committed_report_is_rendered_by_this_script():
    report = json.loads((ROOT / "benchmarks/reports/policy-serving.json").read_text())
    text = (ROOT / "benchmarks/reports/policy-serving.md").read_text(encoding="utf-8")
    assert text == policy_serving.render(report, tuple(policy_serving.PARTS))
