"""``SegmentBatch``: rows in, rows out, with one loaded bundle."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, overload

import numpy as np
import xxhash
from numpy.typing import NDArray
from PIL import Image

from coprs_deploy import demo
from coprs_deploy.artifacts import hash_file
from coprs_deploy.batch.files import is_url, open_file
from coprs_deploy.batch.folders import open_folder
from coprs_deploy.batch.rows import InputRow, OutputRow, to_table
from coprs_deploy.batch.sources import IMAGE_COLUMNS, SourceColumns, batch_rows
from coprs_deploy.bundle import MANIFEST_FILE
from coprs_deploy.closing import Closeable
from coprs_deploy.data.rle import encode_mask
from coprs_deploy.hub import local_bundle
from coprs_deploy.runtime import CoPRS, RuntimeOptions, SegmentationResult
from coprs_deploy.runtime.encoder import DecodedImage
from coprs_deploy.version import __version__

MAX_IMAGE_BYTES = 256 * 2**20
"""Memory of the decoded images of rows that are segmented together."""


def bundle_fingerprint(bundle: str | Path | None) -> str:
    """Return the hash of a bundle's manifest, which has the hashes of all files."""
    return hash_file(Path(demo.BUNDLE if bundle is None else bundle) / MANIFEST_FILE)


class SegmentBatch(Closeable):
    """Callable that segments rows with one bundle, which stays loaded.

    Rows on one image share its decoding, its embedding and the prefix of the prompt. A row that
    fails is a row with its error.

    Args:
        bundle: directory of a bundle, or ``hf://org/name@revision``; None is the demo model.
        options: where and how it runs.
        max_targets: maximum number of targets of each row.
        max_new_tokens: token budget of each response; None takes the checkpoint's.
        mask_folder: path or URL of a folder for a PNG of each mask; None saves none.
        columns: instructions and columns of batches of Ray Data.
        num_ahead: number of rows whose image is decoded and encoded while the policy serves others;
            0 is for several processes that share the cores.

    Attributes:
        concurrency: number of requests that the policy takes at once.
        segments_together: whether the policy decodes several rows in one pass.

    Raises:
        CoPRSError: the bundle cannot be loaded; see :meth:`CoPRS.load`.
    """

    def __init__(
        self,
        bundle: str | Path | None = None,
        options: RuntimeOptions | None = None,
        *,
        max_targets: int = 1,
        max_new_tokens: int | None = None,
        mask_folder: str | Path | None = None,
        columns: SourceColumns | None = None,
        num_ahead: int = 1,
    ) -> None:
        bundle = None if bundle is None else local_bundle(bundle)
        self._coprs = CoPRS.load(bundle, options)
        self.concurrency = self._coprs.concurrency
        self.segments_together = self._coprs.answers_together or self.concurrency > 1
        self._num_threads = self.concurrency + num_ahead
        self._columns = columns or SourceColumns()
        self._bundle = bundle_fingerprint(bundle)
        self._max_targets, self._max_new_tokens = max_targets, max_new_tokens
        self._mask_folder = None if mask_folder is None else open_folder(mask_folder)
        if self._mask_folder is not None:
            self._mask_folder.create()

    @overload
    def __call__(self, rows: Sequence[InputRow]) -> list[OutputRow]: ...

    @overload
    def __call__(self, rows: Mapping[str, Sequence[Any]]) -> Any: ...

    def __call__(self, rows: Sequence[InputRow] | Mapping[str, Sequence[Any]]) -> Any:
        """Segment rows.

        Args:
            rows: rows in any order; or a batch of Ray Data, which is values by column.

        Returns:
            One row for each, in their order. Of a batch, a table of pyarrow with the columns of the
            part files and the other columns of the batch, its images excepted.
        """
        if isinstance(rows, Mapping):
            return self._segment_columns(rows)
        return self._segment_rows(rows)

    def close(self) -> None:
        """Free graphs and policy."""
        self._coprs.close()

    def _segment_rows(self, rows: Sequence[InputRow]) -> list[OutputRow]:
        groups = group_by_image(rows)
        if self._coprs.answers_together and self.concurrency == 1:
            done = list(self._segment_together(groups.values()))
        else:
            done = self._segment_one_by_one(groups)
        by_number = {row.row: row for row in done}
        return [by_number[row.row] for row in rows]

    def _segment_columns(self, batch: Mapping[str, Sequence[Any]]) -> Any:
        rows, indices = batch_rows(batch, self._columns)
        table = to_table(self._segment_rows(rows))
        for name, values in batch.items():
            is_image = name == self._columns.image_column or name in IMAGE_COLUMNS
            if name not in table.column_names and not is_image:
                table = table.append_column(name, [[values[index] for index in indices]])
        return table

    def _segment_together(self, groups: Iterable[list[InputRow]]) -> Iterator[OutputRow]:
        """Yield the rows; the policy reads several in one pass."""
        requests: list[tuple[InputRow, DecodedImage]] = []
        num_bytes = 0
        for group in groups:
            image = _SharedImage(len(group))
            for row in group:
                try:
                    decoded = image.decoded(self._coprs, row)
                except Exception as error:  # of any kind, so that one row ends no run
                    yield self._failed(row, error)
                    continue
                if not requests or requests[-1][1] is not decoded:
                    num_bytes += decoded.rgb.nbytes
                if requests and num_bytes > MAX_IMAGE_BYTES:
                    yield from self._answers(requests)
                    requests, num_bytes = [], decoded.rgb.nbytes
                requests.append((row, decoded))
        yield from self._answers(requests)

    def _answers(self, requests: Sequence[tuple[InputRow, DecodedImage]]) -> Iterator[OutputRow]:
        results = self._coprs.segment_together(
            [(image, row.instruction) for row, image in requests],
            self._max_targets,
            self._max_new_tokens,
        )
        for (row, _), result in zip(requests, results, strict=True):
            try:
                if isinstance(result, Exception):
                    raise result
                yield self._output(row, result)
            except Exception as error:  # of any kind, so that one row ends no run
                yield self._failed(row, error)

    def _segment_one_by_one(self, groups: dict[str, list[InputRow]]) -> list[OutputRow]:
        """Return the rows; while the policy serves some, images of others are encoded."""
        images = {key: _SharedImage(len(group)) for key, group in groups.items()}
        tasks = [(images[key], group) for key, group in groups.items()]
        if self.concurrency > 1:  # the policy reads one prefix for all of them
            tasks = [(image, [row]) for image, group in tasks for row in group]
        pool = ThreadPoolExecutor(self._num_threads, thread_name_prefix="batch")
        try:
            return [row for task in pool.map(self._segment_group, tasks) for row in task]
        finally:
            pool.shutdown(cancel_futures=True)

    def _segment_group(self, task: tuple[_SharedImage, list[InputRow]]) -> list[OutputRow]:
        image, rows = task
        return [self._segment(image, row) for row in rows]

    def _segment(self, image: _SharedImage, row: InputRow) -> OutputRow:
        try:
            result = self._coprs.segment(
                image.decoded(self._coprs, row),
                row.instruction,
                self._max_targets,
                self._max_new_tokens,
            )
            return self._output(row, result)
        except Exception as error:  # of any kind, so that one row ends no run
            return self._failed(row, error)
        finally:
            image.release()

    def _output(self, row: InputRow, result: SegmentationResult) -> OutputRow:
        return self._row(
            row,
            found=result.found,
            masks=[encode_mask(mask) for mask in result.masks],
            boxes=result.boxes.tolist(),
            areas=result.areas.tolist(),
            scores=result.scores.tolist(),
            mask_files=self._save_masks(row, result),
            reasoning=_storable(result.reasoning),
            response=_storable(result.response),
            stop_reason=result.stop_reason,
            format_violations=list(result.format_violations),
            image_size=list(result.image.shape[:2]),
            timings=asdict(result.timings),
        )

    def _failed(self, row: InputRow, error: Exception) -> OutputRow:
        message = str(error) or type(error).__name__
        return self._row(row, error=message, error_type=type(error).__name__)

    def _row(self, row: InputRow, **values: Any) -> OutputRow:
        return OutputRow(
            row=row.row,
            id=_storable(row.id),
            image=_storable(row.image),
            image_id=_storable(row.image_id),
            instruction=_storable(row.instruction),
            bundle=self._bundle,
            runtime=self._coprs.description,
            version=__version__,
            **values,
        )

    def _save_masks(self, row: InputRow, result: SegmentationResult) -> list[str]:
        """Write the masks; their names depend on the row alone, so that a retry replaces them."""
        if self._mask_folder is None:
            return []
        names = [f"{row.row:09d}-{number + 1}.png" for number in range(len(result.masks))]
        for name, mask in zip(names, result.masks, strict=True):
            png = io.BytesIO()
            Image.fromarray(mask.astype(np.uint8) * 255).save(png, "PNG")
            self._mask_folder.write(name, png.getvalue())
        return names


def group_by_image(rows: Sequence[InputRow]) -> dict[str, list[InputRow]]:
    """Group rows by the location or the content of their image, in the order of the first."""
    groups: dict[str, list[InputRow]] = {}
    for row in rows:
        key = row.location if row.content is None else _content_key(row.content)
        groups.setdefault(key, []).append(row)
    return groups


class _SharedImage:
    """Image of several rows, which is decoded by the first and freed by the last of them."""

    def __init__(self, num_rows: int) -> None:
        self._left = num_rows
        self._lock = threading.Lock()
        self._image: DecodedImage | None = None

    def decoded(self, coprs: CoPRS, row: InputRow) -> DecodedImage:
        """Return the image.

        Raises:
            ValueError: the row cannot be segmented.
            ImageError: it cannot be used.
            OSError: it cannot be read.
        """
        if row.problem:
            raise ValueError(row.problem)
        with self._lock:
            if self._image is None:
                self._image = coprs.decode(_image_source(row))
            return self._image

    def release(self) -> None:
        """Count a row as done."""
        with self._lock:
            self._left -= 1
            if not self._left:
                self._image = None


def _content_key(content: bytes | NDArray[Any]) -> str:
    if isinstance(content, bytes):
        return xxhash.xxh3_128_hexdigest(content)
    shape = str((content.shape, content.dtype)).encode()
    return xxhash.xxh3_128_hexdigest(shape + np.ascontiguousarray(content).tobytes())


def _image_source(row: InputRow) -> str | bytes | NDArray[Any]:
    if row.content is not None:
        return row.content
    if not is_url(row.location):
        return row.location
    with open_file(row.location) as file:
        return file.read()


def _storable(text: str) -> str:
    """Replace what UTF-8 cannot hold, such as bytes of a file name."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
