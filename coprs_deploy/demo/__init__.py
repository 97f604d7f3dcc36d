"""The model that comes with the package: small, trained by the recipe ``shipped``.

    checkpoint/      float16 weights, what ``coprs-deploy export`` and further training take
    bundle/          the same as graphs for ONNX Runtime; its policy is the checkpoint's
    MODEL_CARD.md    what it was trained on, what it can do and what it cannot

``make shipped`` writes all three from a finished run.
"""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parent
CHECKPOINT = ROOT / "checkpoint"
BUNDLE = ROOT / "bundle"
MODEL_CARD = ROOT / "MODEL_CARD.md"
