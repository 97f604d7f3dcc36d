"""Start the processes of a run on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence


def is_worker() -> bool:
    """Return whether this process is one of several of a run."""
    return "LOCAL_RANK" in os.environ


def launch(arguments: Sequence[str], num_processes: int, num_threads: int) -> int:
    """Run ``coprs-deploy`` with these arguments in several processes that train together.

    Args:
        arguments: arguments of the command line.
        num_processes: number of processes.
        num_threads: CPU threads of each process.

    Returns:
        The exit code.
    """
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={num_processes}",
        "-m",
        "coprs_deploy",
        *arguments,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": str(num_threads)}
    return subprocess.run(command, env=environment, check=False).returncode
