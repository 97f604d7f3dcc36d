"""A batch run of fakes in a process that is killed: ``main`` is what the process runs."""

import os
import time
from pathlib import Path

from coprs_deploy.batch import RowSource, SegmentBatch, SourceColumns, segment_batch
from coprs_deploy.batch.local import run_local
from coprs_deploy.batch.manifest import BatchManifest, BatchOutput
from coprs_deploy.batch.workers import WorkerSettings
from coprs_deploy.engines import SegmentationGraphs
from coprs_deploy.runtime import CoPRS, RuntimeOptions
from tests.unit.runtime_fakes import GEOMETRY, SPECS, FakePolicy, FakeRunner

ROWS_PER_FILE = 5


class Settings(WorkerSettings):
    """Opens a batch of fakes."""

    def open(self):
        policy = FakePolicy(during=lambda: time.sleep(0.002))
        runners = {name: FakeRunner(name) for name in SPECS}
        coprs = CoPRS(SegmentationGraphs(runners), policy, GEOMETRY, RuntimeOptions())
        segment_batch.CoPRS.load = lambda *arguments: coprs
        return SegmentBatch(mask_folder=self.mask_folder)


def main(table, out):
    """Go on with a run; exit with 0 when every row is there."""
    source = RowSource(table, SourceColumns())
    manifest = BatchManifest("fakes", source.fingerprint, {}, source.num_rows, ROWS_PER_FILE)
    output = BatchOutput(Path(out), manifest)
    with output.opened(resume=True):
        settings = Settings(None, RuntimeOptions(), mask_folder=output.mask_folder)
        run_local(source, output, settings, 1)
    os._exit(0)
