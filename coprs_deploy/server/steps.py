"""Steps that keep a core busy, such as decoding and drawing: in threads, a bounded number at once.

The event loop stays free for other clients, and a step that has not begun is dropped when its
request is cancelled.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_POOL = ThreadPoolExecutor(
    max(1, len(os.sched_getaffinity(0)) // 2), thread_name_prefix="image-step"
)


async def run_step(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run a function in a thread of the pool; return its result."""
    call = asyncio.get_running_loop().run_in_executor
    return await call(_POOL, lambda: function(*args, **kwargs))
