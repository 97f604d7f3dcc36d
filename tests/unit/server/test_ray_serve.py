"""Calls of Ray Serve where replicas do not start; with Ray itself: ``test_serve_ray.py``."""

import signal
import threading
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from coprs_deploy.cli.serve import _serve_on_ray
from coprs_deploy.errors import CoPRSError
from coprs_deploy.images import MAX_IMAGE_PIXELS
from coprs_deploy.runtime import RuntimeOptions
from coprs_deploy.runtime.ray_cluster import RayOptions
from coprs_deploy.server import ray_serve


class FailingServe:
    """Ray Serve whose ``run`` raises."""

    def __init__(self, error):
        self.error = error
        self.deleted = []

    def start(self, http_options):
        assert http_options == {"host": "127.0.0.1", "port": 8000}

    def run(self, application, name, route_prefix):
        raise self.error

    def delete(self, name):
        self.deleted.append(name)


@pytest.mark.parametrize(
    ("error", "raised"),
    [(RuntimeError("no GPU"), CoPRSError), (KeyboardInterrupt(), KeyboardInterrupt)],
)
def test_application_that_does_not_start_is_deleted(monkeypatch, error, raised):
    serve = FailingServe(error)
    monkeypatch.setattr(ray_serve, "import_serve", lambda: serve)
    monkeypatch.setattr(ray_serve, "connect", lambda address: None)
    monkeypatch.setattr(ray_serve, "build_application", lambda options, scale: None)
    with pytest.raises(raised):
        ray_serve.RayServer(ray_serve.ReplicaOptions(), RayOptions(), "127.0.0.1", 8000)
    assert serve.deleted == [ray_serve.APPLICATION]


def test_replicas_that_cannot_be_replaced_leave_the_server_running(monkeypatch, capsys):
    outcomes = iter([CoPRSError("the bundle is broken"), None, KeyboardInterrupt()])

    def replace():
        if error := next(outcomes):
            raise error

    server = nullcontext(SimpleNamespace(replace_replicas=replace))
    signaled = SimpleNamespace(wait=lambda seconds: True, clear=lambda: None)
    monkeypatch.setattr(ray_serve, "RayServer", lambda *_: server)
    monkeypatch.setattr(threading, "Event", lambda: signaled)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    arguments = SimpleNamespace(
        bundle=None,
        grace_period=5,
        api_key="",
        host="127.0.0.1",
        port=8000,
        max_upload=32,
        root_path="",
        cors_origin=[],
        max_pixels=MAX_IMAGE_PIXELS,
    )
    _serve_on_ray(arguments, RuntimeOptions(), RayOptions())
    logged = capsys.readouterr().err
    assert "replicas were not replaced: the bundle is broken" in logged
    assert logged.strip().endswith("replicas were replaced\nreplicas are replaced\nstopped")
