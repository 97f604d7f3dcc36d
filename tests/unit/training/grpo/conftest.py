"""A GRPO trainer on the demo model and a few scenes, without a run."""

import functools
import types
from dataclasses import dataclass
from typing import Any

import pytest

from coprs_deploy.checkpoint import read_checkpoint
from coprs_deploy.data.synthetic.examples import SceneExamples
from coprs_deploy.data.synthetic.presets import PRESETS
from coprs_deploy.demo import CHECKPOINT
from coprs_deploy.policy.vision_inputs import VisionProcessor
from coprs_deploy.prompts import REFERENCE_TOKEN
from coprs_deploy.training.grpo.arguments import grpo_arguments, lora_config
from coprs_deploy.training.grpo.attachment import Attachment, SegmentationHead
from coprs_deploy.training.grpo.batch import PromptCollator
from coprs_deploy.training.grpo.processor import PolicyProcessor
from coprs_deploy.training.grpo.scores import ResponseReader
from coprs_deploy.training.grpo.stage import prompt_order
from coprs_deploy.training.grpo.trainer import GrpoParts, JointTrainer
from coprs_deploy.training.recipe import Recipe
from coprs_deploy.training.settings import CheckpointModel, GrpoSettings, SyntheticData
from coprs_deploy.training.state import TrainingState, state_from_checkpoint


@dataclass
class Setup:
    """A trainer and its parts."""

    trainer: Any
    state: TrainingState
    attachment: Attachment
    reference_id: int
    lines: list


def build_setup(
    directory,
    checkpoint=CHECKPOINT,
    examples=None,
    trainer=JointTrainer,
    processes=1,
    checkpointing=False,
    **changes,
) -> Setup:
    """Build a trainer; further arguments are settings of the stage."""
    settings = GrpoSettings(
        **{
            "max_steps": 4,
            "global_batch_size": 2,
            "num_generations": 2,
            "max_completion_length": 48,
            **changes,
        }
    )
    opened = read_checkpoint(checkpoint)
    state = state_from_checkpoint(opened)
    state.policy.model.requires_grad_(True)
    state.segmentation.requires_grad_(True)
    policy, tokenizer = state.policy.model, state.policy.tokenizer
    policy.config.name_or_path = str(opened.policy_path)
    reference_id = tokenizer.convert_tokens_to_ids(REFERENCE_TOKEN)
    head = SegmentationHead(state.segmentation)
    head.requires_grad_(settings.mode != "rl")
    attachment = Attachment(policy, head, reference_id)
    examples = examples or SceneExamples(PRESETS["plain"], 16)
    parts = GrpoParts(
        policy,
        PolicyProcessor(
            tokenizer,
            VisionProcessor(opened.policy_path, policy.config),
            state.policy.prompt,
        ),
        PromptCollator(state, None, settings.max_targets),
        ResponseReader(tokenizer, settings.response_format),
        examples,
        settings,
    )
    recipe = Recipe(
        description="a test",
        model=CheckpointModel(gradient_checkpointing=checkpointing),
        data=SyntheticData(),
        stages={"grpo": settings},
        precision="fp32",
        logging_steps=1,
        save_steps=2,
    )
    lines: list = []
    built = trainer(
        parts,
        grpo_arguments(
            settings, recipe, types.SimpleNamespace(num_processes=processes), directory, state
        ),
        order=prompt_order(examples, settings, 0),
        peft_config=lora_config(settings.lora),
        on_log=lines.append,
        callbacks=[],
    )
    return Setup(built, state, attachment, reference_id, lines)


@pytest.fixture
def make_setup(tmp_path):
    """Build a trainer in a temporary directory."""
    return functools.partial(build_setup, tmp_path)
