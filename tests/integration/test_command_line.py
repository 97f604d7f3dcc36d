"""Every verb through the command line on generated models, and what only a process shows."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from coprs_deploy import demo
from coprs_deploy.cli.main import READER_GONE, main
from tests import ROOT


@dataclass(frozen=True)
class Finished:
    """Exit code and output of a command."""

    code: int
    stdout: str
    stderr: str


def run(*arguments: str | Path) -> Finished:
    """Run a command in this process."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with redirect_stdout(stdout), redirect_stderr(stderr):
        code = main([*map(str, arguments)])
    return Finished(code, stdout.getvalue(), stderr.getvalue())


def run_json(*arguments: str | Path) -> dict:
    done = run(*arguments, "--json")
    assert done.code == 0, done.stderr
    return json.loads(done.stdout)


def run_process(
    *arguments: str | Path, stdin: bytes | None = None
) -> subprocess.CompletedProcess[bytes]:
    """Run a command in a fresh process."""
    command = [sys.executable, "-m", "coprs_deploy", *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, check=False, timeout=300)


@pytest.fixture(scope="module", params=["tiny", "tiny-llava"])
def model(request, tmp_path_factory) -> Path:
    """Convert and export a model; the folder holds checkpoint, bundle and scene.png."""
    root = tmp_path_factory.mktemp(request.param)
    made = run_json(
        "convert", "--random", "--policy-size", request.param, "--out", root / "checkpoint"
    )
    assert "random weights" in made["note"]
    exported = run_json("export", root / "checkpoint", "--out", root / "bundle")
    assert all(row["passed"] for row in exported["equivalence"])
    pixels = np.random.default_rng(0).integers(0, 256, (96, 160, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(root / "scene.png")
    return root


@pytest.mark.slow
class TestVerbs:
    def test_verify_repeats_the_check(self, model):
        verified = run_json("verify", model / "bundle", "--against", model / "checkpoint")
        assert verified["passed"]
        assert [row["graph"] for row in verified["equivalence"]] == [
            "image_encoder",
            "prior",
            "mask_decoder",
            "end_to_end",
        ]

    def test_segment_writes_its_files(self, model, tmp_path):
        done = run_json(
            "segment",
            model / "scene.png",
            "the red thing",
            "--bundle",
            model / "bundle",
            "--out",
            tmp_path,
        )
        assert done["found"]
        assert done["image_size"] == [96, 160]
        saved = json.loads((tmp_path / "result.json").read_text())
        assert saved["masks"] == done["masks"]
        mask = np.asarray(Image.open(tmp_path / "mask.png"))
        assert mask.shape == (96, 160)
        assert np.count_nonzero(mask) == done["areas"][0]
        for name in ("overlay.png", "prior.png"):
            with Image.open(tmp_path / name) as image:
                assert image.size[0] >= 640

    def test_segment_mask_equals_pytorch(self, model):
        from coprs_deploy.checkpoint import load_segmentation_model, read_checkpoint
        from coprs_deploy.engines import SegmentationGraphs
        from coprs_deploy.engines.torch_runner import TorchRunner
        from coprs_deploy.policy.transformers_policy import TransformersPolicy
        from coprs_deploy.runtime import CoPRS
        from coprs_deploy.specs import graph_specs

        done = run_json(
            "segment", model / "scene.png", "the red thing", "--bundle", model / "bundle"
        )
        checkpoint = read_checkpoint(model / "checkpoint")
        config = checkpoint.config
        specs = graph_specs(config.model.geometry, config.model.policy_hidden_size)
        modules = load_segmentation_model(checkpoint).graph_modules()
        policy = TransformersPolicy(
            checkpoint.policy_path,
            config.prompt,
            config.policy_image.min_pixels,
            config.policy_image.max_pixels,
        )
        runners = {name: TorchRunner(module, specs[name]) for name, module in modules.items()}
        with CoPRS(SegmentationGraphs(runners), policy, config.model.geometry) as reference:
            result = reference.segment(model / "scene.png", "the red thing")
        assert result.to_json()["masks"] == done["masks"]
        assert result.response == done["response"]

    @pytest.mark.parametrize("runtime", ["openvino", "auto"])
    def test_segment_gives_the_same_result_on_another_runtime(self, model, runtime):
        request = (model / "scene.png", "the red thing", "--bundle", model / "bundle")
        done = run("segment", *request, "--runtime", runtime, "--json")
        assert done.code == 0, done.stderr
        result, expected = json.loads(done.stdout), run_json("segment", *request)
        assert result["masks"] == expected["masks"]
        assert result["response"] == expected["response"]
        if runtime == "openvino":
            assert "graphs: openvino" in result["runtime"]
        else:
            for graph in ("image_encoder", "prior", "mask_decoder"):
                assert f"{graph}: o" in done.stderr
            again = run("segment", *request, "--runtime", runtime)
            assert again.stderr.count("(cached on 20") == 3

    def test_verify_checks_another_runtime(self, model):
        verified = run_json(
            *("verify", model / "bundle", "--against", model / "checkpoint"),
            *("--runtime", "openvino"),
        )
        assert verified["passed"]
        refused = run(
            *("verify", model / "bundle", "--against", model / "checkpoint"),
            *("--runtime", "tensorrt"),
        )
        assert refused.code == 2
        assert "accepted: onnxruntime, openvino" in refused.stderr

    def test_export_for_openvino_is_compared_with_pytorch(self, model, tmp_path):
        exported = run_json(
            *("export", model / "checkpoint", "--out", tmp_path / "bundle"),
            *("--runtime", "openvino"),
        )
        assert all(row["passed"] for row in exported["equivalence"])
        shown = run_json("inspect", tmp_path / "bundle")
        assert {graph["runtime"] for graph in shown["graphs"].values()} == {"openvino"}
        assert "openvino" in shown["toolchain"]

    def test_segment_several_targets_give_numbered_files(self, model, tmp_path):
        done = run_json(
            "segment",
            model / "scene.png",
            "every thing",
            "--max-targets",
            "3",
            "--bundle",
            model / "bundle",
            "--out",
            tmp_path,
        )
        assert len(done["masks"]) == 3
        assert (tmp_path / "mask-3.png").is_file()

    def test_segment_no_match_is_exit_code_1(self, model, tmp_path):
        done = run(
            "segment",
            model / "scene.png",
            "the red thing",
            "--max-new-tokens",
            "3",
            "--bundle",
            model / "bundle",
            "--out",
            tmp_path,
            "--json",
        )
        assert done.code == 1
        result = json.loads(done.stdout)
        assert not result["found"]
        assert result["masks"] == []
        assert result["stop_reason"] == "token_budget"
        assert result["format_violations"]
        assert result["reasoning"]
        assert not np.asarray(Image.open(tmp_path / "mask.png")).any()

    def test_inspect_shows_graphs_and_equivalence(self, model):
        shown = run("inspect", model / "bundle")
        assert shown.code == 0
        for part in ("image_encoder", "mask_logits (1, 1, 64, 64)", "random weights", "ok"):
            assert part in shown.stdout

    def test_segment_changed_graph_is_refused_by_name(self, model, tmp_path):
        changed = shutil.copytree(model / "bundle", tmp_path / "changed")
        graph = changed / "prior.onnx"
        data = bytearray(graph.read_bytes())
        data[len(data) // 2] ^= 1
        graph.write_bytes(bytes(data))
        done = run("segment", model / "scene.png", "x", "--bundle", changed)
        assert done.code == 1
        assert "prior.onnx was changed" in done.stderr

    def test_verify_report_that_cannot_be_written_is_refused_first(self, model, tmp_path):
        (tmp_path / "file").touch()
        for report in (tmp_path, tmp_path / "file" / "page.html"):
            done = run(
                *("verify", model / "bundle", "--against", model / "checkpoint"),
                *("--report", report),
            )
            assert done.code == 2
            assert str(tmp_path) in done.stderr
            assert "candidate" not in done.stderr

    def test_verify_against_another_checkpoint_fails(self, model, tmp_path):
        run_json("convert", "--random", "--seed", "1", "--out", tmp_path / "other")
        done = run("verify", model / "bundle", "--against", tmp_path / "other")
        assert done.code == 1
        assert "another checkpoint" in done.stderr


class TestWrongUse:
    @pytest.mark.parametrize(
        ("arguments", "hint"),
        [
            (["exprot"], "did you mean export?"),
            (["inspect", "b", "--jsn"], "did you mean --json?"),
            (["segment", "nowhere.png", "x", "--bundle", "b"], "there is no bundle at b"),
            (["segment", "nowhere.png", "x"], "nowhere.png"),
            (["synth", "--out", "sheet.gif"], "ends in .png"),
            (["synth", "--preset", "plane", "--out", "s.png"], "accepted: plain, full"),
            (["synth", "--num-examples", "0", "--out", "s.png"], "must be at least 1"),
            (["synth", "--held-out", "--first-seed", "-9", "--out", "s.png"], "at least 0"),
            (["synth", "--columns", "0", "--out", "s.jsonl"], "must be at least 1"),
            (["evaluate", "--preset", "plane"], "accepted: plain, full"),
            (["evaluate", "--dataset", "nowhere.jsonl"], "nowhere.jsonl"),
            (["evaluate", "--require", "miou=0.2", "--out", "d"], "did you mean giou?"),
            (["evaluate", "--num-no-match", "0", "--require", "no_match_recall=1"], "undefined"),
            (["evaluate", "--dataset", "e.jsonl", "--first-seed", "1"], "--first-seed select"),
            (["inspect", "nowhere"], "there is no bundle at nowhere"),
            (["export", "nowhere", "--out", "b"], "there is no checkpoint directory nowhere"),
            (["export", "nowhere", "--out", "b", "--precision", "fp17"], "accepted: fp32, bf16"),
            (["export", "nowhere", "--out", "b", "--targets", "4,1"], "min,opt,max"),
            (["convert", "--out", "c"], "one of the arguments CHECKPOINT --policy"),
            (["convert", "--random", "--sam", "vit_x", "--out", "c"], "vit_b, vit_l, vit_h"),
            (["convert", "--random", "--reference-tail", "x", "--out", "c"], "be combined with"),
            (
                ["convert", "p", "--image-encoder", "f", "--reference-tail", "x", "--out", "c"],
                "be combined with CHECKPOINT",
            ),
            (["convert", "--policy", "p", "--out", "c"], "--sam is missing"),
            (["convert", "--policy", "p", "--sam", "s.pth", "--out", "c"], "no file s.pth"),
        ],
    )
    def test_wrong_use_is_exit_code_2_and_states_the_fix(
        self, arguments, hint, tmp_path, monkeypatch
    ):
        monkeypatch.chdir(tmp_path)
        done = run(*arguments)
        assert done.code == 2
        assert hint in done.stderr
        assert "Traceback" not in done.stderr
        assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_process_reads_the_image_from_stdin():
    scene = ROOT / "examples" / "scene.png"
    done = run_process("segment", "-", "the largest red circle", stdin=scene.read_bytes())
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode() == run("segment", scene, "the largest red circle").stdout


def test_process_exits_with_the_code_of_main(tmp_path):
    done = run_process("inspect", tmp_path / "nowhere")
    assert done.returncode == 2
    assert b"there is no bundle at" in done.stderr
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["sheet.png", "some.jsonl", "some.parquet"])
def test_synth_writes_a_contact_sheet_or_an_example_file(name, tmp_path):
    done = run_json("synth", "--preset", "full", "--num-examples", "3", "--out", tmp_path / name)
    assert done["num_examples"] == 3
    if name == "sheet.png":
        with Image.open(tmp_path / name) as sheet:
            assert sheet.size[0] > 900
    else:
        from coprs_deploy.data.examples import ExampleFile

        assert len(ExampleFile(tmp_path / name)) == 3


def test_doctor_with_runtimes_and_policies_is_ready():
    report = run_json("doctor")
    assert report["is_ready"]
    names = {entry["name"]: entry for entry in report["runtimes"]}
    assert names["onnxruntime cpu"]["is_available"]
    assert names["openvino cpu"]["is_available"]
    for entry in report["runtimes"] + report["policies"]:
        assert entry["is_available"] or entry["remedy"]


@pytest.mark.parametrize("arguments", [("inspect", demo.BUNDLE), ("train", "--list")])
def test_closed_pipe_ends_the_command_silently(arguments):
    command = [sys.executable, "-m", "coprs_deploy", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) == READER_GONE
