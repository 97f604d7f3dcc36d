"""Options of a benchmark run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from coprs_deploy.model_config import SAM_SIZES


@dataclass(frozen=True)
class BenchOptions:
    """What to measure, and how.

    Attributes:
        bundle: bundle to measure; None takes the demo model.
        checkpoint: checkpoint of the bundle, for PyTorch cases and other precisions.
        suites: names of suites; empty takes the default ones.
        sizes: SAM sizes to measure with random weights, where a suite needs no policy.
        devices: ``cpu``, ``cuda`` or both.
        filter: regular expression; only cases whose ``group: case`` matches are run.
        calibration: folder of images for int8.
        is_quick: leave out what takes long: lower precisions on a CPU, the small graphs alone, some
            of the repetitions.
        tag: first word of the report's file names; empty takes the model's name.
        command: command that makes the report again.
        min_time_s: measured time of a case, all rounds together.
        rounds: number of rounds.
        max_rounds: number of rounds while a median is not yet stable.
        warmup_s: unmeasured time before the first round; at least two runs, or one longer run.
        case_timeout_s: seconds after which opening a case, or one run, is given up.
        max_memory_bytes: memory of the cases of a group that are open side by side.
        work_dir: folder of prepared files, kept for the next run; None takes a temporary one.
        prepare_only: stop when everything is prepared.
    """

    bundle: Path | None = None
    checkpoint: Path | None = None
    suites: tuple[str, ...] = ()
    sizes: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cpu",)
    filter: str = ""
    calibration: Path | None = None
    is_quick: bool = False
    tag: str = ""
    command: str = "coprs-deploy bench"
    min_time_s: float = 3.0
    rounds: int = 3
    max_rounds: int = 5
    warmup_s: float = 1.0
    case_timeout_s: float = 120.0
    max_memory_bytes: int = 4_000_000_000
    work_dir: Path | None = None
    prepare_only: bool = False

    def __post_init__(self) -> None:
        """Refuse options that do not fit together."""
        for size in self.sizes:
            if size not in SAM_SIZES:
                raise ValueError(f"sizes names {size!r}; accepted: {', '.join(SAM_SIZES)}, all")
        if self.rounds < 1:
            raise ValueError(f"--rounds is {self.rounds}; accepted: 1 and more")
        if self.checkpoint and not self.bundle:
            raise ValueError("--checkpoint needs BUNDLE; the demo model has its own checkpoint")
        if self.prepare_only and self.work_dir is None:
            raise ValueError("--prepare-only keeps what it makes: name a folder with --work-dir")
        try:
            re.compile(self.filter)
        except re.error as error:
            text = f"--filter is {self.filter!r}; accepted: a regular expression ({error})"
            raise ValueError(text) from error
