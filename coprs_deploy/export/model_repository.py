"""Model repository of NVIDIA's Triton Inference Server, from a bundle.

    coprs_image_encoder/    config.pbtxt, 1/image_encoder.onnx (.data) or .engine
    coprs_prior/            likewise
    coprs_mask_decoder/     likewise
    coprs/                  config.pbtxt, manifest.json, 1/model.py: image file and concentration
                            in, masks out; calls the other three

Files of graphs and names of tensors are those of the bundle. ``coprs`` runs in Triton's Python
backend, where this package has to be installed (:mod:`coprs_deploy.runtime.python_backend`). The
policy, which writes the reasoning and gives the concentration, stays outside.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from coprs_deploy.artifacts import check_replaceable, new_directory, write_text
from coprs_deploy.bundle import MANIFEST_FILE, Bundle, GraphRecord
from coprs_deploy.errors import ArtifactError
from coprs_deploy.specs import MODEL_NAME, MODEL_TENSORS, PRIOR, TensorSpec, model_of_graph

CONFIG_FILE = "config.pbtxt"
MARKER = f"{MODEL_NAME}/{CONFIG_FILE}"

VERSION = "1"
"""Folder of the files: Triton's number of the version."""

BACKENDS = {"onnxruntime": "onnxruntime", "tensorrt": "tensorrt"}
"""Triton's backend for each runtime of a bundle."""

NUM_INSTANCES = 2
"""Processes of the Python model, so that one image is decoded while another is in the graphs."""

DATA_TYPES = {
    "float32": "TYPE_FP32",
    "int64": "TYPE_INT64",
    "bool": "TYPE_BOOL",
    "bytes": "TYPE_STRING",
}

MODEL_SOURCE = '''"""Image file and concentration in, masks out."""

from coprs_deploy.runtime.python_backend import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


def check_model_repository(runtime: str, bundle: Path, out: Path, overwrite: bool) -> None:
    """Check early whether :func:`write_model_repository` can write a bundle of a runtime.

    Raises:
        ValueError: Triton has no backend for the runtime.
        ArtifactError: ``out`` exists and is not to be replaced, or is not beside the bundle.
    """
    if runtime not in BACKENDS:
        raise ValueError(
            f"a model repository has no backend for the runtime {runtime!r}; accepted with "
            f"--triton: {', '.join(BACKENDS)}"
        )
    first, second = (Path(os.path.realpath(path)) for path in (bundle, out))
    if first.is_relative_to(second) or second.is_relative_to(first):
        raise ArtifactError(
            f"the model repository {out} and the bundle {bundle} are the same directory, or one is "
            "inside the other, and either is replaced as a whole; choose a directory beside it"
        )
    check_replaceable(out, MARKER, overwrite)


def write_model_repository(bundle: Bundle, out: Path, overwrite: bool = False) -> None:
    """Write the model repository of a bundle.

    Args:
        bundle: the bundle; it stays as it is.
        out: directory to write.
        overwrite: whether an existing model repository is replaced.

    Raises:
        ValueError: Triton has no backend for a graph's runtime.
        ArtifactError: ``out`` exists and is not to be replaced, or is not beside the bundle.
    """
    graphs = bundle.manifest.graphs
    for graph in graphs.values():
        check_model_repository(graph.runtime, bundle.path, out, overwrite)
    with new_directory(out, MARKER, overwrite) as root:
        for name, graph in graphs.items():
            folder = root / model_of_graph(name) / VERSION
            folder.mkdir(parents=True)
            for record in bundle.manifest.files:
                if record.path in (graph.file, f"{graph.file}.data"):
                    shutil.copyfile(bundle.path / record.path, folder / record.path)
            write_text(folder.parent / CONFIG_FILE, graph_config(graph))
        folder = root / MODEL_NAME / VERSION
        folder.mkdir(parents=True)
        write_text(folder / "model.py", MODEL_SOURCE)
        shutil.copyfile(bundle.path / MANIFEST_FILE, folder.parent / MANIFEST_FILE)
        hidden_size = graphs[PRIOR].spec.inputs[1].shape[1]
        write_text(folder.parent / CONFIG_FILE, python_config(int(hidden_size)))


def graph_config(graph: GraphRecord) -> str:
    """Return the configuration of a graph; Triton chooses GPU or CPU."""
    head = [
        _field("name", model_of_graph(graph.spec.name)),
        _field("backend", BACKENDS[graph.runtime]),
        _field("default_model_filename", graph.file),
    ]
    return _config(head, graph.spec.inputs, graph.spec.outputs)


def python_config(hidden_size: int) -> str:
    """Return the configuration of the Python model for concentrations of a width."""
    head = [
        _field("name", MODEL_NAME),
        _field("backend", "python"),
        f"instance_group [ {{ kind: KIND_CPU count: {NUM_INSTANCES} }} ]",
    ]
    inputs, outputs = MODEL_TENSORS
    sized = [
        TensorSpec(t.name, t.dtype, tuple(hidden_size if s == "hidden" else s for s in t.shape))
        for t in inputs
    ]
    return _config(head, sized, outputs)


def _config(
    head: Sequence[str], inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
) -> str:
    """Write a ``ModelConfig`` in protobuf's text format; the shapes include the batch."""
    lines = [*head, "max_batch_size: 0"]
    for kind, specs in (("input", inputs), ("output", outputs)):
        lines += [f"{kind} [", ",\n".join(map(_tensor, specs)), "]"]
    return "\n".join([*lines, ""])


def _tensor(spec: TensorSpec) -> str:
    sizes = ", ".join("-1" if isinstance(size, str) else str(size) for size in spec.shape)
    return f'  {{ name: "{spec.name}" data_type: {DATA_TYPES[spec.dtype]} dims: [ {sizes} ] }}'


def _field(name: str, value: str) -> str:
    return f'{name}: "{value}"'
