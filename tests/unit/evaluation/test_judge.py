"""The judge of the reasoning against a local stand-in server."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from coprs_deploy.errors import ArtifactError
from coprs_deploy.evaluation import judge
from coprs_deploy.evaluation.chat_endpoint import ChatEndpoint
from coprs_deploy.evaluation.judge import JudgeItem, JudgeSettings, parse_answer, rate
from tests.unit.evaluation.judge_server import GOOD, answer, judge_server


def make_items(count):
    """Return items that differ in image and texts."""
    images = [np.full((30, 40, 3), 4 * number, np.uint8) for number in range(count)]
    return [
        JudgeItem(lambda image=image: image, f"the object {number}", f"reasoning {number}")
        for number, image in enumerate(images)
    ]


def run(script, items, directory, **settings):
    """Rate items; return scores, outcome and requests."""
    with judge_server(script) as (url, requests):
        settings = JudgeSettings(url, "m", **settings)
        endpoint = ChatEndpoint(url, "m", max_attempts=2, pause=lambda s: None)
        return *rate(items, settings, directory, endpoint=endpoint), requests


def test_rate_weighs_the_scores_of_the_paper(tmp_path):
    scores, report, _ = run(lambda n, r: answer(), make_items(1), tmp_path, prices=(2, 10))
    assert scores[0].quality == pytest.approx(0.475)
    assert sum(judge.WEIGHTS.values()) == pytest.approx(1)
    assert report.to_json() == {
        "model": "m",
        "num_examples": 1,
        "num_scored": 1,
        "failures": {},
        "first_failures": {},
        "prompt_tokens": 100,
        "completion_tokens": 10,
        "cost": pytest.approx(3e-4),
        "error": "",
    }


def test_rate_sends_image_instruction_and_reasoning(tmp_path):
    image = np.random.default_rng(0).integers(0, 255, (30, 2048, 3), np.uint8)
    items = [JudgeItem(lambda: image, "the red car", "It stands left.")]
    _, _, requests = run(lambda n, r: answer(), items, tmp_path)
    text, sent_image = requests[0]["body"]["messages"][0]["content"]
    assert "the red car" in text["text"]
    assert "It stands left." in text["text"]
    for name in judge.WEIGHTS:
        assert name in text["text"]
    head, _, data = sent_image["image_url"]["url"].partition(",")
    assert head == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as sent:
        assert sent.size == (1024, 15)


def test_rate_again_sends_nothing(tmp_path):
    first, report, _ = run(lambda n, r: answer(), make_items(5), tmp_path)
    again, second, requests = run(lambda n, r: answer(), make_items(5), tmp_path)
    assert requests == []
    assert again == first
    assert second.to_json() == report.to_json()
    assert (report.num_requested, second.num_requested) == (5, 0)


def test_rate_continues_after_a_kill_in_the_middle_of_a_line(tmp_path):
    first, _, _ = run(lambda n, r: answer(), make_items(4), tmp_path)
    cache = tmp_path / judge.CACHE_FILE
    cache.write_bytes(cache.read_bytes()[:-20])
    again, _, requests = run(lambda n, r: answer(), make_items(4), tmp_path)
    assert len(requests) == 1
    assert again == first
    assert len(cache.read_text().splitlines()) == 4


@pytest.mark.parametrize("change", ["image", "instruction", "reasoning", "model"])
def test_rate_changed_content_is_rated_again(change, tmp_path):
    run(lambda n, r: answer(), make_items(1), tmp_path)
    (item,) = make_items(1)
    image = item.load_image() + (change == "image")
    other = JudgeItem(
        lambda: image.astype(np.uint8),
        item.instruction + "!" * (change == "instruction"),
        item.reasoning + "!" * (change == "reasoning"),
    )
    with judge_server(lambda n, r: answer()) as (url, requests):
        model = "n" if change == "model" else "m"
        rate([other], JudgeSettings(url, model), tmp_path)
    assert len(requests) == 1


def test_rate_tells_the_judge_what_is_wrong_with_its_answer(tmp_path):
    replies = ["no idea", json.dumps(GOOD | {"task_relevance": 7}), "```json\n%s\n```"]
    replies[2] %= json.dumps(GOOD, indent=1)
    scores, _, requests = run(lambda n, r: answer(replies[n]), make_items(1), tmp_path)
    assert scores[0].quality == pytest.approx(0.475)
    assert (scores[0].prompt_tokens, scores[0].completion_tokens) == (300, 30)
    second, third = (request["body"]["messages"] for request in requests[1:])
    assert second[1] == {"role": "assistant", "content": "no idea"}
    assert "the answer has no JSON object" in second[2]["content"]
    assert "task_relevance is 7; accepted: a number from 0 to 1" in third[4]["content"]


def test_rate_counts_failures_and_scores_the_others(tmp_path):
    def script(_, request):
        text = request["body"]["messages"][0]["content"][0]["text"]
        responses = {
            "object 0": answer("never JSON"),
            "object 1": answer(None, refusal="no"),
            "object 2": (500, "down", {}),
            "object 3": (400, "too large", {}),
        }
        return next((r for name, r in responses.items() if name in text), answer())

    scores, report, _ = run(script, make_items(6), tmp_path)
    assert [score is None for score in scores] == [True] * 4 + [False] * 2
    assert report.failures == {"malformed answer": 1, "refusal": 1, "HTTP 500": 1, "HTTP 400": 1}
    assert report.first_failures["malformed answer"] == "the answer has no JSON object"
    assert (report.num_examples, report.num_scored, report.error) == (6, 2, "")


def test_rate_unreadable_image_is_a_failure(tmp_path):
    def load():
        raise ArtifactError("the image is gone")

    items = [JudgeItem(load, "a", "b"), *make_items(1)]
    scores, report, _ = run(lambda n, r: answer(), items, tmp_path)
    assert [score is None for score in scores] == [True, False]
    assert report.failures == {"unreadable image": 1}


def test_rate_gives_up_when_nothing_works_and_keeps_the_scores(tmp_path):
    script = lambda n, r: answer() if n < 3 else (400, "quota", {})  # noqa: E731
    scores, report, requests = run(script, make_items(60), tmp_path, concurrency=1)
    assert sum(score is not None for score in scores) == 3
    assert "gave up after 10 failures in a row" in report.error
    assert "quota" in report.error
    assert len(requests) < 20
    again, _, _ = run(lambda n, r: answer(), make_items(60), tmp_path)
    assert None not in again


def test_rate_wrong_key_ends_at_once(tmp_path):
    script = lambda n, r: (401, "bad key", {})  # noqa: E731
    scores, report, requests = run(script, make_items(40), tmp_path, concurrency=2)
    assert scores == [None] * 40
    assert "bad key" in report.error
    assert len(requests) <= 2


def test_rate_has_no_more_requests_at_once_than_the_limit(tmp_path):
    import threading
    import time

    active, most, lock = 0, 0, threading.Lock()

    def script(*_):
        nonlocal active, most
        with lock:
            active += 1
            most = max(most, active)
        time.sleep(0.02)
        with lock:
            active -= 1
        return answer()

    run(script, make_items(12), tmp_path, concurrency=3)
    assert 1 <= most <= 3


def test_rate_into_a_directory_in_use_is_refused(tmp_path):
    with judge._open_cache(tmp_path), pytest.raises(ArtifactError, match="another process rates"):
        rate(make_items(1), JudgeSettings("http://127.0.0.1:9/v1", "m"), tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no JSON object"),
        ("{", "no valid JSON"),
        ("{}", r"the keys are \(none\)"),
        (json.dumps(GOOD | {"extra": 1}), "the keys are"),
        (json.dumps(GOOD | {"task_relevance": "0.5"}), "task_relevance is '0.5'"),
        (json.dumps(GOOD | {"task_relevance": True}), "task_relevance is True"),
        (json.dumps(GOOD | {"task_relevance": float("nan")}), "task_relevance is nan"),
        (json.dumps(GOOD | {"task_relevance": -0.1}), "task_relevance is -0.1"),
    ],
)
def test_parse_answer_malformed_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_answer(text)


def test_settings_without_url_or_model_are_refused():
    with pytest.raises(ValueError, match="add --judge-url"):
        JudgeSettings(model="m")
    with pytest.raises(ValueError, match="add --judge-model"):
        JudgeSettings("http://h/v1")
    assert "secret" not in repr(JudgeSettings("http://h/v1", "m", key="secret"))
