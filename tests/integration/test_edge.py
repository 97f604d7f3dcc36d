"""The runtime without PyTorch: what the extra `edge` installs suffices, and the rest says so.

`make demo` runs the same in an environment that has nothing else.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from coprs_deploy.cli.main import EXTRAS, VERBS
from coprs_deploy.data.examples import write_examples
from coprs_deploy.data.synthetic import PLAIN, SceneExamples
from coprs_deploy.errors import install_hint
from tests import ROOT

SCENE = str(ROOT / "examples" / "scene.png")
INSTRUCTION = "the largest red circle"
ABSENT = ("accelerate", "matplotlib", "onnx", "onnxscript", "safetensors", "torch", "transformers")


def run_edge(program, *absent):
    """Run a program in a process that can import none of these packages, nor what trains."""
    blocked = (
        f"import sys\nsys.modules |= dict.fromkeys({(*ABSENT, *absent)!r})\n"
        "from coprs_deploy import CoPRS\nfrom coprs_deploy.cli.main import main\n"
    )
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", blocked + program],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )


def test_extra_edge_brings_neither_torch_nor_transformers():
    required = [Requirement(line) for line in requires("coprs-deploy")]
    edge = {r.name for r in required if r.marker is None or r.marker.evaluate({"extra": "edge"})}
    assert {"numpy", "openvino", "tokenizers"} <= edge
    assert edge.isdisjoint(ABSENT)


@pytest.mark.parametrize("runtime", ["openvino", "onnxruntime"])
def test_segment_without_torch_finds_the_target_of_the_demo(runtime):
    arguments = ["segment", SCENE, INSTRUCTION, "--json", "--runtime", runtime]
    done = run_edge(f"sys.exit(main({arguments!r}))")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["found"]
    assert result["runtime"].startswith(f"graphs: {runtime} ")
    assert "policy: openvino" in result["runtime"]


def test_load_without_onnxruntime_runs_its_graphs_in_openvino_with_the_same_mask():
    program = (
        f"with CoPRS.load() as coprs:\n    result = coprs.segment({SCENE!r}, {INSTRUCTION!r})\n"
        "    print(coprs.description, result.masks.sum(), result.prior_logits.shape)\n"
    )
    missing, installed = run_edge(program, "onnxruntime"), run_edge(program)
    assert missing.returncode == 0, missing.stderr
    assert missing.stdout.startswith("graphs: openvino ")
    assert installed.stdout.startswith("graphs: onnxruntime ")
    assert missing.stdout.split("int8")[1] == installed.stdout.split("int8")[1]


def test_inspect_doctor_and_server_need_no_torch():
    program = (
        "from coprs_deploy.server.app import build_app\n"
        "with CoPRS.load() as coprs:\n    build_app(coprs, 1 << 20)\n"
        "inspected = main(['inspect', 'coprs_deploy/demo/bundle'])\n"
        "sys.exit(10 * inspected + main(['doctor']))\n"
    )
    done = run_edge(program)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "policy: hidden size 128" in done.stdout
    assert "yes openvino cpu" in done.stdout


ARGUMENTS = {
    "convert": ["--random", "--out", "OUT"],
    "export": ["coprs_deploy/demo/checkpoint", "--out", "OUT"],
    "verify": ["coprs_deploy/demo/bundle", "--against", "coprs_deploy/demo/checkpoint"],
    "train": ["grpo_demo", "--out", "OUT"],
    "features": ["coprs_deploy/demo/checkpoint", "EXAMPLES", "--out", "OUT"],
    "segment": [SCENE, INSTRUCTION, "--policy", "transformers"],
}


def test_verbs_that_need_torch_name_the_extra_in_one_line(tmp_path):
    assert {*EXTRAS, "segment"} == set(ARGUMENTS) <= set(VERBS)
    paths = {"OUT": str(tmp_path / "out"), "EXAMPLES": str(tmp_path / "examples.jsonl")}
    write_examples(Path(paths["EXAMPLES"]), SceneExamples(PLAIN, 1))
    calls = [[verb, *(paths.get(a, a) for a in given)] for verb, given in ARGUMENTS.items()]
    done = run_edge(f"for call in {calls!r}:\n    print(call[0], main(call))\n")
    assert done.returncode == 0, done.stderr
    assert [line.split()[-1] for line in done.stdout.splitlines()] == ["2"] * len(calls)
    lines = [line for line in done.stderr.splitlines() if "pip install" in line]
    for verb, line in zip(ARGUMENTS, lines, strict=True):
        assert line.startswith(f"coprs-deploy {verb}: "), line
        assert line.endswith(install_hint(EXTRAS.get(verb, "torch"))), line


def test_help_of_every_verb_needs_no_torch():
    done = run_edge(f"for verb in {list(VERBS)!r}:\n    main([verb, '--help'])\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: coprs-deploy ") == len(VERBS)


def test_batch_needs_no_torch(tmp_path):
    arguments = ["batch", SCENE, "--instruction", INSTRUCTION, "--out", str(tmp_path / "out")]
    done = run_edge(f"sys.exit(main({[*arguments, '--workers', '1', '--json']!r}))", "fsspec")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["num_done"] == 1
