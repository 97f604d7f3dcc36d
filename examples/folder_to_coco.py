"""Segment the images of a folder: ``python examples/folder_to_coco.py [FOLDER INSTRUCTION]``.

Writes COCO results to ``results.json``. ``coprs-deploy batch`` does the same in part files, which a
killed run keeps.
"""

import sys
from pathlib import Path

from coprs_deploy.batch import RowSource, SegmentBatch, SourceColumns, write_coco


def main(arguments: list[str]) -> int:
    """Print what was found in each image."""
    folder, instruction = arguments or ("examples", "the largest red circle")
    rows = list(RowSource(folder, SourceColumns((instruction,))))
    with SegmentBatch() as batch:  # the demo model; SegmentBatch("bundle") loads yours
        results = batch(rows)
    for result in results:
        print(f"{result.image}: {result.error or result.areas or 'nothing found'}")
    num_masks = write_coco(Path("results.json"), results)
    return 0 if num_masks else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
