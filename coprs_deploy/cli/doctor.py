"""Say what can run here: versions, runtimes, policies, and the pip line for what cannot.

Exit code 0 when at least one runtime and one policy can run, else 1.
"""

from __future__ import annotations

import argparse
import platform

from coprs_deploy.cli.parser import add_json_flag, print_json
from coprs_deploy.machine import installed_versions
from coprs_deploy.version import __version__

SUMMARY = "say which runtimes and policies can run here"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of this verb."""
    add_json_flag(parser)


def run(arguments: argparse.Namespace) -> int:
    """Look around and report."""
    from dataclasses import asdict

    from coprs_deploy import engines, policy

    runtimes = [
        entry
        for name in engines.runtime_names()
        for entry in engines.runtime_module(name).availability()
    ]
    policies = policy.availability()
    can_answer = any(e.is_available for e in runtimes if not e.name.startswith("torch")) and any(
        e.is_available for e in policies
    )
    if arguments.json:
        print_json(
            {
                "version": __version__,
                "versions": installed_versions(),
                "platform": platform.platform(),
                "can_answer": can_answer,
                "runtimes": [asdict(entry) for entry in runtimes],
                "policies": [asdict(entry) for entry in policies],
            }
        )
        return 0 if can_answer else 1
    print(f"coprs-deploy {__version__} on {platform.platform()}")
    print(", ".join(f"{name} {version}" for name, version in installed_versions().items()))
    for title, entries in (("runtimes", runtimes), ("policies", policies)):
        print(f"\n{title}")
        for entry in entries:
            print(f"  {'yes' if entry.is_available else 'no ':<4}{entry.name:<20}{entry.detail}")
            if entry.remedy:
                print(f"      {'':<20}{entry.remedy}")
    print("\n" + ("ready to answer" if can_answer else "cannot answer yet: see the lines above"))
    return 0 if can_answer else 1
