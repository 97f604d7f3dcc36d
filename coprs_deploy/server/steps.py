"""Steps that keep a core busy, such as encoding masks: in threads, a bounded number at once.

The event loop stays free for other clients, and a step that has not begun is dropped when its
request is cancelled.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from coprs_deploy.runtime.concurrency import IMAGE_CORES, NUM_IMAGE_CORES

P = ParamSpec("P")
T = TypeVar("T")

_POOL = ThreadPoolExecutor(NUM_IMAGE_CORES, thread_name_prefix="image-step")


async def run_step(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run a function in a thread of the pool; return its result."""

    def step() -> T:
        with IMAGE_CORES.hold():
            return function(*args, **kwargs)

    return await asyncio.get_running_loop().run_in_executor(_POOL, step)
