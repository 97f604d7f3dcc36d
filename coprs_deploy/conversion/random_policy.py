"""Policies with random weights: real architectures in real sizes, and tiny scripted ones.

A tiny policy always generates a fixed text that ends in ``<REF_POS>``: its output head maps each
token's embedding to the next token of the script, and its layers are too weak to interfere. Its
hidden states still depend on the image and the instruction as in any policy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from coprs_deploy.artifacts import write_json
from coprs_deploy.checkpoint import PolicyImageLimits
from coprs_deploy.conversion.policy_files import DEFAULT_PROMPTS
from coprs_deploy.policy.progress_bars import without_progress_bars
from coprs_deploy.prompts import REFERENCE_TOKEN, PromptTemplate, encode_prompt

Family = Literal["qwen2_5_vl", "llava"]

SCRIPT = (
    *("<think>", " this", " generated", " policy", " follows", " a", " script", "</think>"),
    *(REFERENCE_TOKEN, " and", REFERENCE_TOKEN),
)
"""Default text; after the first target it continues with another one, until generation stops."""

SPECIAL_TOKENS: Mapping[Family, Sequence[str]] = {
    "qwen2_5_vl": (
        *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        *("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
    ),
    "llava": ("<pad>", "</s>", "<image>"),
}
END_TOKENS: Mapping[Family, str] = {"qwen2_5_vl": "<|im_end|>", "llava": "</s>"}


@dataclass(frozen=True)
class PolicySize:
    """Architecture of a policy, with the numbers of the public model configurations."""

    family: Family
    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    tie_word_embeddings: bool = False
    image_limits: PolicyImageLimits = field(default_factory=PolicyImageLimits)
    is_scripted: bool = False
    dtype: str = "bfloat16"


def _text(width: int, layers: int, heads: int, mlp: int, *, vocab: int, kv: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "intermediate_size": mlp,
        "vocab_size": vocab,
    }


def _rope(theta: float, *sections: int) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": theta, "mrope_section": list(sections)}
    return {"rope_parameters": rope}


_QWEN_TEXT = {"max_position_embeddings": 32768, **_rope(1e6, 16, 24, 24)}
_QWEN_VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "num_heads": 16,
    "intermediate_size": 3420,
    "patch_size": 14,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
_LLAMA_TEXT = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
_CLIP_VISION = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
_TINY_TEXT = {**_text(64, 2, 2, 128, vocab=512, kv=2), "max_position_embeddings": 2048}
_tiny = partial(
    PolicySize,
    image_limits=PolicyImageLimits(min_pixels=784, max_pixels=12_544),
    is_scripted=True,
    dtype="float32",
)

POLICY_SIZES: Mapping[str, PolicySize] = {
    "tiny": _tiny(
        "qwen2_5_vl",
        _TINY_TEXT | _rope(1e4, 4, 6, 6),
        _QWEN_VISION
        | {"depth": 2, "hidden_size": 64, "num_heads": 2, "intermediate_size": 128}
        | {"fullatt_block_indexes": [1]},
    ),
    "tiny-llava": _tiny(
        "llava",
        _LLAMA_TEXT | _TINY_TEXT,
        _CLIP_VISION
        | {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
        | {"intermediate_size": 128, "image_size": 56, "projection_dim": 64},
    ),
    "3b": PolicySize(
        "qwen2_5_vl",
        _QWEN_TEXT | _text(2048, 36, 16, 11008, vocab=151936, kv=2),
        _QWEN_VISION,
        tie_word_embeddings=True,
    ),
    "7b": PolicySize(
        "qwen2_5_vl", _QWEN_TEXT | _text(3584, 28, 28, 18944, vocab=152064, kv=4), _QWEN_VISION
    ),
    "llava-7b": PolicySize(
        "llava", _LLAMA_TEXT | _text(4096, 32, 32, 11008, vocab=32064, kv=32), _CLIP_VISION
    ),
    "llava-13b": PolicySize(
        "llava", _LLAMA_TEXT | _text(5120, 40, 40, 13824, vocab=32064, kv=40), _CLIP_VISION
    ),
}
"""Real sizes (Qwen2.5-VL 3B and 7B, LLaVA-1.5 7B and 13B) and two tiny ones."""


LARGE_POLICY = 1_000_000_000
"""Number of parameters from which a policy is never in memory as a whole."""

SHARD_BYTES = 1_000_000_000
"""Size of the weight files of a large policy; one of them is in memory at a time."""


@dataclass(frozen=True)
class RandomPolicy:
    """Policy in memory with everything that its directory needs.

    The parameters of a large policy are on the meta device; ``save`` draws them from ``seed``.
    """

    model: Any
    tokenizer: Any
    image_processor: Any
    prompt: PromptTemplate
    image_limits: PolicyImageLimits
    seed: int = 0

    def save(self, directory: Path) -> None:
        """Write the transformers directory."""
        with without_progress_bars():
            if self.model.device.type == "meta":
                _save_large(self.model, directory, self.seed)
            else:
                self.model.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)
        self.image_processor.save_pretrained(directory)


def build_random_policy(
    size: str, seed: int = 0, script: Sequence[str] = SCRIPT, has_reference_token: bool = True
) -> RandomPolicy:
    """Build a policy with random weights.

    ``size`` is a name in ``POLICY_SIZES``. ``script`` is the text of a tiny policy, one token per
    entry; a repeated token must have the same successor each time. Without an end token generation
    does not stop by itself.

    Raises:
        ValueError: a token of the script has two successors.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    described = POLICY_SIZES[size]
    tokenizer = build_tokenizer(described.family, script, has_reference_token)
    config = build_config(described, tokenizer)
    dtype = getattr(torch, described.dtype)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    if model.num_parameters() < LARGE_POLICY:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    model.requires_grad_(False).eval()
    ids = tokenizer.convert_tokens_to_ids
    model.generation_config.eos_token_id = ids(END_TOKENS[described.family])
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    prompt = DEFAULT_PROMPTS[described.family]
    if described.is_scripted:
        last = encode_prompt(prompt, tokenizer, "anything", 1)[-1]
        # A byte-level vocabulary spells a leading space as a letter.
        spelled = ("Ġ" + word[1:] if word.startswith(" ") else word for word in script)
        _write_script(model, [last, *map(ids, spelled)], seed)
    return RandomPolicy(
        model, tokenizer, _image_processor(described), prompt, described.image_limits, seed
    )


def _save_large(model: Any, directory: Path, seed: int) -> None:
    """Write configuration and random weights of a policy on the meta device, file by file."""
    import torch
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(directory)
    model.generation_config.save_pretrained(directory)
    described = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del described["lm_head.weight"]
    split = split_torch_state_dict_into_shards(described, max_shard_size=SHARD_BYTES)
    generator = torch.Generator().manual_seed(seed)
    for file, names in split.filename_to_tensors.items():
        tensors = {name: _random_weight(name, described[name], generator) for name in names}
        save_file(tensors, directory / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(directory / "model.safetensors.index.json", index)


def _random_weight(name: str, described: Any, generator: Any) -> Any:
    """Draw a weight as transformers initializes it: norms are one, biases zero."""
    import torch

    if name.endswith(".bias"):
        return torch.zeros(described.shape, dtype=described.dtype)
    if described.ndim == 1 and name.endswith(".weight"):
        return torch.ones(described.shape, dtype=described.dtype)
    return torch.randn(described.shape, generator=generator).mul_(0.02).to(described.dtype)


def build_config(size: PolicySize, tokenizer: Any) -> Any:
    """Build the transformers configuration with the tokenizer's special ids."""
    from transformers import LlavaConfig, Qwen2_5_VLConfig

    token = tokenizer.convert_tokens_to_ids
    text = {
        **size.text,
        "bos_token_id": None,
        "eos_token_id": token(END_TOKENS[size.family]),
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": size.tie_word_embeddings,
    }
    if size.family == "llava":
        return LlavaConfig(
            text_config={"model_type": "llama", **text},
            vision_config={"model_type": "clip_vision_model", **size.vision},
            image_token_index=token("<image>"),
            vision_feature_select_strategy="default",
            vision_feature_layer=-2,
            tie_word_embeddings=size.tie_word_embeddings,
        )
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config={**size.vision, "out_hidden_size": size.text["hidden_size"]},
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=size.tie_word_embeddings,
    )


def build_tokenizer(
    family: Family, script: Sequence[str] = SCRIPT, has_reference_token: bool = True
) -> Any:
    """Train a small byte-level BPE in which every word of the script is one token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = list(SPECIAL_TOKENS[family])
    words = [word for word in script if not word.startswith("<")]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    corpus = [DEFAULT_PROMPTS[family].text] * 4 + ["x" + word for word in words] * 50
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=480, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(corpus, trainer)
    added = [*special, REFERENCE_TOKEN] if has_reference_token else special
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in added])
    marks = [t for t in ("<think>", "</think>") if t in script]
    backend.add_tokens([AddedToken(t, special=False, normalized=False) for t in marks])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=special[0],
        eos_token=END_TOKENS[family],
        extra_special_tokens=special[1:],
    )


def _write_script(model: Any, tokens: Sequence[int], seed: int) -> None:
    """Make greedy decoding follow ``tokens``: each token's embedding maps to its successor."""
    import torch

    successors: dict[int, int] = {}
    for token, successor in pairwise(tokens):
        if successors.setdefault(token, successor) != successor:
            raise ValueError(f"token {token} has two successors in the script; accepted: one")
    generator = torch.Generator().manual_seed(seed)
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    with torch.no_grad():
        table.copy_(torch.randn(table.shape, generator=generator))
        head.copy_(0.01 * torch.randn(head.shape, generator=generator))
        for token, successor in successors.items():
            head[successor] += table[token] / table.shape[1] ** 0.5
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")) and "language_model" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator))
                weight.mul_(0.25 / weight.shape[1] ** 0.5)
            elif name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
                weight.copy_(torch.randn(weight.shape, generator=generator))
                weight.mul_(weight.shape[1] ** -0.5)


def _image_processor(size: PolicySize) -> Any:
    if size.family == "llava":
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        side = size.vision["image_size"]
        return CLIPImageProcessorPil(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}
        )
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    limits = size.image_limits
    return Qwen2VLImageProcessorPil(
        patch_size=size.vision["patch_size"],
        size={"shortest_edge": limits.min_pixels, "longest_edge": limits.max_pixels},
    )
