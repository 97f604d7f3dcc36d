"""``coprs-deploy batch --engine ray`` on a real cluster: the rows of the local engine."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from coprs_deploy.batch.rows import read_part
from coprs_deploy.cli.main import main
from coprs_deploy.data.synthetic import HELD_OUT_SEED, PLAIN, make_scene
from coprs_deploy.data.synthetic.questions import ask_questions
from tests import ROOT

pytest.importorskip("ray", reason="Ray is not installed")

pytestmark = pytest.mark.extended

ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_AUTH_MODE": "disabled",  # its token would be written to the home directory
    "RAY_USAGE_STATS_ENABLED": "0",
}
WAIT_S = 120
ROWS_PER_FILE = 4
NUM_ROWS = 64


class RayCluster:
    """A cluster with a head node that has some cores."""

    def __init__(self, process):
        self._process = process
        self.address = self._line()

    def __call__(self, line):
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._line()

    def _line(self):
        line = self._process.stdout.readline().strip()
        assert line, "the cluster ended"
        return line


@contextlib.contextmanager
def cluster_of(num_cores):
    program = Path(__file__).with_name("ray_cluster.py")
    with subprocess.Popen(
        [sys.executable, program, str(num_cores)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=ENVIRONMENT,
    ) as process:
        try:
            yield RayCluster(process)
        finally:
            process.stdin.close()
            try:
                process.wait(WAIT_S)
            finally:
                process.kill()


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Return a table of rows on scenes, four an image, one row without an image."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("rows")
    lines, seed = [], HELD_OUT_SEED
    while len(lines) < NUM_ROWS:
        scene = make_scene(PLAIN, seed)
        questions = ask_questions(scene, PLAIN, seed, 4)
        if len(questions) == 4:  # a scene of few objects has fewer
            Image.fromarray(scene.image).save(folder / f"{seed}.png")
            lines += [{"image": f"{seed}.png", "instruction": q.instruction} for q in questions]
        seed += 1
    lines[-1]["image"] = "missing.png"
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "rows.jsonl"


def arguments(table, out, *others):
    return ["batch", str(table), "--out", str(out), "--rows-per-file", str(ROWS_PER_FILE), *others]


def ray_command(cluster, table, out, replicas, *others):
    options = ["--engine", "ray", "--replicas", replicas, "--ray-address", cluster.address]
    return [sys.executable, "-m", "coprs_deploy", *arguments(table, out, *options, *others)]


def run_on_ray(*given):
    done = subprocess.run(
        ray_command(*given),
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=2 * WAIT_S,
        check=False,
    )
    assert done.returncode == 1, done.stderr  # a row has no image


def rows_of(out):
    found = [row for path in sorted(out.glob("part-*.parquet")) for row in read_part(path)]
    return [msgspec.structs.replace(row, timings={}, runtime="") for row in found]


@pytest.fixture(scope="module")
def local(table, tmp_path_factory):
    """Return the output of a local run, and its rows."""
    out = tmp_path_factory.mktemp("local") / "out"
    assert main(arguments(table, out, "--workers", "1", "--num-threads", "1")) == 1
    rows = rows_of(out)
    assert [row.row for row in rows] == list(range(NUM_ROWS))
    assert sum(row.found for row in rows) > NUM_ROWS // 2
    return out, rows


def wait_for(condition):
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("num_actors", [2, 3])
def test_actors_give_the_rows_of_the_local_engine(table, local, tmp_path, num_actors):
    with cluster_of(num_actors) as cluster:
        run_on_ray(cluster, table, tmp_path / "out", str(num_actors))
    assert rows_of(tmp_path / "out") == local[1]


def test_run_goes_on_with_the_other_engine(table, local, tmp_path):
    half = tmp_path / "half"
    with cluster_of(1) as cluster:
        for engine in ("ray", "local"):
            shutil.copytree(local[0], half)
            for path in sorted(half.glob("part-*.parquet"))[1::2]:
                path.unlink()
            kept = {path: path.stat().st_mtime_ns for path in half.glob("part-*.parquet")}
            if engine == "ray":
                run_on_ray(cluster, table, half, "1", "--resume")
            else:
                options = ["--workers", "1", "--num-threads", "1", "--resume"]
                assert main(arguments(table, half, *options)) == 1
            assert rows_of(half) == local[1]
            assert all(path.stat().st_mtime_ns == kept[path] for path in kept)
            shutil.rmtree(half)


def test_actor_that_is_killed_and_nodes_that_are_added_lose_no_row(table, local, tmp_path):
    out = tmp_path / "out"
    with (
        cluster_of(1) as cluster,
        subprocess.Popen(
            ray_command(cluster, table, out, "1:3"),
            env=ENVIRONMENT,
            stderr=subprocess.PIPE,
            text=True,
        ) as run,
    ):
        try:
            wait_for(lambda: list(out.glob("part-*.parquet")))
            assert cluster("actors") == "1"  # there is room for one
            cluster("kill")
            cluster("add 2")
            wait_for(lambda: cluster("actors") == "3" or run.poll() is not None)
            assert run.wait(WAIT_S) == 1, run.stderr.read()
        finally:
            run.kill()
    assert rows_of(out) == local[1]


def test_bundle_that_no_actor_can_load_is_one_sentence(table, tmp_path):
    options = ["--policy", "openvino", "--policy-dtype", "bfloat16"]
    with cluster_of(1) as cluster:
        done = subprocess.run(
            ray_command(cluster, table, tmp_path / "out", "1", *options),
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=WAIT_S,
            check=False,
        )
    assert done.returncode == 2
    assert "the openvino policy has the precision that it was exported with" in done.stderr
    assert "Traceback" not in done.stderr


def test_segment_batch_runs_in_map_batches(local, table):
    """The public class in a pipeline of Ray Data gives the rows of the verb."""
    program = """
import json, sys
from pathlib import Path
import ray
from coprs_deploy.batch import SegmentBatch

ray.init(address=sys.argv[1], log_to_driver=False)
lines = [json.loads(line) for line in open(sys.argv[2])]
for line in lines:  # an actor has another working directory
    line["image"] = str(Path(line["image"]).absolute())
rows = [{"id": str(n), **line} for n, line in enumerate(lines[:16])]
found = ray.data.from_items(rows).map_batches(
    SegmentBatch, concurrency=2, num_cpus=1, batch_size=8, batch_format="numpy"
)
print(json.dumps([[row["id"], row["areas"], row["boxes"]] for row in found.take_all()]))
"""
    with cluster_of(3) as cluster:
        done = subprocess.run(
            [sys.executable, "-c", program, cluster.address, str(table)],
            env={**ENVIRONMENT, "RAY_DATA_DISABLE_PROGRESS_BARS": "1"},
            cwd=table.parent,
            capture_output=True,
            text=True,
            timeout=WAIT_S,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    found = {int(key): values for key, *values in json.loads(done.stdout.splitlines()[-1])}
    assert sorted(found) == list(range(16))
    for row in local[1][:16]:
        areas, boxes = found[row.row]
        # Ray Data decides which rows are decoded together, on which roundings depend.
        assert areas == pytest.approx(row.areas, rel=0.05)
        assert len(boxes) == len(row.boxes)
