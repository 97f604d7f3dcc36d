"""A capture that goes wrong on purpose, to show that the comparison with transformers sees it.

The token budget of a request chooses what goes wrong with it.
"""

from coprs_deploy.policy.vllm_policy.capture import STEP, HiddenStateCapture
from coprs_deploy.policy.vllm_policy.policy import VllmPolicy

WRONG_ROW = 101
ONE_STEP_EARLY = 102


class MutantCapture(HiddenStateCapture):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self._row_before = {}

    def apply(self, logits):
        logits = super().apply(logits)
        for row, (order, _) in self._batch.items():
            self._row_before[order.path] = STEP.rows[row].clone()
        return logits

    def row_of(self, row, logits):
        order, _ = self._batch[row]
        if order.budget == ONE_STEP_EARLY:
            return self._row_before[order.path]
        shift = 1 if order.budget == WRONG_ROW else 0
        return super().row_of((row + shift) % len(logits), logits)


class MutantPolicy(VllmPolicy):
    @staticmethod
    def _plug_ins():
        return {"logits_processors": [MutantCapture]}
