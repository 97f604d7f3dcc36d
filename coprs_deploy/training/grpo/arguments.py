"""From a recipe's words to the settings of TRL and PEFT, none of their defaults left to chance."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from trl import GRPOConfig

from coprs_deploy.training.recipe import Recipe
from coprs_deploy.training.settings import CheckpointModel, GrpoSettings, Lora
from coprs_deploy.training.state import TrainingState

if TYPE_CHECKING:
    from accelerate import Accelerator

LORA_TARGETS = (
    r".*language_model\.layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)"
)
"""Matrices of the language model that adapters sit on, in both families of policy."""

VLLM_MODES = {"vllm_colocated": "colocate", "vllm_server": "server"}


def rows_of_a_pass(settings: GrpoSettings, num_processes: int) -> tuple[int, int]:
    """Divide a step's responses: rows of one forward pass, and passes of a process.

    Raises:
        ValueError: they cannot be divided evenly.
    """
    rows = settings.global_batch_size * settings.num_generations
    if rows % num_processes:
        raise ValueError(
            f"a step has {settings.global_batch_size} prompts x {settings.num_generations} responses = "
            f"{rows}, which {num_processes} processes cannot share evenly; change global_batch_size"
        )
    mine = rows // num_processes
    a_pass = settings.per_device_train_batch_size or mine
    if mine % a_pass:
        raise ValueError(
            f"per_device_train_batch_size is {a_pass}; it must divide the {mine} responses of a process"
        )
    return a_pass, mine // a_pass


def grpo_arguments(
    settings: GrpoSettings,
    recipe: Recipe,
    accelerator: Accelerator,
    folder: Path,
    workbench: TrainingState,
) -> GRPOConfig:
    """Write down everything that TRL is to do.

    Raises:
        ValueError: steps, states and rollouts do not fit together.
    """
    if recipe.save_steps % settings.num_iterations:
        raise ValueError(
            f"save_steps is {recipe.save_steps}; it must be a multiple of num_iterations "
            f"({settings.num_iterations}), so that no rollout is cut in two by a resume"
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
        num_generations=settings.num_generations,
        num_iterations=settings.num_iterations,
        shuffle_dataset=False,  # the table of prompts is in the order of the run
        max_completion_length=response,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        loss_type="dapo" if settings.algorithm == "dapo" else "grpo",
        importance_sampling_level="sequence" if settings.algorithm == "gspo" else "token",
        epsilon=settings.epsilon,
        epsilon_high=settings.epsilon_high,
        beta=settings.beta,
        use_bias_correction_kl=False,  # the k3 estimator of the paper
        entropy_coef=settings.entropy_coef,
        scale_rewards="group",
        reward_weights=[settings.reward.mask, 1 - settings.reward.mask],
        mask_truncated_completions=settings.mask_truncated_completions,
        learning_rate=settings.optimizer.rate,
        max_grad_norm=settings.optimizer.clip,
        bf16=recipe.precision == "bf16",
        gradient_checkpointing=checkpointing,
        use_cpu=not torch.cuda.is_available(),
        seed=recipe.seed,
        logging_steps=recipe.logging_steps,
        save_strategy="steps",
        save_steps=recipe.save_steps,
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


def _rollout_arguments(settings: GrpoSettings, longest: int) -> dict[str, Any]:
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
