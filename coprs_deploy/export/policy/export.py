"""The policy's graphs in a bundle: conversion, calibration where it measures better, and check."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from coprs_deploy.bundle import PolicyEquivalence, PolicyGraphsRecord
from coprs_deploy.checkpoint import Checkpoint
from coprs_deploy.data.examples import Example
from coprs_deploy.errors import EquivalenceError
from coprs_deploy.export.calibration_examples import CalibrationExamples
from coprs_deploy.export.policy.check import compare_policy, describe_layer_errors
from coprs_deploy.export.policy.compression import compression_of
from coprs_deploy.export.policy.graphs import export_policy_graphs, refine_decoder
from coprs_deploy.export.policy.samples import decode_samples, decoder_inputs
from coprs_deploy.export.tolerances import POLICY_TOLERANCES
from coprs_deploy.policy.openvino_policy.graphs import DECODER_FILE


@dataclass(frozen=True)
class PolicyExport:
    """Export of a policy's graphs.

    Attributes:
        checkpoint: weights of policy and segmentation model.
        graphs: directory to create.
        precision: precision of the weights.
        calibration: examples that int4 weights are fitted to; None for none.
        allow_inexact: accept graphs outside their tolerance.
        report: called with the name of each step as it starts.
        note: called with what was found.
    """

    checkpoint: Checkpoint
    graphs: Path
    precision: str
    calibration: CalibrationExamples | None
    allow_inexact: bool
    report: Callable[[str], None]
    note: Callable[[str], None]

    def write(self, scratch: Path) -> PolicyGraphsRecord:
        """Write and check the graphs; ``scratch`` is for a decoder, on the same file system.

        Raises:
            EquivalenceError: the graphs are outside their tolerance.
        """
        policy = self.checkpoint.policy_path
        export_policy_graphs(policy, self.graphs, self.precision, self.report)
        equivalence = self._compare()
        compression = compression_of(self.precision)
        if self.calibration is not None:
            calibrated = self._calibrate(equivalence, scratch)
            if calibrated is not None:
                equivalence = calibrated
                compression = compression_of(self.precision, self.calibration.record())
        if not equivalence.passed:
            self._refuse(equivalence)
        return PolicyGraphsRecord("openvino", self.precision, equivalence, compression)

    def _compare(self) -> PolicyEquivalence:
        tolerance = POLICY_TOLERANCES[self.precision]
        examples = self._load(self.calibration.held_out) if self.calibration else ()
        return compare_policy(
            self.checkpoint, self.graphs, tolerance, self.report, examples=examples
        )

    def _load(self, rows: Sequence[int]) -> list[Example]:
        assert self.calibration is not None
        return [self.calibration.file.load(row) for row in rows]

    def _calibrate(self, nearest: PolicyEquivalence, scratch: Path) -> PolicyEquivalence | None:
        """Fit the decoder to the examples; None if that is no better, and nothing changed."""
        assert self.calibration is not None
        self.report("calibrate policy: responses")
        examples = self._load(self.calibration.used)
        samples = decode_samples(self.checkpoint, self.graphs, examples)
        inputs = list(decoder_inputs(self.checkpoint, self.graphs, samples))
        files = (self.graphs / DECODER_FILE, (self.graphs / DECODER_FILE).with_suffix(".bin"))
        for file in files:
            file.rename(scratch / file.name)
        refine_decoder(self.checkpoint.policy_path, self.graphs, inputs, self.report)
        calibrated = self._compare()
        self.note(f"{self.precision} without calibration: {nearest}")
        self.note(f"{self.precision} with calibration: {calibrated}")
        if (calibrated.passed, calibrated.cosine) > (nearest.passed, nearest.cosine):
            return calibrated
        self.note("the calibration is not used: its hidden states are not closer to PyTorch's")
        for file in files:
            (scratch / file.name).replace(file)
        return None

    def _refuse(self, equivalence: PolicyEquivalence) -> None:
        tolerance = POLICY_TOLERANCES[self.precision]
        message = f"the policy's {self.precision} graphs: {equivalence}; accepted: {tolerance}"
        if self.allow_inexact:
            self.note(message)
            return
        self.report("check error of each layer")
        lines = describe_layer_errors(self.checkpoint, self.graphs)
        calibration = ""
        if self.precision == "int4" and self.calibration is None:
            calibration = "--policy-calibration EXAMPLES; "
        raise EquivalenceError(
            f"{message}\n{lines}\nWhat to try: {calibration}a higher --policy-precision; or, to "
            "measure speed only, --allow-inexact-policy"
        )
