"""Deadlines of requests: when the reasoning has to end for the mask to be ready in time."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from coprs_deploy.policy.reasoning_limit import Clock, RunningEstimate

TYPICAL = 0.5
"""Quantile of the recent durations that a deadline must allow for; a shorter one is refused."""


@dataclass
class DeadlineEstimates:
    """Running estimates of what a request takes besides its reasoning, in seconds.

    Attributes:
        prompt: preprocessing and prefill of the policy.
        encoder: image encoder, of images that were not cached.
        masks: from the last hidden state to the masks, without a wait for the image encoder.
        clock: ``time.perf_counter``, or its replacement in a test.
    """

    prompt: RunningEstimate = field(default_factory=RunningEstimate)
    encoder: RunningEstimate = field(default_factory=RunningEstimate)
    masks: RunningEstimate = field(default_factory=RunningEstimate)
    clock: Clock = time.perf_counter

    def reasoning_deadline(
        self, start: float, deadline_ms: float | None, *, is_encoded: bool
    ) -> float | None:
        """Return the clock's value by which the hidden state is due; None without a deadline.

        What seems too short is tried where no request has been measured for a moment, so that a
        busy moment does not refuse requests for ever.

        Args:
            start: arrival of the request.
            deadline_ms: time from the arrival to the mask.
            is_encoded: whether the image is encoded already.

        Raises:
            ValueError: the deadline cannot be met, or nothing has been measured yet.
        """
        if deadline_ms is None:
            return None
        masks, typical = self.masks.quantile(), self.masks.quantile(TYPICAL)
        prompt = self.prompt.quantile(TYPICAL)
        if masks is None or typical is None or prompt is None:
            raise ValueError(
                "deadline_ms needs the time of prompt and masks, which is measured: call "
                "warm_up() before the first request with a deadline"
            )
        encoder = 0.0 if is_encoded else self.encoder.quantile(TYPICAL) or 0.0
        passed = self.clock() - start
        least_ms = 1e3 * (passed + max(prompt, encoder) + typical)
        has_passed = deadline_ms <= 1e3 * passed
        if has_passed or (deadline_ms < least_ms and self.prompt.is_current):
            raise ValueError(
                f"deadline_ms is {deadline_ms:g}; a mask without reasoning takes {least_ms:.0f} ms "
                f"here: {1e3 * passed:.0f} until the request was read, {1e3 * prompt:.0f} for the "
                f"prompt beside {1e3 * encoder:.0f} for the image encoder, {1e3 * typical:.0f} for "
                "the mask; allow more"
            )
        return start + deadline_ms / 1e3 - masks
