"""A Qwen2.5-VL policy of small size: its tokenizer, its configuration, its starting weights.

The architecture is transformers' own, so that every runtime that knows Qwen2.5-VL runs it. Only the
sizes are small, and the rotary frequencies fit a grid of few cells.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

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


THOUGHT_MARKS = ("<think>", "</think>")


WORDS = r" ?[A-Za-z0-9]+| ?[^\sA-Za-z0-9]+|\s+"
"""Where text is cut before tokens are learned: a word takes its leading blank along."""


BRANCH_SCALE = 0.5
"""Factor on the layers that write to the residual stream, so that it grows slowly with depth."""


def prompt_template(sizes: TinyPolicy) -> PromptTemplate:
    """Lay out the prompt: the image first, so that many questions can follow one image."""
    return PromptTemplate(
        text=(
            f"<|im_start|>user\n<|vision_start|>{IMAGE_TOKEN}<|vision_end|>{sizes.instruction}"
            f"{END_TOKEN}\n<|im_start|>assistant\n"
        ),
        image_token=IMAGE_TOKEN,
        max_prompt_tokens=sizes.grid_size**2 + 128,
        max_response_tokens=sizes.max_response_tokens,
    )


def build_tiny_policy(sizes: TinyPolicy, corpus: Iterable[str], seed: int) -> PolicyParts:
    """Build a policy with random weights.

    Args:
        sizes: of the policy.
        corpus: texts whose words become tokens: instructions and responses.
        seed: of the weights.
    """
    import torch
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
    """Describe the architecture for transformers."""
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
    """Make the image processor that gives every square image the same number of tokens."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    area = sizes.image_size**2
    return Qwen2VLImageProcessorPil(
        patch_size=sizes.patch_size,
        merge_size=2,
        temporal_patch_size=2,
        size={"shortest_edge": area, "longest_edge": area},
    )


def build_tokenizer(corpus: Iterable[str], vocab_size: int) -> Any:
    """Train a byte-level BPE in which every word of the corpus becomes one token.

    ``<REF_POS>`` is one special token; the marks of a thought are ordinary added tokens, so that
    they survive in decoded text.
    """
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast

    marks = (*SPECIAL_TOKENS, *THOUGHT_MARKS)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(marks),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pieces = (piece for text in corpus for piece in _between(text, marks))
    backend.train_from_iterator(pieces, trainer)
    backend.add_special_tokens(
        [AddedToken(mark, special=True, normalized=False) for mark in SPECIAL_TOKENS]
    )
    backend.add_tokens(
        [AddedToken(mark, special=False, normalized=False) for mark in THOUGHT_MARKS]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD_TOKEN,
        eos_token=END_TOKEN,
        extra_special_tokens=list(SPECIAL_TOKENS[1:]),
        padding_side="left",
    )


def _between(text: str, marks: Iterable[str]) -> list[str]:
    """Cut a text at its special tokens, which the merges must not see."""
    return re.split("|".join(map(re.escape, marks)), text)
