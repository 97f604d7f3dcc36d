"""Requests to a local stand-in server: retries, refusals, and what cannot be retried."""

import json

import pytest

from coprs_deploy.errors import EndpointError
from coprs_deploy.evaluation.chat_endpoint import ChatEndpoint, RequestFailedError
from tests.unit.evaluation.judge_server import Silence, answer, judge_server

MESSAGES = [{"role": "user", "content": "hello"}]


def complete(script, **settings):
    """Send one conversation; return its completion, the requests and the pauses."""
    pauses = []
    with judge_server(script) as (url, requests):
        endpoint = ChatEndpoint(url, "m", pause=pauses.append, **settings)
        return endpoint.complete(MESSAGES), requests, pauses


def failure(script, kind=RequestFailedError, **settings):
    """Return the error of one conversation, and the requests."""
    with judge_server(script) as (url, requests):
        endpoint = ChatEndpoint(url, "m", pause=lambda s: None, **settings)
        with pytest.raises(kind) as caught:
            endpoint.complete(MESSAGES)
    return caught.value, requests


def test_complete_sends_model_messages_and_key_and_reads_the_usage():
    completion, requests, pauses = complete(lambda n, r: answer("hi"), key="secret")
    assert (completion.text, completion.prompt_tokens, completion.completion_tokens) == (
        "hi",
        100,
        10,
    )
    assert requests[0]["path"] == "/v1/chat/completions"
    assert requests[0]["headers"]["Authorization"] == "Bearer secret"
    assert requests[0]["body"] == {"model": "m", "messages": MESSAGES, "temperature": 0}
    assert pauses == []


def test_complete_without_a_key_or_usage_sends_none_and_counts_zero():
    body = json.dumps({"choices": [{"message": {"content": "hi"}}], "usage": None})
    completion, requests, _ = complete(lambda n, r: body)
    assert "Authorization" not in requests[0]["headers"]
    assert completion.prompt_tokens == 0


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_complete_retries_temporary_failures_with_growing_pauses(status):
    script = lambda n, r: answer() if n == 3 else (status, "busy", {})  # noqa: E731
    completion, requests, pauses = complete(script)
    assert completion.text
    assert len(requests) == 4
    assert 0.5 <= pauses[0] <= 1 <= pauses[1] <= 2 <= pauses[2] <= 4


def test_complete_waits_as_long_as_the_server_requests_but_at_most_a_minute():
    headers = [{"Retry-After": "7"}, {"Retry-After": "900"}, {"Retry-After": "Wed, 21 Oct"}]
    script = lambda n, r: answer() if n == 3 else (429, "", headers[n])  # noqa: E731
    _, _, pauses = complete(script)
    assert pauses[0] == 7
    assert pauses[1] == 60
    assert pauses[2] <= 4


@pytest.mark.parametrize("body", ["<html>proxy</html>", "{}", '{"choices": []}', "[]", "null"])
def test_complete_retries_a_body_without_a_choice(body):
    error, requests = failure(lambda n, r: body, max_attempts=3)
    assert error.kind == "malformed response"
    assert len(requests) == 3


def test_complete_silent_server_is_a_timeout():
    error, requests = failure(lambda n, r: Silence(0.5), timeout_s=0.05, max_attempts=2)
    assert error.kind == "timeout"
    assert len(requests) == 2


def test_complete_without_a_server_is_no_connection():
    with judge_server(lambda n, r: answer()) as (url, _):
        pass
    endpoint = ChatEndpoint(url, "m", max_attempts=2, pause=lambda s: None)
    with pytest.raises(RequestFailedError) as caught:
        endpoint.complete(MESSAGES)
    assert caught.value.kind == "no connection"


def test_complete_refusal_is_not_retried():
    error, requests = failure(lambda n, r: answer(None, refusal="I cannot rate people"))
    assert (error.kind, str(error)) == ("refusal", "I cannot rate people")
    assert len(requests) == 1


def test_complete_bad_request_fails_this_request_alone():
    error, requests = failure(lambda n, r: (400, "image too large", {}))
    assert error.kind == "HTTP 400"
    assert "image too large" in str(error)
    assert len(requests) == 1


@pytest.mark.parametrize("status", [401, 403, 404])
def test_complete_wrong_key_or_path_ends_the_work_and_hides_the_key(status):
    script = lambda n, r: (status, f"no: {r['headers']['Authorization']}", {})  # noqa: E731
    error, requests = failure(script, EndpointError, key="secret")
    assert f"HTTP {status}: no: Bearer ***" in str(error)
    assert "check the URL, the name of the model and the key" in str(error)
    assert len(requests) == 1


def test_complete_redirect_is_not_followed():
    with judge_server(lambda n, r: answer()) as (elsewhere, other):
        script = lambda n, r: (307, "", {"Location": elsewhere + "/chat/completions"})  # noqa: E731
        failure(script, EndpointError, key="secret")
    assert other == []


def test_complete_model_without_temperature_gets_none():
    def script(number, request):
        if "temperature" in request["body"]:
            return 400, "Unsupported value: 'temperature' does not support 0", {}
        return answer()

    with judge_server(script) as (url, requests):
        endpoint = ChatEndpoint(url, "m")
        for _ in range(2):
            endpoint.complete(MESSAGES)
    assert ["temperature" in request["body"] for request in requests] == [True, False, False]


@pytest.mark.parametrize("url", ["", "localhost:8000/v1", "ftp://host/v1", "http://", "http://["])
def test_chat_endpoint_relative_url_is_refused(url):
    with pytest.raises(ValueError, match=r"accepted: http://HOST\[:PORT\]/v1"):
        ChatEndpoint(url, "m")


def test_chat_endpoint_url_with_the_path_of_the_call_is_kept():
    assert ChatEndpoint("http://h/v1/chat/completions/", "m").url == "http://h/v1/chat/completions"
