"""Prompts, truth, scores and judgement, for both families of policy."""

import numpy as np
import pytest
import torch

from coprs_deploy.checkpoint import read_checkpoint
from coprs_deploy.data.examples import Example
from coprs_deploy.data.synthetic.examples import held_out_examples
from coprs_deploy.data.synthetic.presets import PRESETS
from coprs_deploy.demo import CHECKPOINT
from coprs_deploy.evaluation.evaluator import evaluate, predict_with
from coprs_deploy.prompts import encode_prompt
from coprs_deploy.runtime import CoPRS
from coprs_deploy.training.features import FeatureStore, compute_features
from coprs_deploy.training.grpo.batch import GroundTruth, QuestionCollector
from coprs_deploy.training.grpo.evaluation import evaluate_policy, summarize
from coprs_deploy.training.grpo.scores import DecodedMasks, mask_scores, overlaps, row_losses
from coprs_deploy.training.losses import segmentation_losses
from coprs_deploy.training.settings import SegmentationLossWeights

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

FAMILIES = ["tiny_checkpoint", "tiny_llava_checkpoint"]


@pytest.fixture
def pictures(scene):
    """Examples of another shape than the encoder's square, with none, one and two targets."""
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
def test_the_prompt_is_the_one_that_the_runtime_writes(family, request, make_bench, pictures):
    bench = make_bench(checkpoint=request.getfixturevalue(family), examples=pictures, targets=2)
    parts, policy = bench.trainer.parts, bench.workbench.policy
    questions = [parts.collector.question(example, n) for n, example in enumerate(pictures)]
    conversations = [
        [
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": q.picture},
                    {"type": "text", "text": q.example.instruction},
                ],
            }
        ]
        for q in questions
    ]
    written = parts.processor.apply_chat_template(conversations, tokenize=True)
    padded = parts.processor(
        images=[[q.picture] for q in questions], text=[q.example.instruction for q in questions]
    )
    image_id = policy.tokenizer.convert_tokens_to_ids(policy.prompt.image_token)
    for n, question in enumerate(questions):
        count = parts.processor.look(question.picture).num_tokens
        wanted = encode_prompt(policy.prompt, policy.tokenizer, question.example.instruction, count)
        assert written["input_ids"][n] == wanted
        assert wanted.count(image_id) == count
        attended = padded["attention_mask"][n].bool()
        assert padded["input_ids"][n][attended].tolist() == wanted
        assert not attended[: int((~attended).sum())].any(), "the padding is not on the left"


@pytest.mark.parametrize("family", FAMILIES)
def test_both_families_learn_with_several_targets(family, request, make_bench, pictures):
    bench = make_bench(
        checkpoint=request.getfixturevalue(family),
        examples=pictures,
        targets=2,
        steps=2,
        global_batch_size=4,
        max_response_tokens=24,
    )
    before = {n: p.detach().clone() for n, p in bench.trainer.model.named_parameters()}
    bench.trainer.train()
    after = dict(bench.trainer.model.named_parameters())
    moved = [n for n, p in before.items() if not torch.equal(p, after[n])]
    assert any(n.startswith("segmentation.prior") for n in moved)
    assert len(bench.lines) == 2
    assert all(np.isfinite(line["loss"]) for line in bench.lines)
    evaluated = evaluate_policy(bench.trainer, pictures)
    assert [each.score.id for each in evaluated] == ["two", "one", "none", "other"]
    assert [each.score.num_targets for each in evaluated] == [2, 1, 0, 1]


def test_memory_is_saved_without_another_gradient(make_bench):
    found = []
    for checkpointing in (False, True):
        trainer = make_bench(checkpointing=checkpointing, segmentation_loss_weight=0.3).trainer
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


def decoded_and_truth():
    """Four rows on a grid of 8: both targets, one of two, nothing named, nothing wanted."""
    masks = torch.zeros(4, 2, 8, 8)
    masks[:3, 0, :4] = 1
    masks[:2, 1, 4:] = 1
    logits = torch.where(masks > 0, 40.0, -40.0)
    is_found = torch.tensor([[1, 1], [1, 0], [0, 0], [0, 0]]).bool()
    inside = torch.ones(4, 1, 8, 8)
    counts = torch.tensor([2, 2, 1, 0])
    truth = GroundTruth(torch.zeros(4, 4, 2, 2), inside, masks, counts)
    return DecodedMasks(logits, logits, is_found), truth


def test_masks_are_scored_as_means_over_targets():
    decoded, truth = decoded_and_truth()
    assert mask_scores(decoded, truth).tolist() == pytest.approx([1.0, 0.5, 0.0, 1.0])
    named = DecodedMasks(*decoded[:2], torch.ones(4, 2, dtype=torch.bool))
    assert mask_scores(named, truth).tolist() == pytest.approx([1.0, 1.0, 1.0, 0.0])
    found = overlaps(decoded, truth)
    assert float(found["mask_iou"].value()) == pytest.approx(3 / 5)


def test_masks_in_the_padding_cost_nothing():
    decoded, truth = decoded_and_truth()
    inside = torch.ones(4, 1, 8, 8)
    inside[:, :, 6:] = 0
    everywhere = DecodedMasks(decoded[0], torch.full_like(decoded[1], 40.0), decoded[2])
    upper = truth.masks[0, 0]  # 4 of the 6 rows that belong to the image
    truth = truth._replace(inside=inside, masks=truth.masks * inside)
    iou = float(upper.sum() / inside[0].sum())
    dice = 2 * iou / (1 + iou)
    lower_iou = 1 - iou
    lower = 0.8 * lower_iou + 0.2 * 2 * lower_iou / (1 + lower_iou)
    wanted = (0.8 * iou + 0.2 * dice + lower) / 2
    assert float(mask_scores(everywhere, truth)[0]) == pytest.approx(wanted, rel=1e-5)


def test_rows_are_averaged_over_their_targets_first():
    decoded, truth = decoded_and_truth()
    noise = torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    decoded = DecodedMasks(noise, noise.flip(0), decoded.is_found)
    weights = SegmentationLossWeights(mask_focal=10.0)
    found = row_losses(decoded, truth, weights)
    for name, loss in found.items():
        by_hand = 0.0
        for row, count in enumerate(truth.num_targets.tolist()):
            for slot in range(count):
                one = segmentation_losses(
                    decoded.prior_logits[row, slot][None, None],
                    decoded.mask_logits[row, slot][None, None],
                    truth.masks[row, slot][None, None],
                    truth.inside[row : row + 1],
                    weights,
                )
                by_hand += float(one[name].value()) / count
        assert float(loss) == pytest.approx(by_hand, rel=1e-5), name


def test_truth_looks_at_a_repeated_question_once(make_bench, pictures):
    collector = make_bench(examples=pictures, targets=2).trainer.parts.collector
    first, second = (collector.question(pictures[n], n) for n in (0, 3))
    truth = collector.truth([first, first, second, first], torch.device("cpu"))
    assert truth.num_targets.tolist() == [2, 2, 1, 2]
    assert torch.equal(truth.image_embedding[0], truth.image_embedding[3])
    assert not torch.equal(truth.image_embedding[0], truth.image_embedding[2])
    assert truth.is_target.tolist() == [[True, True], [True, True], [True, False], [True, True]]
    assert 0 < float(truth.inside.mean()) < 1, "the padding is not marked"


def test_an_example_with_too_many_targets_is_refused(make_bench, pictures):
    collector = make_bench(examples=pictures, targets=1).trainer.parts.collector
    question = collector.question(pictures[0], 0)
    with pytest.raises(ValueError, match="two has 2 targets, and targets is 1"):
        collector.truth([question], torch.device("cpu"))


@pytest.mark.slow
def test_evaluate_policy_agrees_with_the_runtime(make_bench):
    examples = held_out_examples(PRESETS["plain"], 6, 2)
    evaluated = evaluate_policy(make_bench(max_response_tokens=128).trainer, examples)
    with CoPRS.load() as coprs:
        expected = evaluate(predict_with(coprs.segment, 1), examples)
    for ours, theirs in zip(evaluated, expected, strict=True):
        assert ours.response == theirs.response
        assert ours.score.mask_iou == pytest.approx(theirs.score.mask_iou, abs=2e-3)
        assert ours.score.prior_iou == pytest.approx(theirs.score.prior_iou, abs=2e-3)
    metrics = summarize(evaluated)
    assert metrics["giou"] > 0.9
    assert metrics["count_accuracy"] == 1


def test_known_embeddings_are_those_of_the_encoder(make_bench, pictures, tmp_path):
    bench = make_bench(examples=pictures, targets=2)
    compute_features(
        read_checkpoint(CHECKPOINT), (p.image for p in pictures), len(pictures), tmp_path / "known"
    )
    known = QuestionCollector(bench.workbench, FeatureStore(tmp_path / "known"), 2)
    questions = [known.question(example, n) for n, example in enumerate(pictures)]
    found = known.truth(questions, torch.device("cpu")).image_embedding
    wanted = bench.trainer.parts.collector.truth(questions, torch.device("cpu")).image_embedding
    assert found.dtype == torch.float16
    assert float((found.float() - wanted).abs().max() / wanted.abs().max()) < 2e-3
