"""Options of the report of an evaluation: judge of the reasoning, and training run."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from coprs_deploy.evaluation.judge import JudgeSettings
from coprs_deploy.evaluation.reports.training_correlation import read_training_correlation

KEY_VARIABLE = "COPRS_DEPLOY_JUDGE_KEY"
"""Environment variable with the key of the judge's endpoint; no option, which others could see."""

_DEFAULTS = JudgeSettings()


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    group = parser.add_argument_group("report, with --out")
    group.add_argument(
        "--judge-url",
        metavar="URL",
        help="OpenAI-compatible endpoint that rates the reasoning, as in http://localhost:8000/v1; "
        f"its key is read from ${KEY_VARIABLE}",
    )
    group.add_argument("--judge-model", metavar="NAME", default="", help="name of the judge model")
    group.add_argument(
        "--judge-examples",
        type=int,
        metavar="N",
        help="number of examples of each data set that are rated (default: all)",
    )
    group.add_argument(
        "--judge-concurrency",
        type=int,
        metavar="N",
        default=_DEFAULTS.concurrency,
        help="number of requests to the judge at once (default: %(default)s)",
    )
    group.add_argument(
        "--judge-timeout",
        type=float,
        metavar="SECONDS",
        default=_DEFAULTS.timeout_s,
        help="longest silence of the judge (default: %(default)g)",
    )
    group.add_argument(
        "--judge-prices",
        type=float,
        nargs=2,
        metavar=("PROMPT", "COMPLETION"),
        help="price of a million tokens, for the cost in the report",
    )
    group.add_argument(
        "--training-run",
        type=Path,
        metavar="DIR",
        help="run directory or log.jsonl, for the correlation of prior and mask during training",
    )


def read_judge(arguments: argparse.Namespace) -> JudgeSettings | None:
    """Read and check the options before the work; None without a judge.

    Raises:
        ValueError: an option is missing or out of range.
        FileNotFoundError: the training run does not exist.
        ArtifactError: the training run has no values for a correlation.
    """
    if arguments.training_run:
        read_training_correlation(arguments.training_run)
    settings = JudgeSettings(
        arguments.judge_url,
        arguments.judge_model,
        arguments.judge_examples,
        arguments.judge_concurrency,
        arguments.judge_timeout,
        tuple(arguments.judge_prices) if arguments.judge_prices else None,
        os.environ.get(KEY_VARIABLE, ""),
    )
    if not arguments.out and (settings.url or arguments.training_run):
        raise ValueError("--judge-url and --training-run are for the report; name its --out DIR")
    if settings.url is None:
        return None
    settings.open()  # which checks the URL, and sends nothing
    return settings
