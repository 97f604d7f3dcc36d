"""A source of small examples in memory, and predictions for them."""

from types import SimpleNamespace

import numpy as np

from coprs_deploy.data.examples import Example, ExampleSource
from coprs_deploy.data.rows import FieldError


class FakeSource(ExampleSource):
    """Examples in memory; two on each image, and one that cannot be decoded for each None."""

    description = "fake"

    def __init__(self, examples, *, has_references=False, has_no_match=True, files=()):
        self.examples = examples
        self.num_rows = len(examples)
        self.num_targets = [1 if each is None else len(each.masks) for each in examples]
        self.question_types = ["" if each is None else each.question_type for each in examples]
        self.has_references, self.has_no_match, self.files = has_references, has_no_match, files

    def read(self, index):
        if self.examples[index] is None:
            raise FieldError("image", "it is damaged")
        return self.examples[index]

    def image_file(self, index):
        raise NotImplementedError

    def image_name(self, index):
        return f"image-{index // 2}"


def example_of(number, targets, ignored=None, size=(5, 6), **others):
    """Return an example whose instruction is its number; a mask is a set of pixel numbers."""
    image = np.full((*size, 3), number % 251, np.uint8)
    masks = np.array([mask_of(pixels, size) for pixels in targets]).reshape(-1, *size)
    ignore_mask = None if ignored is None else mask_of(ignored, size)
    return Example(
        str(number), image, str(number), masks.astype(bool), ignore_mask=ignore_mask, **others
    )


def mask_of(pixels, size=(5, 6)):
    mask = np.zeros(size, dtype=bool)
    mask.flat[sorted(pixels)] = True
    return mask


def result_of(masks, priors, size=(5, 6)):
    """Return what ``CoPRS.segment`` returns, as far as evaluation reads it."""
    found = np.array([mask_of(pixels, size) for pixels in masks]).reshape(-1, *size).astype(bool)
    logits = np.array([mask_of(pixels, size) for pixels in priors]).reshape(-1, *size)
    return SimpleNamespace(
        masks=found,
        prior_logits=np.where(logits > 0, 2.0, -2.0).astype(np.float32),
        response="<think>it</think>",
        scores=np.linspace(0.5, 0.9, len(found)),
        stop_reason="end_of_text",
    )
