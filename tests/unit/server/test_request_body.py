"""Bodies in JSON, several instructions, and the forms of the masks."""

import base64
import io
import itertools
import json
import subprocess
import tracemalloc

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image
from starlette.testclient import TestClient

from coprs_deploy.data.rle import decode_mask
from coprs_deploy.errors import PolicyError, RequestTimeoutError
from coprs_deploy.runtime import concurrency
from coprs_deploy.server.app import build_app
from coprs_deploy.server.bodies import EVENT_STREAM, ErrorBody, ResultBody, ResultsBody
from coprs_deploy.server.openapi import SEGMENT_BODY
from coprs_deploy.server.request_body import MAX_INSTRUCTIONS
from tests.unit.runtime_fakes import FakePolicy
from tests.unit.server.asgi import png
from tests.unit.server.clients import connect_to, events_of, post

IMAGE = base64.b64encode(png()).decode()


def post_json(client, headers=None, **fields):
    return client.post("/segment", json={"image": IMAGE, **fields}, headers=headers)


def without_timings(result):
    return {**result, "timings": None}


class TestJson:
    @pytest.mark.parametrize("prefix", ["", "data:image/png;base64,"])
    def test_json_has_the_result_of_the_form(self, build, prefix):
        client, policy = connect_to(build)
        fields = {"max_targets": 2, "max_new_tokens": 5, "max_reasoning_tokens": 3}
        by_form = post(client, **fields)
        by_json = post_json(client, image=prefix + IMAGE, instruction="the cup", **fields)
        assert by_json.status_code == 200
        assert without_timings(by_json.json()) == without_timings(by_form.json())
        first, second = policy.requests
        assert (first.max_targets, first.max_new_tokens) == (2, 5)
        assert (second.instruction, second.max_targets, second.max_new_tokens) == ("the cup", 2, 5)
        assert first.max_reasoning_tokens == second.max_reasoning_tokens == 3

    def test_json_may_be_answered_by_a_stream(self, build):
        client, _ = connect_to(build)
        response = post_json(client, {"Accept": EVENT_STREAM}, instruction="the cup")
        assert [name for name, _ in events_of(response)] == ["text", "text", "prior", "result"]

    @pytest.mark.parametrize(
        ("fields", "kind", "part"),
        [
            ({"image": "no base64!"}, "ImageDecodeError", "image is not base64"),
            ({"image": "data:image/png,abc"}, "ImageDecodeError", "it starts with 'data:image/png"),
            ({"image": base64.b64encode(b"text").decode()}, "ImageDecodeError", "not an image"),
            ({"image": 3}, "RequestError", "image: Input should be a valid string"),
            ({"image": ""}, "RequestError", "image: String should have at least 1 character"),
            ({"max_targets": "2"}, "RequestError", "max_targets: Input should be a valid integer"),
            ({"max_target": 2}, "RequestError", "unknown field `max_target`"),
            ({"return": "bmp"}, "RequestError", "Input should be 'rle', 'png'"),
            ({"return": []}, "RequestError", "return"),
            ({"return": ["rle"] * 5}, "RequestError", "at most 4 items"),
            ({"instructions": ["a"]}, "RequestError", "instruction and instructions are given"),
        ],
    )
    def test_field_that_is_not_accepted_is_refused(self, build, fields, kind, part):
        client, policy = connect_to(build)
        response = post_json(client, **{"instruction": "the cup", **fields})
        assert (response.status_code, response.json()["type"]) == (422, kind)
        assert part in response.json()["error"]
        assert policy.requests == []

    @pytest.mark.parametrize(
        ("content", "part"),
        [
            (b'{"field-0":0' + b"".join(b',"f%d":0' % n for n in range(500_000)) + b"}", "field-0"),
            (b'{"instruction":[' + b"[]," * 800_000 + b"[]]}", "accepted: at most 2097152"),
            (b'{"image":[' + b"[]," * 800_000 + b"[]]}", "accepted: at most 2097152"),
        ],
        ids=["fields", "instruction", "image"],
    )
    def test_json_of_many_items_is_refused_without_parsing_each(self, build, content, part):
        coprs, _ = build(FakePolicy())
        client = TestClient(build_app(coprs, 1 << 25))
        headers = {"Content-Type": "application/json"}
        tracemalloc.start()
        response = client.post("/segment", content=content, headers=headers)
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert response.status_code == 422
        assert part in response.json()["error"]
        assert peak_bytes < 10 * len(content)

    @pytest.mark.parametrize("content", [b"", b"{", b'{"image": "\\ud800"}', b"\xff"])
    def test_malformed_json_is_refused_with_400(self, build, content):
        client, _ = connect_to(build)
        headers = {"Content-Type": "application/json"}
        response = client.post("/segment", content=content, headers=headers)
        assert (response.status_code, response.json()["type"]) == (400, "RequestError")

    def test_json_that_is_no_object_is_refused(self, build):
        client, _ = connect_to(build)
        assert client.post("/segment", json=[1]).status_code == 422

    @pytest.mark.parametrize("media_type", ["", "text/plain", "application/xml"])
    def test_other_media_type_is_refused_with_415(self, build, media_type):
        client, _ = connect_to(build)
        headers = {"Content-Type": media_type}
        response = client.post("/segment", content=b"x", headers=headers)
        assert response.status_code == 415
        assert "send multipart/form-data, or application/json" in response.json()["error"]

    def test_examples_of_the_document_are_answered(self, build):
        client, _ = connect_to(build)
        examples = SEGMENT_BODY["requestBody"]["content"]["application/json"]["examples"]
        for name, body in (("one", ResultBody), ("several", ResultsBody)):
            response = client.post("/segment", json=examples[name]["value"])
            assert response.status_code == 200
            body.model_validate(response.json())


def failing_at(step, error):
    """Return what raises an error before a text delta of a policy, counted from 1."""
    steps = itertools.count(1)

    def during():
        if next(steps) == step:
            raise error

    return during


class TestInstructions:
    @pytest.mark.parametrize("max_cached_images", [0, 8])
    def test_several_instructions_encode_the_image_once(self, build, max_cached_images):
        policy = FakePolicy()
        coprs, runners = build(policy, max_cached_images=max_cached_images)
        client, _ = connect_to(lambda *_: (coprs, runners), policy)
        response = post_json(client, instructions=["the cup", "the table", "the cup"])
        results = ResultsBody.model_validate(response.json()).results
        assert [each.instruction for each in results] == ["the cup", "the table", "the cup"]
        assert runners["image_encoder"].calls == 1
        assert [each.timings.image_encoder_ms > 0 for each in results] == [True, False, False]
        assert coprs.num_active == 0

    def test_several_instructions_have_the_results_of_single_ones(self, build):
        client, _ = connect_to(build)
        several = post(client, instructions=["the cup", "the table"]).json()["results"]
        single = [post(client, instruction=each).json() for each in ("the cup", "the table")]
        assert list(map(without_timings, several)) == list(map(without_timings, single))

    def test_list_of_one_instruction_is_answered_by_a_list(self, build):
        client, _ = connect_to(build)
        assert len(post_json(client, instructions=["the cup"]).json()["results"]) == 1

    def test_stream_of_several_instructions_names_each(self, build):
        client, _ = connect_to(build)
        headers = {"Accept": EVENT_STREAM}
        events = events_of(post_json(client, headers, instructions=["the cup", "the table"]))
        for index, instruction in enumerate(("the cup", "the table")):
            own = [(name, data) for name, data in events if data["index"] == index]
            assert [name for name, _ in own] == ["text", "text", "prior", "result"]
            assert ResultBody.model_validate(own[-1][1]).instruction == instruction

    def test_instructions_run_as_many_at_once_as_the_policy_takes(self, build):
        client, policy = connect_to(build, FakePolicy(concurrency=2))
        assert post_json(client, instructions=["a", "b", "c"]).status_code == 200
        assert sorted(request.instruction for request in policy.requests) == ["a", "b", "c"]

    @pytest.mark.parametrize(
        ("instructions", "part"),
        [
            ([], "instructions: List should have at least 1 item"),
            (["a"] * (MAX_INSTRUCTIONS + 1), "instructions: List should have at most 16 items"),
            (["a", " "], "the instruction is empty"),
        ],
    )
    def test_instructions_that_are_not_accepted_are_refused(self, build, instructions, part):
        client, policy = connect_to(build)
        response = post_json(client, instructions=instructions)
        assert response.status_code == 422
        assert part in response.json()["error"]
        assert policy.requests == []

    def test_failure_of_one_instruction_leaves_the_others(self, build):
        client, _ = connect_to(build, FakePolicy(during=failing_at(3, PolicyError("no cup"))))
        response = post_json(client, instructions=["a", "b", "c"])
        assert response.status_code == 200
        results = ResultsBody.model_validate(response.json()).results
        assert results[1] == ErrorBody(error="no cup", type="PolicyError")
        assert [results[0].instruction, results[2].instruction] == ["a", "c"]

    def test_failure_of_one_instruction_is_an_event_with_its_index(self, build):
        client, _ = connect_to(build, FakePolicy(during=failing_at(1, PolicyError("no cup"))))
        headers = {"Accept": EVENT_STREAM}
        events = events_of(post_json(client, headers, instructions=["a", "b"]))
        assert events[0] == ("error", {"error": "no cup", "type": "PolicyError", "index": 0})
        assert [name for name, _ in events[1:]] == ["text", "text", "prior", "result"]
        assert {data["index"] for _, data in events[1:]} == {1}

    @pytest.mark.parametrize(
        ("error", "status"), [(RequestTimeoutError("too late"), 504), (ValueError("no"), 422)]
    )
    def test_failure_of_all_instructions_has_the_status_of_the_first(self, build, error, status):
        def fail():
            raise error

        client, policy = connect_to(build, FakePolicy(during=fail))
        response = post_json(client, instructions=["a", "b"])
        expected = {"error": str(error), "type": type(error).__name__}
        assert (response.status_code, response.json()) == (status, expected)
        assert len(policy.requests) == 2

    def test_bug_in_one_instruction_ends_the_request(self, build):
        client, policy = connect_to(build, FakePolicy(during=failing_at(3, KeyError("bug"))))
        response = post_json(client, instructions=["a", "b", "c"])
        assert (response.status_code, response.json()["type"]) == (500, "KeyError")
        assert len(policy.requests) == 2

    def test_more_instructions_than_the_queue_takes_are_refused(self, build):
        client, _ = connect_to(build, max_queue_size=1)
        assert post_json(client, instructions=["a", "b"]).status_code == 200
        response = post_json(client, instructions=["a", "b", "c"])
        assert response.status_code == 422
        assert "accepted: at most 2" in response.json()["error"]


class TestMaskFormats:
    def test_masks_are_the_same_in_every_form(self, build):
        client, _ = connect_to(build)
        formats = ["rle", "png", "polygons", "logits"]
        response = post_json(client, instruction="the cup", max_targets=2, **{"return": formats})
        result = ResultBody.model_validate(response.json())
        masks = [decode_mask(each.model_dump(), 20, 30) for each in result.masks]
        files = [io.BytesIO(base64.b64decode(each)) for each in result.mask_pngs]
        images = [Image.open(file) for file in files]
        assert {image.mode for image in images} == {"1"}
        for image, polygons, mask in zip(images, result.mask_polygons, masks, strict=True):
            assert np.array_equal(np.asarray(image), mask)
            assert np.array_equal(decode_mask(polygons, 20, 30), mask)
        for logits in (result.mask_logits, result.prior_logits):
            values = np.frombuffer(base64.b64decode(logits.data), "<f4").reshape(logits.shape)
            assert values.shape == (2, 16, 16)
            assert (logits.image_size, logits.unpadded_size) == (32, (21, 32))
        assert [mask.all() for mask in masks] == [True, True]
        assert values[:, 0, 0].tolist() == [11.0, 12.0]  # the prior logits of the fakes

    @pytest.mark.parametrize("form", ["png", "polygons", "logits"])
    def test_only_the_requested_form_is_sent(self, build, form):
        client, _ = connect_to(build)
        names = {
            "png": {"mask_pngs"},
            "polygons": {"mask_polygons"},
            "logits": {"mask_logits", "prior_logits"},
        }[form]
        fields = {"return": form}
        for result in (
            post(client, **fields).json(),
            post_json(client, instruction="x", **fields).json(),
            events_of(post(client, headers={"Accept": EVENT_STREAM}, **fields))[-1][1],
        ):
            assert names < set(result)
            assert "masks" not in result

    def test_result_without_a_target_has_empty_forms(self, build):
        client, _ = connect_to(build, FakePolicy(found=0))
        formats = ["rle", "png", "polygons", "logits"]
        result = post(client, **{"return": formats}).json()
        assert (result["masks"], result["mask_pngs"], result["mask_polygons"]) == ([], [], [])
        assert result["mask_logits"]["shape"] == [0, 16, 16]
        assert result["mask_logits"]["data"] == ""


class TestLimits:
    def test_image_with_more_pixels_is_refused_before_it_is_decoded(self, build, monkeypatch):
        monkeypatch.setattr(concurrency, "load_image", lambda source: pytest.fail("decoded"))
        client, _ = connect_to(build, app_options={"max_pixels": 599})
        response = post(client)
        assert (response.status_code, response.json()["type"]) == (422, "ImageSizeError")
        assert "600 pixels; accepted: at most 599" in response.json()["error"]

    def test_postscript_is_not_run(self, build, monkeypatch):
        run = []
        monkeypatch.setattr(EpsImagePlugin, "gs_binary", "gs")
        monkeypatch.setattr(subprocess, "check_call", lambda *args, **_: run.append(args))
        client, _ = connect_to(build)
        program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{} loop\n"
        response = post(client, program)
        assert (response.status_code, response.json()["type"]) == (422, "ImageDecodeError")
        assert run == []

    def test_full_queue_is_refused_before_the_body_is_read(self, build, monkeypatch):
        client, _ = connect_to(build)
        limit = client.app.state.coprs._limit
        limit.num_active = limit.max_active
        response = client.post(
            "/segment", content=b"not read", headers={"Content-Type": "multipart/form-data"}
        )
        assert (response.status_code, response.json()["type"]) == (503, "QueueFullError")
        limit.num_active = 0

    def test_large_body_in_json_is_answered(self, build):
        noise = np.random.default_rng(0).integers(0, 255, (100, 150, 3), np.uint8)
        file = io.BytesIO()
        Image.fromarray(noise).save(file, "PNG")
        client, _ = connect_to(build)
        content = json.dumps({"image": base64.b64encode(file.getvalue()).decode()})
        assert len(content) < 100_000
        result = post_json(client, image=json.loads(content)["image"], instruction="x").json()
        assert result["image_size"] == [100, 150]
