"""Hidden-state capture with injected errors, which the comparison with transformers must detect.

The token budget of a request selects its error.
"""

from coprs_deploy.policy.vllm_policy.capture import HiddenStateCapture
from coprs_deploy.policy.vllm_policy.policy import VllmPolicy

WRONG_ROW = 101
ONE_STEP_EARLY = 102


class MutantCapture(HiddenStateCapture):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self._previous = {}

    def apply(self, logits):
        logits = super().apply(logits)
        for row, (request, _) in self._batch.items():
            self._previous[request.path] = HiddenStateCapture.step[row].clone()
        return logits

    def hidden_state_of(self, row, logits):
        request, _ = self._batch[row]
        if request.token_budget == ONE_STEP_EARLY:
            return self._previous[request.path]
        shift = 1 if request.token_budget == WRONG_ROW else 0
        return super().hidden_state_of((row + shift) % len(logits), logits)


class MutantPolicy(VllmPolicy):
    @staticmethod
    def _logits_processors():
        return [MutantCapture]
