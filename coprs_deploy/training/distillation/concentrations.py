"""Concentrations of a checkpoint's policy on examples, on disk.

    NAME-KEY-00000.safetensors     (N, D) float32 of each of the first examples, by its index

KEY stands for the contents of examples and checkpoint. Examples with a response are read with it,
all others get a greedy one first. An interrupted computation resumes with the missing files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from coprs_deploy.artifacts import atomic_write, make_directory
from coprs_deploy.checkpoint import Checkpoint
from coprs_deploy.data.examples import Example
from coprs_deploy.policy.vision_inputs import VisionProcessor
from coprs_deploy.prompts import REFERENCE_TOKEN
from coprs_deploy.training.examples import ExampleSets
from coprs_deploy.training.state import TrainingState, state_from_checkpoint
from coprs_deploy.training.supervised_stage import ExampleCollector

PER_FILE = 256
PER_PASS = 16
"""Examples of a forward pass."""

Progress = Callable[[int, int], None]
"""Callback with the numbers of examples that are done and of all."""


class ConcentrationFiles:
    """Concentrations of one set of examples in a folder.

    Args:
        folder: folder of the files.
        name: name of the set.
        checkpoint: the teacher.
        examples: the examples.
        content: hash of their contents.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        checkpoint: Checkpoint,
        examples: Sequence[Example],
        content: str,
    ) -> None:
        identity = f"{content} {checkpoint.fingerprint()} {PER_FILE}"
        key = xxhash.xxh3_64_hexdigest(identity.encode())
        self._folder, self._stem = folder, f"{name}-{key}"
        self._checkpoint, self._examples = checkpoint, examples

    def _path(self, start: int) -> Path:
        return self._folder / f"{self._stem}-{start // PER_FILE:05d}.safetensors"

    def compute(self, device: torch.device, on_progress: Progress) -> None:
        """Compute what is missing; the policy is loaded only if something is."""
        from safetensors.torch import save_file

        total = len(self._examples)
        missing = [start for start in range(0, total, PER_FILE) if not self._path(start).is_file()]
        if not missing:
            return
        make_directory(self._folder)
        reader = _Reader(self._checkpoint, device)
        for start in missing:
            found: dict[str, Tensor] = {}
            for first in range(start, min(start + PER_FILE, total), PER_PASS):
                indices = range(first, min(first + PER_PASS, start + PER_FILE, total))
                states = reader([self._examples[index] for index in indices])
                found.update(zip(map(str, indices), states, strict=True))
                on_progress(indices.stop, total)
            with atomic_write(self._path(start)) as partial:
                save_file(found, partial)

    def load(self) -> list[Tensor]:
        """Return the concentrations of each example, (N, D) float32.

        N is the number of its targets, or 0 where the policy's own response names another number.
        """
        from safetensors.torch import load_file

        found: list[Tensor] = []
        for start in range(0, len(self._examples), PER_FILE):
            stored = load_file(self._path(start))
            found += [stored[str(start + number)] for number in range(len(stored))]
        return found


class _Reader:
    """The policy of a checkpoint, which reads examples with their responses."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        self._state: TrainingState = state_from_checkpoint(checkpoint)
        self._policy: Any = self._state.policy.model.to(device).requires_grad_(False).eval()
        self._state.segmentation.to(device)
        vision = VisionProcessor(checkpoint.policy_path, self._policy.config)
        self._sets = ExampleSets([], [], vision, seed=0)
        self._collect = ExampleCollector(self._state, vision)
        self._device = device

    @torch.inference_mode()
    def __call__(self, examples: Sequence[Example]) -> list[Tensor]:
        """Return the hidden states (N, D) of the ``<REF_POS>`` of each response."""
        examples = self._with_responses(examples)
        batch = self._collect(examples)
        inputs = {name: tensor.to(self._device) for name, tensor in batch.inputs.items()}
        hidden = self._policy.model(**inputs, use_cache=False).last_hidden_state
        states = hidden[batch.references[:, 0], batch.references[:, 1]].float().cpu()
        return [
            states[batch.references[:, 0] == row].contiguous().clone()
            for row in range(len(examples))
        ]

    def _with_responses(self, examples: Sequence[Example]) -> list[Example]:
        """Give examples without a response the policy's; without targets if it names others."""
        without = [i for i, each in enumerate(examples) if not each.response and len(each.masks)]
        examples = list(examples)
        if not without:
            return examples
        from coprs_deploy.training.generation import respond

        for index, sample in zip(
            without, respond(self._state, self._sets, [examples[i] for i in without]), strict=True
        ):
            example = examples[index]
            if sample.response.count(REFERENCE_TOKEN) == len(example.masks):
                examples[index] = replace(example, response=sample.response)
            else:
                examples[index] = replace(example, masks=example.masks[:0])
        return examples
