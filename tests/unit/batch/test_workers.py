"""Worker processes: how they end."""

import os
import signal

import pytest

from coprs_deploy.batch import InputRow
from coprs_deploy.batch.workers import Workers, WorkerSettings
from coprs_deploy.errors import CoPRSError
from coprs_deploy.runtime import RuntimeOptions
from tests import ROOT

SCENE = str(ROOT / "examples" / "scene.png")


def test_bundle_that_cannot_be_loaded_is_the_error_of_the_first_worker(tmp_path):
    settings = WorkerSettings(tmp_path / "nowhere", RuntimeOptions())
    with pytest.raises(CoPRSError, match="there is no bundle at"):
        Workers(settings, 2)


@pytest.mark.slow
def test_worker_that_ends_is_reported_and_the_rest_are_ended():
    settings = WorkerSettings(None, RuntimeOptions(policy="openvino"))
    with Workers(settings, 2) as workers:
        rows = [InputRow(0, "0", SCENE, "the largest red circle", SCENE)]
        (found,) = workers.submit(rows).result(120)
        assert found.found
        processes = [each._process for each in workers._processes]
        for process in processes:
            os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(CoPRSError, match="exit code -9; finished parts are kept"):
            workers.submit(rows).result(120)
    assert not any(process.is_alive() for process in processes)
