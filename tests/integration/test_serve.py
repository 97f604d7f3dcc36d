"""``coprs-deploy serve`` as a process: results, refusals and shutdown."""

import contextlib
import http.client
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from PIL import Image

from coprs_deploy import CoPRS
from coprs_deploy.cli.main import main
from coprs_deploy.cli.serve import read_api_key
from coprs_deploy.errors import install_hint
from coprs_deploy.server.api_keys import ApiKeys
from coprs_deploy.server.process import EXIT_TIMEOUT_S
from tests import ROOT

SCENE = ROOT / "examples" / "scene.png"
INSTRUCTION = "the largest red circle"


def form(image):
    """Encode a multipart form without a library."""
    parts = [
        b'--x\r\nContent-Disposition: form-data; name="instruction"\r\n\r\n' + INSTRUCTION.encode(),
        b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n' + image,
        b"--x--\r\n",
    ]
    return b"\r\n".join(parts)


@contextlib.contextmanager
def serving(*arguments, **environment):
    """Start a server; yield its process and its address."""
    command = [sys.executable, "-m", "coprs_deploy", "serve", "--port", "0", *arguments]
    environment = {**os.environ, **environment}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as server:
        try:
            lines = iter(server.stderr.readline, "")
            address = next(line for line in lines if re.match(r"http://127\.0\.0\.1:\d+$", line))
            yield server, address.strip()
        finally:
            server.kill()


def post(address, image, **headers):
    headers["Content-Type"] = "multipart/form-data; boundary=x"
    request = urllib.request.Request(f"{address}/segment", form(image), headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


@pytest.mark.slow
def test_serve_returns_the_result_of_the_runtime_and_stops_on_sigterm():
    with serving(COPRS_API_KEY="secret") as (server, address):
        result = post(address, SCENE.read_bytes(), Authorization="Bearer secret")
        with pytest.raises(urllib.error.HTTPError, match="401"):
            post(address, SCENE.read_bytes())
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=60) == 0
        assert server.stderr.read().endswith("stopped\n")
    with CoPRS.load() as coprs:
        expected = coprs.segment(SCENE, INSTRUCTION).to_json()
    assert {**result, "timings": None} == {**expected, "timings": None}


@pytest.mark.slow
def test_serve_stops_on_sighup():
    with serving() as (server, _):
        server.send_signal(signal.SIGHUP)
        assert server.wait(timeout=60) == 0
        stderr = server.stderr.read()
    assert stderr.endswith("stopped\n")
    assert "Traceback" not in stderr


@pytest.mark.slow
def test_serve_stops_on_sigterm_within_seconds_under_load():
    """Eight images of 36 megapixels take longer than the grace period; they get 503."""
    file = io.BytesIO()
    Image.new("RGB", (6_000, 6_000)).save(file, "PNG")
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    with serving("--grace-period", "0.5") as (server, address):
        post(address, SCENE.read_bytes())
        host = address.removeprefix("http://")
        half_sent = socket.create_connection(host.split(":"))
        half_sent.sendall(b"GET / HTTP/1.1\r\nHo")
        connections = [http.client.HTTPConnection(host, timeout=60) for _ in range(8)]
        for connection in connections:
            connection.request("POST", "/segment", form(file.getvalue()), headers)
        with urllib.request.urlopen(f"{address}/health", timeout=60) as response:
            assert response.status == 200
        server.send_signal(signal.SIGTERM)
        start = time.monotonic()
        statuses = [connection.getresponse().status for connection in connections]
        assert server.wait(timeout=60) == 0
        assert time.monotonic() - start < 0.5 + EXIT_TIMEOUT_S + 5
        half_sent.close()
        for connection in connections:
            connection.close()
    assert 503 in statuses
    assert set(statuses) <= {200, 503}


def test_serve_address_in_use_is_refused_before_loading(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "nowhere", "--port", str(port)]) == 2
    message = capsys.readouterr().err
    assert f"cannot listen on 127.0.0.1, port {port}" in message
    assert "choose another --host or --port" in message


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--port", "70000"], "--port is 70000; it must be from 0 to 65535"),
        (["--max-upload", "0"], "--max-upload is 0.0; it must be above 0 MiB, and finite"),
        (["--max-upload", "inf"], "--max-upload is inf; it must be above 0 MiB, and finite"),
        (["--timeout", "0"], "timeout_s is 0.0; it must be above 0"),
        (["--max-queue-size", "-1"], "max_queue_size is -1; it must be at least 0"),
        (["--policy", "vlm"], "policy is 'vlm'; accepted: "),
        (["--grace-period", "-1"], "--grace-period is -1.0; it must be at least 0 s"),
        (["--root-path", "api/"], "--root-path is 'api/'; accepted: a path such as /"),
        (["--cors-origin", "a.example"], "--cors-origin is 'a.example'; accepted: * or an origin"),
        (["--cors-origin", "https://a.example/page"], "accepted: * or an origin"),
        (["--api-key", ""], "--api-key is empty or holds other than visible ASCII characters"),
        (["--drain", "-1"], "--drain is -1.0; it must be at least 0 s"),
        (["--max-pixels", "0"], "--max-pixels is 0; it must be at least 1"),
        (["--requests-per-minute", "5"], "--requests-per-minute limits each API key; add --api"),
        (["--max-concurrent", "0"], "--max-concurrent is 0; it must be at least 1"),
        (["--new-api-key", "alice"], "--new-api-key needs --api-keys FILE"),
        (["--api-keys", "nowhere.json"], "nowhere.json: No such file or directory"),
        (["--tls-key", "key.pem"], "--tls-key is key.pem; accepted: with --tls-cert only"),
        (["--otlp-endpoint", "collector"], "--otlp-endpoint is 'collector'; accepted: a URL"),
    ],
)
def test_serve_arguments_out_of_range_are_refused(arguments, part, capsys):
    assert main(["serve", *arguments]) == 2
    assert part in capsys.readouterr().err


@pytest.mark.parametrize(("given", "expected"), [(None, "from-variable"), ("given", "given")])
def test_serve_api_key_is_read_from_the_environment(monkeypatch, given, expected):
    monkeypatch.setenv("COPRS_API_KEY", "from-variable")
    assert read_api_key(given) == expected
    monkeypatch.delenv("COPRS_API_KEY")
    assert read_api_key(None) == ""


def test_serve_empty_api_key_in_the_environment_is_refused(monkeypatch):
    monkeypatch.setenv("COPRS_API_KEY", "")
    with pytest.raises(ValueError, match="COPRS_API_KEY is empty"):
        read_api_key(None)


def test_serve_missing_library_names_the_pip_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve"]) == 2
    assert capsys.readouterr().err.strip().endswith(install_hint("serve"))


def test_serve_new_api_key_is_printed_and_added(tmp_path, capsys):
    path = tmp_path / "keys.json"
    printed = []
    for name in ("alice", "bob"):
        assert main(["serve", "--api-keys", str(path), "--new-api-key", name]) == 0
        printed.append(capsys.readouterr().out.strip())
    keys = ApiKeys(path=path)
    assert [keys.find(key).name for key in printed] == ["alice", "bob"]
