"""Run of an evaluation over a data set: order of the examples, and one row for each.

It opens no model: a callable segments. Rows on one image are neighbors, so that its embedding, and
what a policy keeps of its prompt, is computed once. An example that fails is a row with its error.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from msgspec import structs

from coprs_deploy.artifacts import hash_file
from coprs_deploy.data.examples import Example, ExampleSource
from coprs_deploy.data.rows import FieldError
from coprs_deploy.errors import shorten
from coprs_deploy.evaluation.evaluator import (
    Prediction,
    Segment,
    encode_masks,
    prediction_of,
    score_example,
)
from coprs_deploy.evaluation.protocols import EvaluationProtocol
from coprs_deploy.evaluation.rows import EvaluationRow


@dataclass(frozen=True, eq=False)
class EvaluationTask:
    """A data set that is evaluated under a protocol; can be pickled for worker processes.

    Attributes:
        name: name of the data set, as in ``refcoco:testA``.
        examples: its examples.
        max_targets: maximum number of targets of a request.
        protocol: how the rows are counted.
    """

    name: str
    examples: Sequence[Example]
    max_targets: int
    protocol: EvaluationProtocol

    @property
    def source(self) -> ExampleSource | None:
        """The examples if they are on disk; None for generated ones."""
        return self.examples if isinstance(self.examples, ExampleSource) else None

    def image_groups(self, done: Iterable[int] = ()) -> list[list[int]]:
        """Return the positions that are not done, those on one image together.

        Images are in the order of their first example; without names, each example has its own.
        """
        finished = set(done)
        groups: dict[str, list[int]] = {}
        for index in range(len(self.examples)):
            groups.setdefault(self._image(index) or f"row {index}", []).append(index)
        left = ([i for i in group if i not in finished] for group in groups.values())
        return [group for group in left if group]

    def fingerprint(self) -> str:
        """Hash the files of annotations, or the examples of a generated source."""
        digest = hashlib.sha256()
        if self.source is not None:
            for path in self.source.files:
                digest.update(f"{path.name} {hash_file(path)}\n".encode())
            return digest.hexdigest()
        for example in self.examples:
            digest.update(f"{example.id} {example.instruction}\n".encode())
            digest.update(example.image.tobytes())
            digest.update(np.packbits(example.masks).tobytes())
        return digest.hexdigest()

    def _image(self, index: int) -> str:
        try:
            return self.source.image_name(index) if self.source is not None else ""
        except FieldError:  # the row fails when it is decoded
            return ""

    def evaluate(self, index: int, segment: Segment) -> EvaluationRow:
        """Evaluate an example; whatever fails is in the row."""
        image, source = self._image(index), self.source
        try:
            example = self.examples[index]
        except Exception as error:
            assert source is not None, "generated examples are valid"
            return EvaluationRow(
                index=index,
                id="",
                image=image,
                question_type=source.question_types[index],
                source=source.description,
                num_targets=self._num_targets(source.num_targets[index]),
                num_found=0,
                mask=None,
                prior=None,
                error=_describe(error),
            )
        is_reference = source is not None and source.has_references
        instruction = self.protocol.instruction(example.instruction, is_reference=is_reference)
        others = {
            "instruction": _storable(instruction),
            "image": image,
            "num_targets": self._num_targets(_num_targets(example, self.protocol)),
            "num_same_class": source.num_same_class(index) if source is not None else None,
        }
        try:
            prediction = prediction_of(segment(example.image, instruction, self.max_targets))
            row = score_example(index, example, prediction, self.protocol, **others)
            others |= {"masks": encode_masks(prediction.masks)}
        except Exception as error:
            nothing = example.masks[:0]
            row = score_example(index, example, Prediction(nothing, nothing, ""), self.protocol)
            others |= {"error": _describe(error)}
        return structs.replace(row, response=_storable(row.response), **others)

    def _num_targets(self, found: int) -> int:
        """Count the target of an empty annotation, where the data set has no no-match examples."""
        is_empty = not found and self.source is not None and not self.source.has_no_match
        return 1 if is_empty else found


def evaluate_rows(
    task: EvaluationTask, indices: Iterable[int], segment: Segment, concurrency: int = 1
) -> Iterator[EvaluationRow]:
    """Evaluate examples in the given order, several at once if the model serves several.

    Args:
        task: the data set.
        indices: positions of the examples.
        segment: the model; with a concurrency above 1, called from several threads.
        concurrency: number of examples at once.
    """
    if concurrency == 1:
        yield from (task.evaluate(index, segment) for index in indices)
        return
    pending: deque[Future[EvaluationRow]] = deque()
    with ThreadPoolExecutor(concurrency, thread_name_prefix="evaluate") as pool:
        try:
            for index in indices:
                pending.append(pool.submit(task.evaluate, index, segment))
                if len(pending) > concurrency:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def _num_targets(example: Example, protocol: EvaluationProtocol) -> int:
    """Count the targets; ignored pixels that become foreground are one."""
    is_foreground = protocol.ignored_pixels == "foreground" and example.ignore_mask is not None
    return len(example.masks) or int(is_foreground and bool(np.any(example.ignore_mask)))


def _describe(error: Exception) -> str:
    return _storable(f"{type(error).__name__}: {shorten(str(error), 1000)}")


def _storable(text: str) -> str:
    """Replace what UTF-8 cannot store by escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
