"""Clients of the application on a runtime of fakes."""

import json

from starlette.testclient import TestClient

from coprs_deploy.server.app import build_app
from tests.unit.runtime_fakes import FakePolicy
from tests.unit.server.asgi import MAX_BYTES, png


def connect_to(build, policy=None, app_options=None, **options):
    """Return a client of an application, and its policy."""
    policy = policy or FakePolicy()
    coprs, _ = build(policy, **options)
    return TestClient(build_app(coprs, MAX_BYTES, **(app_options or {}))), policy


def post(client, image=None, headers=None, **fields):
    """Send a form."""
    files = {"image": ("a.png", png() if image is None else image)}
    if "instructions" not in fields:
        fields.setdefault("instruction", "the cup")
    return client.post("/segment", files=files, data=fields, headers=headers)


def events_of(response):
    """Return names and data of the events of a stream."""
    parts = [part.split("\n") for part in response.text.split("\n\n")[:-1]]
    assert all(
        len(p) == 2 and p[0].startswith("event: ") and p[1].startswith("data: ") for p in parts
    )
    return [(name[len("event: ") :], json.loads(data[len("data: ") :])) for name, data in parts]
