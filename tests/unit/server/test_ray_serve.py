"""Calls of Ray Serve where its application does not start; with Ray: ``test_serve_ray.py``."""

import pytest

from coprs_deploy.errors import CoPRSError
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
