"""From a recipe's words to the settings of TRL and PEFT, none of their defaults left to chance."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from trl import GRPOConfig

from coprs_deploy.training.grpo.settings import GrpoPhase, Lora
from coprs_deploy.training.recipe import CheckpointModel, Recipe
from coprs_deploy.training.workbench import Workbench

if TYPE_CHECKING:
    from accelerate import Accelerator

LORA_TARGETS = (
    r".*language_model\.layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)"
)
"""Matrices of the language model that adapters sit on, in both families of policy."""

VLLM_MODES = {"vllm_colocated": "colocate", "vllm_server": "server"}


def rows_of_a_pass(settings: GrpoPhase, num_processes: int) -> tuple[int, int]:
    """Divide a step's responses: rows of one forward pass, and passes of a process.

    Raises:
        ValueError: they cannot be divided evenly.
    """
    rows = settings.batch_images * settings.group_size
    if rows % num_processes:
        raise ValueError(
            f"a step has {settings.batch_images} prompts x {settings.group_size} responses = "
            f"{rows}, which {num_processes} processes cannot share evenly; change batch_images"
        )
    mine = rows // num_processes
    a_pass = settings.rows_per_pass or mine
    if mine % a_pass:
        raise ValueError(
            f"rows_per_pass is {a_pass}; it must divide the {mine} responses of a process"
        )
    return a_pass, mine // a_pass


def grpo_arguments(
    settings: GrpoPhase,
    recipe: Recipe,
    accelerator: Accelerator,
    folder: Path,
    workbench: Workbench,
) -> GRPOConfig:
    """Write down everything that TRL is to do.

    Raises:
        ValueError: steps, states and rollouts do not fit together.
    """
    if recipe.save_every % settings.updates_per_rollout:
        raise ValueError(
            f"save_every is {recipe.save_every}; it must be a multiple of updates_per_rollout "
            f"({settings.updates_per_rollout}), so that no rollout is cut in two by a resume"
        )
    rows, passes = rows_of_a_pass(settings, accelerator.num_processes)
    prompt = workbench.policy.prompt
    response = settings.max_response_tokens or prompt.max_response_tokens
    checkpointing = (
        isinstance(recipe.model, CheckpointModel) and recipe.model.gradient_checkpointing
    )
    return GRPOConfig(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=passes,
        steps_per_generation=passes,
        num_generations=settings.group_size,
        num_iterations=settings.updates_per_rollout,
        shuffle_dataset=False,  # the table of prompts is in the order of the run
        max_completion_length=response,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        loss_type="dapo" if settings.algorithm == "dapo" else "grpo",
        importance_sampling_level="sequence" if settings.algorithm == "gspo" else "token",
        epsilon=settings.clip_below,
        epsilon_high=settings.clip_above,
        beta=settings.kl_weight,
        use_bias_correction_kl=False,  # the k3 estimator of the paper
        entropy_coef=settings.entropy_weight,
        scale_rewards="group",
        reward_weights=[settings.reward.mask, 1 - settings.reward.mask],
        mask_truncated_completions=settings.skip_truncated,
        learning_rate=settings.optimizer.rate,
        max_grad_norm=settings.optimizer.clip,
        bf16=recipe.precision == "bf16",
        gradient_checkpointing=checkpointing,
        use_cpu=not torch.cuda.is_available(),
        seed=recipe.seed,
        logging_steps=recipe.log_every,
        save_strategy="steps",
        save_steps=recipe.save_every,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        **_rollout_arguments(settings, prompt.max_prompt_tokens + response),
    )


def lora_config(settings: Lora) -> Any:
    """Describe the adapters for PEFT; None where whole weights are trained."""
    if not settings.rank:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=LORA_TARGETS,
    )


def _rollout_arguments(settings: GrpoPhase, longest: int) -> dict[str, Any]:
    rollout = settings.rollout
    if rollout.engine == "transformers":
        return {"use_vllm": False}
    return {
        "use_vllm": True,
        "vllm_mode": VLLM_MODES[rollout.engine],
        "vllm_tensor_parallel_size": rollout.tensor_parallel,
        "vllm_gpu_memory_utilization": rollout.memory_share,
        "vllm_enable_sleep_mode": rollout.sleeps,
        "vllm_max_model_length": longest,
        "vllm_server_host": rollout.host,
        "vllm_server_port": rollout.port,
    }
