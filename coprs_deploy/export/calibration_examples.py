"""Examples that a policy is quantized on, and others about other images that it is checked on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from coprs_deploy.bundle import PolicyCalibration
from coprs_deploy.data.examples import Example, ExampleFile

MIN_EXAMPLES = 8

MAX_USED = 128
"""Their images and hidden states are in memory together: for prompts of a thousand tokens and a
policy of 7B some 3 GB."""

MAX_HELD_OUT = 16


@dataclass(frozen=True)
class CalibrationExamples:
    """Rows of an example file without duplicates, in an order given by their contents.

    Attributes:
        file: the file.
        used: rows to calibrate on.
        held_out: rows about other images, to check on.
        sha256: hash over the contents of the rows used.
    """

    file: ExampleFile
    used: tuple[int, ...]
    held_out: tuple[int, ...]
    sha256: str

    def record(self) -> PolicyCalibration:
        """Return the record for the manifest."""
        return PolicyCalibration(
            self.file.path.name, len(self.used), len(self.held_out), self.sha256
        )


def split_examples(
    path: str | Path, max_used: int = MAX_USED, max_held_out: int = MAX_HELD_OUT
) -> CalibrationExamples:
    """Open an example file and hold out one in four images, for at most ``max_held_out`` rows.

    Of the rest, at most ``max_used`` rows are used.

    Raises:
        ValueError: there are too few different examples or images, or the suffix is not supported.
        FileNotFoundError: the file does not exist.
        ArtifactError: the file cannot be read, or no row is valid.
    """
    keys: list[tuple[str, str]] = []

    def note(example: Example) -> None:
        image = hashlib.sha256(f"{example.image.shape}".encode() + example.image.tobytes())
        text = f"{image.hexdigest()}\n{example.instruction}\n{example.response}"
        keys.append((image.hexdigest(), hashlib.sha256(text.encode()).hexdigest()))

    file = ExampleFile(path, inspect=note)
    by_content = {key: index for index, key in enumerate(keys)}
    images = sorted({image for image, _ in keys})
    if len(by_content) < MIN_EXAMPLES or len(images) < 4:
        raise ValueError(
            f"calibration is {path}, which has {len(by_content)} different examples about "
            f"{len(images)} images; accepted: at least {MIN_EXAMPLES} about 4, better 128 and more "
            "of the kind that the model will see"
        )
    apart = set(images[: len(images) // 4])
    held_out = sorted(key for key in by_content if key[0] in apart)[:max_held_out]
    used = sorted((key for key in by_content if key[0] not in apart), key=lambda key: key[1])
    used = used[:max_used]
    return CalibrationExamples(
        file=file,
        used=tuple(by_content[key] for key in used),
        held_out=tuple(by_content[key] for key in held_out),
        sha256=hashlib.sha256("".join(key[1] for key in used).encode()).hexdigest(),
    )
