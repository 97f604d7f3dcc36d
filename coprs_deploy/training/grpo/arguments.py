"""TRL and PEFT settings of a GRPO stage, with every relevant default set explicitly."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from trl import GRPOConfig

from coprs_deploy.training.recipe import Recipe
from coprs_deploy.training.settings import LORA_TARGETS, GrpoSettings, Lora
from coprs_deploy.training.state import TrainingState

if TYPE_CHECKING:
    from accelerate import Accelerator

TRL_SETTINGS = (
    *("max_steps", "num_generations", "num_iterations", "temperature", "top_p", "top_k"),
    *("loss_type", "importance_sampling_level", "epsilon", "epsilon_high", "beta", "entropy_coef"),
    *("mask_truncated_completions", "use_vllm", "vllm_mode", "vllm_tensor_parallel_size"),
    *("vllm_gpu_memory_utilization", "vllm_enable_sleep_mode"),
    *("vllm_server_host", "vllm_server_port"),
)
"""Settings that TRL takes under the same name."""


def grpo_arguments(
    settings: GrpoSettings,
    recipe: Recipe,
    accelerator: Accelerator,
    output_dir: Path,
    state: TrainingState,
) -> GRPOConfig:
    """Build TRL's configuration of a stage, with training states in ``output_dir``.

    Raises:
        ValueError: the batch cannot be split evenly, or a resume would split a rollout.
    """
    if recipe.save_steps % settings.num_iterations:
        raise ValueError(
            f"save_steps is {recipe.save_steps}; accepted: multiples of num_iterations "
            f"({settings.num_iterations}), so that a resume does not split a rollout"
        )
    per_pass, passes = settings.split_batch(accelerator.num_processes)
    prompt = state.policy.prompt
    max_completion_length = settings.max_completion_length or prompt.max_response_tokens
    weights = settings.reward_weights
    return GRPOConfig(
        output_dir=str(output_dir),
        per_device_train_batch_size=per_pass,
        gradient_accumulation_steps=passes,
        steps_per_generation=passes,
        shuffle_dataset=False,  # the prompts are shuffled already
        max_completion_length=max_completion_length,
        use_bias_correction_kl=False,  # the paper's k3 estimator
        scale_rewards="group",
        reward_weights=[weights.mask, weights.format] + [weights.length] * (weights.length > 0),
        learning_rate=settings.optimizer.learning_rate,
        max_grad_norm=settings.optimizer.max_grad_norm,
        bf16=recipe.precision == "bf16",
        gradient_checkpointing=recipe.model.gradient_checkpointing,
        use_cpu=not torch.cuda.is_available(),
        seed=recipe.seed,
        logging_steps=recipe.logging_steps,
        save_strategy="steps",
        save_steps=recipe.save_steps,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        vllm_max_model_length=prompt.max_prompt_tokens + max_completion_length,
        **{name: getattr(settings, name) for name in TRL_SETTINGS},
    )


def lora_config(settings: Lora) -> Any:
    """Build PEFT's configuration of the adapters; None if whole weights are trained."""
    if not settings.r:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=settings.r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=LORA_TARGETS,
    )
