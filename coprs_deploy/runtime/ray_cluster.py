"""What batch runs and serving on a Ray cluster share: its address, number and size of replicas."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import Any

from coprs_deploy.errors import CoPRSError, check_number, import_failure, install_hint
from coprs_deploy.runtime.options import RuntimeOptions


@dataclass(frozen=True)
class RayOptions:
    """Where replicas of a bundle run, and how many.

    Attributes:
        min_replicas: number of replicas that are started at once.
        max_replicas: number of replicas while there is work for them; those that the cluster has no
            room for start when a node is added.
        address: address of the cluster; None for that of ``RAY_ADDRESS``, or one on this machine.
    """

    min_replicas: int = 1
    max_replicas: int = 1
    address: str | None = None

    def __post_init__(self) -> None:
        check_number("min_replicas", self.min_replicas, least=1)
        check_number("max_replicas", self.max_replicas, least=self.min_replicas)


def read_ray_options(replicas: str | None, address: str | None) -> RayOptions:
    """Read the number of replicas as ``MIN:MAX``, or as one number for both; None is one.

    Raises:
        ValueError: the text is neither, or a number is too small.
    """
    text = "1" if replicas is None else replicas
    least, colon, most = text.partition(":")
    if not least.isdecimal() or (colon and not most.isdecimal()):
        raise ValueError(f"replicas is {text!r}; accepted: MIN:MAX, such as 2:8, or one number")
    return RayOptions(int(least), int(most or least), address)


def import_ray() -> Any:
    """Import Ray; MissingDependencyError if it is not installed."""
    try:
        import ray
    except ImportError as error:
        raise import_failure(error, "ray", install_hint("ray"), title="Ray") from error
    return ray


def connect(address: str | None) -> Any:
    """Connect to a cluster, or start one on this machine, unless this process has one; return Ray.

    Raises:
        MissingDependencyError: Ray is not installed.
        CoPRSError: there is no cluster at the address.
    """
    ray = import_ray()
    if not ray.is_initialized():
        try:
            # Without an address, Ray takes the cluster that was started last, even if it has ended.
            found = address or os.environ.get("RAY_ADDRESS") or "local"
            ray.init(address=found, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise CoPRSError(
                f"Ray cannot be used at {address or 'this machine'}: {error}; start a cluster with "
                "'ray start --head', or name its address"
            ) from error
    return ray


def replica_resources(runtime: RuntimeOptions) -> dict[str, float]:
    """Return what Ray reserves for a replica: a GPU, or as many cores as threads."""
    if runtime.is_on_cpu:
        return {"num_cpus": runtime.num_threads or 1, "num_gpus": 0}
    return {"num_cpus": 1, "num_gpus": 1}
