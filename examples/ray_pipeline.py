"""Segment in a pipeline of Ray Data: ``python examples/ray_pipeline.py [IMAGE INSTRUCTION]``.

Each actor holds a bundle; on a cluster, give each a GPU with ``num_gpus=1``. Writes Parquet files
to ``segmented/``. Needs the extra ``ray``; ``coprs-deploy batch --engine ray`` does the same with a
manifest, and goes on after a kill.
"""

import sys
from pathlib import Path

import ray

from coprs_deploy.batch import SegmentBatch


def main(arguments: list[str]) -> int:
    """Print what was found in each row."""
    image, instruction = arguments or ("examples/scene.png", "the largest red circle")
    instructions = (instruction, "the leftmost circle", "the topmost triangle")
    path = str(Path(image).absolute())
    rows = [{"id": each, "image_path": path, "instruction": each} for each in instructions]
    ray.init("local", include_dashboard=False, log_to_driver=False)  # "auto" joins a cluster
    try:
        found = ray.data.from_items(rows).map_batches(
            SegmentBatch,  # the demo model; fn_constructor_kwargs={"bundle": "bundle"} loads yours
            compute=ray.data.ActorPoolStrategy(size=1),
            batch_size=8,
            num_cpus=1,
        )
        found = found.materialize()
        found.write_parquet("segmented")
        results = found.take_all()
    finally:
        ray.shutdown()
    for result in results:
        print(f"{result['instruction']}: {result['error'] or list(result['areas'])}")
    return 0 if any(result["found"] for result in results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
