"""``coprs-deploy serve --engine ray``: two replicas, and their replacement under load."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import psutil
import pytest

from tests import ROOT
from tests.integration.test_serve import SCENE, form, post

pytest.importorskip("ray.serve", reason="Ray Serve is not installed")

pytestmark = pytest.mark.extended

WAIT_S = 240
NUM_CLIENTS = 3


def free_port():
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextlib.contextmanager
def serving_on_ray(*arguments):
    """Start two replicas on a new cluster of this machine; yield the server and its address."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_MODE": "disabled",  # its token would be written to the home directory
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "RAY_ADDRESS": "local",
    }
    command = [sys.executable, "-m", "coprs_deploy", "serve", "--engine", "ray", "--replicas", "2"]
    command += ["--port", str(free_port()), *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as server:
        try:
            lines = iter(server.stderr.readline, "")
            address = next(line for line in lines if re.match(r"http://127\.0\.0\.1:\d+$", line))
            yield server, address.strip()
        finally:
            children = psutil.Process(server.pid).children(recursive=True)
            server.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(60)
            server.kill()
            for process in children:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()


def replicas(server):
    processes = psutil.Process(server.pid).children(recursive=True)
    found = set()
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if any("ServeReplica:coprs" in word for word in process.cmdline()):
                found.add(process.pid)
    return found


def test_replicas_are_replaced_without_a_lost_request():
    image = SCENE.read_bytes()
    with serving_on_ray() as (server, address):
        first = replicas(server)
        assert len(first) == 2
        expected = post(address, image)
        results, errors, stopped = [], [], threading.Event()

        def ask():
            while not stopped.is_set():
                try:
                    results.append(post(address, image))
                except Exception as error:
                    errors.append(error)

        clients = [threading.Thread(target=ask) for _ in range(NUM_CLIENTS)]
        for client in clients:
            client.start()
        try:
            server.send_signal(signal.SIGHUP)
            lines = iter(server.stderr.readline, "")
            assert next(line for line in lines if line == "replicas were replaced\n")
            end = time.monotonic() + WAIT_S
            while replicas(server) & first:
                assert time.monotonic() < end
                time.sleep(0.2)
        finally:
            stopped.set()
            for client in clients:
                client.join(WAIT_S)
        assert errors == []
        assert len(results) > 2 * NUM_CLIENTS
        assert expected["found"]
        assert {result["response"] for result in results} == {expected["response"]}
        assert {len(result["masks"]) for result in results} == {len(expected["masks"])}
        assert len(replicas(server)) == 2


def test_events_are_streamed_and_errors_have_their_status():
    with serving_on_ray() as (_, address):
        headers = {"Content-Type": "multipart/form-data; boundary=x"}
        stream = {**headers, "Accept": "text/event-stream"}
        request = urllib.request.Request(f"{address}/segment", form(SCENE.read_bytes()), stream)
        with urllib.request.urlopen(request, timeout=60) as response:
            events = re.findall(r"^event: (\w+)$", response.read().decode(), re.MULTILINE)
        assert set(events) == {"text", "prior", "result"}
        broken = urllib.request.Request(f"{address}/segment", form(b"no image"), headers)
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(broken, timeout=60)
        assert caught.value.code == 422
        assert json.load(caught.value)["type"] == "ImageDecodeError"
