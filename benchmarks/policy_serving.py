"""Cost and benefit of the vLLM policy on the demo model: ratios within one run.

    .venv-vllm/bin/python benchmarks/policy_serving.py --out benchmarks/reports --part capture

Each part adds its numbers to ``policy-serving.json`` and writes ``policy-serving.md`` again. Parts
that compare keep both sides open and interleave them, so that other load on the machine meets both.
On a CPU the demo model is so small that vLLM's own bookkeeping dominates: the shares say little
about a large policy on a GPU. The part ``load`` needs psutil (pip install psutil).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from coprs_deploy import demo
from coprs_deploy.artifacts import write_json
from coprs_deploy.bench.report import median_interval
from coprs_deploy.bundle import open_bundle
from coprs_deploy.engines import RunnerOptions, SegmentationGraphs, open_bundle_graph
from coprs_deploy.images import RgbArray, prepare_image
from coprs_deploy.machine import machine_record
from coprs_deploy.policy import Policy, PolicyRequest, PolicyResult
from coprs_deploy.policy.transformers_policy import TransformersPolicy
from coprs_deploy.policy.vllm_policy.policy import VllmPolicy
from coprs_deploy.policy.vllm_policy.transport import HiddenStateTransport
from coprs_deploy.runtime import CoPRS, RuntimeOptions, Timings
from coprs_deploy.runtime.target_decoding import decode_targets

NAME = "policy-serving"


def median(values: Sequence[float]) -> float:
    """Return the median, rounded to four digits."""
    return round(statistics.median(values), 4)


def questions(count: int, skip: int = 0) -> list[PolicyRequest]:
    """Return requests on held-out scenes of the demo model, one question each."""
    from coprs_deploy.data.synthetic import PLAIN
    from coprs_deploy.data.synthetic.examples import held_out_examples

    examples = held_out_examples(PLAIN, skip + count, 0)[skip:]
    return [PolicyRequest(example.image, example.instruction) for example in examples]


def ask(policy: Policy, request: PolicyRequest) -> tuple[float, PolicyResult]:
    """Ask once; return milliseconds and the result."""
    start = time.perf_counter()
    (result,) = (e for e in policy.stream(request) if isinstance(e, PolicyResult))
    return 1e3 * (time.perf_counter() - start), result


def open_policy(kind: Callable[..., Policy], **options: Any) -> Policy:
    """Open the demo model's policy."""
    bundle = open_bundle(demo.BUNDLE)
    record = bundle.manifest.policy
    return kind(bundle.policy_path, record.prompt, record.min_pixels, record.max_pixels, **options)


def interval(values: Sequence[float]) -> list[float]:
    """Return the 95 % confidence interval of the median, rounded like the median."""
    return [round(bound, 4) for bound in median_interval(values)]


def wall(
    work: Callable[[Any, PolicyRequest], Any], policy: Policy, requests: Sequence[PolicyRequest]
) -> float:
    """Run all requests at once; return seconds until the last result."""
    with ThreadPoolExecutor(len(requests)) as pool:
        start = time.perf_counter()
        for _ in pool.map(lambda request: work(policy, request), requests):
            pass
        return time.perf_counter() - start


STARTS = 5
"""How often the two engines are started: they differ from start to start."""

MAX_CAPTURE_SHARE = 0.01
"""Largest accepted share of the decoding time for the capture."""


class PlainVllmPolicy(VllmPolicy):
    """The same engine without the hidden-state capture: its results have no concentrations."""

    @staticmethod
    def _logits_processors() -> list[type]:
        return []


def decode(policy: VllmPolicy, request: PolicyRequest, captures: bool = True) -> tuple[float, int]:
    """Decode one response; return milliseconds from the first token to the vector, and tokens.

    ``captures`` says whether the request is captured. The public ``stream`` always captures, so
    this is the one place that uses private members of :class:`VllmPolicy`.
    """
    engine = policy._open_engine()

    async def decoded() -> tuple[float, int]:
        with policy._transport.for_request() as path:
            running = policy._encode(request, path)
            if not captures:
                running.params.extra_args = None
            async for _ in policy._new_tokens(engine.engine, running):
                pass
            policy._transport.take(path)
        return 1e3 * (time.perf_counter() - running.first_token), len(running.token_ids)

    return engine.run(decoded())


def measure_capture(rounds: int) -> dict[str, Any]:
    """Compare decoding with and without hidden-state capture, in interleaved pairs.

    Inside one engine a request asks for its vector or does not. A second engine has no plug-in;
    such engines differ from start to start, so several pairs of them are started. All write the
    same tokens: the demo model ends its response after ``<REF_POS>``, where the capture ends it.
    """
    inside: list[tuple[float, float, int]] = []
    engines: list[list[tuple[float, float]]] = []
    together: list[float] = []
    for start in range(STARTS):
        found = _measure_engines(max(2, rounds // STARTS), is_plain_first=bool(start % 2))
        inside += found.inside
        engines.append(found.engines)
        together += found.together
    shares = [a / b - 1 for a, b, _ in inside]
    by_start = [median([a / b - 1 for a, b in pairs]) for pairs in engines]
    return {
        "pairs": len(inside),
        "decode_ms": median([a for a, _, _ in inside]),
        "plain_decode_ms": median([b for _, b, _ in inside]),
        "share": median(shares),
        "share_interval": interval(shares),
        "steps": median([n for _, _, n in inside]),
        "microseconds_a_step": median([1e3 * (a - b) / n for a, b, n in inside]),
        "engine_pairs": sum(map(len, engines)),
        "engine_shares": sorted(by_start),
        "engine_share": median(by_start),
        "sixteen_pairs": len(together),
        "sixteen_share": median(together),
        "sixteen_share_interval": interval(together),
        "limit": MAX_CAPTURE_SHARE,
    }


class _Found(NamedTuple):
    """Measurements of one start of the two engines.

    Attributes:
        inside: with and without a vector in one engine, milliseconds, and steps.
        engines: in the engine with the plug-in and a vector, and in the one without the plug-in.
        together: sixteen at once, the engine with the plug-in over the one without it, less 1.
    """

    inside: list[tuple[float, float, int]]
    engines: list[tuple[float, float]]
    together: list[float]


def _measure_engines(rounds: int, is_plain_first: bool) -> _Found:
    requests = questions(12)
    kinds = [VllmPolicy, PlainVllmPolicy]
    opened = {kind: open_policy(kind) for kind in (kinds[::-1] if is_plain_first else kinds)}
    captured, plain = opened[VllmPolicy], opened[PlainVllmPolicy]
    assert isinstance(captured, VllmPolicy)
    assert isinstance(plain, VllmPolicy)
    found = _Found([], [], [])
    with captured, plain:
        ways = {
            "vector": (captured, True),
            "no vector": (captured, False),
            "plain": (plain, False),
        }
        for request in requests:
            written = {decode(policy, request, asks)[1] for policy, asks in ways.values()}
            assert len(written) == 1, "the engines wrote different responses"
        for number in range(rounds * len(requests)):
            times = {}
            order = list(ways)[number % 3 :] + list(ways)[: number % 3]
            for way in order:
                policy, asks = ways[way]
                times[way], steps = decode(policy, requests[number % len(requests)], asks)
            found.inside.append((times["vector"], times["no vector"], steps - 1))
            found.engines.append((times["vector"], times["plain"]))
        both = (captured, plain)
        for number in range(2 * rounds):
            walls = {}
            for policy in both if number % 2 else both[::-1]:
                walls[policy] = wall(decode, policy, [*requests, *requests[:4]])
            found.together.append(walls[captured] / walls[plain] - 1)
    return found


def measure_capture_work(rounds: int) -> dict[str, Any]:
    """Time what the capture itself does in a step of the engine, without an engine.

    The logits processor over a batch without ``<REF_POS>``, over one with it
    in every request, and the lookup of a batch that has not changed; medians.
    """
    import torch
    from vllm import SamplingParams
    from vllm.v1.sample.logits_processor import BatchUpdate

    from coprs_deploy.policy.vllm_policy.capture import CaptureRequest, HiddenStateCapture

    torch.set_num_threads(1)
    width, vocabulary, reference, stop = 3584, 152_064, 7, 2
    config = SimpleNamespace(speculative_config=None)
    rows = []
    for requests in (1, 16):
        found: dict[str, float] = {}
        for kind, last in (("writing", 5), ("reading_reference", reference)):
            with HiddenStateTransport(width) as files:
                capture = HiddenStateCapture(config, torch.device("cpu"), False)
                paths = [files.create() for _ in range(requests)]
                added = []
                for row, path in enumerate(paths):
                    order = CaptureRequest(str(path), reference, stop, 1, 2000)
                    params = SamplingParams(
                        max_tokens=2001, stop_token_ids=[stop], extra_args=order.extra_args()
                    )
                    added.append((row, params, None, [4] * 300 + [last]))
                capture.update_state(BatchUpdate(requests, [], added, []))
                HiddenStateCapture.step = torch.zeros(requests, width)
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


def measure_answers(rounds: int) -> dict[str, Any]:
    """Compare whole requests with the policy alone and with encoding first, by split of the cores.

    Each request has an image that is new to the runtime; the three ways are interleaved.
    """
    import torch

    cores = len(os.sched_getaffinity(0))
    rows = []
    for policy_threads, graph_threads in sorted({(a, b) for a in (1, cores) for b in (1, cores)}):
        torch.set_num_threads(policy_threads)
        with _parts(graph_threads) as (stages, policy, geometry):
            coprs = CoPRS(stages, policy, geometry, RuntimeOptions(max_cached_images=0))
            found: dict[str, list[float]] = {"answer": [], "policy": [], "one_by_one": []}
            timings: list[Timings] = []
            for number, request in enumerate(questions(rounds + 2, skip=100)):
                ways: dict[str, Callable[[], Any]] = {
                    "answer": partial(coprs.segment, request.image, request.instruction),
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
        "image_encoder_overlap_ms": median([t.image_encoder_overlap_ms for t in timings]),
        "reference_to_mask_ms": median([t.reference_to_mask_ms for t in timings]),
    }


@contextmanager
def _parts(graph_threads: int) -> Iterator[tuple[SegmentationGraphs, Policy, Any]]:
    bundle = open_bundle(demo.BUNDLE)
    options = RunnerOptions(num_threads=graph_threads)
    names = bundle.manifest.graphs
    with (
        SegmentationGraphs(
            {name: open_bundle_graph(bundle, name, options) for name in names}
        ) as stages,
        open_policy(TransformersPolicy) as policy,
    ):
        yield stages, policy, bundle.manifest.geometry


def _one_by_one(
    stages: SegmentationGraphs, policy: Policy, geometry: Any, request: PolicyRequest
) -> None:
    """Answer without overlap: image encoder, policy, mask decoder."""
    prepared = prepare_image(request.image, geometry)
    embedding = stages.encode(prepared)
    _, result = ask(policy, request)
    if len(result.concentrations):
        for _ in decode_targets(stages, embedding, result.concentrations, prepared, geometry):
            pass


def measure_questions(rounds: int) -> dict[str, Any]:
    """Compare a second question on an image with the first, and the two policies with each other.

    Every image is new to its first question; the second is another question. Sixteen requests at
    once have images that neither policy has seen.
    """
    first: list[Timings] = []
    second: list[Timings] = []
    bundle = open_bundle(demo.BUNDLE)
    options = RunnerOptions()
    with (
        SegmentationGraphs(
            {n: open_bundle_graph(bundle, n, options) for n in bundle.manifest.graphs}
        ) as stages,
        open_policy(VllmPolicy) as vllm,
        open_policy(TransformersPolicy) as transformers,
    ):
        coprs = CoPRS(stages, vllm, bundle.manifest.geometry)
        requests = questions(rounds + 3, skip=200)
        for number, (request, other) in enumerate(pairwise(requests)):
            texts = (request.instruction, other.instruction)
            one, two = (coprs.segment(request.image, text).timings for text in texts)
            if number >= 2:
                first.append(one)
                second.append(two)
        walls: dict[str, dict[str, list[float]]] = {}
        for number in range(max(3, rounds // 4)):
            single, *several = questions(17, skip=400 + 17 * number)
            policies = [("vllm", vllm), ("transformers", transformers)]
            for name, policy in policies if number % 2 else policies[::-1]:
                found = walls.setdefault(name, {"one": [], "sixteen": []})
                found["one"].append(1e3 * wall(ask, policy, [single]))
                found["sixteen"].append(1e3 * wall(ask, policy, several))
    return {
        "images": len(first),
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
"""A tenth of the requests are abandoned after a few tokens."""


def measure_load(rounds: int) -> dict[str, Any]:
    """Send 200 mixed requests to the runtime, 16 at a time, and abandon one in ten.

    Results are compared with those of single requests; memory is read after each quarter.
    """
    del rounds
    scenes = questions(25, skip=600)
    # Twenty-five images, eight questions on each; one in three is about another scene.
    requests = [
        (
            scenes[(7 * i) % 25].image,
            scenes[(7 * i + i % 3 // 2) % 25].instruction,
            1 + i % 2,
        )
        for i in range(NUM_LOAD_REQUESTS)
    ]
    with CoPRS.load(policy="vllm") as coprs:
        alone = {}
        for scene, instruction, targets in requests:
            key = (scene.tobytes(), instruction, targets)
            if key not in alone:
                alone[key] = coprs.segment(scene, instruction, targets)
        outcomes: list[str] = []
        memory = [resident_bytes()]
        seconds = 0.0
        for start in range(0, NUM_LOAD_REQUESTS, NUM_LOAD_REQUESTS // 4):
            part = range(start, start + NUM_LOAD_REQUESTS // 4)
            began = time.perf_counter()
            outcomes += asyncio.run(_load(coprs, requests, part, alone))
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
    coprs: CoPRS, requests: Sequence[tuple[RgbArray, str, int]], part: range, alone: Any
) -> list[str]:
    slots = asyncio.Semaphore(AT_ONCE)

    async def one(number: int) -> str:
        scene, instruction, targets = requests[number]
        async with slots:
            if number % ONE_IN == ONE_IN - 1:
                events = coprs.astream(scene, instruction, targets)
                async for _ in events:
                    break
                await events.aclose()
                return "abandoned"
            answer = await coprs.asegment(scene, instruction, targets)
        expected = alone[(scene.tobytes(), instruction, targets)]
        is_equal = answer.response == expected.response and (answer.masks == expected.masks).all()
        return "equal" if is_equal else "different"

    return await asyncio.gather(*(one(number) for number in part))


def resident_bytes() -> int:
    """Return the resident memory of this process and of all that it started."""
    import psutil

    me = psutil.Process()
    return sum(int(p.memory_info().rss) for p in (me, *me.children(recursive=True)))


def percent(share: float) -> str:
    """Format a share in percent with its sign."""
    return f"{100 * share:+.1f}%"


def render(report: Mapping[str, Any], parts: Sequence[str]) -> str:
    """Render the report as Markdown.

    Args:
        report: content of ``policy-serving.json``.
        parts: names of all parts; missing ones are listed.
    """
    lines = [
        "# Measurements of the vLLM policy",
        "",
        "The demo model on a CPU, float32. Shares in percent are medians over interleaved pairs of",
        "runs, in brackets the 95% interval of the median; times are medians. The model",
        "is so small that vLLM's bookkeeping (three processes that wake each other for every",
        "token) dominates. None of this says how fast a policy of billions of weights is on a GPU:",
        "none of this ran there.",
        "",
        "    make test-vllm   # sets up the environment",
        "    .venv-vllm/bin/python benchmarks/policy_serving.py --out benchmarks/reports",
        "",
    ]
    for part, write in _SECTIONS.items():
        if part in report:
            machine = report[part]["machine"]
            lines += [*write(report[part]), "", f"Measured on: {machine['processor']}.", ""]
    if absent := [part for part in parts if part not in report]:
        lines += [f"Not measured yet: {', '.join(absent)}.", ""]
    return "\n".join(lines)


def _capture_lines(part: dict[str, Any]) -> list[str]:
    low, high = part["share_interval"]
    many_low, many_high = part["sixteen_share_interval"]
    verdict = "kept" if part["share"] <= part["limit"] else "not kept"
    starts = ", ".join(percent(share) for share in part["engine_shares"])
    return [
        "## Cost of the hidden-state capture",
        "",
        "| | with the vector over without |",
        "|---|---|",
        f"| in one engine, with and without a vector, {part['pairs']} pairs | "
        f"{percent(part['share'])} [{percent(low)}, {percent(high)}] of "
        f"{part['plain_decode_ms']:.1f} ms decoding |",
        f"| a step of that | {part['microseconds_a_step']:+.0f} microseconds, over "
        f"{part['steps']:.0f} |",
        f"| against an engine without the plug-in, {part['engine_pairs']} pairs | "
        f"{percent(part['engine_share'])}; by start: {starts} |",
        f"| sixteen at once, against that engine, {part['sixteen_pairs']} pairs | "
        f"{percent(part['sixteen_share'])} [{percent(many_low)}, {percent(many_high)}] of the time "
        "to the last result |",
        "",
        f"The limit of {100 * part['limit']:.0f}% for one request is {verdict} in one engine. "
        "Two engines differ from start to start, whichever of them has the plug-in; the work "
        "of the plug-in itself in a step is below.",
    ]


def _capture_work_lines(part: dict[str, Any]) -> list[str]:
    lines = [
        "## Work of the capture in a step",
        "",
        f"The logits processor alone, {part['width']} wide, {part['vocabulary']} tokens, medians "
        f"of {part['steps']} steps. The step that reads `<REF_POS>` comes once a response:",
        "",
        "| requests | step without `<REF_POS>` | step with `<REF_POS>` in all requests |",
        "|---|---|---|",
    ]
    lines += [
        f"| {row['requests']} | {row['writing_microseconds']:.1f} microseconds | "
        f"{row['reading_reference_microseconds']:.0f} microseconds |"
        for row in part["rows"]
    ]
    return lines


def _answer_lines(part: dict[str, Any]) -> list[str]:
    lines = [
        "## Whole requests against the policy alone, by split of the cores",
        "",
        f"Policy: {part['policy']}. Every image is new.",
        "",
        "| threads policy + graphs | request | policy alone | encoder, policy, mask one by one | "
        "request over policy | request over one by one | encoder (hidden) | `<REF_POS>` to mask |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['policy_threads']} + {row['graph_threads']} | {row['answer_ms']:.0f} ms | "
        f"{row['policy_ms']:.0f} ms | {row['one_by_one_ms']:.0f} ms | "
        f"{percent(row['answer_over_policy'])} | {percent(row['answer_over_one_by_one'])} | "
        f"{row['image_encoder_ms']:.1f} ms ({row['image_encoder_overlap_ms']:.1f}) | "
        f"{row['reference_to_mask_ms']:.1f} ms |"
        for row in part["rows"]
    ]
    return lines


def _question_lines(part: dict[str, Any]) -> list[str]:
    lines = [
        "## A second question on an image, and the two policies",
        "",
        f"vLLM, {part['images']} images, two questions on each, medians. The image encoder "
        "does not run for the second question, and what the prefix cache holds is not read again. "
        "The responses differ in length and in their targets: only the prefill is comparable.",
        "",
        "| | first | second |",
        "|---|---|---|",
    ]
    lines += [
        f"| {name} | {part['first'][name]:.1f} | {part['second'][name]:.1f} |"
        for name in part["first"]
    ]
    lines += [
        "",
        f"Milliseconds until the last result ({part['rounds_of_policies']} rounds, new images):",
        "",
        "| policy | one request | sixteen at once |",
        "|---|---|---|",
    ]
    lines += [
        f"| {name} | {row['one_ms']:.0f} | {row['sixteen_ms']:.0f} |"
        for name, row in part["policies"].items()
    ]
    return lines


def _load_lines(part: dict[str, Any]) -> list[str]:
    outcomes = ", ".join(f"{count} {name}" for name, count in part["outcomes"].items())
    memory = " -> ".join(str(value) for value in part["resident_mib"])
    return [
        "## Load",
        "",
        f"{part['requests']} mixed requests, {part['at_once']} at a time, in {part['seconds']} s: "
        f"{outcomes} (compared with the same requests one by one, masks included).",
        f"Left in the engine: {part['left_in_the_engine']['unfinished']} requests, "
        f"{part['left_in_the_engine']['unfetched']} vectors.",
        "",
        f"Resident memory of all processes before and after each quarter, MiB: {memory} "
        f"({percent(part['growth_of_the_last_half'])} in the last half).",
    ]


_SECTIONS: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "capture": _capture_lines,
    "capture-work": _capture_work_lines,
    "answers": _answer_lines,
    "questions": _question_lines,
    "load": _load_lines,
}

PARTS: dict[str, Callable[[int], dict[str, Any]]] = {
    "capture": measure_capture,
    "capture-work": measure_capture_work,
    "answers": measure_answers,
    "questions": measure_questions,
    "load": measure_load,
}


def run(out: Path, parts: Sequence[str], rounds: int) -> dict[str, Any]:
    """Measure some parts, add them to the report in a folder, and return the whole report.

    Args:
        out: folder; ``policy-serving.json`` in it keeps the parts that are not measured now.
        parts: names in ``PARTS``.
        rounds: number of rounds of each comparison.
    """
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"{NAME}.json"
    report = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"suite": NAME}
    for part in parts:
        measured = PARTS[part](rounds)
        report[part] = {"machine": machine_record().to_json(), **measured}
    write_json(file, report)
    (out / f"{NAME}.md").write_text(render(report, tuple(PARTS)), encoding="utf-8")
    return report


def main(arguments: Sequence[str]) -> int:
    """Measure and print the report as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the report")
    parser.add_argument(
        "--part", action="append", choices=list(PARTS), help="part to measure (default: all)"
    )
    parser.add_argument("--rounds", type=int, default=20, help="number of rounds (default: 20)")
    given = parser.parse_args(arguments)
    print(json.dumps(run(given.out, given.part or list(PARTS), given.rounds)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
