"""The graphs of a bundle, each opened with the runtime that was asked for or measured."""

from __future__ import annotations

import logging
from contextlib import ExitStack

from coprs_deploy.bundle import Bundle
from coprs_deploy.engines import RunnerOptions, Stages, open_bundle_graph
from coprs_deploy.engines.runtime_choice import RuntimeChoice, choose_runtimes
from coprs_deploy.runtime.options import AUTO, RuntimeOptions

logger = logging.getLogger(__name__)


def resolve_runtimes(bundle: Bundle, options: RuntimeOptions) -> tuple[RuntimeChoice, ...]:
    """Choose runtimes if that was asked for; each choice is logged, with its reason.

    Returns:
        A choice for each graph; empty unless the runtime is ``auto``.
    """
    if options.runtime != AUTO:
        return ()
    choices = choose_runtimes(
        bundle, _runner_options(options), remeasure=options.remeasure, report=logger.info
    )
    for choice in choices.values():
        logger.info("%s", choice)
    return tuple(choices.values())


def open_stages(
    bundle: Bundle, options: RuntimeOptions, choices: tuple[RuntimeChoice, ...] = ()
) -> Stages:
    """Open the three graphs.

    Args:
        bundle: the bundle.
        options: how to run them.
        choices: what :func:`resolve_runtimes` gave.

    Raises:
        ValueError: the runtime that was asked for cannot run a graph.
        EnvironmentNotReadyError: a library or device that was asked for is not here.
    """
    chosen = {choice.graph: choice.runtime for choice in choices}
    settings = _runner_options(options)
    with ExitStack() as opened:
        runners = {
            name: opened.enter_context(
                open_bundle_graph(bundle, name, settings, chosen.get(name, options.runtime))
            )
            for name in bundle.manifest.graphs
        }
        opened.pop_all()
    return Stages(runners)


def _runner_options(options: RuntimeOptions) -> RunnerOptions:
    return RunnerOptions(
        device=options.device,
        num_threads=options.num_threads,
        allow_plan_code=options.allow_plan_code,
        cuda_graphs=options.cuda_graphs,
        inference_precision=options.inference_precision,
    )
