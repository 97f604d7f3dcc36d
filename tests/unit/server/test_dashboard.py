"""The dashboard beside the containers reads only metrics and labels that the server has."""

import json
import re
import sys
import types

import pytest
from starlette.testclient import TestClient

from coprs_deploy.server import metrics
from coprs_deploy.server.app import build_app
from tests import ROOT
from tests.unit.server.asgi import MAX_BYTES, png

DASHBOARD = json.loads((ROOT / "containers/grafana/server.json").read_text("utf-8"))
FUNCTIONS = {"sum", "by", "rate", "histogram_quantile", "le"}


@pytest.fixture
def exposition(build, monkeypatch):
    """Text of ``/metrics`` after an answered and a refused request, on a machine with a GPU."""
    monkeypatch.setitem(sys.modules, "torch", types.ModuleType("torch"))
    monkeypatch.setattr(metrics, "gpu_memory", lambda: [{"used": 1, "total": 2}])
    client = TestClient(build_app(build()[0], MAX_BYTES))
    for instruction in ("the cup", " "):
        files = {"image": ("a.png", png())}
        client.post("/segment", files=files, data={"instruction": instruction})
    text = client.get("/metrics").text
    assert 'status="200"' in text and 'status="422"' in text
    return text


def test_every_metric_of_the_dashboard_is_exported(exposition):
    exported = set(re.findall(r"^(\w+)(?=[{ ])", exposition, re.MULTILINE))
    labels = set(re.findall(r'[{,](\w+)="', exposition))
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            plain = re.sub(r'"[^"]*"|\[[^]]*\]', "", target["expr"])
            names = set(re.findall(r"[a-z_]{2,}", plain)) - FUNCTIONS
            assert names, target
            assert names <= exported | labels, (panel["title"], names - exported - labels)
            shown = set(re.findall(r"{{(\w+)}}", target.get("legendFormat", "")))
            assert shown <= labels, (panel["title"], shown - labels)


def test_prometheus_scrapes_a_path_that_the_server_has(exposition):
    assert "coprs_requests_queued" in exposition
    assert "metrics_path: /metrics" in (ROOT / "containers/prometheus.yml").read_text("utf-8")
