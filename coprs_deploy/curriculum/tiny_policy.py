"""Tiny Qwen2.5-VL policy: tokenizer, configuration and initial weights.

The architecture is transformers' own, so that every runtime of Qwen2.5-VL runs it. Only the sizes
are small, and the rotary frequencies fit a small grid.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch

from coprs_deploy.curriculum.recipe import TinyPolicy
from coprs_deploy.prompts import REFERENCE_TOKEN, PromptTemplate
from coprs_deploy.training.state import PolicyParts

PAD_TOKEN = "<|endoftext|>"
END_TOKEN = "<|im_end|>"
IMAGE_TOKEN = "<|image_pad|>"

SPECIAL_TOKENS = (
    PAD_TOKEN,
    "<|im_start|>",
    END_TOKEN,
    "<|vision_start|>",
    "<|vision_end|>",
    IMAGE_TOKEN,
    "<|video_pad|>",
    REFERENCE_TOKEN,
)

REASONING_TOKENS = ("<think>", "</think>")

PRE_TOKENS = r" ?[A-Za-z0-9]+| ?[^\sA-Za-z0-9]+|\s+"
"""Pre-tokenization: a word keeps its leading space."""

BRANCH_SCALE = 0.5
"""Initial scale of the layers that write to the residual stream, which grows with depth."""


def prompt_template(sizes: TinyPolicy) -> PromptTemplate:
    """Return the prompt template: image first, so that many questions can follow one image."""
    return PromptTemplate(
        text=(
            f"<|im_start|>user\n<|vision_start|>{IMAGE_TOKEN}<|vision_end|>{sizes.instruction_template}"
            f"{END_TOKEN}\n<|im_start|>assistant\n"
        ),
        image_token=IMAGE_TOKEN,
        max_prompt_tokens=sizes.grid_size**2 + 128,
        max_response_tokens=sizes.max_response_tokens,
    )


def build_tiny_policy(sizes: TinyPolicy, corpus: Iterable[str], seed: int) -> PolicyParts:
    """Build a policy with random weights, and a tokenizer trained on the texts of ``corpus``."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    template = prompt_template(sizes)
    tokenizer = build_tokenizer([template.text, *corpus], sizes.vocab_size)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(tiny_config(sizes, tokenizer))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("attn.proj.weight", "o_proj.weight", "down_proj.weight")):
                weight.mul_(BRANCH_SCALE)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return PolicyParts(model, tokenizer, tiny_image_processor(sizes), template)


def tiny_config(sizes: TinyPolicy, tokenizer: Any) -> Any:
    """Return transformers' configuration of the policy."""
    from transformers import Qwen2_5_VLConfig

    token = tokenizer.convert_tokens_to_ids
    return Qwen2_5_VLConfig(
        text_config={
            "initializer_range": sizes.initializer_range,
            "vocab_size": len(tokenizer),
            "hidden_size": sizes.hidden_size,
            "intermediate_size": sizes.intermediate_size,
            "num_hidden_layers": sizes.num_hidden_layers,
            "num_attention_heads": sizes.num_attention_heads,
            "num_key_value_heads": sizes.num_attention_heads,
            "max_position_embeddings": 1024,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": sizes.rope_theta,
                "mrope_section": list(sizes.mrope_section),
            },
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "tie_word_embeddings": True,
        },
        vision_config={
            "initializer_range": sizes.initializer_range,
            "depth": sizes.vision_depth,
            "hidden_size": sizes.vision_hidden_size,
            "intermediate_size": sizes.vision_intermediate_size,
            "num_heads": sizes.vision_num_heads,
            "patch_size": sizes.patch_size,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": sizes.image_size,
            "out_hidden_size": sizes.hidden_size,
            "fullatt_block_indexes": list(range(sizes.vision_depth)),
        },
        image_token_id=token(IMAGE_TOKEN),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
    )


def tiny_image_processor(sizes: TinyPolicy) -> Any:
    """Return an image processor with a fixed number of tokens for square images."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    area = sizes.image_size**2
    return Qwen2VLImageProcessorPil(
        patch_size=sizes.patch_size,
        merge_size=2,
        temporal_patch_size=2,
        size={"shortest_edge": area, "longest_edge": area},
    )


def build_tokenizer(corpus: Iterable[str], vocab_size: int) -> Any:
    """Train a byte-level BPE tokenizer with one token for every word of the corpus.

    ``<REF_POS>`` is one special token. ``<think>`` and ``</think>`` are added tokens that are not
    special, so that decoded text keeps them.
    """
    import tokenizers
    from tokenizers import AddedToken, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    added = (*SPECIAL_TOKENS, *REASONING_TOKENS)
    # Added tokens must not take part in merges.
    pattern = "|".join(map(re.escape, added))
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(PRE_TOKENS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - len(added),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pieces = (piece for text in corpus for piece in re.split(pattern, text))
    backend.train_from_iterator(pieces, trainer)
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    backend.add_tokens(
        [AddedToken(token, special=False, normalized=False) for token in REASONING_TOKENS]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD_TOKEN,
        eos_token=END_TOKEN,
        extra_special_tokens=list(SPECIAL_TOKENS[1:]),
        padding_side="left",
    )
