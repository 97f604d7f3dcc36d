"""Opening of a bundle's graphs and policy, in parallel."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import TypeAlias

from coprs_deploy.bundle import Bundle
from coprs_deploy.engines import SegmentationGraphs, open_bundle_graph
from coprs_deploy.engines.autotune import RuntimeChoice, autotune
from coprs_deploy.errors import BundleError
from coprs_deploy.policy import Policy
from coprs_deploy.runtime.options import AUTO, RuntimeOptions

logger = logging.getLogger(__name__)

Progress: TypeAlias = Callable[[str], None]
"""Callback that takes one line of text per step; called from the loading thread."""


def load_parts(
    bundle: Bundle,
    options: RuntimeOptions,
    choices: tuple[RuntimeChoice, ...],
    progress: Progress,
) -> tuple[SegmentationGraphs, Policy]:
    """Open graphs and policy in parallel.

    vLLM claims the GPU memory that is free, so on a GPU it waits until the graphs are open.

    Raises:
        BundleError: graphs and policy do not match.
        EnvironmentNotReadyError: a requested library or device is not available.
    """
    graphs_are_open = threading.Event()
    start = time.perf_counter()
    progress(f"loading graphs and policy ({options.policy})")
    with ThreadPoolExecutor(1, thread_name_prefix="load-policy") as pool, ExitStack() as opened:
        loading = pool.submit(_open_policy, bundle, options, graphs_are_open)
        opened.callback(_close_loaded, loading)
        try:
            graphs = opened.enter_context(open_graphs(bundle, options, choices))
        finally:
            graphs_are_open.set()
        progress(f"graphs ready after {time.perf_counter() - start:.1f} s")
        policy = loading.result()
        progress(f"policy ready after {time.perf_counter() - start:.1f} s: {policy.description}")
        opened.pop_all()
    return graphs, policy


def _close_loaded(loading: Future[Policy]) -> None:
    with suppress(Exception):  # the error that is reported is another one
        loading.result().close()


def _open_policy(
    bundle: Bundle, options: RuntimeOptions, graphs_are_open: threading.Event
) -> Policy:
    record = bundle.manifest.policy
    device = options.policy_device or options.device
    source = (bundle.policy_path, record.prompt, record.min_pixels, record.max_pixels)
    policy: Policy
    if options.policy == "vllm":
        from coprs_deploy.policy.vllm_policy.policy import VllmPolicy

        memory_is_ready = None if device == "cpu" else graphs_are_open
        policy = VllmPolicy(
            *source,
            device=device,
            dtype=options.policy_dtype,
            settings=replace(
                options.vllm, num_threads=options.vllm.num_threads or options.num_threads
            ),
            memory_is_ready=memory_is_ready,
        )
    else:
        from coprs_deploy.policy.transformers_policy import TransformersPolicy

        policy = TransformersPolicy(
            *source, device=device, dtype=options.policy_dtype, num_threads=options.num_threads
        )
    if policy.hidden_size != record.hidden_size:
        policy.close()
        raise BundleError(
            f"policy hidden size {policy.hidden_size} does not match prior input size "
            f"{record.hidden_size}; use the policy that this bundle was exported with"
        )
    return policy


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
        opened.pop_all()
    return SegmentationGraphs(runners)
