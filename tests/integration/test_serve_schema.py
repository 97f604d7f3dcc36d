"""schemathesis against a running server: every response is one that the document declares."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.test_serve import serving

LEFT_OUT = "positive_data_acceptance"
"""A schema cannot say which bytes are an image."""

CONFIGURATION = """\
[checks.negative_data_rejection]
expected-statuses = [400, 401, 404, 405, 408, 411, 413, 415, 422]
"""
"""A long instruction may be refused by its size (413) before it is read."""


@pytest.mark.extended
@pytest.mark.parametrize("key", ["", "secret"])
def test_running_server_conforms_to_its_document(key, tmp_path):
    environment = {"COPRS_API_KEY": key} if key else {}
    arguments = ("--max-upload", "1", "--timeout", "60", "--max-queue-size", "8")
    (tmp_path / "schemathesis.toml").write_text(CONFIGURATION)
    with serving(*arguments, **environment) as (server, address):
        command = [
            *(Path(sys.executable).with_name("schemathesis"), "run", f"{address}/openapi.json"),
            *("--checks", "all", "--exclude-checks", LEFT_OUT),
            *("--max-examples", "8", "--max-time", "100", "--seed", "1", "--request-timeout", "60"),
            *("--generation-database", "none", "--no-color", "--warnings", "off"),
            *(("--header", f"Authorization: Bearer {key}") if key else ()),
        ]
        clean = {name: value for name, value in os.environ.items() if name != "COPRS_API_KEY"}
        done = subprocess.run(
            command,
            check=False,
            cwd=tmp_path,
            env=clean,
            capture_output=True,
            text=True,
            timeout=900,
        )
        # Long bodies are left out.
        lines = (line for line in done.stdout.splitlines() if len(line) < 1_000)
        print("\n".join(lines)[-20_000:], done.stderr[-2_000:])
        assert server.poll() is None
    assert done.returncode == 0
    assert re.search(r"\d+ generated, \d+ passed", done.stdout)
