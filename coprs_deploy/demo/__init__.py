"""Paths of the demo model: a small model trained by the recipes ``demo`` and ``demo_truncated``.

    checkpoint/      float16 weights, for ``coprs-deploy export`` and further training
    bundle/          the graphs for ONNX Runtime, the policy as int8 graphs for OpenVINO; its policy
                     weights are those of the checkpoint
    samples/         scenes with instructions for the page of the server
    MODEL_CARD.md    training data, evaluation and limits

``make demo-model`` trains it and writes checkpoint, bundle and card.
"""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parent
CHECKPOINT = ROOT / "checkpoint"
BUNDLE = ROOT / "bundle"
SAMPLES = ROOT / "samples"
MODEL_CARD = ROOT / "MODEL_CARD.md"
