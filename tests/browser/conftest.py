"""A server with the demo model, and Chromium driven by Playwright."""

import contextlib
import os
import re
import shutil
import subprocess
import sys

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

ARGUMENTS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)


@contextlib.contextmanager
def serving(*arguments, **environment):
    """Start a server with the demo model; yield its address."""
    command = [sys.executable, "-m", "coprs_deploy", "serve", "--port", "0", *arguments]
    environment = {**os.environ, "COPRS_API_KEY": "", **environment}
    if not environment["COPRS_API_KEY"]:
        del environment["COPRS_API_KEY"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as server:
        try:
            lines = iter(server.stderr.readline, "")
            found = (re.match(r"(http://127\.0\.0\.1:\d+)$", line) for line in lines)
            yield next(match.group(1) for match in found if match)
        finally:
            server.kill()


@pytest.fixture(scope="module")
def address():
    with serving("--runtime", "openvino", "--policy", "openvino") as address:
        yield address


@pytest.fixture(scope="module")  # Playwright's event loop would disturb the tests of other modules
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with playwright.sync_playwright() as opened:
        chromium = opened.chromium.launch(executable_path=CHROMIUM, args=list(ARGUMENTS))
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser):
    """Open the page of a server; errors of the page, and requests to other hosts, fail the test."""
    contexts, errors = [], []

    def opener(address, **options):
        options = {
            "viewport": {"width": 1280, "height": 900},
            "reduced_motion": "reduce",
            **options,
        }
        context = browser.new_context(**options)
        context.grant_permissions(["clipboard-read", "clipboard-write"], origin=address)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: _check_message(message, errors))
        page.on("request", lambda request: _check_host(request.url, address, errors))
        page.goto(address)
        return page

    yield opener
    for context in contexts:
        context.close()
    assert errors == []


def _check_message(message, errors):
    # A refused request is an error to the browser, and a message of the page to the user.
    if message.type == "error" and not message.text.startswith("Failed to load resource"):
        errors.append(message.text)


def _check_host(url, address, errors):
    if not url.startswith((address, "data:", "blob:")):
        errors.append(f"the page requested {url}")
