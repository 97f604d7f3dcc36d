"""Many images and instructions: rows in, rows out, in part files that a killed run keeps.

files               local files, and URLs through fsspec
rows                rows in, rows out, and the columns of the part files
sources             folder, glob, JSON lines, CSV, Parquet, WebDataset -> rows
segment_batch       rows -> rows with a loaded bundle
manifest            what an output folder holds: its manifest and its part files
workers, local      processes that segment; the run on one machine
coco, annotations   part files -> COCO results; supervision, FiftyOne, Label Studio (brush_rle)
"""

from coprs_deploy.batch.annotations import to_supervision, write_fiftyone, write_label_studio
from coprs_deploy.batch.coco import write_coco
from coprs_deploy.batch.rows import InputRow, OutputRow
from coprs_deploy.batch.segment_batch import SegmentBatch
from coprs_deploy.batch.sources import RowSource, SourceColumns

__all__ = [
    "InputRow",
    "OutputRow",
    "RowSource",
    "SegmentBatch",
    "SourceColumns",
    "to_supervision",
    "write_coco",
    "write_fiftyone",
    "write_label_studio",
]
