"""TensorRT: engines that are built on the GPU that runs them."""

from __future__ import annotations

from pathlib import Path

from coprs_deploy.bundle import EngineRecord
from coprs_deploy.engines.flavors import TENSORRT
from coprs_deploy.engines.plan_execution import open_plan, plan_availability
from coprs_deploy.engines.runner import Availability, Runner, RunnerOptions
from coprs_deploy.specs import GraphSpec


def open_graph(
    path: Path, spec: GraphSpec, options: RunnerOptions, engine: EngineRecord | None = None
) -> Runner:
    """Open a plan; see :func:`coprs_deploy.engines.plan_execution.open_plan`."""
    return open_plan(TENSORRT, path, spec, options, engine)


def availability() -> list[Availability]:
    """Say whether the library is installed, and whether a GPU can run its engines."""
    return plan_availability(TENSORRT)
