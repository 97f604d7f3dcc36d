"""Estimates of a whole run, and their text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from coprs_deploy.data.examples import ExampleFile
from coprs_deploy.data.readers.registry import open_source
from coprs_deploy.data.rows import SUFFIXES, open_rows
from coprs_deploy.data.selection import image_names
from coprs_deploy.errors import CoPRSError
from coprs_deploy.specs import Record
from coprs_deploy.training.features import INDEX_FILE
from coprs_deploy.training.planning.estimate import (
    BFLOAT16_BYTES,
    FINISHED_WEIGHTS,
    GIGABYTE,
    Estimate,
    GpuSpec,
    estimate,
)
from coprs_deploy.training.planning.meta_models import build_on_meta
from coprs_deploy.training.recipe import Recipe
from coprs_deploy.training.settings import ExampleData


class RunEstimate(Record, frozen=True):
    """Estimate of all stages of a run.

    Attributes:
        source: where the sizes of the models come from.
        stages: estimate of each stage.
        hours: hours of all stages.
        disk_bytes: largest size of the run directory.
        feature_bytes: largest size of the image embeddings that `coprs-deploy features` writes;
            None if the data cannot be read.
        notes: what could not be estimated.
    """

    source: str
    stages: dict[str, Estimate]
    hours: float
    disk_bytes: float
    feature_bytes: float | None
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether every stage fits into memory."""
        return all(each.fits for each in self.stages.values())


def estimate_run(recipe: Recipe, gpus: int, gpu: GpuSpec | None = None) -> RunEstimate:
    """Estimate a run from its checkpoint, or the named sizes while there is none.

    Raises:
        CheckpointError: the checkpoint does not exist and the recipe names no sizes, or it cannot
            be used.
        ValueError: the name of a size is unknown.
    """
    models = build_on_meta(recipe.model)
    stages = estimate(recipe, gpus, gpu, models)
    geometry = models.segmentation.config.geometry
    embedding = BFLOAT16_BYTES * geometry.out_chans * geometry.grid_size**2
    features, notes = None, list[str]()
    if isinstance(recipe.data, ExampleData):
        counts = []
        for name in ("training", "held_out"):
            try:
                counts.append(_count_images(getattr(recipe.data, name)))
            except (CoPRSError, ValueError, OSError) as error:
                notes.append(f"data.{name}: {error}")
        if recipe.data.features and not (Path(recipe.data.features) / INDEX_FILE).is_file():
            notes.append(f"data.features: there are no embeddings in {recipe.data.features}")
        if len(counts) == 2:
            features = float(embedding * sum(counts))
    hours = sum(each.hours for each in stages.values())
    disk = largest_directory(stages)
    return RunEstimate(models.source, stages, hours, disk, features, tuple(notes))


def largest_directory(stages: Mapping[str, Estimate]) -> float:
    """Return the largest size of a run directory in bytes, with the weights of earlier stages."""
    before = largest = 0.0
    for one in stages.values():
        largest = max(largest, before + one.disk["peak"])
        before += one.disk[FINISHED_WEIGHTS]
    return largest


def _count_images(source: str) -> int:
    """Count the images of a source without decoding; rows of an example file, at most as many."""
    path = Path(source)
    if path.suffix in SUFFIXES and path.is_file():
        try:
            return len(open_rows(path))
        except CoPRSError:  # Parquet of Hugging Face
            pass
    found = open_source(source)
    assert not isinstance(found, ExampleFile)
    return len(image_names(found))


def estimate_page(run: RunEstimate) -> str:
    """Format the estimate of a run as text."""
    return "\n".join(_page(run))


def _page(run: RunEstimate) -> Iterator[str]:
    yield run.source
    for name, one in run.stages.items():
        yield from _stage_lines(name, one)
    yield f"all stages: {_hours(run.hours)}; disk: at most {run.disk_bytes / GIGABYTE:.1f} GB"
    if run.feature_bytes is not None:
        size = run.feature_bytes / GIGABYTE
        yield f"embeddings of all images (`coprs-deploy features`): at most {size:.1f} GB"
    yield from (f"note: {note}" for note in run.notes)


def _stage_lines(name: str, one: Estimate) -> Iterator[str]:
    gpu, peak = one.gpu, one.memory["peak"] / GIGABYTE
    verdict = "fits" if one.fits else "DOES NOT FIT"
    yield f"{name}: {one.gpus} GPUs of {gpu.memory_gb:g} GB, {verdict} (peak {peak:.1f} GB per GPU)"
    for part, size in one.memory.items():
        if size:
            yield f"  {part:<44}{size / GIGABYTE:>10.2f} GB"
    yield f"  step at the maximum length, computed, not measured: {one.seconds['step']:.1f} s"
    for part, seconds in one.seconds.items():
        if part != "step":
            yield f"  {part:<44}{seconds:>10.2f} s"
    yield f"  {'all steps':<44}{_hours(one.hours - one.evaluation_hours):>12}"
    yield f"  {'all evaluations':<44}{_hours(one.evaluation_hours):>12}"
    yield f"  disk: at most {one.disk['peak'] / GIGABYTE:.1f} GB in the run directory"
    for part, size in one.disk.items():
        if size and part != "peak":
            yield f"  {part:<44}{size / GIGABYTE:>10.2f} GB"
    yield (
        f"  assumed: {gpu.teraflops:g} TFLOP/s at {gpu.flops_utilization:.0%}, "
        f"{gpu.bandwidth_gb:g} GB/s at {gpu.bandwidth_utilization:.0%}, links {gpu.link_gb:g} GB/s"
    )
    yield from (f"  note: {note}" for note in one.notes)


def _hours(hours: float) -> str:
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"
