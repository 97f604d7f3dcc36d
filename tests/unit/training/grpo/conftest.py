"""A trainer on the shipped model and a few scenes, without a run around it."""

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
from coprs_deploy.training.grpo.batch import QuestionCollector
from coprs_deploy.training.grpo.processor import PolicyProcessor
from coprs_deploy.training.grpo.scores import ResponseReader
from coprs_deploy.training.grpo.stage import order_of_prompts
from coprs_deploy.training.grpo.trainer import GrpoParts, JointTrainer
from coprs_deploy.training.recipe import Recipe
from coprs_deploy.training.settings import CheckpointModel, GrpoSettings, SyntheticData
from coprs_deploy.training.state import TrainingState, state_from_checkpoint


@dataclass
class Bench:
    """What a test works with."""

    trainer: Any
    workbench: TrainingState
    attachment: Attachment
    reference_id: int
    lines: list


def build_bench(
    folder,
    checkpoint=CHECKPOINT,
    examples=None,
    trainer=JointTrainer,
    processes=1,
    checkpointing=False,
    **changes,
) -> Bench:
    """Build a trainer; further arguments are settings of the phase."""
    settings = GrpoSettings(
        **{
            "steps": 4,
            "global_batch_size": 2,
            "num_generations": 2,
            "max_response_tokens": 48,
            **changes,
        }
    )
    opened = read_checkpoint(checkpoint)
    workbench = state_from_checkpoint(opened)
    workbench.policy.model.requires_grad_(True)
    workbench.segmentation.requires_grad_(True)
    policy, tokenizer = workbench.policy.model, workbench.policy.tokenizer
    policy.config.name_or_path = str(opened.policy_path)
    reference_id = tokenizer.convert_tokens_to_ids(REFERENCE_TOKEN)
    head = SegmentationHead(workbench.segmentation)
    head.requires_grad_(settings.mode != "rl")
    attachment = Attachment(policy, head, reference_id)
    examples = examples or SceneExamples(PRESETS["plain"], 16)
    parts = GrpoParts(
        policy,
        PolicyProcessor(
            tokenizer,
            VisionProcessor(opened.policy_path, policy.config),
            workbench.policy.prompt,
        ),
        QuestionCollector(workbench, None, settings.targets),
        ResponseReader(
            reference_id,
            lambda ids: tokenizer.decode(list(ids), skip_special_tokens=True),
            settings.reward.convention,
        ),
        examples,
        settings,
    )
    recipe = Recipe(
        description="a test",
        model=CheckpointModel(gradient_checkpointing=checkpointing),
        data=SyntheticData(),
        phases={"grpo": settings},
        precision="fp32",
        logging_steps=1,
        save_steps=2,
    )
    lines: list = []
    built = trainer(
        parts,
        grpo_arguments(
            settings, recipe, types.SimpleNamespace(num_processes=processes), folder, workbench
        ),
        order=order_of_prompts(examples, settings, 0),
        peft_config=lora_config(settings.lora),
        on_log=lines.append,
        callbacks=[],
    )
    return Bench(built, workbench, attachment, reference_id, lines)


@pytest.fixture
def make_bench(tmp_path):
    """Build a trainer in a folder of its own."""
    return functools.partial(build_bench, tmp_path)
