"""Shared fixtures: a tiny checkpoint of each policy family, its bundle, an image, no network."""

import os
import socket
import time
from ipaddress import ip_address
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from coprs_deploy.artifacts import file_lock
from coprs_deploy.conversion import random_checkpoint
from coprs_deploy.export import export_checkpoint

# Time of all fuzz tests together under the profile "fuzz"; the rest of the 20 minutes of
# `make fuzz` is for collection, fixtures and the last runs.
FUZZ_S = 17 * 60

# A test marked `fuzz` sets no `max_examples` of its own, so that the profile decides.
UNTIMED = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("fast", derandomize=True, max_examples=40, **UNTIMED)
settings.register_profile("fuzz", max_examples=200, print_blob=True, **UNTIMED)
settings.load_profile("fast")


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_call(item):
    """Repeat a fuzz test for its share of the time under the profile "fuzz"."""
    begin = time.monotonic()
    result = yield
    if item.get_closest_marker("fuzz") and item.config.getoption("--hypothesis-profile") == "fuzz":
        tests = sum(other.get_closest_marker("fuzz") is not None for other in item.session.items)
        processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
        runs = 1
        while time.monotonic() - begin < FUZZ_S / -(-tests // processes):
            item.runtest()
            runs += 1
        item.user_properties.append(("fuzz runs", runs))
    return result


def pytest_terminal_summary(terminalreporter):
    """Print how often each fuzz test was repeated."""
    for report in terminalreporter.getreports("passed"):
        for name, runs in report.user_properties:
            if name == "fuzz runs" and report.when == "call":
                examples = settings.get_profile("fuzz").max_examples
                terminalreporter.write_line(f"{report.nodeid}: {runs} x {examples} examples")


def pytest_collection_modifyitems(items):
    """Put files with slow tests first, so that the processes end together."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session", autouse=True)
def no_network():
    """Fail whatever reaches for another machine, even if the caller swallows the error."""
    attempts = []
    connect, resolve = socket.socket.connect, socket.getaddrinfo

    def refuse(address):
        attempts.append(address)
        raise AssertionError(f"a test reached for the network: {address}")

    def is_local(host):
        if host in (None, "", "localhost"):
            return True
        try:
            return ip_address(host).is_loopback or ip_address(host).is_unspecified
        except ValueError:
            return False

    def guarded_connect(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and not is_local(address[0]):
            refuse(address)
        return connect(self, address)

    def guarded_resolve(host, *args, **kwargs):
        if not is_local(host.decode() if isinstance(host, bytes) else host):
            refuse(host)
        return resolve(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded_connect)
        patch.setattr(socket, "getaddrinfo", guarded_resolve)
        yield
    assert attempts == []


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory):
    """Keep compiled graphs and autotune results out of the user's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COPRS_DEPLOY_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """Return a function that makes a folder once per run; the processes of a run share it."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def make(name, function) -> Path:
        path = shared / name
        with file_lock(shared / f"{name}.lock"):
            if not path.exists():
                function(path)
        return path

    return make


@pytest.fixture(scope="session")
def tiny_checkpoint(made_once) -> Path:
    """A checkpoint with a tiny scripted Qwen2.5-VL policy; read-only."""
    return made_once("tiny-checkpoint", lambda path: random_checkpoint(path, "tiny"))


@pytest.fixture(scope="session")
def tiny_llava_checkpoint(made_once) -> Path:
    """A checkpoint with a tiny scripted LLaVA-1.5 policy; read-only."""
    return made_once("tiny-llava-checkpoint", lambda path: random_checkpoint(path, "tiny-llava"))


@pytest.fixture(scope="session")
def tiny_bundle(made_once, tiny_checkpoint) -> Path:
    """``tiny_checkpoint`` as a bundle; read-only."""
    return made_once("tiny-bundle", lambda path: export_checkpoint(tiny_checkpoint, path))


@pytest.fixture(scope="session")
def tiny_llava_bundle(made_once, tiny_llava_checkpoint) -> Path:
    """``tiny_llava_checkpoint`` as a bundle; read-only."""
    return made_once(
        "tiny-llava-bundle", lambda path: export_checkpoint(tiny_llava_checkpoint, path)
    )


@pytest.fixture
def scene() -> NDArray[np.uint8]:
    """(90, 140, 3) uint8 RGB: three shapes on grey, wider than high, hence padded."""
    image = Image.new("RGB", (140, 90), (120, 124, 130))
    draw = ImageDraw.Draw(image)
    draw.ellipse((12, 20, 52, 60), fill=(214, 40, 40))
    draw.rectangle((70, 10, 100, 40), fill=(36, 90, 200))
    draw.polygon([(110, 80), (135, 80), (122, 50)], fill=(30, 160, 70))
    return np.array(image)
