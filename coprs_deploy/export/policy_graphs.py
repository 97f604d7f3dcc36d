"""Convert a policy to OpenVINO graphs: vision tower, embedding table and stateful decoder.

The decoder walks transformers' own layers, with the cache as inputs and outputs; OpenVINO keeps it
inside the graph. 16-bit weights stay 16-bit in the file and are computed with in float32.
``policy_compression`` compresses them to int8 or int4.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coprs_deploy.errors import PolicyError, import_failure, install_hint
from coprs_deploy.export.policy_compression import compress_graph
from coprs_deploy.policy.openvino_policy.graphs import (
    DECODER_FILE,
    DESCRIPTION_FILE,
    EMBEDDING_FILE,
    PREPROCESSOR_FILE,
    VISION_FILE,
    PolicyGraphs,
)
from coprs_deploy.policy.openvino_policy.positions import MASKED, QwenVision
from coprs_deploy.policy.openvino_policy.tokenizer import TOKENIZER_FILE
from coprs_deploy.policy.policy_size import check_policy_size
from coprs_deploy.policy.progress_bars import without_progress_bars


def export_policy_graphs(
    policy: Path, out: Path, precision: str, report: Callable[[str], None]
) -> PolicyGraphs:
    """Convert a transformers directory.

    Args:
        policy: transformers directory of a Qwen2.5-VL or LLaVA-1.5 policy.
        out: directory to create.
        precision: ``fp32`` keeps the weights as they are stored; ``bf16`` rounds them; ``int8`` and
            ``int4`` compress them (with ``int4``, vision tower and output head are int8).
        report: called with the name of each step as it starts.

    Raises:
        MissingDependencyError: OpenVINO or NNCF is not installed.
        PolicyError: the family, or a setting of its image processor, is not supported.
    """
    _import_converters(precision)
    out.mkdir(parents=True)
    report("load policy")
    model = load_policy(policy)
    if precision == "bf16":
        round_weights(model)
    description = _write_description(policy, out, model, precision)
    table = model.get_input_embeddings().weight.detach()
    rows = table.view(torch.uint16) if table.dtype == torch.bfloat16 else table
    np.save(out / EMBEDDING_FILE, rows.numpy())
    modes = {"int8": ("int8", "int8"), "int4": ("int8", "int4")}
    vision_mode, decoder_mode = modes.get(precision, (None, None))
    for file, build, mode in (
        (VISION_FILE, _vision_graph, vision_mode),
        (DECODER_FILE, _decoder_graph, decoder_mode),
    ):
        report(f"convert {Path(file).stem}")
        graph = build(model)
        if file == DECODER_FILE:
            del model
        _save(graph, out / file, mode)
    return description


def load_policy(policy: Path) -> Any:
    """Load a policy for conversion, in its stored dtype.

    Raises:
        PolicyError: it cannot be loaded, or is of another family.
    """
    from transformers import AutoModelForImageTextToText

    check_policy_size(policy)
    try:
        with without_progress_bars():
            model = AutoModelForImageTextToText.from_pretrained(
                policy, dtype="auto", local_files_only=True
            )
    except (OSError, ValueError) as error:
        raise PolicyError(f"{policy} cannot be loaded as a policy: {error}") from error
    if model.config.model_type not in _VISION_MODULES:
        raise PolicyError(
            f"the policy in {policy} is of type {model.config.model_type!r}; accepted: "
            f"{', '.join(_VISION_MODULES)}"
        )
    return model.requires_grad_(False).eval()


def round_weights(model: nn.Module) -> None:
    """Round the weights to bfloat16; buffers, such as rotary frequencies, stay float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()


def _write_description(policy: Path, out: Path, model: Any, precision: str) -> PolicyGraphs:
    """Write what the runtime reads besides the graphs, all defaults filled in."""
    from transformers import AutoImageProcessor, AutoTokenizer

    config = model.config
    tokenizer = AutoTokenizer.from_pretrained(policy, local_files_only=True)
    (out / TOKENIZER_FILE).write_text(tokenizer.backend_tokenizer.to_str(), encoding="utf-8")
    processor = AutoImageProcessor.from_pretrained(policy, backend="pil", local_files_only=True)
    settings = json.loads(processor.to_json_string())
    for name in ("do_resize", "do_rescale", "do_normalize"):
        if not settings.get(name, True):
            raise PolicyError(
                f"{name} is false in the image processor of {policy}; accepted for "
                "--policy-runtime openvino: true"
            )
    (out / PREPROCESSOR_FILE).write_text(json.dumps(settings, indent=2), encoding="utf-8")
    ends = model.generation_config.eos_token_id
    ends = [tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])]
    vision, num_image_tokens = None, None
    if config.model_type == "qwen2_5_vl":
        sizes = config.vision_config
        vision = QwenVision(
            patch_size=sizes.patch_size,
            spatial_merge_size=sizes.spatial_merge_size,
            window_size=sizes.window_size,
        )
    else:
        crop, side = settings["crop_size"], config.vision_config.patch_size
        num_image_tokens = (crop["height"] // side) * (crop["width"] // side)
        num_image_tokens += config.vision_feature_select_strategy == "full"
    text = config.get_text_config()
    description = PolicyGraphs(
        family=config.model_type,
        precision=precision,
        hidden_size=text.hidden_size,
        image_token_id=config.image_token_id,
        end_token_ids=tuple(dict.fromkeys(i for i in ends if i is not None)),
        num_layers=text.num_hidden_layers,
        vision=vision,
        num_image_tokens=num_image_tokens,
    )
    content = json.dumps(description.to_json(), indent=2)
    (out / DESCRIPTION_FILE).write_text(content, encoding="utf-8")
    return description


class _DecoderModule(nn.Module):
    """(1, L, D) embeddings, positions and the cache -> logits and hidden state of the last row."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.text = model.model.language_model
        self.head = model.get_output_embeddings()
        config = model.config.get_text_config()
        self.groups = config.num_attention_heads // config.num_key_value_heads
        self.width = head_size(config)
        self.axes = 3 if model.config.model_type == "qwen2_5_vl" else 1

    def forward(
        self, inputs_embeds: Tensor, position_ids: Tensor, past: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        x, present = inputs_embeds, []
        count, before = x.shape[1], past[0].shape[2]
        axes = position_ids if self.axes == 3 else position_ids[0]
        rotation = [t.unsqueeze(1) for t in self.text.rotary_emb(x, axes)]
        ahead = torch.arange(before + count)[None] > (torch.arange(count) + before)[:, None]
        mask = torch.where(ahead, MASKED, 0.0)[None, None]
        for i, layer in enumerate(self.text.layers):
            attention, y = layer.self_attn, layer.input_layernorm(x)
            q, k, v = (
                projection(y).view(1, count, -1, self.width).transpose(1, 2)
                for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            k = torch.cat((past[2 * i], _rotate(k, *rotation)), 2)
            v = torch.cat((past[2 * i + 1], v), 2)
            present += [k, v]
            q = _rotate(q, *rotation)
            y = F.scaled_dot_product_attention(q, self._repeat(k), self._repeat(v), mask)
            x = x + attention.o_proj(y.transpose(1, 2).reshape(1, count, -1))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        hidden = self.text.norm(x[:, -1])
        return self.head(hidden), hidden, *present

    def _repeat(self, x: Tensor) -> Tensor:
        """Repeat grouped heads in the form that the plugin's attention with cache looks for."""
        batch, heads, count, width = x.shape
        repeated = x[:, :, None].expand(batch, heads, self.groups, count, width)
        return repeated.reshape(batch, heads * self.groups, count, width)


class _QwenVisionModule(nn.Module):
    """Patches in window order -> (V, D) tokens; see ``positions.vision_inputs``.

    Windows are padded to one size, so that one graph serves every image size.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.tower = model.model.visual
        self.config = model.config.vision_config
        kernel = self.tower.patch_embed.proj.weight.flatten(1)
        self.patch = nn.Linear(kernel.shape[1], kernel.shape[0], bias=False)
        self.patch.weight = nn.Parameter(kernel, requires_grad=False)

    def example(self) -> dict[str, Tensor]:
        unit = self.config.spatial_merge_size**2
        count = 8 * unit
        return {
            "patches": torch.randn(count, self.patch.in_features),
            "positions": torch.randint(0, 4, (count, 2)),
            "slots": torch.arange(count),
            "slot_mask": torch.zeros(2, 1, 1, count // 2),
            "unslot": torch.arange(count),
            "image_order": torch.arange(8),
        }

    def forward(  # noqa: PLR0917
        self,
        patches: Tensor,
        positions: Tensor,
        slots: Tensor,
        slot_mask: Tensor,
        unslot: Tensor,
        image_order: Tensor,
    ) -> Tensor:
        x, heads = self.patch(patches), self.config.num_heads
        rotation = [t.unsqueeze(1) for t in self.tower.rotary_pos_emb(x, positions)]
        windows, size = slot_mask.shape[0], slot_mask.shape[3]
        for i, block in enumerate(self.tower.blocks):
            y = block.attn.qkv(block.norm1(x)).reshape(x.shape[0], 3, heads, -1)
            parts = _rotate(y[:, 0], *rotation), _rotate(y[:, 1], *rotation), y[:, 2]
            if i in self.config.fullatt_block_indexes:
                q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in parts)
                y = F.scaled_dot_product_attention(q, k, v)
                y = y.squeeze(0).transpose(0, 1).reshape(x.shape)
            else:
                padded = (t[slots].reshape(windows, size, heads, -1) for t in parts)
                q, k, v = (t.transpose(1, 2) for t in padded)
                y = F.scaled_dot_product_attention(q, k, v, slot_mask)
                y = y.transpose(1, 2).reshape(windows * size, x.shape[1])[unslot]
            x = x + block.attn.proj(y)
            x = x + block.mlp(block.norm2(x))
        tokens: Tensor = self.tower.merger(x)[image_order]
        return tokens


class _LlavaVisionModule(nn.Module):
    """(1, 3, S, S) pixels -> (V, D) tokens."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.tower = model.model.vision_tower
        self.projector = model.model.multi_modal_projector
        self.layer = model.config.vision_feature_layer
        self.keeps_class_token = model.config.vision_feature_select_strategy == "full"
        self.side = model.config.vision_config.image_size

    def example(self) -> dict[str, Tensor]:
        return {"pixel_values": torch.randn(1, 3, self.side, self.side)}

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.tower.pre_layrnorm(self.tower.embeddings(pixel_values))
        states = [x]
        for layer in self.tower.encoder.layers:
            x = layer(x, attention_mask=None)
            x = x[0] if isinstance(x, tuple) else x
            states.append(x)
        features = states[self.layer]
        kept = features if self.keeps_class_token else features[:, 1:]
        tokens: Tensor = self.projector(kept)[0]
        return tokens


_VISION_MODULES: Mapping[str, Callable[[Any], Any]] = {
    "qwen2_5_vl": _QwenVisionModule,
    "llava": _LlavaVisionModule,
}


def head_size(config: Any) -> int:
    """Return the size of an attention head of a text config."""
    given = getattr(config, "head_dim", None)
    return int(given or config.hidden_size // config.num_attention_heads)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def _vision_graph(model: Any) -> Any:
    module = _VISION_MODULES[model.config.model_type](model)
    example = module.example()
    graph = _convert(module, example)
    for port, name in zip(graph.inputs, example, strict=True):
        port.get_tensor().set_names({name})
    graph.outputs[0].get_tensor().set_names({"tokens"})
    return graph


def _decoder_graph(model: Any) -> Any:
    """Convert the decoder and move its cache inside the graph."""
    import openvino as ov
    from openvino._offline_transformations import apply_make_stateful_transformation

    module = _DecoderModule(model)
    config = model.config.get_text_config()
    names = [f"{kind}.{i}" for i in range(config.num_hidden_layers) for kind in ("key", "value")]
    heads, width = config.num_key_value_heads, module.width
    past = tuple(torch.randn(1, heads, 2, width) for _ in names)
    positions = torch.arange(2, 5).expand(module.axes, 1, 3).clone()
    graph = _convert(module, (torch.randn(1, 3, config.hidden_size), positions, past))
    inputs = ["inputs_embeds", "position_ids", *(f"past.{name}" for name in names)]
    shapes = [[1, -1, config.hidden_size], [module.axes, 1, -1]]
    shapes += [[1, heads, -1, width]] * len(names)
    for port, name, shape in zip(graph.inputs, inputs, shapes, strict=True):
        port.get_tensor().set_names({name})
        port.get_node().set_partial_shape(ov.PartialShape(shape))
    outputs = ["logits", "hidden", *(f"present.{name}" for name in names)]
    for port, name in zip(graph.outputs, outputs, strict=True):
        port.get_tensor().set_names({name})
    _insert_beam_order(graph, len(names))
    graph.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(graph, {f"past.{name}": f"present.{name}" for name in names})
    _set_initial_states(graph, (1, heads, 0, width))
    graph.validate_nodes_and_infer_types()
    return graph


def _insert_beam_order(graph: Any, num_states: int) -> None:
    """Put a Gather by ``beam_idx`` after each state.

    The CPU plugin fuses attention and cache only where one stands; it is always given [0].
    """
    from openvino import opset13 as ops

    order = ops.parameter([-1], np.int32, name="beam_idx")
    order.output(0).get_tensor().set_names({"beam_idx"})
    graph.add_parameters([order])
    for port in graph.inputs[2 : 2 + num_states]:
        users = port.get_target_inputs()
        gathered = ops.gather(port, order, ops.constant(0))
        for user in users:
            user.replace_source_output(gathered.output(0))


def _set_initial_states(graph: Any, shape: tuple[int, ...]) -> None:
    """Give each state an empty first value; OpenVINO 2026.4 does not compile a graph without."""
    from openvino import opset13 as ops

    for node in graph.get_ops():
        if node.get_type_name() == "ReadValue":
            empty = ops.broadcast(ops.constant(np.float32(0)), ops.constant(list(shape)))
            node.set_arguments([empty.output(0)])


def _convert(module: nn.Module, example: Any) -> Any:
    import openvino as ov
    from openvino.frontend.pytorch.patch_model import __make_16bit_traceable as keep_16bit

    if any(p.dtype != torch.float32 for p in module.parameters()):
        # Constants stay 16-bit, everything is computed in float32.
        keep_16bit(module)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing fixes sizes that are constants of a policy
        return ov.convert_model(module.eval(), example_input=example)


def _save(graph: Any, path: Path, mode: str | None) -> None:
    import openvino as ov

    if mode is not None:
        graph = compress_graph(graph, mode)
    ov.save_model(graph, path, compress_to_fp16=False)


def _import_converters(precision: str) -> None:
    needed = ["openvino"] if precision in ("fp32", "bf16") else ["openvino", "nncf"]
    for package in needed:
        try:
            __import__(package)
        except ImportError as error:
            need, hint = f"the policy's {precision} graph", install_hint("policy-export")
            raise import_failure(error, package, hint, needed_by=need) from error
