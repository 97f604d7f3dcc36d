"""Segment in a pipeline of Ray Data: ``python examples/ray_pipeline.py [IMAGE INSTRUCTION]``.

Each actor holds a bundle; on a cluster, give each a GPU with ``num_gpus=1``. Writes Parquet files
to ``segmented/``. Needs ``pip install "ray[data]"``.
"""

import sys
from pathlib import Path
from typing import Any

import ray

from coprs_deploy.batch import InputRow, SegmentBatch


class Segment:
    """An actor: rows with ``image`` and ``instruction`` in, with masks (COCO RLE) out."""

    def __init__(self, bundle: str | None = None) -> None:
        self._batch = SegmentBatch(bundle)

    def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
        """Segment a batch; a row that fails has its error."""
        inputs = [
            InputRow(number, str(number), image, instruction, location=image)
            for number, (image, instruction) in enumerate(
                zip(rows["image"], rows["instruction"], strict=True)
            )
        ]
        results = [result.to_json() for result in self._batch(inputs)]
        names = ("image", "instruction", "found", "masks", "scores", "reasoning", "error")
        return {name: [result[name] for result in results] for name in names}


def main(arguments: list[str]) -> int:
    """Print what was found in each row."""
    image, instruction = arguments or ("examples/scene.png", "the largest red circle")
    instructions = (instruction, "the leftmost circle", "the topmost triangle")
    rows = [{"image": str(Path(image).absolute()), "instruction": each} for each in instructions]
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        segmented = ray.data.from_items(rows).map_batches(
            Segment, compute=ray.data.ActorPoolStrategy(size=1), batch_size=8, num_cpus=1
        )
        segmented = segmented.materialize()
        segmented.write_parquet("segmented")
        results = segmented.take_all()
    finally:
        ray.shutdown()
    for result in results:
        print(f"{result['instruction']}: {result['error'] or len(result['masks'])}")
    return 0 if any(result["found"] for result in results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
