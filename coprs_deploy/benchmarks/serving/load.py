"""Two hundred mixed requests, sixteen at a time, one in ten abandoned."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from coprs_deploy.benchmarks.serving.asking import (
    questions,
)
from coprs_deploy.images import RgbArray
from coprs_deploy.policy.vllm_policy.policy import VllmPolicy
from coprs_deploy.runtime import CoPRS

NUM_LOAD_REQUESTS = 200
AT_ONCE = 16
ONE_IN = 10
"""A tenth of the load's requests are abandoned after a few words."""


def measure_load(rounds: int) -> dict[str, Any]:
    """Put 200 mixed requests on the runtime, 16 at a time, and abandon one in ten.

    Answers are compared with those made one by one; memory is read after each quarter.
    """
    del rounds
    scenes = questions(25, skip=600)
    # Twenty-five pictures, eight questions on each; one in three is about another scene.
    asked = [
        (
            scenes[(7 * i) % 25].rgb,
            scenes[(7 * i + i % 3 // 2) % 25].instruction,
            1 + i % 2,
        )
        for i in range(NUM_LOAD_REQUESTS)
    ]
    with CoPRS.load(policy="vllm") as coprs:
        alone = {}
        for scene, instruction, targets in asked:
            key = (scene.tobytes(), instruction, targets)
            if key not in alone:
                alone[key] = coprs.segment(scene, instruction, targets)
        outcomes: list[str] = []
        memory = [resident_bytes()]
        seconds = 0.0
        for start in range(0, NUM_LOAD_REQUESTS, NUM_LOAD_REQUESTS // 4):
            part = range(start, start + NUM_LOAD_REQUESTS // 4)
            began = time.perf_counter()
            outcomes += asyncio.run(_load(coprs, asked, part, alone))
            seconds += time.perf_counter() - began
            memory.append(resident_bytes())
        policy = coprs._policy
        assert isinstance(policy, VllmPolicy)
        time.sleep(2)  # the last of all was abandoned: the engine hears of it a little later
        left = {"unfinished": policy.count_unfinished(), "unfetched": policy.count_unfetched()}
    counts = {name: outcomes.count(name) for name in sorted(set(outcomes))}
    return {
        "requests": len(outcomes),
        "at_once": AT_ONCE,
        "outcomes": counts,
        "left_in_the_engine": left,
        "seconds": round(seconds, 1),
        "resident_mib": [round(bytes_ / 2**20) for bytes_ in memory],
        "growth_of_the_last_half": round(memory[-1] / memory[2] - 1, 4),
    }


async def _load(
    coprs: CoPRS, asked: Sequence[tuple[RgbArray, str, int]], part: range, alone: Any
) -> list[str]:
    places = asyncio.Semaphore(AT_ONCE)

    async def one(number: int) -> str:
        scene, instruction, targets = asked[number]
        async with places:
            if number % ONE_IN == ONE_IN - 1:
                events = coprs.astream(scene, instruction, targets)
                async for _ in events:
                    break
                await events.aclose()  # type: ignore[attr-defined]
                return "abandoned"
            answer = await coprs.asegment(scene, instruction, targets)
        expected = alone[(scene.tobytes(), instruction, targets)]
        is_equal = answer.response == expected.response and (answer.masks == expected.masks).all()
        return "equal" if is_equal else "different"

    return await asyncio.gather(*(one(number) for number in part))


def resident_bytes() -> int:
    """Memory of this process and of all that it started."""
    import psutil

    me = psutil.Process()
    return sum(int(p.memory_info().rss) for p in (me, *me.children(recursive=True)))
