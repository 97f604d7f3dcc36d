"""Starting the processes of a run on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence


def is_worker() -> bool:
    """Say whether this is already one of several processes of a run."""
    return "LOCAL_RANK" in os.environ


def launch(arguments: Sequence[str], processes: int, threads: int) -> int:
    """Run ``coprs-deploy`` with these arguments in several processes that train together.

    Args:
        arguments: of the command line.
        processes: how many.
        threads: CPU threads of each.

    Returns:
        The exit code.
    """
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
        "-m",
        "coprs_deploy.cli.main",
        *arguments,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    return subprocess.run(command, env=environment, check=False).returncode
