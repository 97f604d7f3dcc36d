"""Upload a bundle to the Hugging Face hub.

The files are checked against the manifest and uploaded in one commit, with a model card: README.md
of the bundle, else one that is made from the manifest. CoPRS.load and the other verbs open the
result as hf://org/name.

Log in with `hf auth login`, or set HF_TOKEN; HF_ENDPOINT names another hub.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from coprs_deploy.cli.parser import print_result
from coprs_deploy.console import StepPrinter
from coprs_deploy.publishing import push_bundle


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of this verb."""
    parser.add_argument("bundle", metavar="BUNDLE", type=Path, help="bundle directory")
    parser.add_argument(
        "location", metavar="HUB", help="hf://org/name or hf://org/name@branch; created if missing"
    )
    parser.add_argument(
        "--card", type=Path, metavar="FILE", help="model card, which replaces an existing one"
    )
    parser.add_argument(
        "--license",
        default="",
        metavar="ID",
        help="license in the metadata of a card that is made, such as apache-2.0",
    )
    parser.add_argument(
        "--private",
        action="store_true",
        default=None,
        help="make a new repository private (default: as the account says)",
    )
    parser.add_argument(
        "--message", default="Upload of a bundle", metavar="TEXT", help="message of the commit"
    )


def run(arguments: argparse.Namespace) -> int:
    """Check and upload the bundle, and print the URL of the commit."""
    card = None if arguments.card is None else arguments.card.read_text(encoding="utf-8")
    with StepPrinter() as steps:
        steps("check and upload the bundle")
        url = push_bundle(
            arguments.bundle,
            arguments.location,
            card=card,
            license_id=arguments.license,
            private=arguments.private,
            message=arguments.message,
        )
    print_result(arguments, {"bundle": str(arguments.bundle), "commit": url}, url)
    return 0
