"""Golden outputs: read ``tests/golden/demo.npz``, and compare a runtime with it without PyTorch.

``python export/record_golden.py tests/golden/demo.npz`` records the file.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from coprs_deploy.engines.runner import Array
from coprs_deploy.errors import EquivalenceError
from coprs_deploy.export.equivalence import compare_graphs
from coprs_deploy.export.samples import SampleInput
from coprs_deploy.export.tolerances import TOLERANCES
from coprs_deploy.images import prepare_image
from coprs_deploy.specs import GRAPH_NAMES, Geometry
from tests import ROOT

GOLDEN_FILE = ROOT / "tests" / "golden" / "demo.npz"


@dataclass(frozen=True)
class Golden:
    """Recorded inputs and outputs.

    Attributes:
        fingerprint: hash of the recorded checkpoint.
        samples: inputs.
        outputs: PyTorch's outputs in float32, one per sample, by graph name; each graph was fed
            with the output of the graph before it.
    """

    fingerprint: str
    samples: list[SampleInput]
    outputs: dict[str, list[Array]]


def read_golden(path: Path, geometry: Geometry, fingerprint: str) -> Golden:
    """Read a file written by ``export/record_golden.py``.

    Args:
        path: the file.
        geometry: sizes of the model, to prepare the images.
        fingerprint: hash of the checkpoint that the file must belong to.

    Raises:
        EquivalenceError: it was recorded from another checkpoint.
    """
    with np.load(path, allow_pickle=False) as arrays:
        recorded = str(arrays["fingerprint"])
        if recorded != fingerprint:
            raise EquivalenceError(
                f"{path.name} was recorded from another checkpoint ({recorded[:12]}) than this one "
                f"({fingerprint[:12]}); record it again: python export/record_golden.py FILE"
            )
        count = sum(name.startswith("image.") for name in arrays.files)
        samples = [
            SampleInput(prepare_image(arrays[f"image.{i}"], geometry), arrays[f"concentration.{i}"])
            for i in range(count)
        ]
        outputs = {name: [arrays[f"{name}.{i}"] for i in range(count)] for name in GRAPH_NAMES}
    return Golden(recorded, samples, outputs)


def compare_with_golden(golden, candidate):
    """Compare a runtime with the recorded outputs, in the float32 tolerances."""

    def never(name):
        raise AssertionError(f"the outputs of {name} are recorded")

    return compare_graphs(
        reference=never,
        candidate=candidate,
        samples=golden.samples,
        tolerances=TOLERANCES["onnxruntime", "fp32"],
        known=dict(golden.outputs),
    )
