"""Requests made from the OpenAPI document: every response is one that the document declares."""

import base64

import pytest
import schemathesis
from hypothesis import given
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks
from schemathesis.config import SchemathesisConfig

from coprs_deploy.engines import SegmentationGraphs
from coprs_deploy.runtime import CoPRS
from coprs_deploy.server.app import build_app
from coprs_deploy.server.bodies import EVENT_STREAM
from tests.unit.runtime_fakes import GEOMETRY, SPECS, FakePolicy, FakeRunner
from tests.unit.server.asgi import MAX_BYTES, png

pytestmark = pytest.mark.fuzz

load_all_checks()
# A schema cannot say which bytes are an image, nor that a text is not blank.
CHOSEN = [check for check in CHECKS.get_all() if check.__name__ != "positive_data_acceptance"]

REFUSALS = [400, 401, 404, 405, 406, 413, 415, 422, 429]
CONFIG = SchemathesisConfig.from_dict(
    {"checks": {"negative_data_rejection": {"expected-statuses": REFUSALS}}}
)


@pytest.fixture(scope="module")
def operations():
    """Return the operations of the OpenAPI document, bound to the application."""
    graphs = SegmentationGraphs({name: FakeRunner(name) for name in SPECS})
    with CoPRS(graphs, FakePolicy(found=1), GEOMETRY) as coprs:
        app = build_app(coprs, MAX_BYTES)
        document = schemathesis.openapi.from_asgi("/openapi.json", app, config=CONFIG)
        yield [operation.ok() for operation in document.get_all_operations()]


@pytest.mark.parametrize("mode", GenerationMode)
@given(data=st.data())
def test_response_is_one_that_the_document_declares(operations, mode, data):
    operation = data.draw(st.sampled_from(operations))
    case = data.draw(operation.as_strategy(generation_mode=mode))
    if mode is GenerationMode.POSITIVE and operation.path == "/segment":
        image = data.draw(st.sampled_from([png(), b"no image"]))
        is_json = case.media_type == "application/json"
        case.body["image"] = base64.b64encode(image).decode() if is_json else image
    accept = data.draw(st.sampled_from(["*/*", EVENT_STREAM, "application/json", ";,q=;;"]))
    case.call_and_validate(checks=CHOSEN, headers={"Accept": accept})
