"""Quantize the policy of a checkpoint with llm-compressor, in the format that vLLM runs.

The linear layers of the decoder are quantized; vision tower, embeddings and output head are not.
w4a16 and w8a8 choose each weight by GPTQ, from the inputs that its layer gets on the calibration
examples; fp8 rounds to the nearest value. The written files are then checked: unpacked in
transformers, with the inputs of each product rounded as vLLM rounds them, the policy responds to
held-out examples, and is compared with the float policy.
"""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from coprs_deploy.artifacts import new_directory, write_json
from coprs_deploy.bundle import PolicyEquivalence, PolicyQuantization
from coprs_deploy.checkpoint import (
    CONFIG_FILE,
    POLICY_DIRECTORY,
    SEGMENTATION_FILE,
    Checkpoint,
    read_checkpoint,
)
from coprs_deploy.errors import (
    EquivalenceError,
    MissingDependencyError,
    install_hint,
)
from coprs_deploy.export.calibration_examples import CalibrationExamples, split_examples
from coprs_deploy.export.calibration_inputs import (
    CalibrationInputs,
    open_policy,
    respond_to_examples,
)
from coprs_deploy.export.tolerances import QUANTIZED_POLICY_TOLERANCES
from coprs_deploy.machine import installed_versions
from coprs_deploy.policy.compressed_weights import require_float_weights
from coprs_deploy.policy.policy import PolicyRequest
from coprs_deploy.policy.policy_size import check_policy_size
from coprs_deploy.policy.progress_bars import without_progress_bars

SCHEMES = tuple(QUANTIZED_POLICY_TOLERANCES)
"""Bits of the weights (w) and of the inputs of each product (a)."""

GROUP_SIZES = (128, 64, 32)
"""Weights that share one scale in w4a16: the first that divides the columns of every layer."""

NOT_QUANTIZED = (
    "re:.*lm_head",
    "re:.*visual.*",
    "re:.*vision_tower.*",
    "re:.*multi_modal_projector.*",
)
"""Linear layers outside the decoder, as patterns: their full names differ between transformers,
where llm-compressor reads them, the files, and vLLM."""

TOOL = "llmcompressor"

Report = Callable[[str], None]


@dataclass(frozen=True)
class QuantizationOptions:
    """Options of a quantization.

    Attributes:
        allow_inexact_policy: write the checkpoint although its policy is outside its tolerance, as
            random weights of real size are.
        overwrite: replace an existing checkpoint.
    """

    allow_inexact_policy: bool = False
    overwrite: bool = False


def quantize_checkpoint(
    path: str | Path,
    out: str | Path,
    scheme: str,
    calibration: str | Path,
    options: QuantizationOptions | None = None,
    *,
    report: Report = lambda step: None,
) -> Checkpoint:
    """Write a checkpoint whose policy is quantized, and checked against the float policy.

    llm-compressor and the check use a GPU if PyTorch finds one; the float policy of the check is
    computed on the CPU.

    Args:
        path: checkpoint with a float policy.
        out: checkpoint to write.
        scheme: one of :data:`SCHEMES`.
        calibration: example file; see :func:`.calibration_examples.split_examples`.
        options: options.
        report: called with the name of each step as it starts.

    Raises:
        MissingDependencyError: llm-compressor is not installed.
        CheckpointError: the checkpoint cannot be used, or its policy is quantized already.
        PolicyError: the policy's configuration does not belong to its weights.
        ArtifactError: ``out`` exists, or the examples cannot be read.
        EquivalenceError: the policy is outside its tolerance; nothing is written.
        ValueError: the scheme is unknown or does not fit the policy, or there are too few examples.
    """
    options = options or QuantizationOptions()
    if scheme not in SCHEMES:
        raise ValueError(f"scheme is {scheme!r}; accepted: {', '.join(SCHEMES)}")
    with _output_on_stderr():
        _import_tool()
    checkpoint = read_checkpoint(path)
    require_float_weights(checkpoint.policy_path, "quantizing it")
    check_policy_size(checkpoint.policy_path)
    report("read examples")
    examples = split_examples(calibration)
    with new_directory(Path(out), CONFIG_FILE, options.overwrite) as partial:
        policy = partial / POLICY_DIRECTORY
        policy.mkdir()
        group_size = write_quantized_policy(checkpoint, policy, scheme, examples, report)
        equivalence = _check(checkpoint, policy, scheme, examples, report)
        if not equivalence.passed and not options.allow_inexact_policy:
            raise _refusal(checkpoint, policy, scheme, examples, equivalence)
        report("write checkpoint")
        shutil.copyfile(checkpoint.path / SEGMENTATION_FILE, partial / SEGMENTATION_FILE)
        record = PolicyQuantization(
            scheme=scheme,
            group_size=group_size,
            tool=f"{TOOL} {installed_versions([TOOL])[TOOL]}",
            calibration=examples.record(),
            equivalence=equivalence,
        )
        config = msgspec.structs.replace(checkpoint.config, policy_quantization=record)
        write_json(partial / CONFIG_FILE, config.to_json())
    return Checkpoint(Path(out), config)


def write_quantized_policy(
    checkpoint: Checkpoint,
    out: Path,
    scheme: str,
    examples: CalibrationExamples,
    report: Report = lambda step: None,
) -> int | None:
    """Quantize the policy of a checkpoint into an empty directory; return the group size.

    Raises:
        ValueError: no group size divides the columns of every layer.
    """
    from torch.utils.data import DataLoader
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    source = checkpoint.policy_path
    responses = respond_to_examples(checkpoint, examples, report) if scheme != "fp8" else []
    report(f"quantize to {scheme}")
    with _output_on_stderr(), without_progress_bars():
        from llmcompressor import oneshot

        model = AutoModelForImageTextToText.from_pretrained(
            source, dtype="auto", local_files_only=True
        ).eval()
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
        group_size = choose_group_size(model) if scheme == "w4a16" else None
        inputs = CalibrationInputs(checkpoint, examples, responses, model.config, tokenizer)
        oneshot(
            model=model,
            processor=tokenizer,
            recipe=_recipe(scheme, group_size),
            dataset=DataLoader(inputs, batch_size=None) if responses else None,  # type: ignore[arg-type]
            pipeline="sequential" if responses else "datafree",
        )
        model.save_pretrained(out, save_compressed=True)
    _complete_policy(source, out)
    return group_size


def choose_group_size(model: Any) -> int:
    """Return the first of :data:`GROUP_SIZES` that divides the columns of the decoder's layers.

    Raises:
        ValueError: none does.
    """
    import torch

    columns = {
        module.in_features
        for module in model.model.language_model.modules()
        if isinstance(module, torch.nn.Linear)
    }
    for size in GROUP_SIZES:
        if all(number % size == 0 for number in columns):
            return size
    raise ValueError(
        f"scheme is 'w4a16', and the decoder's layers have {sorted(columns)} columns; accepted: "
        f"multiples of {GROUP_SIZES[-1]}; use w8a8 or fp8"
    )


def _recipe(scheme: str, group_size: int | None) -> Any:
    """Return the modifier of llm-compressor for a scheme."""
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier

    ignore = list(NOT_QUANTIZED)
    if scheme == "fp8":
        return QuantizationModifier(targets="Linear", scheme="FP8_DYNAMIC", ignore=ignore)
    if scheme == "w8a8":
        return GPTQModifier(targets="Linear", scheme="W8A8", ignore=ignore)
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "symmetric": True}
    groups = {"targets": ["Linear"], "weights": {**weights, "group_size": group_size}}
    return GPTQModifier(config_groups={"group_0": groups}, ignore=ignore)


def _complete_policy(source: Path, out: Path) -> None:
    """Add the source's other files, and its configuration with the quantization."""
    from coprs_deploy.conversion.policy_files import copy_policy_files

    written = json.loads((out / "config.json").read_text(encoding="utf-8"))
    copy_policy_files(source, out)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    quantization = {**written["quantization_config"], "ignore": list(NOT_QUANTIZED)}
    write_json(out / "config.json", {**config, "quantization_config": quantization})


def _check(
    checkpoint: Checkpoint,
    policy: Path,
    scheme: str,
    examples: CalibrationExamples,
    report: Report,
) -> PolicyEquivalence:
    """Compare the written policy with the float one on the held-out examples."""
    from coprs_deploy.export.policy.check import compare_samples
    from coprs_deploy.export.policy.samples import decode_sample

    report("responses of the quantized policy")
    with _output_on_stderr(), open_policy(checkpoint, policy) as candidate:
        samples = [
            decode_sample(candidate, examples.file.load(index)) for index in examples.held_out
        ]
    return compare_samples(checkpoint, samples, QUANTIZED_POLICY_TOLERANCES[scheme], report)


def _refusal(
    checkpoint: Checkpoint,
    policy: Path,
    scheme: str,
    examples: CalibrationExamples,
    equivalence: PolicyEquivalence,
) -> EquivalenceError:
    """Return the error of a policy outside its tolerance, with the error of each layer."""
    tolerance = QUANTIZED_POLICY_TOLERANCES[scheme]
    index = examples.held_out[0]
    with _output_on_stderr():
        found = _layer_outputs(checkpoint, policy, examples, index)
    wanted = _layer_outputs(checkpoint, checkpoint.policy_path, examples, index)
    return EquivalenceError(
        f"the policy in {scheme}: {equivalence}; accepted: {tolerance}\n"
        f"{describe_layer_errors(found, wanted)}\n"
        "What to try: more examples in --calibration, of the kind that the model will see; another "
        "--scheme (w8a8 rounds least); or, to measure speed only, --allow-inexact-policy"
    )


def describe_layer_errors(found: Sequence[Any], wanted: Sequence[Any]) -> str:
    """Compare the outputs of the decoder's layers, one line per layer.

    A layer's error includes those of the layers before it.
    """
    from coprs_deploy.export.equivalence import relative_error

    lines = ["Relative error of each decoder layer's output, layers before it included:"]
    for number, (values, expected) in enumerate(zip(found, wanted, strict=True)):
        lines.append(f"  layer {number}: {relative_error(values, expected, order=2):.2%}")
    return "\n".join(lines)


def _layer_outputs(
    checkpoint: Checkpoint, policy: Path, examples: CalibrationExamples, index: int
) -> list[Any]:
    """Return the output of each decoder layer, (1, L, D), for the prompt of an example."""
    example = examples.file.load(index)
    outputs: list[Any] = []

    def record(module: object, inputs: object, output: Any) -> None:
        rows = output[0] if isinstance(output, tuple) else output
        outputs.append(rows.float().cpu().numpy())

    with (
        open_policy(checkpoint, policy) as opened,
        opened.start(PolicyRequest(example.image, example.instruction)) as decoding,
    ):
        hooks = [layer.register_forward_hook(record) for layer in opened.decoder_layers]
        decoding.prefill()
        for hook in hooks:
            hook.remove()
    return outputs


def _import_tool() -> None:
    """Import llm-compressor.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import llmcompressor
        from llmcompressor.logger import LoggerConfig, configure_logger
    except ImportError as error:
        raise MissingDependencyError(
            f"quantizing a policy needs {TOOL}, which cannot be imported ({error}); in an "
            f"environment of its own: {install_hint('quantize')}"
        ) from error
    assert llmcompressor is not None
    configure_logger(LoggerConfig(console_log_level="ERROR"))


@contextmanager
def _output_on_stderr() -> Iterator[None]:
    """Send what llm-compressor prints to stderr, and silence its warnings to its developers."""
    with redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
