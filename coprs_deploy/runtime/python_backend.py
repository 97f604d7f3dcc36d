"""Model of Triton's Python backend: an image file and concentrations in, masks out.

``coprs-deploy export --triton`` writes a ``model.py`` that names the class. It prepares the image,
calls the three graphs, which are models of the same server, and resizes their masks.
``triton_python_backend_utils`` exists only inside Triton's process, so it is imported there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coprs_deploy.bundle import read_manifest
from coprs_deploy.engines import SegmentationGraphs
from coprs_deploy.engines.graphs import join_chunks, masks_at_original_size
from coprs_deploy.engines.runner import Array, DeviceTensor, HostTensor, Runner, host_array
from coprs_deploy.errors import CoPRSError
from coprs_deploy.images import load_image, prepare_image
from coprs_deploy.specs import GraphSpec, model_of_graph


class ServedGraph(Runner):
    """A graph that the same Triton server runs; its outputs come back to the host.

    Args:
        spec: inputs and outputs.
        backend: the module ``triton_python_backend_utils``.
    """

    def __init__(self, spec: GraphSpec, backend: Any) -> None:
        super().__init__(spec, f"Triton model {model_of_graph(spec.name)}")
        self._backend = backend

    def _run(self, inputs: Mapping[str, Array | DeviceTensor]) -> dict[str, DeviceTensor]:
        backend, names = self._backend, [tensor.name for tensor in self.spec.outputs]
        response = backend.InferenceRequest(
            model_name=model_of_graph(self.spec.name),
            requested_output_names=names,
            inputs=[backend.Tensor(name, host_array(value)) for name, value in inputs.items()],
            preferred_memory=backend.PreferredMemory(backend.TRITONSERVER_MEMORY_CPU),
        ).exec()
        if response.has_error():
            raise CoPRSError(f"{self.description} failed: {response.error().message()}")
        found = {name: backend.get_output_tensor_by_name(response, name) for name in names}
        return {name: HostTensor(tensor.as_numpy()) for name, tensor in found.items()}

    def close(self) -> None:
        """Leave the model to the server."""


class TritonPythonModel:
    """The class that Triton's Python backend looks for.

    Inputs and outputs are those of :data:`coprs_deploy.specs.MODEL_TENSORS`. What is wrong with a
    request is an error of that request only.
    """

    def initialize(self, args: Mapping[str, str]) -> None:
        """Read the manifest beside the configuration; Triton's ``args`` name the folder."""
        import triton_python_backend_utils as backend

        manifest = read_manifest(Path(args["model_repository"]))
        specs = {name: graph.spec for name, graph in manifest.graphs.items()}
        self._backend: Any = backend
        self._geometry = manifest.geometry
        self._graphs = SegmentationGraphs(
            {name: ServedGraph(spec, backend) for name, spec in specs.items()}
        )

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer requests, one after the other."""
        return [self._respond(request) for request in requests]

    def _respond(self, request: Any) -> Any:
        backend = self._backend
        read = backend.get_input_tensor_by_name
        try:
            masks, mask_logits = self.decode(
                read(request, "image").as_numpy().item(),
                read(request, "concentration").as_numpy(),
            )
        except (CoPRSError, ValueError) as error:
            kind = backend.TritonError
            code = kind.INVALID_ARG if isinstance(error, ValueError) else kind.INTERNAL
            return backend.InferenceResponse([], kind(str(error), code))
        tensors = [backend.Tensor("masks", masks), backend.Tensor("mask_logits", mask_logits)]
        return backend.InferenceResponse(tensors)

    def decode(
        self, image: bytes, concentrations: NDArray[np.float32]
    ) -> tuple[NDArray[np.bool_], NDArray[np.float32]]:
        """Decode (N, D) concentrations on an image file.

        Returns:
            (N, H, W) masks at the size of the image, and (N, 1, M, M) mask logits.

        Raises:
            ImageError: the image cannot be used.
            ValueError: there is no concentration, or its width is not the prior's.
            CoPRSError: a graph failed.
        """
        count = len(concentrations)
        if not count:
            raise ValueError("concentration has 0 rows; accepted: one for each target")
        prepared = prepare_image(load_image(image), self._geometry)
        embedding = self._graphs.encode(prepared)
        _, chunks = self._graphs.priors_and_masks(embedding, concentrations, prepared.unpadded_size)
        masks = masks_at_original_size(chunks, count, prepared, self._geometry)
        return masks, join_chunks(chunks, count)
