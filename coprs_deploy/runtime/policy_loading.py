"""Opening of a bundle's policy, and the choice of the library that runs it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import numpy as np

from coprs_deploy.bundle import POLICY_GRAPHS_DIRECTORY, Bundle
from coprs_deploy.engines.autotune import (
    MAX_RUNS,
    TIMING_SECONDS,
    RuntimeChoice,
    Timing,
    choose_fastest,
    hash_parts,
)
from coprs_deploy.engines.cache import Cache
from coprs_deploy.errors import BundleError, RequestTimeoutError
from coprs_deploy.machine import available_memory_bytes, installed_versions
from coprs_deploy.policy import Policy, PolicyRequest, PolicyResult
from coprs_deploy.policy.availability import TRANSFORMERS_PACKAGES
from coprs_deploy.policy.policy_dtype import MAX_MEMORY_SHARE
from coprs_deploy.runtime.options import AUTO, RuntimeOptions

logger = logging.getLogger(__name__)

POLICY = "policy"
"""Name of the policy in its :class:`RuntimeChoice`, beside the names of the graphs."""

TIMED_TOKENS = 16
"""Tokens of a response that is timed; after its prompt."""

TIMED_IMAGE_PX = 448
"""Largest side of the image of a timed prompt; 256 vision tokens of Qwen2.5-VL."""

LEAST_LIMIT_MS = 5000.0
"""Time that a library has for its first response, however fast another one is."""

PACKAGES = (*TRANSFORMERS_PACKAGES, "numpy", "openvino", "tokenizers")
"""Packages whose versions are part of the cache key."""


def choose_policy(
    bundle: Bundle, options: RuntimeOptions, progress: Callable[[str], None] = lambda step: None
) -> RuntimeChoice:
    """Choose the library that runs the policy: that of the options, or the fastest for ``auto``.

    ``auto`` chooses between OpenVINO and transformers. It measures, and caches the result, if the
    bundle has graphs and weights of the policy, both libraries are installed, the device is the
    CPU, and no dtype is requested.

    Raises:
        CoPRSError: both were measured, and both failed; the error of OpenVINO.
    """
    if options.policy != AUTO:
        return RuntimeChoice(POLICY, options.policy, "as requested")
    if decided := _without_measurement(bundle, options):
        return RuntimeChoice(POLICY, *decided)
    manifest = bundle.manifest
    assert manifest.policy_graphs is not None
    key = hash_parts(
        PACKAGES,
        policy=manifest.policy.to_json(),
        graphs=manifest.policy_graphs.to_json(),
        files=sorted(
            f.sha256 for f in manifest.files if f.path.startswith(POLICY_GRAPHS_DIRECTORY)
        ),
        num_threads=options.num_threads,
    )
    candidates = {
        library: partial(_time_policy, bundle, options, library)
        for library in ("openvino", "transformers")
    }
    choice = choose_fastest(
        POLICY,
        candidates,
        cache=Cache(options.cache_dir),
        key=key,
        retune=options.retune,
        progress=progress,
    )
    logger.info("%s", choice)
    return choice


def _without_measurement(bundle: Bundle, options: RuntimeOptions) -> tuple[str, str] | None:
    """Return library and reason where only one of the two libraries can run the policy."""
    record = bundle.manifest.policy
    installed = installed_versions(("openvino", *TRANSFORMERS_PACKAGES))
    weights = sum(file.size_bytes for file in record.files)
    if record.path is None:
        return "openvino", "the bundle has the policy's graphs only"
    if bundle.manifest.policy_graphs is None:
        return "transformers", "the bundle has no graphs of the policy"
    if (options.policy_device or options.device) != "cpu":
        return "transformers", "the policy's graphs run on a CPU only"
    if options.policy_dtype is not None:
        return "transformers", "the policy's graphs have the dtype that they were exported with"
    if missing := [name for name in TRANSFORMERS_PACKAGES if name not in installed]:
        return "openvino", f"{', '.join(missing)} not installed"
    if "openvino" not in installed:
        return "transformers", "OpenVINO is not installed"
    if weights > MAX_MEMORY_SHARE * available_memory_bytes():
        return "openvino", f"the weights ({weights / 1e9:.1f} GB) do not fit into the memory"
    return None


def _time_policy(bundle: Bundle, options: RuntimeOptions, library: str, limit_ms: float) -> Timing:
    """Measure the median latency of a prompt and :data:`TIMED_TOKENS` tokens, after a first run.

    Each run has another image, so that none finds its prompt in a cache. A library that takes
    longer than ``limit_ms`` is stopped.
    """
    limit_s = max(limit_ms, LEAST_LIMIT_MS) / 1e3
    side = min(TIMED_IMAGE_PX, int(bundle.manifest.policy.max_pixels**0.5))
    times_ms: list[float] = []
    with open_policy(bundle, options, library) as policy:
        end = None
        while end is None or (time.perf_counter() < end and len(times_ms) < MAX_RUNS):
            image = np.full((side, side, 3), len(times_ms), np.uint8)
            start = time.perf_counter()
            request = PolicyRequest(
                image, "anything", max_new_tokens=TIMED_TOKENS, deadline=start + limit_s
            )
            try:
                (result,) = (e for e in policy.stream(request) if isinstance(e, PolicyResult))
            except RequestTimeoutError:
                return Timing(library, 1e3 * (time.perf_counter() - start), error="stopped")
            times_ms.append(
                result.preprocess_ms
                + result.prefill_ms
                + result.decode_ms * TIMED_TOKENS / len(result.token_ids)
            )
            end = end or time.perf_counter() + TIMING_SECONDS
    # The first run counts only where it took all the time.
    return Timing(library, median(times_ms[1:] or times_ms), len(times_ms))


def open_policy(
    bundle: Bundle,
    options: RuntimeOptions,
    library: str,
    graphs_are_open: Future[None] | None = None,
) -> Policy:
    """Open the policy of a bundle.

    Args:
        bundle: opened bundle.
        options: device, dtype and threads of the policy.
        library: ``openvino``, ``transformers`` or ``vllm``.
        graphs_are_open: vLLM, which claims the GPU memory that is free, waits for it, and does not
            start if it was cancelled.

    Raises:
        BundleError: the bundle has no such policy, or its hidden size does not match the prior.
        EnvironmentNotReadyError: the library or device is not available.
        CancelledError: ``graphs_are_open`` was cancelled.
    """
    record = bundle.manifest.policy
    device = options.policy_device or options.device
    path = bundle.policy_graphs_path if library == "openvino" else bundle.policy_path
    source = (path, record.prompt, record.min_pixels, record.max_pixels)
    policy: Policy
    if library == "vllm":
        from coprs_deploy.policy.vllm_policy.policy import VllmPolicy

        num_threads = options.vllm.num_threads or options.num_threads
        policy = VllmPolicy(
            *source,
            device=device,
            dtype=options.policy_dtype,
            settings=replace(options.vllm, num_threads=num_threads),
            memory_is_ready=graphs_are_open,
        )
    else:
        settings: dict[str, Any] = {"device": device, "dtype": options.policy_dtype}
        settings |= {"num_threads": options.num_threads}
        settings |= {"prompt_lookup_num_tokens": options.prompt_lookup_num_tokens}
        if library == "openvino":
            settings["cache_dir"] = options.cache_dir
        else:
            settings["static_decoding"] = options.static_decoding
        policy = _policy_class(library)(*source, **settings)
    if policy.hidden_size != record.hidden_size:
        policy.close()
        raise BundleError(
            f"policy hidden size {policy.hidden_size} does not match prior input size "
            f"{record.hidden_size}; use the policy that this bundle was exported with"
        )
    return policy


def _policy_class(library: str) -> Callable[..., Policy]:
    if library == "openvino":
        from coprs_deploy.policy.openvino_policy.policy import OpenVinoPolicy

        return OpenVinoPolicy
    from coprs_deploy.policy.transformers_policy import TransformersPolicy

    return TransformersPolicy
