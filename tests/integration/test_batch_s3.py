"""``coprs-deploy batch`` from and to S3: a server of moto on this machine, a run that is killed."""

import os
import signal
import subprocess
import sys

import pytest

from coprs_deploy.batch.files import list_files
from coprs_deploy.batch.folders import open_folder
from coprs_deploy.batch.rows import read_part
from coprs_deploy.cli.main import main
from tests import ROOT

pytest.importorskip("s3fs", reason="the extra s3 is not installed")
moto_server = pytest.importorskip("moto.server", reason="moto is not installed")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

NUM_IMAGES = 6


@pytest.fixture
def bucket(monkeypatch):
    """Return the URL of an empty bucket, and the environment in which it is found."""
    import fsspec

    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "OMP_NUM_THREADS": "1",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    fsspec.filesystem("s3", skip_instance_cache=True).mkdir("bucket")
    fsspec.filesystem("s3").clear_instance_cache()
    yield "s3://bucket"
    fsspec.filesystem("s3").clear_instance_cache()
    server.stop()


def parts_of(url):
    folder = open_folder(url)
    rows = []
    for name in folder.names():
        if name.endswith(".parquet"):
            with folder.open(name) as file:
                rows += read_part(name, file)
    return [(row.row, row.id, row.found, row.masks, row.error_type) for row in rows]


def test_run_from_and_to_s3_is_killed_and_resumed(bucket, tmp_path, capsys):
    import s3fs

    store = s3fs.S3FileSystem()
    scene = (ROOT / "examples" / "scene.png").read_bytes()
    for number in range(NUM_IMAGES):
        store.pipe_file(f"bucket/images/{number}.png", scene)
    store.pipe_file("bucket/images/broken.png", b"no image")
    assert len(list_files(f"{bucket}/images")) == NUM_IMAGES + 1
    arguments = ["batch", f"{bucket}/images", "--instruction", "the largest red circle"]
    arguments += ["--rows-per-file", "2", "--workers", "1", "--save-masks"]
    local, remote = str(tmp_path / "local"), f"{bucket}/runs/first"
    assert main([*arguments, "--out", local]) == 1  # one image is broken

    command = [sys.executable, "-m", "coprs_deploy", *arguments, "--out", remote]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            while not any(".parquet" in name for name in open_folder(remote).names()):
                assert process.poll() is None, "it ended before its first part was seen"
        finally:
            process.send_signal(signal.SIGKILL)
    left = parts_of(remote)
    assert main([*arguments, "--out", remote]) == 2
    assert "pass --resume" in capsys.readouterr().err
    assert main([*arguments, "--out", remote, "--resume"]) == 1
    found = parts_of(remote)
    assert found[: len(left)] == left
    assert found == parts_of(local)
    assert [row for row, *_ in found] == list(range(NUM_IMAGES + 1))
    masks = open_folder(f"{remote}/masks").names()
    assert masks == sorted(os.listdir(f"{local}/masks"))  # noqa: PTH208
    assert len(masks) == NUM_IMAGES
    assert not [name for name in store.ls(remote) if name.rpartition("/")[2].startswith(".")]
