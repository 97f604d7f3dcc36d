"""What the vLLM policy costs and gains, on the shipped model: ratios within one run.

    python -m coprs_deploy.benchmarks.policy_serving --out docs/reports --part capture

Each part adds its figures to ``policy-serving.json`` in the folder and writes
``policy-serving.md`` anew. Parts that compare keep both sides alive and let them take turns, so
that what the machine does meanwhile meets both. It runs on a CPU, where the model is so small that
vLLM's own bookkeeping dominates: the shares say little about a large policy on a GPU.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from coprs_deploy import shipped
from coprs_deploy.artifacts import write_json
from coprs_deploy.benchmarks.machine import describe_machine
from coprs_deploy.benchmarks.policy_serving_page import to_markdown
from coprs_deploy.benchmarks.statistics import median_interval
from coprs_deploy.bundle import open_bundle
from coprs_deploy.engines import RunnerOptions, Stages, open_bundle_graph
from coprs_deploy.images import RgbArray, prepare_image
from coprs_deploy.policy import Policy, PolicyRequest, PolicyResult
from coprs_deploy.policy.transformers_policy import TransformersPolicy
from coprs_deploy.policy.vector_files import VectorFiles
from coprs_deploy.policy.vllm_policy import VllmPolicy, _Progress
from coprs_deploy.runtime import CoPRS, Timings
from coprs_deploy.runtime.target_decoding import decode_targets

NAME = "policy-serving"

MOST_CAPTURE_SHARE = 0.01
"""What capturing may cost of an answer's decoding time."""


def median(values: Sequence[float]) -> float:
    """Return the median, rounded to where a figure still means something."""
    return round(statistics.median(values), 4)


def questions(count: int, skip: int = 0) -> list[PolicyRequest]:
    """Ask about held-out scenes of the shipped model, one question each."""
    from coprs_deploy.training.asked import held_out_examples
    from coprs_deploy.training.scenes import PLAIN

    examples = held_out_examples(PLAIN, skip + count, 0)[skip:]
    return [PolicyRequest(example.image, example.instruction) for example in examples]


def ask(policy: Policy, request: PolicyRequest) -> tuple[float, PolicyResult]:
    """Ask once: milliseconds and the result."""
    start = time.perf_counter()
    (result,) = (e for e in policy.stream(request) if isinstance(e, PolicyResult))
    return 1e3 * (time.perf_counter() - start), result


def open_policy(kind: Callable[..., Policy], **options: Any) -> Policy:
    """Open the shipped policy."""
    bundle = open_bundle(shipped.BUNDLE)
    record = bundle.manifest.policy
    return kind(bundle.policy_path, record.prompt, record.min_pixels, record.max_pixels, **options)


class PlainVllmPolicy(VllmPolicy):
    """The same engine without the capture: its answers have no concentrations."""

    @staticmethod
    def _plug_ins() -> dict[str, Any]:
        return {}


def decode(policy: VllmPolicy, request: PolicyRequest) -> tuple[float, int]:
    """Answer once: milliseconds behind the first token to the vector, and tokens."""

    async def answer() -> tuple[float, int]:
        prompt, progress = policy._encode(request), _Progress()
        async for _ in policy._tokens_of(prompt, progress):
            pass
        policy._files.take(prompt.vectors)
        return 1e3 * (time.perf_counter() - progress.first_token), len(progress.token_ids)

    return policy._run(answer())


def measure_capture(rounds: int) -> dict[str, Any]:
    """Compare vLLM with the capture against the same engine without it, in pairs.

    Without it there are no logits processor and no vector in the request's file. Both
    write the same tokens: the shipped model ends its answer behind ``<REF_POS>`` of itself, where
    the capture makes it end.
    """
    requests = questions(12)
    captured, plain = (open_policy(kind) for kind in (VllmPolicy, PlainVllmPolicy))
    assert isinstance(captured, VllmPolicy)
    assert isinstance(plain, VllmPolicy)
    both = (captured, plain)
    with captured, plain:
        for request in requests:
            (_, one), (_, other) = (decode(policy, request) for policy in both)
            assert one == other, "the two engines wrote different answers"
        pairs, together = [], []
        for number in range(rounds * len(requests)):
            times = {}
            for policy in both if number % 2 else both[::-1]:
                times[policy], steps = decode(policy, requests[number % len(requests)])
            pairs.append((times[captured], times[plain], steps - 1))
        for number in range(2 * rounds):
            walls = {}
            for policy in both if number % 2 else both[::-1]:
                walls[policy] = _wall(decode, policy, [*requests, *requests[:4]])
            together.append(walls[captured] / walls[plain] - 1)
    shares = [a / b - 1 for a, b, _ in pairs]
    return {
        "pairs": len(pairs),
        "decode_ms": median([a for a, _, _ in pairs]),
        "plain_decode_ms": median([b for _, b, _ in pairs]),
        "share": median(shares),
        "share_interval": interval(shares),
        "steps": median([n for _, _, n in pairs]),
        "microseconds_a_step": median([1e3 * (a - b) / n for a, b, n in pairs]),
        "sixteen_pairs": len(together),
        "sixteen_share": median(together),
        "sixteen_share_interval": interval(together),
        "limit": MOST_CAPTURE_SHARE,
    }


def measure_capture_work(rounds: int) -> dict[str, Any]:
    """Time what the capture itself does in a step of the engine, without an engine.

    The logits processor over a batch in which nobody reads ``<REF_POS>``, over one in which
    everybody does, and the lookup of a batch that has not changed; medians.
    """
    import torch
    from vllm import SamplingParams
    from vllm.v1.sample.logits_processor import BatchUpdate

    from coprs_deploy.policy.vllm_capture import STEP, CaptureOrder, ConcentrationCapture

    torch.set_num_threads(1)
    width, vocabulary, reference, stop = 3584, 152_064, 7, 2
    config = SimpleNamespace(speculative_config=None)
    rows = []
    for requests in (1, 16):
        found: dict[str, float] = {}
        for kind, last in (("writing", 5), ("reading_reference", reference)):
            with VectorFiles(width) as files:
                capture = ConcentrationCapture(config, torch.device("cpu"), False)
                paths = [files.open() for _ in range(requests)]
                added = []
                for row, path in enumerate(paths):
                    order = CaptureOrder(str(path), reference, stop, 1, 2000)
                    params = SamplingParams(
                        max_tokens=2001, stop_token_ids=[stop], extra_args=order.extra_args()
                    )
                    added.append((row, params, None, [4] * 300 + [last]))
                capture.update_state(BatchUpdate(requests, [], added, []))
                STEP.rows = torch.zeros(requests, width)
                logits = torch.zeros(requests, vocabulary)
                times = []
                for _ in range(100 * rounds):
                    start = time.perf_counter()
                    capture.update_state(None)
                    capture.apply(logits)
                    times.append(1e6 * (time.perf_counter() - start))
                    for path in paths:
                        os.truncate(path, 0)
            found[f"{kind}_microseconds"] = median(times)
        rows.append({"requests": requests, **found})
    return {"width": width, "vocabulary": vocabulary, "steps": 100 * rounds, "rows": rows}


def _wall(
    work: Callable[[Any, PolicyRequest], Any], policy: Policy, requests: Sequence[PolicyRequest]
) -> float:
    """Ask all at once; seconds until the last answer."""
    with ThreadPoolExecutor(len(requests)) as pool:
        start = time.perf_counter()
        for _ in pool.map(lambda request: work(policy, request), requests):
            pass
        return time.perf_counter() - start


def measure_answers(rounds: int) -> dict[str, Any]:
    """Compare whole answers with the policy alone and with encoding first, by split of the cores.

    Each question shows a picture that is new to the runtime; the three ways take turns.
    """
    import torch

    cores = len(os.sched_getaffinity(0))
    rows = []
    for policy_threads, graph_threads in sorted({(a, b) for a in (1, cores) for b in (1, cores)}):
        torch.set_num_threads(policy_threads)
        with _parts(graph_threads) as (stages, policy, geometry):
            coprs = CoPRS(stages, policy, geometry, cached_images=0)
            found: dict[str, list[float]] = {"answer": [], "policy": [], "one_by_one": []}
            timings: list[Timings] = []
            for number, request in enumerate(questions(rounds + 2, skip=100)):
                ways: dict[str, Callable[[], Any]] = {
                    "answer": partial(coprs.segment, request.rgb, request.instruction),
                    "policy": partial(ask, policy, request),
                    "one_by_one": partial(_one_by_one, stages, policy, geometry, request),
                }
                order = list(ways)[number % 3 :] + list(ways)[: number % 3]
                for way in order:
                    start = time.perf_counter()
                    result = ways[way]()
                    if number >= 2:  # the first two warm up
                        found[way].append(1e3 * (time.perf_counter() - start))
                        if way == "answer":
                            timings.append(result.timings)
            rows.append(_answer_row(policy_threads, graph_threads, found, timings))
    return {"policy": "transformers", "rows": rows}


def _answer_row(
    policy_threads: int,
    graph_threads: int,
    found: dict[str, list[float]],
    timings: Sequence[Timings],
) -> dict[str, Any]:
    over_policy = [a / p - 1 for a, p in zip(found["answer"], found["policy"], strict=True)]
    over_one_by_one = [a / b - 1 for a, b in zip(found["answer"], found["one_by_one"], strict=True)]
    return {
        "policy_threads": policy_threads,
        "graph_threads": graph_threads,
        **{f"{way}_ms": median(values) for way, values in found.items()},
        "answer_over_policy": median(over_policy),
        "answer_over_policy_interval": interval(over_policy),
        "answer_over_one_by_one": median(over_one_by_one),
        "image_encoder_ms": median([t.image_encoder_ms for t in timings]),
        "image_encoder_hidden_ms": median([t.image_encoder_hidden_ms for t in timings]),
        "reference_to_mask_ms": median([t.reference_to_mask_ms for t in timings]),
    }


@contextmanager
def _parts(graph_threads: int) -> Iterator[tuple[Stages, Policy, Any]]:
    bundle = open_bundle(shipped.BUNDLE)
    options = RunnerOptions(num_threads=graph_threads)
    names = bundle.manifest.graphs
    with (
        Stages({name: open_bundle_graph(bundle, name, options) for name in names}) as stages,
        open_policy(TransformersPolicy) as policy,
    ):
        yield stages, policy, bundle.manifest.geometry


def _one_by_one(stages: Stages, policy: Policy, geometry: Any, request: PolicyRequest) -> None:
    """Answer without overlap: the image encoder first, then the policy, then the mask."""
    prepared = prepare_image(request.rgb, geometry)
    embedding = stages.encode(prepared)
    _, result = ask(policy, request)
    if len(result.concentrations):
        for _ in decode_targets(stages, embedding, result.concentrations, prepared, geometry):
            pass


def measure_questions(rounds: int) -> dict[str, Any]:
    """Compare a second question on a picture with the first, and the two policies with each other.

    Every picture is new when its first question is asked; the second is another question. Sixteen
    questions at once are on pictures that neither policy has seen.
    """
    first: list[Timings] = []
    second: list[Timings] = []
    bundle = open_bundle(shipped.BUNDLE)
    options = RunnerOptions()
    with (
        Stages(
            {n: open_bundle_graph(bundle, n, options) for n in bundle.manifest.graphs}
        ) as stages,
        open_policy(VllmPolicy) as vllm,
        open_policy(TransformersPolicy) as transformers,
    ):
        coprs = CoPRS(stages, vllm, bundle.manifest.geometry)
        asked = questions(rounds + 3, skip=200)
        for number, (request, other) in enumerate(pairwise(asked)):
            texts = (request.instruction, other.instruction)
            one, two = (coprs.segment(request.rgb, text).timings for text in texts)
            if number >= 2:
                first.append(one)
                second.append(two)
        walls: dict[str, dict[str, list[float]]] = {}
        for number in range(max(3, rounds // 4)):
            single, *several = questions(17, skip=400 + 17 * number)
            policies = [("vllm", vllm), ("transformers", transformers)]
            for name, policy in policies if number % 2 else policies[::-1]:
                found = walls.setdefault(name, {"one": [], "sixteen": []})
                found["one"].append(1e3 * _wall(ask, policy, [single]))
                found["sixteen"].append(1e3 * _wall(ask, policy, several))
    return {
        "pictures": len(first),
        "first": _question_row(first),
        "second": _question_row(second),
        "rounds_of_policies": len(walls["vllm"]["one"]),
        "policies": {
            name: {f"{count}_ms": median(values) for count, values in found.items()}
            for name, found in walls.items()
        },
    }


def _question_row(timings: Sequence[Timings]) -> dict[str, float]:
    return {name: median([getattr(timing, name) for timing in timings]) for name in _ROW_NAMES}


_ROW_NAMES = (
    "prefill_ms",
    "decode_ms",
    "image_encoder_ms",
    "reference_to_mask_ms",
    "total_ms",
    "cached_prompt_tokens",
    "prompt_tokens",
    "response_tokens",
)


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
        memory = [_resident_bytes()]
        seconds = 0.0
        for start in range(0, NUM_LOAD_REQUESTS, NUM_LOAD_REQUESTS // 4):
            part = range(start, start + NUM_LOAD_REQUESTS // 4)
            began = time.perf_counter()
            outcomes += asyncio.run(_load(coprs, asked, part, alone))
            seconds += time.perf_counter() - began
            memory.append(_resident_bytes())
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


def _resident_bytes() -> int:
    """Memory of this process and of all that it started."""
    import psutil

    me = psutil.Process()
    return sum(int(p.memory_info().rss) for p in (me, *me.children(recursive=True)))


def interval(values: Sequence[float]) -> list[float]:
    """Bound the median with 95 % confidence, rounded as the median is."""
    return [round(bound, 4) for bound in median_interval(values)]


PARTS: dict[str, Callable[[int], dict[str, Any]]] = {
    "capture": measure_capture,
    "capture-work": measure_capture_work,
    "answers": measure_answers,
    "questions": measure_questions,
    "load": measure_load,
}


def run(out: Path, parts: Sequence[str], rounds: int) -> dict[str, Any]:
    """Measure some parts and add them to the report in a folder.

    Args:
        out: the folder; ``policy-serving.json`` there keeps the parts that are not measured now.
        parts: names in ``PARTS``.
        rounds: how often each comparison is repeated.

    Returns:
        The whole report.
    """
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"{NAME}.json"
    report = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"suite": NAME}
    for part in parts:
        figures = PARTS[part](rounds)
        report[part] = {"machine": describe_machine(), **figures}
    write_json(file, report)
    (out / f"{NAME}.md").write_text(to_markdown(report, tuple(PARTS)), encoding="utf-8")
    return report


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Raw)
    parser.add_argument("--out", type=Path, required=True, help="folder of the report")
    parser.add_argument("--part", action="append", choices=list(PARTS), help="default: all")
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    print(json.dumps(run(arguments.out, arguments.part or list(PARTS), arguments.rounds)))


_Raw = argparse.RawDescriptionHelpFormatter


if __name__ == "__main__":
    main()
