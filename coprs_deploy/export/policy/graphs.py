"""Convert a policy to OpenVINO graphs: vision tower, embedding table and stateful decoder.

The decoder walks transformers' own layers, with the cache as inputs and outputs; OpenVINO keeps it
inside the graph. 16-bit weights stay 16-bit in the file and are computed with in float32.
``policy_compression`` compresses them to int8 or int4. The decoder's layers are converted and
compressed one by one, and joined, so that few uncompressed weights are in memory.
"""

from __future__ import annotations

import gc
import json
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from coprs_deploy.errors import PolicyError, import_failure, install_hint
from coprs_deploy.export.policy.compression import DecoderInput, LayerInputs, compress_graph
from coprs_deploy.export.policy.modules import (
    VISION_MODULES,
    EntryModule,
    HeadModule,
    LayerModule,
    head_size,
)
from coprs_deploy.policy.openvino_policy.graphs import (
    DECODER_FILE,
    DESCRIPTION_FILE,
    EMBEDDING_FILE,
    PREPROCESSOR_FILE,
    VISION_FILE,
    PolicyGraphs,
)
from coprs_deploy.policy.openvino_policy.positions import QwenVision
from coprs_deploy.policy.openvino_policy.tokenizer import TOKENIZER_FILE
from coprs_deploy.policy.pixels import check_settings
from coprs_deploy.policy.policy_size import check_policy_size
from coprs_deploy.policy.progress_bars import without_progress_bars

LAYERS_PER_LOAD = 8
"""Decoder layers that are converted before the policy is loaded again. Weights are mapped from
their files; what was read of a file stays in memory until the whole file is unmapped."""

FIRST_LAYER_MODE = "int8"
"""Mode of the decoder's first layer, also with int4: with four bits in every layer, most of the
error of the trained policies that were measured came from the first."""


def export_policy_graphs(
    policy: Path, out: Path, precision: str, report: Callable[[str], None]
) -> PolicyGraphs:
    """Convert a transformers directory.

    Args:
        policy: transformers directory of a Qwen2.5-VL or LLaVA-1.5 policy.
        out: directory to create.
        precision: ``fp32`` keeps the weights as they are stored; ``bf16`` rounds them; ``int8`` and
            ``int4`` compress them (with ``int4``, vision tower, first layer of the decoder and
            output head are int8).
        report: called with the name of each step as it starts.

    Raises:
        MissingDependencyError: OpenVINO or NNCF is not installed.
        PolicyError: the family, or a setting of its image processor, is not supported.
    """
    require_converters(precision)
    out.mkdir(parents=True)
    report("load policy")
    load = partial(_load, policy, precision)
    model = load()
    description = _write_description(policy, out, model, precision)
    table = model.get_input_embeddings().weight.detach()
    rows = table.view(torch.uint16) if table.dtype == torch.bfloat16 else table
    np.save(out / EMBEDDING_FILE, rows.numpy())
    modes = {"int8": ("int8", "int8"), "int4": ("int8", "int4")}
    vision_mode, decoder_mode = modes.get(precision, (None, None))
    report("convert vision tower")
    graph = _vision_graph(model)
    _save(graph if vision_mode is None else compress_graph(graph, vision_mode), out / VISION_FILE)
    del model, table, rows, graph
    _unmap_files()
    graph = _decoder_graph(load, decoder_mode, report)
    report("write decoder")
    _save(graph, out / DECODER_FILE)
    return description


def refine_decoder(
    policy: Path,
    graphs: Path,
    samples: Iterable[DecoderInput],
    report: Callable[[str], None],
) -> None:
    """Replace an int4 decoder by one whose weights are fitted to samples.

    Args:
        policy: transformers directory that the graphs were exported from.
        graphs: directory of the graphs.
        samples: what the decoder reads for each sample.
        report: called with the name of each step as it starts.
    """
    graph = _decoder_graph(partial(_load, policy, "int4"), "int4", report, samples)
    report("write decoder")
    _save(graph, graphs / DECODER_FILE)


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
    if model.config.model_type not in VISION_MODULES:
        raise PolicyError(
            f"the policy in {policy} is of type {model.config.model_type!r}; accepted: "
            f"{', '.join(VISION_MODULES)}"
        )
    return model.requires_grad_(False).eval()


def _load(policy: Path, precision: str) -> Any:
    model = load_policy(policy)
    if precision == "bf16":
        round_weights(model)
    for parameter in model.parameters():
        if parameter.ndim == 1:  # norms and biases go into the graph, and would keep a file mapped
            parameter.data = parameter.data.clone()
    return model


def _unmap_files() -> None:
    """Free the modules of policies that are no longer used, and with them the mapped files."""
    # TorchScript keeps what it has traced (https://github.com/pytorch/pytorch/issues/35600).
    torch._C._jit_clear_class_registry()
    torch.jit._recursive.concrete_type_store = torch.jit._recursive.ConcreteTypeStore()
    torch.jit._state._clear_class_state()
    gc.collect()  # modules that were prepared for tracing refer to themselves


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
    check_settings(settings)
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


def _vision_graph(model: Any) -> Any:
    module = VISION_MODULES[model.config.model_type](model)
    example = module.example()
    graph = _convert(module, example)
    for port, name in zip(graph.inputs, example, strict=True):
        port.get_tensor().set_names({name})
    graph.outputs[0].get_tensor().set_names({"tokens"})
    return graph


def _decoder_graph(
    load: Callable[[], Any],
    mode: str | None,
    report: Callable[[str], None],
    samples: Iterable[DecoderInput] = (),
) -> Any:
    """Convert the decoder layer by layer, and move its cache inside the graph.

    Args:
        load: loads the policy, whose weights are mapped from its files.
        mode: ``int8``, ``int4`` or None.
        report: called with the name of each step as it starts.
        samples: what an int4 decoder is fitted to.
    """
    from openvino import opset13 as ops

    model = load()
    config = model.config.get_text_config()
    heads, width, size = config.num_key_value_heads, head_size(config), config.hidden_size
    entry = EntryModule(model)
    x = _parameter("inputs_embeds", np.float32, [1, -1, size])
    position_ids = _parameter("position_ids", np.int64, [entry.axes, 1, -1])
    names = [f"{kind}.{i}" for i in range(config.num_hidden_layers) for kind in ("key", "value")]
    past = [_parameter(f"past.{name}", np.float32, [1, heads, -1, width]) for name in names]
    beams = _parameter("beam_idx", np.int32, [-1])
    # The CPU plugin fuses attention and cache only where a Gather stands; it is always given [0].
    states = [ops.gather(state, beams, ops.constant(0)).output(0) for state in past]

    cache = torch.randn(1, heads, 2, width)
    positions = torch.arange(2, 5).expand(entry.axes, 1, 3).clone()
    graph = _convert(entry, (positions, cache))
    calibration = LayerInputs(samples, graph, (1, heads, 0, width))
    shared = _append(graph, [position_ids.output(0), states[0]])
    rows, rotation = torch.randn(1, 3, size), torch.randn(1, 1, 3, width)
    example = (rows, rotation, rotation, torch.zeros(1, 1, 3, 5), cache, cache)
    report("convert output head")  # first: its compression takes the most memory
    head = _compressed(_convert(HeadModule(model), (rows,)), mode and "int8", "head")
    present, last, count = [], x.output(0), config.num_hidden_layers
    for i in range(count):
        report(f"convert layer {i + 1} of {count}")
        if i % LAYERS_PER_LOAD == 0:
            del model
            _unmap_files()
            model = load()
        layer = LayerModule(model.model.language_model.layers[i], config)
        graph = _convert(layer, example)
        part = mode if i else mode and FIRST_LAYER_MODE
        graph = _compressed(graph, part, f"layer.{i}", calibration.of_layer())
        calibration.advance(graph)
        last, *written = _append(graph, [last, *shared, *states[2 * i : 2 * i + 2]])
        present += written
        del layer, graph  # its results would remain outputs of the decoder
    graph = _stateful_graph(
        [*_append(head, [last]), *present], [x, position_ids, *past, beams], names
    )
    _set_initial_states(graph, (1, heads, 0, width))
    graph.validate_nodes_and_infer_types()
    return graph


def _stateful_graph(outputs: Sequence[Any], parameters: Sequence[Any], names: Sequence[str]) -> Any:
    """Name the outputs, and move the cache inside the graph.

    Args:
        outputs: logits, hidden state, and the extended cache in the order of ``names``.
        parameters: inputs; those of the cache have names of their own.
        names: names of keys and values.
    """
    import openvino as ov
    from openvino import opset13 as ops
    from openvino._offline_transformations import apply_make_stateful_transformation

    for port, name in zip(
        outputs, ["logits", "hidden", *(f"present.{name}" for name in names)], strict=True
    ):
        port.get_tensor().set_names({name})
    graph = ov.Model([ops.result(port) for port in outputs], list(parameters))
    apply_make_stateful_transformation(graph, {f"past.{name}": f"present.{name}" for name in names})
    return graph


def _parameter(name: str, dtype: Any, shape: Sequence[int]) -> Any:
    from openvino import opset13 as ops

    parameter = ops.parameter(list(shape), dtype, name=name)
    parameter.output(0).get_tensor().set_names({name})
    return parameter


def _append(graph: Any, sources: Sequence[Any]) -> list[Any]:
    """Replace the inputs of a graph by outputs of others; return its own outputs."""
    for parameter, source in zip(graph.get_parameters(), sources, strict=True):
        for user in parameter.output(0).get_target_inputs():
            user.replace_source_output(source)
    return [result.input(0).get_source_output() for result in graph.get_results()]


def _compressed(
    graph: Any, mode: str | None, name: str, inputs: Sequence[Sequence[NDArray[Any]]] = ()
) -> Any:
    """Compress a part of the decoder, and give its nodes names that are unique among all parts."""
    if mode is not None:
        graph = compress_graph(graph, mode, all_layers=True, inputs=inputs)
    for node in graph.get_ops():
        node.set_friendly_name(f"{name}.{node.get_friendly_name()}")
    return graph


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
        # Shared constants would point into modules that are freed before the graph is saved.
        return ov.convert_model(module.eval(), example_input=example, share_weights=False)


def _save(graph: Any, path: Path) -> None:
    import openvino as ov

    ov.save_model(graph, path, compress_to_fp16=False)


def require_converters(precision: str) -> None:
    """Check early whether the packages of a conversion are installed.

    Raises:
        MissingDependencyError: OpenVINO, or NNCF for ``int8`` and ``int4``, is not.
    """
    needed = ["openvino"] if precision in ("fp32", "bf16") else ["openvino", "nncf"]
    for package in needed:
        try:
            __import__(package)
        except ImportError as error:
            need, hint = f"the policy's {precision} graph", install_hint("policy-export")
            raise import_failure(error, package, hint, needed_by=need) from error
