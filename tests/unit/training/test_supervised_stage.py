"""Supervised stage on example files, with tiny policies of both families."""

import shutil
from dataclasses import replace

import msgspec
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from coprs_deploy.checkpoint import load_segmentation_model, read_checkpoint
from coprs_deploy.conversion import random_checkpoint
from coprs_deploy.data.examples import Example, write_examples
from coprs_deploy.data.synthetic import PLAIN, SceneExamples
from coprs_deploy.policy.vision_inputs import VisionProcessor
from coprs_deploy.training.examples import ExampleSets
from coprs_deploy.training.features import FeatureStore, compute_features
from coprs_deploy.training.losses import IGNORED_LABEL
from coprs_deploy.training.mask_decoding import fit_mask
from coprs_deploy.training.recipe import load_recipe
from coprs_deploy.training.runs.processes import StopRequest
from coprs_deploy.training.runs.run import train
from coprs_deploy.training.runs.run_directory import RunDirectory
from coprs_deploy.training.settings import Optimizer, SupervisedSettings
from coprs_deploy.training.state import state_from_checkpoint
from coprs_deploy.training.supervised_stage import (
    ExampleCollector,
    ExampleObjective,
    SupervisedStage,
)
from coprs_deploy.training.trainer import loss_coefficient

SETTINGS = SupervisedSettings(
    max_steps=6,
    global_batch_size=2,
    segmentation_loss_weight=1.0,
    num_eval_examples=2,
    optimizer=Optimizer(learning_rate=1e-3, name="adamw", warmup_steps=0),
)


@pytest.fixture(scope="module", params=["tiny", "tiny-llava"])
def checkpoint(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("start") / "checkpoint"
    random_checkpoint(path, request.param, "tiny")
    return read_checkpoint(path)


@pytest.fixture(scope="module")
def examples():
    wide = np.zeros((60, 100, 3), np.uint8)
    wide[10:30, 20:70] = 255
    masks = np.zeros((2, 60, 100), np.bool_)
    masks[0, 10:30, 20:70] = True
    masks[1, 40:50, 0:10] = True
    two = Example("two", wide, "both", masks, "<think>a</think> <REF_POS> and <REF_POS>")
    none = Example("none", wide, "the cat", masks[:0], "<think>none</think> nothing matches")
    return [two, none, *SceneExamples(PLAIN, 4)]


def test_example_collector_holds_prompt_response_and_targets(checkpoint, examples):
    state = state_from_checkpoint(checkpoint)
    vision = VisionProcessor(checkpoint.policy_path, state.policy.model.config)
    batch = ExampleCollector(state, vision)(examples[:2])
    tokenizer = state.policy.tokenizer
    reference = tokenizer.convert_tokens_to_ids("<REF_POS>")
    assert batch.references[:, 0].tolist() == [0, 0]
    at = batch.references
    assert (batch.inputs["input_ids"][at[:, 0], at[:, 1]] == reference).all()
    labels = batch.labels[0][batch.labels[0] != IGNORED_LABEL]
    assert labels[-1] == tokenizer.eos_token_id
    assert int((labels == reference).sum()) == 2
    assert batch.masks.shape == (2, 1, 64, 64)
    assert batch.unpadded_sizes.tolist() == [[77, 128], [77, 128]]


def test_objective_losses_fall_on_a_repeated_batch(checkpoint, examples):
    state = state_from_checkpoint(checkpoint)
    state.policy.model.requires_grad_(True)
    state.segmentation.requires_grad_(True)
    vision = VisionProcessor(checkpoint.policy_path, state.policy.model.config)
    sets = ExampleSets(examples, examples, vision, seed=0)
    stage = SupervisedStage("supervised", SETTINGS, state, sets)
    assert not any(p.requires_grad for p in state.segmentation.image_encoder.parameters())
    batch = stage.batch(0, 0, 1)
    trained = [p for p in stage.objective.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    totals = []
    for _ in range(5):
        output = stage.objective(batch)
        loss = sum(mean.total / mean.weight for mean in output.losses.values())
        totals.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert totals[-1] < totals[0]
    metrics = stage.evaluate(Accelerator(cpu=True), 3)
    assert 0 <= metrics["teacher_forced_giou"] <= 1


def test_objective_counts_no_pixel_of_an_ignore_mask(checkpoint, examples):
    state = state_from_checkpoint(checkpoint)
    vision = VisionProcessor(checkpoint.policy_path, state.policy.model.config)
    collect = ExampleCollector(state, vision)
    ignored = np.zeros((60, 100), np.bool_)
    ignored[:, 60:] = True
    wrong = examples[0].masks.copy()
    wrong[:, 10:50, 75:90] = True  # well inside: cells at the border are ignored in part
    found = []
    for masks in (examples[0].masks, wrong):
        for ignore_mask in (ignored, None):
            example = replace(examples[0], masks=masks, ignore_mask=ignore_mask)
            with torch.no_grad():
                output = ExampleObjective(state, SETTINGS)(collect([example]))
            found.append({**output.losses, **output.metrics})
    for name in ("prior_bce", "mask_dice"):
        assert torch.equal(found[0][name].total, found[2][name].total), name
        assert not torch.equal(found[1][name].total, found[3][name].total), name
    assert all(torch.equal(found[0][name].total, found[2][name].total) for name in found[0])


def test_stage_has_a_coefficient_for_every_loss(checkpoint, examples):
    state = state_from_checkpoint(checkpoint)
    vision = VisionProcessor(checkpoint.policy_path, state.policy.model.config)
    sets = ExampleSets(examples, examples, vision, seed=0)
    stage = SupervisedStage("supervised", SETTINGS, state, sets)
    losses = stage.objective(stage.batch(0, 0, 1)).losses
    coefficients = stage.loss_coefficients(1.0)
    assert set(losses) == {"language", "prior_bce", "mask_dice"}
    assert all(loss_coefficient(loss, coefficients) > 0 for loss in losses)


def test_fit_mask_keeps_the_area(examples):
    from coprs_deploy.model_config import SAM_SIZES

    geometry = SAM_SIZES["tiny"].geometry
    fitted = fit_mask(examples[0].masks[0], (77, 128), geometry)
    pixels = fitted.sum().item() * geometry.mask_stride**2
    assert pixels == pytest.approx(1000 * (128 / 100) ** 2, rel=0.03)
    assert fitted[0, 39:].sum() == 0


def test_stage_with_precomputed_embeddings_gives_the_losses_of_the_encoder(
    checkpoint, examples, tmp_path
):
    state = state_from_checkpoint(checkpoint)
    vision = VisionProcessor(checkpoint.policy_path, state.policy.model.config)
    compute_features(checkpoint, [e.image for e in examples], len(examples), tmp_path)
    store = FeatureStore(tmp_path)
    store.require_encoder(state.segmentation)
    losses = []
    for features in (None, store):
        sets = ExampleSets(examples, examples, vision, seed=0, features=features)
        stage = SupervisedStage("supervised", SETTINGS, state, sets)
        batch = stage.batch(0, 0, 1)
        assert (batch.images.shape[1:] == store.index.shape) == (features is not None)
        means = stage.objective(batch).losses
        losses.append({name: (mean.total / mean.weight).item() for name, mean in means.items()})
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    settings = msgspec.structs.replace(SETTINGS, train_image_encoder=True)
    with pytest.raises(ValueError, match="leave one of them out"):
        SupervisedStage("supervised", settings, state, sets)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*rows are invalid:UserWarning")
@pytest.mark.parametrize("has_features", [False, True])
def test_train_from_a_checkpoint_writes_a_trained_checkpoint(
    checkpoint, examples, tmp_path, has_features
):
    for name in ("training", "held_out"):
        write_examples(tmp_path / f"{name}.jsonl", examples)
    with (tmp_path / "training.jsonl").open("a") as file:
        file.write('{"id": "last"}\n')
    settings = [
        f"model.path={checkpoint.path}",
        f"data.training={tmp_path / 'training.jsonl'}",
        f"data.held_out={tmp_path / 'held_out.jsonl'}",
        "precision=fp32",
        "save_dtype=bfloat16",
        "num_threads=1",
        f"num_workers={2 * has_features}",
    ]
    if has_features:
        features = tmp_path / "features"
        compute_features(checkpoint, [e.image for e in examples], len(examples), features)
        settings.append(f"data.features={features}")
    recipe = load_recipe("supervised_7b", settings)
    recipe = msgspec.structs.replace(recipe, stages={"supervised": SETTINGS})
    report = train(recipe, tmp_path / "run")
    assert report["stages"]["supervised"]["metrics"].keys() >= {
        "teacher_forced_giou",
        "teacher_forced_prior_giou",
    }
    training, held_out = report["files"]
    assert [row["column"] for row in training["skipped_rows"]] == ["instruction"]
    assert held_out["skipped_rows"] == []
    finished = read_checkpoint(tmp_path / "run" / "checkpoint")
    if has_features:
        FeatureStore(features).require_encoder(load_segmentation_model(finished))
    trained = state_from_checkpoint(finished).state_dict()
    before = state_from_checkpoint(checkpoint).state_dict()
    query_head = trained["segmentation"]["prior.q_proj.weight"]
    assert not torch.equal(query_head, before["segmentation"]["prior.q_proj.weight"])
    name = "image_encoder.pos_embed"
    assert torch.equal(trained["segmentation"][name], before["segmentation"][name])
    changed = [k for k, v in trained["policy"].items() if not torch.equal(v, before["policy"][k])]
    assert any("language_model" in name for name in changed)


def query_head(path, name="segmentation.safetensors"):
    return load_file(path / name)["prior.q_proj.weight"]


def test_resumed_run_uses_an_allowed_learning_rate_and_data(
    tiny_checkpoint, examples, tmp_path, monkeypatch
):
    """A state holds the rate that it was saved with."""
    for name in ("training", "held_out"):
        write_examples(tmp_path / f"{name}.jsonl", examples)
    settings = [
        *(f"model.path={tiny_checkpoint}", "precision=fp32", "save_dtype=float32"),
        *(f"data.training={tmp_path}/training.jsonl", f"data.held_out={tmp_path}/held_out.jsonl"),
    ]
    recipe = load_recipe("supervised_7b", [*settings, "num_threads=1", "num_workers=0"])
    short = msgspec.structs.replace(SETTINGS, max_steps=2, num_completions_to_print=0)
    recipe = msgspec.structs.replace(recipe, stages={"supervised": short})
    with monkeypatch.context() as patched:
        patched.setattr(StopRequest, "is_agreed", lambda *_: True)
        with pytest.raises(SystemExit):
            train(recipe, tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "other", symlinks=True)
    (state,) = tmp_path.glob("run/stages/supervised/state-*/pytorch_model.bin")
    weights = torch.load(state, weights_only=True)
    (stopped,) = (w for name, w in weights.items() if name.endswith("prior.q_proj.weight"))
    optimizer = msgspec.structs.replace(SETTINGS.optimizer, learning_rate=1e-12)
    slow = msgspec.structs.replace(short, optimizer=optimizer)
    changed = msgspec.structs.replace(recipe, stages={"supervised": slow})
    with pytest.raises(
        ValueError, match=r"--allow-change stages\.supervised\.optimizer\.learning_rate"
    ):
        train(changed, tmp_path / "run")
    write_examples(tmp_path / "training.jsonl", examples[:-1])
    allowed = ["stages.supervised.optimizer"]
    with pytest.raises(ValueError, match=r"data\.training: 1 row removed \(plain-3\)"):
        train(changed, tmp_path / "run", allowed)
    train(changed, tmp_path / "run", [*allowed, "data.training"])
    changes = [line for line in RunDirectory(tmp_path / "run").read_log() if "changed" in line]
    assert [(line["stage"], line["step"]) for line in changes] == [("supervised", 1)] * 2
    write_examples(tmp_path / "training.jsonl", examples)
    train(recipe, tmp_path / "other")
    slow_end, end = (query_head(tmp_path / name / "checkpoint") for name in ("run", "other"))
    assert (slow_end - stopped).abs().max() < 1e-9
    assert (end - stopped).abs().max() > 1e-4


def test_truncated_examples_keep_the_tail_and_do_not_learn_to_end_the_reasoning(
    checkpoint, examples
):
    state = state_from_checkpoint(checkpoint)
    vision = VisionProcessor(checkpoint.policy_path, state.policy.model.config)
    sets = ExampleSets(examples[2:], examples[2:], vision, seed=0)
    whole = SupervisedStage("supervised", SETTINGS, state, sets).batch(0, 0, 1)
    settings = msgspec.structs.replace(SETTINGS, truncation_ratio=1.0)
    stage = SupervisedStage("supervised", settings, state, sets)
    batch, tokenizer = stage.batch(0, 0, 1), state.policy.tokenizer
    lengths = batch.inputs["attention_mask"].sum(1)
    assert (lengths < whole.inputs["attention_mask"].sum(1)).all()
    for row, length in enumerate(lengths):
        ids = batch.inputs["input_ids"][row][:length]
        labels = batch.labels[row][:length]
        response = int((labels != IGNORED_LABEL).nonzero()[0]) + 1
        text = tokenizer.decode(ids[response:])
        end = tokenizer.decode(tokenizer.eos_token_id)
        assert text.startswith("<think>")
        assert text.endswith(f"</think> <REF_POS>{end}")
        (missing,) = (labels[response - 1 : -1] == IGNORED_LABEL).nonzero()[:, 0].tolist()
        assert tokenizer.decode(ids[response + missing :]) == f"</think> <REF_POS>{end}"
    assert torch.equal(stage.batch(0, 0, 1).inputs["input_ids"], batch.inputs["input_ids"])
    evaluated = stage.evaluate(Accelerator(cpu=True), 2)
    assert evaluated == stage.evaluate(Accelerator(cpu=True), 2)


def test_examples_without_a_target_keep_their_whole_reasoning(checkpoint, examples):
    state = state_from_checkpoint(checkpoint)
    vision = VisionProcessor(checkpoint.policy_path, state.policy.model.config)
    sets = ExampleSets(examples[1:2], examples[1:2], vision, seed=0)
    settings = msgspec.structs.replace(SETTINGS, truncation_ratio=1.0)
    whole, found = (
        SupervisedStage("supervised", each, state, sets).batch(0, 0, 1)
        for each in (SETTINGS, settings)
    )
    assert found.inputs["input_ids"].equal(whole.inputs["input_ids"])
    assert found.labels.equal(whole.labels)


def test_truncation_ratio_without_masks_is_refused():
    with pytest.raises(ValueError, match="only masks learn from truncated reasoning"):
        SupervisedSettings(max_steps=1, truncation_ratio=0.5)
