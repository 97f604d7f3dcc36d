"""The figures of :mod:`coprs_deploy.benchmarks.policy_serving` as a page for people."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any


def percent(share: float) -> str:
    """Write a share with its sign."""
    return f"{100 * share:+.1f}%"


def to_markdown(report: Mapping[str, Any], parts: Sequence[str]) -> str:
    """Write the report for people.

    Args:
        report: as ``policy-serving.json`` holds it.
        parts: names of all parts; those that are not in the report are named as missing.
    """
    lines = [
        "# The vLLM policy in figures",
        "",
        "The shipped model on a CPU, float32. Shares in percent are medians over pairs of runs",
        "that took turns, in brackets the 95% interval of the median; times are medians. The model",
        "is so small that vLLM's bookkeeping (three processes that wake each other for every",
        "token) dominates. Nothing here says how fast a policy of billions of weights is on a GPU:",
        "none of this ran there.",
        "",
        "    make test-vllm   # sets up the environment",
        "    .venv-vllm/bin/python -m coprs_deploy.benchmarks.policy_serving --out docs/reports",
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
        "## What the capture costs",
        "",
        "| | with the vector against without |",
        "|---|---|",
        f"| in one engine, asked for it or not, {part['pairs']} pairs | {percent(part['share'])} "
        f"[{percent(low)}, {percent(high)}] of {part['plain_decode_ms']:.1f} ms decoding |",
        f"| a step of that | {part['microseconds_a_step']:+.0f} microseconds, over "
        f"{part['steps']:.0f} |",
        f"| against an engine without the plug-in, {part['engine_pairs']} pairs | "
        f"{percent(part['engine_share'])}; by start: {starts} |",
        f"| sixteen at once, against that engine, {part['sixteen_pairs']} pairs | "
        f"{percent(part['sixteen_share'])} [{percent(many_low)}, {percent(many_high)}] of the time "
        "to the last answer |",
        "",
        f"The limit of {100 * part['limit']:.0f}% for one request is {verdict} in one engine. "
        "Two engines differ from start to start, whichever of them has the plug-in; what the "
        "plug-in itself takes in a step of all other requests stands below.",
    ]


def _capture_work_lines(part: dict[str, Any]) -> list[str]:
    lines = [
        "## What the capture does in a step",
        "",
        f"The logits processor alone, {part['width']} wide, {part['vocabulary']} tokens, medians "
        f"of {part['steps']} steps. The step that reads `<REF_POS>` comes once an answer:",
        "",
        "| requests | a step in which nobody reads `<REF_POS>` | a step in which everybody does |",
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
        "## Whole answers against the policy alone, by split of the cores",
        "",
        f"Policy: {part['policy']}. Every picture is new.",
        "",
        "| threads policy + graphs | answer | policy alone | encoder, policy, mask one by one | "
        "answer over policy | answer over one by one | encoder (hidden) | `<REF_POS>` to mask |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['policy_threads']} + {row['graph_threads']} | {row['answer_ms']:.0f} ms | "
        f"{row['policy_ms']:.0f} ms | {row['one_by_one_ms']:.0f} ms | "
        f"{percent(row['answer_over_policy'])} | {percent(row['answer_over_one_by_one'])} | "
        f"{row['image_encoder_ms']:.1f} ms ({row['image_encoder_hidden_ms']:.1f}) | "
        f"{row['reference_to_mask_ms']:.1f} ms |"
        for row in part["rows"]
    ]
    return lines


def _question_lines(part: dict[str, Any]) -> list[str]:
    lines = [
        "## A second question on a picture, and the two policies",
        "",
        f"vLLM, {part['pictures']} pictures, two questions on each, medians. The image encoder "
        "does not run for the second question, and what the prefix cache holds is not read again. "
        "The answers differ in length and in what they find: only the prefill is a comparison.",
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
        f"Milliseconds until the last answer ({part['rounds_of_policies']} rounds, new pictures):",
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
        f"{outcomes} (compared with the same questions one by one, masks included).",
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
