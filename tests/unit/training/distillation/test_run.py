"""Runs of a distillation: result, resume, embeddings from disk, concentrations, exported states."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from coprs_deploy.checkpoint import load_segmentation_model, read_checkpoint
from coprs_deploy.cli.main import main
from coprs_deploy.data.examples import ExampleFile
from coprs_deploy.data.synthetic import PLAIN, SceneExamples
from coprs_deploy.demo import CHECKPOINT
from coprs_deploy.export.encoder_swap import compare_image_encoders
from coprs_deploy.models.sam_encoder import SamImageEncoder
from coprs_deploy.training.distillation import concentrations
from coprs_deploy.training.distillation.checks import check_distillation
from coprs_deploy.training.distillation.concentrations import ConcentrationFiles
from coprs_deploy.training.distillation.run import train_distillation
from coprs_deploy.training.runs.processes import StopRequest
from coprs_deploy.training.runs.run_directory import RunDirectory


def weights(path):
    return load_segmentation_model(read_checkpoint(path)).state_dict()


def test_result_is_the_teacher_with_another_encoder(recipe_of, data, tiny_checkpoint, tmp_path):
    report = train_distillation(recipe_of(base="distill_masks"), tmp_path / "run")
    found, teacher = weights(tmp_path / "run/checkpoint"), weights(tiny_checkpoint)
    assert all(found[n].equal(t) for n, t in teacher.items() if not n.startswith("image_encoder."))
    checkpoint = read_checkpoint(tmp_path / "run/checkpoint")
    for file in read_checkpoint(tiny_checkpoint).policy_path.iterdir():
        assert (checkpoint.policy_path / file.name).read_bytes() == file.read_bytes()
    moved = compare_image_encoders(tiny_checkpoint, checkpoint.path, data / "images")
    assert len(moved) == 8
    metrics = report["stages"]["decoding"]["metrics"]
    assert {"embedding_error", "agreement_giou", "giou", "teacher_giou"} <= metrics.keys()
    text = (tmp_path / "run/report.md").read_text()
    assert "| student | SAM ViT, width 24, 1 blocks | 128 |" in text
    assert (tmp_path / "run/plots/embedding.png").is_file()
    assert (tmp_path / "run/checkpoints/best").is_symlink()


def test_resumed_run_ends_with_the_same_weights(recipe_of, tmp_path, monkeypatch):
    recipe = recipe_of(base="distill_masks")
    train_distillation(recipe, tmp_path / "whole")
    with monkeypatch.context() as patched:
        patched.setattr(StopRequest, "is_agreed", lambda *_: True)
        for _ in range(2):
            with pytest.raises(SystemExit):
                train_distillation(recipe, tmp_path / "run")
    (state,) = tmp_path.glob("run/stages/embedding/state-*2")
    train_distillation(recipe, tmp_path / "run")
    found, expected = (weights(tmp_path / name / "checkpoint") for name in ("run", "whole"))
    assert all(found[name].equal(tensor) for name, tensor in expected.items())
    assert not state.exists()


def test_embeddings_of_features_replace_the_teachers_encoder(
    recipe_of, data, tiny_checkpoint, tmp_path, monkeypatch
):
    out = tmp_path / "features"
    sources = [str(data / name) for name in ("images", "examples.jsonl", "held_out.jsonl")]
    assert main(["features", str(tiny_checkpoint), *sources, "--out", str(out)]) == 0
    train_distillation(recipe_of(), tmp_path / "computed")
    monkeypatch.setattr(
        "coprs_deploy.models.sam_encoder.SamImageEncoder.forward",
        refuse_teacher(load_segmentation_model(read_checkpoint(tiny_checkpoint))),
    )
    train_distillation(recipe_of(f"features={out}"), tmp_path / "stored")
    lines = [RunDirectory(tmp_path / name).read_log() for name in ("computed", "stored")]
    first = [each[0]["loss"] for each in lines]
    assert first[1] == pytest.approx(first[0], rel=1e-3)  # float16


def refuse_teacher(model):
    """Return SAM's forward pass, which fails for an encoder of the teacher's width."""
    forward, width = SamImageEncoder.forward, model.config.sam.encoder_embed_dim

    def checked(self, image):
        assert image.is_meta or self.config.encoder_embed_dim != width, "the teacher ran"
        return forward(self, image)

    return checked


def test_changed_images_and_another_student_are_refused_on_resume(
    recipe_of, data, tmp_path, monkeypatch
):
    shutil.copytree(data / "images", tmp_path / "images")
    settings = [f"images={tmp_path}/images"]
    with monkeypatch.context() as patched:
        patched.setattr(StopRequest, "is_agreed", lambda *_: True)
        with pytest.raises(SystemExit):
            train_distillation(recipe_of(*settings), tmp_path / "run")
    other = recipe_of(*settings, "model.image_encoder.encoder_embed_dim=48")
    with pytest.raises(ValueError, match=r"model\.image_encoder\.encoder_embed_dim"):
        train_distillation(other, tmp_path / "run")
    (tmp_path / "images/7.png").unlink()
    with pytest.raises(ValueError, match=r"other contents of images: 1 row removed \(7\.png\)"):
        train_distillation(recipe_of(*settings), tmp_path / "run")


def test_state_of_a_stopped_run_is_exported(recipe_of, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        patched.setattr(StopRequest, "is_agreed", lambda *_: True)
        with pytest.raises(SystemExit):
            train_distillation(recipe_of(), tmp_path / "run")
    assert main(["train", "--export-state", str(tmp_path / "run")]) == 0
    checkpoint = read_checkpoint(capsys.readouterr().out.strip())
    assert checkpoint.config.provenance["step"] == 1
    (state,) = tmp_path.glob("run/stages/embedding/state-*/pytorch_model.bin")
    saved = torch.load(state, weights_only=True)
    found = weights(checkpoint.path)["image_encoder.pos_embed"]
    assert found.equal(saved["segmentation.image_encoder.pos_embed"])


class TestConcentrations:
    @pytest.fixture
    def files_of(self, tiny_checkpoint, data, tmp_path, monkeypatch):
        monkeypatch.setattr(concentrations, "PER_FILE", 2)
        checkpoint, examples = (
            read_checkpoint(tiny_checkpoint),
            ExampleFile(data / "held_out.jsonl"),
        )

        def build():
            return ConcentrationFiles(tmp_path, "held_out", checkpoint, examples, "content")

        return build

    def test_interrupted_computation_resumes_with_the_missing_files(
        self, files_of, tmp_path, monkeypatch
    ):
        def stop(done, total):
            if done == 4:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            files_of().compute(torch.device("cpu"), stop)
        (first,) = tmp_path.glob("*.safetensors")
        before = first.stat().st_mtime_ns
        files_of().compute(torch.device("cpu"), lambda done, total: None)
        assert first.stat().st_mtime_ns == before
        found = files_of().load()
        assert [len(each) for each in found] == [len(e.masks) for e in files_of()._examples]
        monkeypatch.setattr(concentrations, "_Reader", None)  # nothing is missing: not loaded
        files_of().compute(torch.device("cpu"), lambda done, total: None)

    def test_example_without_response_gets_the_policys_own(self, tmp_path):
        """The demo model reasons as the scenes do, so that its concentrations are the same."""
        examples = [each for each in SceneExamples(PLAIN, 4, 200) if len(each.masks)][:2]
        found = []
        for name in ("given", "own"):
            files = ConcentrationFiles(
                tmp_path, name, read_checkpoint(CHECKPOINT), examples, "content"
            )
            files.compute(torch.device("cpu"), lambda done, total: None)
            found.append(files.load())
            examples = [replace(example, response="") for example in examples]
        for given, own in zip(*found, strict=True):
            assert given.shape == (1, 128)
            assert torch.allclose(given, own, atol=1e-4)


def test_check_prints_all_problems_and_writes_nothing(tiny_checkpoint, data, tmp_path, capsys):
    settings = [
        *(f"teacher={tiny_checkpoint}", "stages.decoding.embedding_loss_weight=0"),
        *("stages.decoding.decoding_loss_weight=0", f"examples={data}/examples.jsonl"),
    ]
    arguments = [argument for setting in settings for argument in ("--set", setting)]
    out = tmp_path / "run"
    assert main(["train", "distill_masks", "--check", "--json", "--out", str(out), *arguments]) == 2
    problems = {p["where"]: p for p in json.loads(capsys.readouterr().out)["problems"]}
    assert "set it to a folder of images" in problems["images"]["text"]
    assert "nothing is trained" in problems["stages.decoding"]["text"]
    assert not problems["examples"]["is_error"]
    assert not out.exists()


def test_check_names_images_without_an_embedding_and_metrics_without_ground_truth(
    recipe_of, data, tiny_checkpoint, tmp_path
):
    out = tmp_path / "features"
    source = str(data / "held_out.jsonl")
    assert main(["features", str(tiny_checkpoint), source, "--out", str(out)]) == 0
    recipe = recipe_of(f"features={out}", "stages.embedding.best_metric=giou")
    found = {p.where: p.text for p in check_distillation(recipe, tmp_path / "run").problems}
    assert "8 examples have (0.png, 1.png" in found["images"]
    assert "no embedding in" in found["images"]
    assert "agreement_giou" in found["stages.embedding"]


def test_estimate_counts_both_encoders(recipe_of, tiny_checkpoint, data, capsys):
    arguments = ["--set", f"teacher={tiny_checkpoint}", "--set", f"images={data}/images"]
    student = ["--set", "model.image_encoder={family='vit', encoder_embed_dim=24}"]
    arguments = ["train", "distill", "--estimate", "--gpus", "1", *arguments, *student]
    assert main([*arguments, "--json"]) == 0
    estimate = json.loads(capsys.readouterr().out)
    memory = estimate["stages"]["embedding"]["memory"]
    assert memory["activations"] > memory["gradients"] > 0
    assert memory["peak"] == pytest.approx(sum(v for k, v in memory.items() if k != "peak"))
    assert estimate["feature_bytes"] == 8 * 64 * 16 * 16 * 2
    assert main(arguments) == 0
    assert "student: SAM ViT, width 24, 6 blocks, 128 px" in capsys.readouterr().out
