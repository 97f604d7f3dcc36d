"""Compare a policy's responses and decoding time with drafts and without, over many scenes.

Every response must be equal, token by token. Times are processor times of this process, from the
first token on, so that other processes disturb them little. Without a bundle the demo model is
measured, with OpenVINO and with transformers. The mode ``static`` is transformers' static decoding,
without drafts. With ``--replay`` the policy computes as ever, but writes the response of each
scene's label: what drafts save for a policy of real size, whose random weights write nothing that
repeats.

  python benchmarks/policy_drafts.py --count 1000
  python benchmarks/policy_drafts.py BUNDLE --policy openvino --replay --preset full --count 10
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coprs_deploy import demo
from coprs_deploy.bundle import open_bundle
from coprs_deploy.console import format_ms, markdown_table
from coprs_deploy.data.synthetic.examples import held_out_examples
from coprs_deploy.data.synthetic.presets import PRESETS
from coprs_deploy.policy import PolicyRequest, PolicyResult
from coprs_deploy.policy.greedy import Decoding, GreedyPolicy
from coprs_deploy.runtime.options import RuntimeOptions
from coprs_deploy.runtime.policy_loading import open_policy

STATIC = "static"
MODES = {
    "none": (False, 0),
    "tail": (True, 0),
    "lookup": (False, 1),
    "tail and lookup": (True, 1),
    STATIC: (False, 0),
}
"""Whether the tail, and whether earlier text, is drafted."""


def main(arguments: list[str]) -> int:
    """Measure, print a table and one line of JSON; 1 if a response differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("bundle", type=Path, nargs="?", default=demo.BUNDLE)
    parser.add_argument("--policy", choices=("openvino", "transformers"), action="append")
    parser.add_argument("--preset", choices=tuple(PRESETS), default="plain")
    parser.add_argument(
        "--modes",
        type=lambda text: text.split(","),
        default=[mode for mode in MODES if mode != STATIC],
        help=f"some of {','.join(MODES)}; the first is none (default: all but {STATIC})",
    )
    parser.add_argument(
        "--replay", action="store_true", help="the policy writes the responses of the labels"
    )
    parser.add_argument("--count", type=int, default=100, help="number of scenes (default: 100)")
    parser.add_argument("--num-no-match", type=int, default=0)
    parser.add_argument("--max-targets", type=int, default=1)
    parser.add_argument("--lookup", type=int, default=4, help="length of a draft (default: 4)")
    parsed = parser.parse_args(arguments)
    libraries = parsed.policy or ("openvino", "transformers")
    if parsed.modes[0] != "none" or not MODES.keys() >= set(parsed.modes):
        raise ValueError(f"--modes is {parsed.modes}; accepted: none, and others of {[*MODES]}")
    if STATIC in parsed.modes and "openvino" in libraries:
        raise ValueError(f"--modes has {STATIC}; accepted with --policy transformers only")
    results = [result for library in libraries for result in _measure(parsed, library)]
    heads = ("policy", "mode", "equal", "tokens per pass", "decode p50", "saved")
    rows = [
        (
            r["policy"],
            r["mode"],
            f"{r['equal']} of {r['count']}",
            f"{r['tokens_per_pass']:.2f}",
            format_ms(r["decode_ms"]),
            f"{r['saved']:.1%}",
        )
        for r in results
    ]
    print("\n".join(markdown_table(heads, rows)))
    print(json.dumps(results))
    return 0 if all(r["equal"] == r["count"] for r in results) else 1


def _measure(parsed: argparse.Namespace, library: str) -> list[dict[str, Any]]:
    """Ask about each scene in each mode in turn, so that a busy moment meets all of them."""
    examples = held_out_examples(PRESETS[parsed.preset], parsed.count, parsed.num_no_match)
    found: dict[str, list[tuple[PolicyResult, float]]] = {mode: [] for mode in parsed.modes}
    bundle = open_bundle(parsed.bundle)
    with ExitStack() as stack:
        opened = {False: stack.enter_context(open_policy(bundle, RuntimeOptions(), library))}
        if STATIC in found:
            options = RuntimeOptions(policy=library, static_decoding=True)
            opened[True] = stack.enter_context(open_policy(bundle, options, library))
        for number, example in enumerate(examples):
            request = PolicyRequest(example.image, example.instruction, parsed.max_targets)
            first = number % len(found)
            order = [*found][first:] + [*found][:first]
            for mode in order:
                policy = opened[mode == STATIC]
                assert isinstance(policy, GreedyPolicy)
                policy.drafts_tail, has_lookup = MODES[mode]
                policy.prompt_lookup_num_tokens = parsed.lookup * has_lookup
                with replaying(policy, example.response if parsed.replay else None):
                    stream = policy.stream(request)
                    next(stream)  # after the prefill
                    start = time.process_time()
                    *_, result = stream
                assert isinstance(result, PolicyResult)
                found[mode].append((result, 1e3 * (time.process_time() - start)))
    plain = [result for result, _ in found["none"]]
    plain_ms = sum(milliseconds for _, milliseconds in found["none"])
    return [
        {
            "policy": library,
            "mode": mode,
            "count": len(plain),
            "equal": sum(
                r.token_ids == p.token_ids for (r, _), p in zip(pairs, plain, strict=True)
            ),
            "tokens_per_pass": sum(len(r.token_ids) for r, _ in pairs)
            / sum(r.num_passes for r, _ in pairs),
            "decode_ms": float(np.median([milliseconds for _, milliseconds in pairs])),
            "saved": 1 - sum(milliseconds for _, milliseconds in pairs) / plain_ms,
            "max_relative_error": max(_error(r, p) for (r, _), p in zip(pairs, plain, strict=True)),
            "other_tails": sum(r.response.text != _with_tail(r) for r in plain),
        }
        for mode, pairs in found.items()
    ]


class Replay:
    """A request in progress that writes a given response, whatever its decoder would write.

    Args:
        decoding: the request; it reads and computes all tokens.
        token_ids: the response; its last token ends it.
    """

    def __init__(self, decoding: Decoding, token_ids: Sequence[int]) -> None:
        self._decoding, self._token_ids = decoding, token_ids
        self._num_read = 0

    def prefill(self, response: Sequence[int] = ()) -> tuple[int, NDArray[np.float32]]:
        """See :meth:`Decoding.prefill`."""
        self._num_read = len(response)
        _, hidden = self._decoding.prefill(response)
        return self._token_ids[self._num_read], hidden

    def feed(self, tokens: Sequence[int]) -> tuple[list[int], NDArray[np.float32]]:
        """See :meth:`Decoding.feed`."""
        _, states = self._decoding.feed(tokens)
        first, end = self._num_read + 1, len(self._token_ids) - 1
        self._num_read += len(tokens)
        return [self._token_ids[min(first + i, end)] for i in range(len(tokens))], states

    def __getattr__(self, name: str) -> Any:
        """Return what else the request in progress has."""
        return getattr(self._decoding, name)

    def drop(self, count: int) -> None:
        """See :meth:`PromptState.drop`."""
        self._num_read -= count
        self._decoding.drop(count)


@contextmanager
def replaying(policy: GreedyPolicy, response: str | None) -> Iterator[None]:
    """Make a policy write a response in this block; None leaves it as it is."""
    if response is None:
        yield
        return
    text = policy.tokens.tokenizer.backend_tokenizer.encode(response, add_special_tokens=False)
    token_ids = [*text.ids, min(policy.tokens.end_ids)]
    start = policy.start

    @contextmanager
    def replay(request: PolicyRequest) -> Iterator[Replay]:
        with start(request) as decoding:
            yield Replay(decoding, token_ids)

    policy.start = replay  # type: ignore[method-assign]
    try:
        yield
    finally:
        del policy.start


def _with_tail(result: PolicyResult) -> str:
    """Return the response as far as its reasoning, with the tail of this project's prompts."""
    return result.response.text.partition("</think>")[0] + "</think> <REF_POS>"


def _error(found: PolicyResult, plain: PolicyResult) -> float:
    if found.token_ids != plain.token_ids or not len(plain.concentrations):
        return 0.0
    difference = np.abs(found.concentrations - plain.concentrations).max()
    return float(difference / np.abs(plain.concentrations).max())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
