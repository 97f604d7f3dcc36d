"""Run a command in a process of its own and measure it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ChildRun:
    """What a command printed and took.

    Attributes:
        seconds: wall time.
        peak_bytes: largest resident memory of the process; pages of mapped files count.
        output: the JSON object that it printed.
    """

    seconds: float
    peak_bytes: int
    output: dict[str, Any]


def run_cli(arguments: Sequence[str]) -> ChildRun:
    """Run ``coprs-deploy ARGUMENTS --json`` in a new process; its log goes to our stderr.

    Raises:
        RuntimeError: it did not exit with 0.
    """
    command = [sys.executable, "-m", "coprs_deploy.cli.main", *arguments, "--json"]
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        printed = child.stdout.read()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - start
    if child.returncode:
        raise RuntimeError(f"`{' '.join(arguments)}` ended with exit code {child.returncode}")
    return ChildRun(seconds, 1024 * usage.ru_maxrss, json.loads(printed))
