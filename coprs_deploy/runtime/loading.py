"""Opening of a bundle's graphs and policy, in parallel."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import TypeAlias

from coprs_deploy.bundle import Bundle
from coprs_deploy.engines import SegmentationGraphs, open_bundle_graph
from coprs_deploy.engines.autotune import RuntimeChoice, autotune
from coprs_deploy.policy import Policy
from coprs_deploy.runtime.options import AUTO, RuntimeOptions
from coprs_deploy.runtime.policy_loading import open_policy

logger = logging.getLogger(__name__)

Progress: TypeAlias = Callable[[str], None]
"""Callback that takes one line of text per step; called from the loading thread."""


def load_parts(
    bundle: Bundle,
    options: RuntimeOptions,
    choices: tuple[RuntimeChoice, ...],
    policy_choice: RuntimeChoice,
    progress: Progress,
) -> tuple[SegmentationGraphs, Policy]:
    """Open graphs and policy in parallel.

    vLLM claims the GPU memory that is free, so it starts when the graphs are open; if they cannot
    be opened, it does not start.

    Raises:
        BundleError: graphs and policy do not match.
        EnvironmentNotReadyError: a requested library or device is not available.
    """
    graphs_are_open: Future[None] = Future()
    start = time.perf_counter()
    progress(f"loading graphs and policy ({policy_choice.runtime}, {policy_choice.reason})")
    with ThreadPoolExecutor(1, thread_name_prefix="load-policy") as pool, ExitStack() as opened:
        loading = pool.submit(open_policy, bundle, options, policy_choice.runtime, graphs_are_open)
        opened.callback(_close_loaded, loading)
        opened.callback(graphs_are_open.cancel)  # has no effect once they are open
        graphs = opened.enter_context(open_graphs(bundle, options, choices))
        graphs_are_open.set_result(None)
        progress(f"graphs ready after {time.perf_counter() - start:.1f} s")
        policy = loading.result()
        progress(f"policy ready after {time.perf_counter() - start:.1f} s: {policy.description}")
        opened.pop_all()
    return graphs, policy


def _close_loaded(loading: Future[Policy]) -> None:
    with suppress(Exception):  # the error that is reported is another one
        loading.result().close()


def choose_runtimes(bundle: Bundle, options: RuntimeOptions) -> tuple[RuntimeChoice, ...]:
    """Measure and log the fastest runtime of each graph if the runtime is ``auto``, else none."""
    if options.runtime != AUTO:
        return ()
    choices = autotune(bundle, options, retune=options.retune, progress=logger.info)
    for choice in choices.values():
        logger.info("%s", choice)
    return tuple(choices.values())


def open_graphs(
    bundle: Bundle, options: RuntimeOptions, choices: tuple[RuntimeChoice, ...] = ()
) -> SegmentationGraphs:
    """Open the three graphs, each on the runtime of its choice, else on that of the options.

    Raises:
        ValueError: the requested runtime cannot run a graph.
        EnvironmentNotReadyError: a requested library or device is not available.
    """
    chosen = {choice.graph: choice.runtime for choice in choices}
    with ExitStack() as opened:
        runners = {
            name: opened.enter_context(
                open_bundle_graph(bundle, name, options, chosen.get(name, options.runtime))
            )
            for name in bundle.manifest.graphs
        }
        graphs = SegmentationGraphs(runners)
        opened.pop_all()
    return graphs
