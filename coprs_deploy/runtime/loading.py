"""Loading the parts of a bundle side by side: the graphs here, the policy in another thread."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import TypeAlias

from coprs_deploy.bundle import Bundle
from coprs_deploy.engines import RunnerOptions, SegmentationGraphs, open_bundle_graph
from coprs_deploy.engines.autotune import RuntimeChoice, autotune
from coprs_deploy.errors import BundleError
from coprs_deploy.policy import Policy
from coprs_deploy.runtime.options import AUTO, RuntimeOptions

Progress: TypeAlias = Callable[[str], None]
"""Takes one line of text a step; called from the thread that loads."""


def no_progress(step: str) -> None:
    """Tell nobody."""


def load_parts(
    bundle: Bundle,
    options: RuntimeOptions,
    choices: tuple[RuntimeChoice, ...],
    progress: Progress,
) -> tuple[SegmentationGraphs, Policy]:
    """Open the graphs and load the policy at the same time.

    A vLLM engine on the graphs' GPU takes what memory they leave, so it waits for them with that.

    Args:
        bundle: the bundle.
        options: how to run it.
        choices: what :func:`resolve_runtimes` gave.
        progress: called with a line of text a step.

    Raises:
        BundleError: graphs and policy do not belong together.
        EnvironmentNotReadyError: a library or device that was asked for is not here.
    """
    graphs_are_open = threading.Event()
    with ThreadPoolExecutor(1, thread_name_prefix="load-policy") as pool:
        start = time.perf_counter()
        progress(f"loading graphs and policy ({options.policy})")
        loading = pool.submit(_load_policy, bundle, options, graphs_are_open)
        try:
            stages = open_graphs(bundle, options, choices)
        except BaseException:
            graphs_are_open.set()
            with suppress(Exception):  # the graphs' error is the one to tell
                loading.result().close()
            raise
        graphs_are_open.set()
        progress(f"graphs ready after {time.perf_counter() - start:.1f} s")
        try:
            policy = loading.result()
        except BaseException:
            stages.close()
            raise
        progress(f"policy ready after {time.perf_counter() - start:.1f} s: {policy.description}")
    return stages, policy


def _load_policy(
    bundle: Bundle, options: RuntimeOptions, graphs_are_open: threading.Event
) -> Policy:
    policy = _open_policy(bundle, options, graphs_are_open)
    width = bundle.manifest.policy.hidden_size
    if policy.hidden_size != width:
        policy.close()
        raise BundleError(
            f"the policy is {policy.hidden_size} wide and the prior takes {width}: they do not belong "
            "together"
        )
    return policy


def _open_policy(
    bundle: Bundle, options: RuntimeOptions, graphs_are_open: threading.Event
) -> Policy:
    record = bundle.manifest.policy
    device = options.policy_device or options.device
    if options.policy == "vllm":
        from coprs_deploy.policy.vllm_policy.policy import VllmPolicy

        return VllmPolicy(
            bundle.policy_path,
            record.prompt,
            record.min_pixels,
            record.max_pixels,
            device=device,
            dtype=options.policy_dtype,
            settings=options.vllm,
            memory_is_ready=graphs_are_open if device != "cpu" else None,
        )
    from coprs_deploy.policy.transformers_policy import TransformersPolicy

    return TransformersPolicy(
        bundle.policy_path,
        record.prompt,
        record.min_pixels,
        record.max_pixels,
        device=device,
        dtype=options.policy_dtype,
    )


logger = logging.getLogger(__name__)


def resolve_runtimes(bundle: Bundle, options: RuntimeOptions) -> tuple[RuntimeChoice, ...]:
    """Choose runtimes if that was asked for; each choice is logged, with its reason.

    Returns:
        A choice for each graph; empty unless the runtime is ``auto``.
    """
    if options.runtime != AUTO:
        return ()
    choices = autotune(
        bundle, _runner_options(options), retune=options.retune, progress=logger.info
    )
    for choice in choices.values():
        logger.info("%s", choice)
    return tuple(choices.values())


def open_graphs(
    bundle: Bundle, options: RuntimeOptions, choices: tuple[RuntimeChoice, ...] = ()
) -> SegmentationGraphs:
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
    return SegmentationGraphs(runners)


def _runner_options(options: RuntimeOptions) -> RunnerOptions:
    return RunnerOptions(
        device=options.device,
        num_threads=options.num_threads,
        allow_engine_host_code=options.allow_engine_host_code,
        cuda_graphs=options.cuda_graphs,
        inference_precision=options.inference_precision,
    )
