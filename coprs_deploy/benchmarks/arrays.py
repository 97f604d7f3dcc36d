"""Arrays that processes hand to each other through files; nothing heavy is imported for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Values: TypeAlias = dict[str, NDArray[Any]]

OUTPUT_FILE = "outputs.safetensors"


def write_arrays(path: Path, values: Mapping[str, NDArray[Any]]) -> None:
    """Write arrays by name."""
    from safetensors.numpy import save_file

    save_file({name: np.ascontiguousarray(value) for name, value in values.items()}, path)


def read_arrays(path: Path) -> Values:
    """Read what :func:`write_arrays` wrote."""
    from safetensors.numpy import load_file

    values: Values = load_file(path)
    return values


def read_inputs(folder: str | Path) -> Iterator[Values]:
    """Read the inputs of a benchmark in order, see :mod:`coprs_deploy.benchmarks.inputs`."""
    for index in range(len(list(Path(folder).glob("[0-9]*.safetensors")))):
        yield read_arrays(Path(folder) / f"{index}.safetensors")
