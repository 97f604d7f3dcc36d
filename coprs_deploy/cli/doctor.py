"""Report what can run on this machine: versions, runtimes, policies, and pip commands.

Exit code 0 if at least one runtime and one policy can run, else 1.
"""

from __future__ import annotations

import argparse
import platform
from dataclasses import asdict

from coprs_deploy import engines, policy
from coprs_deploy.cli.parser import print_json
from coprs_deploy.machine import MATRIX_UNITS, describe_processor, installed_versions
from coprs_deploy.policy.policy_dtype import cpu_dtype
from coprs_deploy.version import __version__


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare no arguments besides ``--json``."""


def run(arguments: argparse.Namespace) -> int:
    """Collect the availability of all runtimes and policies, and print it."""
    processor = describe_processor()
    dtypes = {stored: str(cpu_dtype(stored, processor)) for stored in MATRIX_UNITS}
    runtimes = [
        entry
        for name in engines.runtime_names()
        for entry in engines.runtime_module(name).availability()
    ]
    policies = policy.availability()
    has_runtime = any(e.is_available for e in runtimes if not e.name.startswith("torch"))
    is_ready = has_runtime and any(e.is_available for e in policies)
    if arguments.json:
        print_json(
            {
                "version": __version__,
                "versions": installed_versions(),
                "platform": platform.platform(),
                "processor": {"name": processor.name, "cores": processor.cores},
                "policy_dtypes": dtypes,
                "is_ready": is_ready,
                "runtimes": [asdict(entry) for entry in runtimes],
                "policies": [asdict(entry) for entry in policies],
            }
        )
        return 0 if is_ready else 1
    print(f"coprs-deploy {__version__} on {platform.platform()}")
    print(", ".join(f"{name} {version}" for name, version in installed_versions().items()))
    print(f"{processor.name}, {processor.cores} cores")
    for stored, chosen in dtypes.items():
        print(f"policies stored in {stored} run in {chosen}")
    for title, entries in (("runtimes", runtimes), ("policies", policies)):
        print(f"\n{title}")
        for entry in entries:
            print(f"  {'yes' if entry.is_available else 'no':<4}{entry.name:<20}{entry.detail}")
            if entry.remedy:
                print(f"      {'':<20}{entry.remedy}")
    print("\n" + ("ready" if is_ready else "not ready: install what the lines above name"))
    return 0 if is_ready else 1
