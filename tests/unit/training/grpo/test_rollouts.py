"""Prompts, ground gt, scores and evaluation, for both policy families."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from coprs_deploy.checkpoint import read_checkpoint
from coprs_deploy.data.examples import Example
from coprs_deploy.data.synthetic.examples import held_out_examples
from coprs_deploy.data.synthetic.presets import PRESETS
from coprs_deploy.demo import CHECKPOINT
from coprs_deploy.evaluation.evaluator import Prediction, evaluate, predict_with
from coprs_deploy.evaluation.protocols import TARGETS
from coprs_deploy.evaluation.summary import row_iou
from coprs_deploy.prompts import encode_prompt
from coprs_deploy.runtime import CoPRS
from coprs_deploy.training.features import FeatureStore, compute_features
from coprs_deploy.training.grpo import evaluation
from coprs_deploy.training.grpo.batch import GroundTruth, PromptCollator
from coprs_deploy.training.grpo.evaluation import (
    evaluate_policy,
    spread,
    summarize,
    write_samples,
)
from coprs_deploy.training.grpo.scores import DecodedMasks, grid_ious, mask_scores, row_losses
from coprs_deploy.training.grpo.trainer import ScoredRollout
from coprs_deploy.training.losses import segmentation_losses
from coprs_deploy.training.runs.gallery import TILE_PX
from coprs_deploy.training.settings import SegmentationLossWeights

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

FAMILIES = ["tiny_checkpoint", "tiny_llava_checkpoint"]


@pytest.fixture
def examples(scene):
    """Examples that are not square, with zero, one and two targets."""
    masks = np.zeros((2, *scene.shape[:2]), np.bool_)
    masks[0, 20:60, 12:52] = True
    masks[1, 10:40, 70:100] = True
    return [
        Example("two", scene, "both", masks),
        Example("one", scene, "the red one", masks[:1]),
        Example("none", scene, "the green cube", masks[:0]),
        Example("other", scene[:, ::-1].copy(), "the blue one", masks[1:]),
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_policy_processor_writes_the_prompt_of_the_runtime(family, request, make_setup, examples):
    setup = make_setup(checkpoint=request.getfixturevalue(family), examples=examples, max_targets=2)
    parts, policy = setup.trainer.parts, setup.state.policy
    items = [parts.collator.item(example, n) for n, example in enumerate(examples)]
    conversations = [
        [
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": item.image},
                    {"type": "text", "text": item.example.instruction},
                ],
            }
        ]
        for item in items
    ]
    written = parts.processor.apply_chat_template(conversations, tokenize=True)
    padded = parts.processor(
        images=[[item.image] for item in items],
        text=[item.example.instruction for item in items],
    )
    image_id = policy.tokenizer.convert_tokens_to_ids(policy.prompt.image_token)
    for n, item in enumerate(items):
        count = parts.processor.vision_inputs(item.image).num_tokens
        expected = encode_prompt(policy.prompt, policy.tokenizer, item.example.instruction, count)
        assert written["input_ids"][n] == expected
        assert expected.count(image_id) == count
        attended = padded["attention_mask"][n].bool()
        assert padded["input_ids"][n][attended].tolist() == expected
        assert not attended[: int((~attended).sum())].any(), "the padding is not on the left"


@pytest.mark.parametrize("family", FAMILIES)
def test_joint_trainer_with_several_targets_updates_weights(family, request, make_setup, examples):
    setup = make_setup(
        checkpoint=request.getfixturevalue(family),
        examples=examples,
        max_targets=2,
        max_steps=2,
        global_batch_size=4,
        max_completion_length=24,
    )
    before = {n: p.detach().clone() for n, p in setup.trainer.model.named_parameters()}
    setup.trainer.train()
    after = dict(setup.trainer.model.named_parameters())
    changed = [n for n, p in before.items() if not torch.equal(p, after[n])]
    assert any(n.startswith("segmentation.prior") for n in changed)
    assert len(setup.lines) == 2
    assert all(np.isfinite(line["loss"]) for line in setup.lines)
    evaluated, _ = evaluate_policy(setup.trainer, examples)
    assert [each.id for each in evaluated] == ["two", "one", "none", "other"]
    assert [each.num_targets for each in evaluated] == [2, 1, 0, 1]


def test_gradient_checkpointing_keeps_the_gradient(make_setup):
    found = []
    for checkpointing in (False, True):
        trainer = make_setup(checkpointing=checkpointing, segmentation_loss_weight=0.3).trainer
        trainer.model.train()
        if checkpointing:
            trainer.model.gradient_checkpointing_enable()
        trainer.current_gradient_accumulation_steps = 1
        torch.manual_seed(3)
        inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        trainer.compute_loss(trainer.model, inputs).backward()
        found.append([p.grad for p in trainer.model.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1])
    for plain, saved in zip(*found, strict=True):
        assert torch.allclose(plain, saved, rtol=1e-4, atol=1e-7)


def decoded_and_gt():
    """Four rows on a grid of 8: both targets, one of two, no reference, no-match."""
    masks = torch.zeros(4, 2, 8, 8)
    masks[:3, 0, :4] = 1
    masks[:2, 1, 4:] = 1
    logits = torch.where(masks > 0, 40.0, -40.0)
    is_found = torch.tensor([[1, 1], [1, 0], [0, 0], [0, 0]]).bool()
    inside = torch.ones(4, 1, 8, 8)
    counts = torch.tensor([2, 2, 1, 0])
    gt = GroundTruth(torch.zeros(4, 4, 2, 2), inside, masks, counts, inside)
    return DecodedMasks(logits, logits, is_found), gt


def test_mask_scores_are_means_over_targets():
    decoded, gt = decoded_and_gt()
    assert mask_scores(decoded, gt).tolist() == pytest.approx([1.0, 0.5, 0.0, 1.0])
    with_references = DecodedMasks(*decoded[:2], torch.ones(4, 2, dtype=torch.bool))
    assert mask_scores(with_references, gt).tolist() == pytest.approx([1.0, 1.0, 1.0, 0.0])
    found = grid_ious(decoded, gt)
    assert (found["sampled_giou"].total / found["sampled_giou"].weight).item() == pytest.approx(
        3 / 5
    )


def test_mask_scores_ignore_the_padding():
    decoded, gt = decoded_and_gt()
    inside = torch.ones(4, 1, 8, 8)
    inside[:, :, 6:] = 0
    everywhere = DecodedMasks(decoded[0], torch.full_like(decoded[1], 40.0), decoded[2])
    upper = gt.masks[0, 0]  # 4 of the 6 rows that belong to the image
    gt = gt._replace(inside=inside, counted=inside, masks=gt.masks * inside)
    iou = float(upper.sum() / inside[0].sum())
    dice = 2 * iou / (1 + iou)
    lower_iou = 1 - iou
    lower = 0.8 * lower_iou + 0.2 * 2 * lower_iou / (1 + lower_iou)
    expected = (0.8 * iou + 0.2 * dice + lower) / 2
    assert float(mask_scores(everywhere, gt)[0]) == pytest.approx(expected, rel=1e-5)


def test_scores_and_losses_ignore_what_is_not_counted():
    decoded, gt = decoded_and_gt()
    counted = torch.ones(4, 1, 8, 8)
    counted[:, :, :2] = 0
    other = gt.masks.clone()
    other[:, :, :2] = 1 - other[:, :, :2]
    noise = torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    decoded, weights = DecodedMasks(noise, noise, decoded.is_found), SegmentationLossWeights()
    results = [
        [
            mask_scores(decoded, each),
            *(mean.total for mean in grid_ious(decoded, each).values()),
            *row_losses(decoded, each, weights).values(),
        ]
        for masks in (gt.masks, other)
        for each in (gt._replace(masks=masks, counted=counted), gt._replace(masks=masks))
    ]
    for ignoring, ignoring_other, counting, counting_other in zip(
        results[0], results[2], results[1], results[3], strict=True
    ):
        assert torch.equal(ignoring, ignoring_other)
        assert not torch.equal(counting, counting_other)


def test_row_losses_average_over_the_targets_of_a_row_first():
    decoded, gt = decoded_and_gt()
    noise = torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    decoded = DecodedMasks(noise, noise.flip(0), decoded.is_found)
    weights = SegmentationLossWeights(mask_focal=10.0)
    found = row_losses(decoded, gt, weights)
    for name, loss in found.items():
        expected = 0.0
        for row, count in enumerate(gt.num_targets.tolist()):
            for slot in range(count):
                one = segmentation_losses(
                    decoded.prior_logits[row, slot][None, None],
                    decoded.mask_logits[row, slot][None, None],
                    gt.masks[row, slot][None, None],
                    gt.inside[row : row + 1],
                    weights,
                )
                expected += (one[name].total / one[name].weight).item() / count
        assert float(loss) == pytest.approx(expected, rel=1e-5), name


def test_ground_truth_encodes_a_repeated_item_once(make_setup, examples):
    collator = make_setup(examples=examples, max_targets=2).trainer.parts.collator
    first, second = (collator.item(examples[n], n) for n in (0, 3))
    gt = collator.ground_truth([first, first, second, first], torch.device("cpu"))
    assert gt.num_targets.tolist() == [2, 2, 1, 2]
    assert torch.equal(gt.image_embedding[0], gt.image_embedding[3])
    assert not torch.equal(gt.image_embedding[0], gt.image_embedding[2])
    assert gt.is_target.tolist() == [[True, True], [True, True], [True, False], [True, True]]
    assert 0 < float(gt.inside.mean()) < 1, "inside does not mark the padding"


def test_ground_truth_of_too_many_targets_is_refused(make_setup, examples):
    collator = make_setup(examples=examples, max_targets=1).trainer.parts.collator
    item = collator.item(examples[0], 0)
    with pytest.raises(ValueError, match="max_targets is 1; example two has 2 targets"):
        collator.ground_truth([item], torch.device("cpu"))


def test_spread_takes_other_prompts_first():
    assert spread(["a", "a", "b", "b", "c"], 4) == [0, 2, 4, 1]
    assert spread(["a", "a"], 8) == [0, 1]


def test_write_samples_of_a_response_without_reference_shows_no_prior(
    make_setup, examples, tmp_path
):
    trainer = make_setup(examples=examples[1:3]).trainer
    collator, tokenizer = trainer.parts.collator, trainer.parts.processor.tokenizer
    items = [collator.item(example, n) for n, example in enumerate(examples[1:3])]
    gt = collator.ground_truth(items, torch.device("cpu"))
    logits = torch.ones_like(gt.masks)
    decoded = DecodedMasks(logits, logits, torch.tensor([[False], [False]]))
    completions = [tokenizer("nothing")["input_ids"]] * 2
    trainer.rollout = ScoredRollout(items, gt, completions, decoded)
    write_samples(trainer, tmp_path, 3, 2)
    lines = [json.loads(x) for x in (tmp_path / "completions.jsonl").read_text().splitlines()]
    found = [(x["id"], x["num_targets"], x["num_found"], x["mask_iou"]) for x in lines]
    assert found == [("one", 1, 0, 0.0), ("none", 0, 0, None)]
    assert lines[0]["response"] == "nothing"
    sheet = Image.open(tmp_path / "step-000003.png")
    for column in (2, 3):
        pixel = (column * TILE_PX + TILE_PX // 2, TILE_PX // 2)
        assert sheet.getpixel(pixel) == (128, 128, 128), "a prior or mask was invented"
    assert sheet.height > 2 * TILE_PX, "the text is missing"


def test_evaluate_policy_returns_the_samples_that_are_shown_from_every_batch(monkeypatch, scene):
    mask = np.ones((1, *scene.shape[:2]), np.bool_)
    examples = [Example(str(number), scene, "it", mask) for number in range(7)]

    def predict(trainer, batch):
        samples = [SimpleNamespace(example=each) for each in batch]
        return [Prediction(each.masks, each.masks, "") for each in batch], samples

    monkeypatch.setattr(evaluation, "_predict", predict)
    monkeypatch.setattr(evaluation, "BATCH_SIZE", 2)
    accelerator = SimpleNamespace(process_index=0, num_processes=1)
    trainer = SimpleNamespace(accelerator=accelerator, model=torch.nn.Identity())
    _, samples = evaluate_policy(trainer, examples, [0, 2, 6])
    assert [sample.example.id for sample in samples] == ["0", "2", "6"]


@pytest.mark.slow
def test_evaluate_policy_agrees_with_the_runtime(make_setup):
    examples = held_out_examples(PRESETS["plain"], 6, 2)
    evaluated, samples = evaluate_policy(
        make_setup(max_completion_length=128).trainer, examples, [0, 7]
    )
    assert [sample.example for sample in samples] == [examples[0], examples[7]]
    assert samples[0].mask_iou == row_iou(evaluated[0], TARGETS)
    assert samples[0].reward == evaluated[0].extra["reward"]
    with CoPRS.load(policy="transformers") as coprs:
        expected = evaluate(predict_with(coprs.segment, 1), examples)
    for ours, theirs in zip(evaluated, expected, strict=True):
        assert ours.response == theirs.response
        for part in ("mask", "prior"):
            expected_iou = row_iou(theirs, TARGETS, part)
            assert row_iou(ours, TARGETS, part) == pytest.approx(expected_iou, abs=2e-3)
    metrics = summarize(evaluated)
    assert metrics["giou"] > 0.9
    assert metrics["count_accuracy"] == 1


def test_ground_truth_from_features_equals_that_of_the_encoder(make_setup, examples, tmp_path):
    setup = make_setup(examples=examples, max_targets=2)
    compute_features(
        read_checkpoint(CHECKPOINT), (e.image for e in examples), len(examples), tmp_path / "known"
    )
    known = PromptCollator(setup.state, FeatureStore(tmp_path / "known"), 2)
    items = [known.item(example, n) for n, example in enumerate(examples)]
    found = known.ground_truth(items, torch.device("cpu")).image_embedding
    expected = setup.trainer.parts.collator.ground_truth(items, torch.device("cpu")).image_embedding
    assert found.dtype == torch.float16
    assert float((found.float() - expected).abs().max() / expected.abs().max()) < 2e-3
