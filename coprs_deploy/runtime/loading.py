"""Loading the parts of a bundle side by side: the graphs here, the policy in another thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeAlias

from coprs_deploy.bundle import Bundle
from coprs_deploy.engines import Stages
from coprs_deploy.engines.runtime_choice import RuntimeChoice
from coprs_deploy.errors import BundleError
from coprs_deploy.policy import Policy
from coprs_deploy.runtime.options import RuntimeOptions
from coprs_deploy.runtime.stage_opening import open_stages

Progress: TypeAlias = Callable[[str], None]
"""Takes one line of text a step; called from the thread that loads."""


def no_progress(step: str) -> None:
    """Tell nobody."""


def load_parts(
    bundle: Bundle,
    options: RuntimeOptions,
    choices: tuple[RuntimeChoice, ...],
    progress: Progress,
) -> tuple[Stages, Policy]:
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
            stages = open_stages(bundle, options, choices)
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
    width = bundle.manifest.policy.width
    if policy.width != width:
        policy.close()
        raise BundleError(
            f"the policy is {policy.width} wide and the prior takes {width}: they do not belong "
            "together"
        )
    return policy


def _open_policy(
    bundle: Bundle, options: RuntimeOptions, graphs_are_open: threading.Event
) -> Policy:
    record = bundle.manifest.policy
    device = options.policy_device or options.device
    if options.policy == "vllm":
        from coprs_deploy.policy.vllm_policy import VllmPolicy

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
