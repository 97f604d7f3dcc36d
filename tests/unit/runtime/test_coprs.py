"""CoPRS at work: equal to PyTorch, overlapped, cached, streamed, cancelled and closed."""

import asyncio
import dataclasses
import json
import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import coprs_deploy
from coprs_deploy.bundle import open_bundle
from coprs_deploy.checkpoint import load_segmentation_model, read_checkpoint, write_checkpoint
from coprs_deploy.conversion.generated_policy import generate_policy
from coprs_deploy.engines import RunnerOptions, Stages, open_graph
from coprs_deploy.engines.runner import Runner
from coprs_deploy.engines.torch_runner import TorchRunner
from coprs_deploy.errors import (
    AnswerTimeoutError,
    BundleError,
    BundleIntegrityError,
    CoPRSError,
    ImageDecodeError,
    InstructionError,
    PolicyError,
    QueueFullError,
)
from coprs_deploy.images import prepare_image, resize_logits
from coprs_deploy.policy import Policy, PolicyRequest, PolicyResult, StopReason, Words
from coprs_deploy.policy.transformers_policy import TransformersPolicy
from coprs_deploy.prompts import Response
from coprs_deploy.runtime import Answer, CoPRS, PriorReady, RuntimeOptions
from coprs_deploy.specs import Geometry, graph_specs

WAIT = 30
"""Seconds after which a thread that should have moved on is taken for stuck."""

PRIOR_RELATIVE = 1e-3
"""The tolerance of the whole chain in float32; measured below 1e-5."""

GEOMETRY = Geometry(image_size=32, patch_size=8, embedding_channels=8)
DIMENSION = 4
SPECS = graph_specs(GEOMETRY, DIMENSION)


@dataclass(frozen=True)
class HostTensor:
    values: np.ndarray

    @property
    def shape(self):
        return self.values.shape

    @property
    def dtype(self):
        return str(self.values.dtype)

    def numpy(self):
        return self.values


class FakeRunner(Runner):
    """A stage that counts its calls; the prior is the concentration's first number everywhere."""

    def __init__(self, name, before=lambda: None):
        super().__init__(SPECS[name], "fake graphs")
        self.before = before
        self.calls = 0
        self.is_closed = False

    def _run(self, inputs):
        self.calls += 1
        self.before()
        spec = self.spec.outputs[0]
        values = {
            "image_embedding": lambda: float(inputs["image"].mean()),
            "prior_logits": lambda: inputs["concentration"][0, 0],
            "mask_logits": lambda: inputs["prior_logits"].numpy()[0, 0, 0, 0] - 10,
        }[spec.name]()
        return {spec.name: HostTensor(np.full(spec.shape, values, dtype=np.float32))}

    def close(self):
        self.is_closed = True


class FakePolicy(Policy):
    """A policy that gives each target its number, and may wait or fail on the way."""

    def __init__(self, words=("a", " thought"), during=lambda: None, found=None, concurrency=1):
        self.description = "fake policy"
        self.width = DIMENSION
        self.concurrency = concurrency
        self.words = words
        self.during = during
        self.found = found
        self.requests = []
        self.abandoned = 0
        self.is_closed = False

    def stream(self, request):
        self.requests.append(request)
        done = False
        try:
            for word in self.words:
                self.during()
                yield Words(word)
            targets = request.targets if self.found is None else self.found
            numbers = np.arange(11, 11 + targets, dtype=np.float32)
            text = "".join(self.words)
            yield PolicyResult(
                response=Response(text, text, tuple(range(targets)), ()),
                concentrations=np.repeat(numbers[:, None], DIMENSION, axis=1),
                stop_reason=StopReason.TARGETS_REACHED if targets else StopReason.END_OF_TEXT,
                token_ids=tuple(range(7)),
                num_prompt_tokens=21,
                prefill_ms=1.0,
                decode_ms=2.0,
            )
            done = True
        finally:
            self.abandoned += not done

    def close(self):
        self.is_closed = True


@pytest.fixture
def build():
    """Build a CoPRS of fakes, and close it after the test."""
    built = []

    def builder(policy=None, encode=lambda: None, cached_images=8, specs=SPECS, **options):
        runners = {
            name: FakeRunner(name, encode if name == "image_encoder" else lambda: None)
            for name in specs
        }
        coprs = CoPRS(Stages(runners), policy or FakePolicy(), GEOMETRY, cached_images, **options)
        built.append(coprs)
        return coprs, runners

    yield builder
    for coprs in built:
        coprs.close()


def picture(value=0, shape=(20, 30)):
    return np.full((*shape, 3), value, dtype=np.uint8)


class TestBundle:
    @pytest.fixture(scope="class", params=["tiny", "tiny_llava"])
    @staticmethod
    def paths(request):
        """Bundle and checkpoint of one family."""
        return [request.getfixturevalue(f"{request.param}_{k}") for k in ("bundle", "checkpoint")]

    @pytest.fixture(scope="class")
    @staticmethod
    def coprs(paths):
        with CoPRS.load(paths[0]) as opened:
            yield opened

    @pytest.fixture(scope="class")
    @staticmethod
    def reference(paths):
        """PyTorch's own stages in the same class."""
        checkpoint = read_checkpoint(paths[1])
        config = checkpoint.config
        specs = graph_specs(config.model.geometry, config.model.policy_width)
        stages = load_segmentation_model(checkpoint).stages()
        policy = TransformersPolicy(
            checkpoint.policy_path,
            config.prompt,
            min_pixels=config.policy_image.min_pixels,
            max_pixels=config.policy_image.max_pixels,
        )
        runners = {name: TorchRunner(stage, specs[name]) for name, stage in stages.items()}
        with CoPRS(Stages(runners), policy, config.model.geometry) as opened:
            yield opened

    @pytest.mark.parametrize("targets", [1, 2])
    def test_an_answer_equals_the_one_of_pytorch(self, coprs, reference, scene, targets):
        found = coprs.segment(scene, "the red disc", targets)
        expected = reference.segment(scene, "the red disc", targets)
        assert found.response == expected.response
        assert found.masks.shape == (targets, 90, 140)
        assert 0 < found.masks.sum() < found.masks.size
        assert np.array_equal(found.masks, expected.masks)
        difference = np.abs(found.priors - expected.priors).max()
        assert difference <= PRIOR_RELATIVE * np.abs(expected.priors).max()
        assert expected.priors.std() > 10 * difference

    def test_an_answer_carries_everything(self, coprs, scene):
        answer = coprs.segment(scene, "  the red disc ")
        assert answer.found
        assert answer.reason == ""
        assert answer.reasoning == "this generated policy follows a script"
        assert answer.response.endswith("</think><REF_POS>")
        assert answer.format_faults == ()
        assert np.array_equal(answer.image, scene)
        assert "onnxruntime" in answer.runtime
        assert "transformers" in answer.runtime
        assert repr(coprs) == f"CoPRS({answer.runtime})"
        timings = answer.timings
        assert timings.response_tokens == 9
        assert timings.prompt_tokens > 50
        for name in ("image_ms", "prefill_ms", "decode_ms", "prior_ms", "mask_decoder_ms"):
            assert 0 < getattr(timings, name) < timings.total_ms, name

    def test_every_kind_of_source_gives_the_same_answer(self, coprs, scene, tmp_path):
        path = tmp_path / "scene.png"
        Image.fromarray(scene).save(path)
        sources = (scene, path, str(path), path.read_bytes(), Image.fromarray(scene))
        answers = [coprs.segment(source, "the red disc") for source in sources]
        for answer in answers[1:]:
            assert np.array_equal(answer.priors, answers[0].priors)

    def test_several_targets_have_priors_of_their_own(self, coprs, scene):
        one, three = (coprs.segment(scene, "the discs", targets=n) for n in (1, 3))
        assert three.response.count("<REF_POS>") == 3
        assert np.array_equal(three.priors[0], one.priors[0])
        assert not np.allclose(three.priors[0], three.priors[1], atol=1e-3)
        assert np.array_equal(three.prior, three.priors[2])

    def test_the_token_budget_is_obeyed(self, coprs, scene):
        answer = coprs.segment(scene, "the red disc", max_new_tokens=3)
        assert not answer.found
        assert answer.timings.response_tokens == 3
        assert answer.reason == "no <REF_POS> was written: the token budget was used up"


class TestLoading:
    def test_without_a_bundle_the_shipped_model_is_loaded(self):
        with CoPRS.load() as coprs:
            answer = coprs.segment(Path(__file__).parents[3] / "examples/scene.png", "the cat")
        assert answer.image.shape == (640, 640, 3)
        assert not answer.found

    def test_a_directory_that_is_no_bundle_is_named(self, tmp_path):
        with pytest.raises(BundleError, match=f"there is no bundle at {tmp_path}"):
            CoPRS.load(tmp_path)

    @pytest.mark.parametrize("file", ["prior.onnx", "policy/model.safetensors"])
    def test_a_changed_file_is_refused(self, tiny_bundle, tmp_path, file):
        copied = tmp_path / "bundle"
        shutil.copytree(tiny_bundle, copied)
        with (copied / file).open("ab") as stream:
            stream.write(b"!")
        with pytest.raises(BundleIntegrityError, match="was cut short or changed"):
            CoPRS.load(copied)

    def test_a_policy_of_another_width_is_refused(self, tiny_bundle, tmp_path):
        copied = tmp_path / "bundle"
        shutil.copytree(tiny_bundle, copied)
        manifest = json.loads((copied / "manifest.json").read_text())
        manifest["policy"]["width"] = 32
        (copied / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(BundleError, match="the policy is 64 wide and the prior takes 32"):
            CoPRS.load(copied)

    def test_options_reach_graphs_and_policy(self, tiny_bundle, scene):
        options = RuntimeOptions(policy_dtype="bfloat16", num_threads=1, cached_images=0)
        with CoPRS.load(tiny_bundle, options) as coprs:
            assert coprs.description.endswith("torch.bfloat16")
            for runner in coprs._stages.runners.values():
                assert runner._session.get_session_options().intra_op_num_threads == 1
            assert coprs.segment(scene, "the red disc").found

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"policy": "gpt"}, "policy is 'gpt'; accepted: transformers"),
            ({"remeasure": True}, "remeasure is for the runtime auto, and the runtime is None"),
            ({"cached_images": -1}, "cached_images is -1; it must be at least 0"),
        ],
    )
    def test_an_unknown_option_is_refused(self, options, message):
        with pytest.raises(ValueError, match=message):
            RuntimeOptions(**options)

    def test_the_class_is_the_one_that_the_package_names(self):
        assert coprs_deploy.CoPRS is CoPRS


class TestNothingFound:
    @pytest.fixture(scope="class")
    @staticmethod
    def coprs(tiny_bundle, tiny_checkpoint, tmp_path_factory):
        """The tiny graphs with a policy that ends its answer without <REF_POS>."""
        root = tmp_path_factory.mktemp("unfound")
        source = read_checkpoint(tiny_checkpoint)
        script = ("<think>", " there", " is", " none", "</think>", "<|im_end|>")
        write_checkpoint(
            root / "checkpoint",
            source.config,
            load_segmentation_model(source).state_dict(),
            generate_policy("tiny", script=script).save,
        )
        bundle = open_bundle(tiny_bundle)
        stages = Stages(
            {
                name: open_graph("onnxruntime", bundle.graph_path(name), g.spec, RunnerOptions())
                for name, g in bundle.manifest.graphs.items()
            }
        )
        limits = source.config.policy_image
        policy = TransformersPolicy(
            root / "checkpoint" / "policy",
            source.config.prompt,
            min_pixels=limits.min_pixels,
            max_pixels=limits.max_pixels,
        )
        with CoPRS(stages, policy, bundle.manifest.geometry) as opened:
            yield opened

    def test_the_mask_is_empty_and_the_reasoning_is_kept(self, coprs, scene):
        answer = coprs.segment(scene, "the unicorn")
        assert not answer.found
        assert answer.masks.shape == answer.priors.shape == (0, 90, 140)
        assert answer.mask.shape == (90, 140)
        assert not answer.mask.any()
        assert answer.reasoning == "there is none"
        assert answer.response == "<think> there is none</think>"
        assert answer.reason == "no <REF_POS> was written: the policy ended its answer"
        assert answer.format_faults != ()
        assert "nothing found" in repr(answer)

    def test_no_prior_is_announced(self, coprs, scene):
        kinds = [type(event) for event in coprs.stream(scene, "the unicorn")]
        assert PriorReady not in kinds
        assert kinds[-1] is Answer

    def test_the_graphs_behind_the_encoder_stay_idle(self, build):
        coprs, runners = build(FakePolicy(found=0))
        answer = coprs.segment(picture(), "x")
        assert not answer.found
        assert (runners["prior"].calls, runners["mask_decoder"].calls) == (0, 0)
        assert answer.timings.prior_ms == answer.timings.resize_ms == 0


class TestOverlap:
    def test_the_image_encoder_runs_while_the_policy_writes(self, build):
        both = threading.Barrier(2, timeout=WAIT)  # broken unless both are at work at once
        policy = FakePolicy(words=("one",), during=both.wait)
        coprs, _ = build(policy, encode=both.wait)
        assert coprs.segment(picture(), "x").found

    def test_the_hidden_time_is_what_ran_beside_the_policy(self, build):
        encoded = threading.Event()

        def encode():
            time.sleep(0.05)
            encoded.set()

        coprs, _ = build(FakePolicy(during=lambda: encoded.wait(WAIT)), encode)
        timings = coprs.segment(picture(), "x").timings
        assert timings.image_encoder_ms >= 50
        assert timings.image_encoder_hidden_ms == pytest.approx(timings.image_encoder_ms, rel=0.2)

    def test_time_after_the_policy_is_not_hidden(self, build):
        finished = threading.Event()

        def encode():
            finished.wait(WAIT)
            time.sleep(0.1)

        class Quick(FakePolicy):
            def stream(self, request):
                yield from super().stream(request)
                finished.set()

        timings = build(Quick(), encode)[0].segment(picture(), "x").timings
        assert timings.image_encoder_ms >= 100
        assert timings.image_encoder_hidden_ms <= timings.image_encoder_ms - 90


class TestCache:
    def test_a_second_question_on_a_picture_encodes_nothing(self, build):
        coprs, runners = build()
        first, second = (coprs.segment(picture(9), text) for text in ("x", "y"))
        assert runners["image_encoder"].calls == 1
        assert first.timings.image_encoder_ms > 0
        assert second.timings.image_encoder_ms == second.timings.image_encoder_hidden_ms == 0
        assert np.array_equal(first.priors, second.priors)

    def test_equal_pixels_in_another_shape_are_another_picture(self, build):
        coprs, runners = build()
        coprs.segment(picture(9, (20, 30)), "x")
        coprs.segment(picture(9, (30, 20)), "x")
        assert runners["image_encoder"].calls == 2

    def test_without_a_cache_each_question_encodes(self, build):
        coprs, runners = build(cached_images=0)
        for _ in range(2):
            assert coprs.segment(picture(), "x").timings.image_encoder_ms > 0
        assert runners["image_encoder"].calls == 2

    def test_the_picture_that_waited_longest_is_forgotten(self, build):
        coprs, runners = build(cached_images=2)
        for value in (1, 2, 1, 3):  # the third picture replaces 2, which waited longer than 1
            coprs.segment(picture(value), "x")
        assert runners["image_encoder"].calls == 3
        coprs.segment(picture(1), "x")
        assert runners["image_encoder"].calls == 3
        coprs.segment(picture(2), "x")
        assert runners["image_encoder"].calls == 4

    def test_an_encoder_that_fails_raises_and_is_asked_again(self, build):
        failures = [RuntimeError("out of memory")]

        def encode():
            if failures:
                raise failures.pop()

        coprs, runners = build(encode=encode)
        with pytest.raises(RuntimeError, match="out of memory"):
            coprs.segment(picture(), "x")
        assert coprs.segment(picture(), "x").found
        assert runners["image_encoder"].calls == 2


class TestStream:
    def test_words_come_first_then_the_prior_then_the_answer(self, build):
        coprs, _ = build()
        *words, prior, answer = coprs.stream(picture(), "x", targets=2)
        assert words == [Words("a"), Words(" thought")]
        assert isinstance(prior, PriorReady)
        assert prior.priors.shape == (2, 20, 30)
        assert np.array_equal(prior.priors, answer.priors)
        assert answer.response == "a thought"

    def test_words_come_as_they_are_written(self, build):
        written = []
        coprs, _ = build(FakePolicy(words=("a", "b"), during=lambda: written.append(None)))
        events = coprs.stream(picture(), "x")
        next(events)
        assert len(written) == 1
        next(events)
        assert len(written) == 2
        events.close()

    def test_the_prior_comes_before_the_mask_is_decoded(self, build):
        coprs, runners = build()
        for event in coprs.stream(picture(), "x"):
            if isinstance(event, PriorReady):
                assert (runners["prior"].calls, runners["mask_decoder"].calls) == (1, 0)
        assert runners["mask_decoder"].calls == 1

    def test_joined_graphs_come_apart_where_the_prior_is_wanted_first(self, build, monkeypatch):
        coprs, runners = build()
        both = []

        def joined(**inputs):
            both.append(inputs)
            prior = runners["prior"](
                image_embedding=inputs["image_embedding"], concentration=inputs["concentration"]
            )
            mask = runners["mask_decoder"](
                image_embedding=inputs["image_embedding"],
                unpadded_size=inputs["unpadded_size"],
                **prior,
            )
            return prior | mask

        monkeypatch.setattr(coprs._stages, "_joined", joined)
        whole = coprs.segment(picture(), "x", targets=2)
        assert len(both) == 2
        assert whole.timings.prior_ms == 0 < whole.timings.mask_decoder_ms
        *_, prior, answer = coprs.stream(picture(), "x", targets=2)
        assert len(both) == 2
        assert answer.timings.prior_ms > 0
        monkeypatch.undo()
        for found in (whole, answer):
            assert np.array_equal(found.priors, prior.priors)
            assert np.array_equal(found.masks, answer.masks)
            assert np.array_equal(found.mask_logits, answer.mask_logits)

    def test_nothing_starts_before_the_first_event_is_asked_for(self, build):
        coprs, runners = build()
        events = coprs.stream(picture(), "x")
        assert runners["image_encoder"].calls == 0
        events.close()

    def test_an_abandoned_stream_abandons_the_policy_and_frees_it(self, build):
        policy = FakePolicy()
        coprs, runners = build(policy)
        events = coprs.stream(picture(), "x")
        next(events)
        events.close()
        assert policy.abandoned == 1
        assert runners["prior"].calls == 0
        assert coprs.segment(picture(), "x").found

    def test_an_abandoned_stream_of_a_real_policy_frees_it(self, tiny_llava_bundle, scene):
        with CoPRS.load(tiny_llava_bundle) as coprs:
            expected = coprs.segment(scene, "the red disc")
            events = coprs.stream(scene, "something else")
            next(events)
            events.close()
            found = coprs.segment(scene, "the red disc")
        assert np.array_equal(found.priors, expected.priors)

    def test_each_target_is_decoded_in_order(self, build):
        coprs, runners = build()
        answer = coprs.segment(picture(), "x", targets=3)
        assert runners["prior"].calls == runners["mask_decoder"].calls == 3
        # The policy numbers its targets from 11; the fake decoder takes 10 away.
        np.testing.assert_allclose(answer.priors.mean(axis=(1, 2)), [11, 12, 13], rtol=1e-6)
        assert answer.masks.all()

    def test_logits_come_back_to_the_original_size(self, build):
        coprs, _ = build()
        rgb = picture(shape=(21, 57))
        answer = coprs.segment(rgb, "x")
        prepared = prepare_image(rgb, GEOMETRY)
        logits = np.full((1, 1, GEOMETRY.mask_size, GEOMETRY.mask_size), 11, dtype=np.float32)
        assert np.array_equal(answer.priors, resize_logits(logits, prepared, GEOMETRY))


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"instruction": ""}, InstructionError, "the instruction is empty"),
            ({"instruction": " \n"}, InstructionError, "the instruction is empty"),
            ({"instruction": None}, InstructionError, "instruction is a NoneType"),
            ({"targets": 0}, ValueError, "targets is 0"),
            ({"max_new_tokens": 0}, ValueError, "max_new_tokens is 0"),
            ({"image": b"no image"}, ImageDecodeError, "not an image"),
            ({"image": 5}, ValueError, "image is a int"),
        ],
    )
    def test_a_question_is_checked_before_anything_runs(self, build, arguments, error, message):
        policy = FakePolicy()
        coprs, runners = build(policy)
        with pytest.raises(error, match=message):
            coprs.segment(**{"image": picture(), "instruction": "x", **arguments})
        assert runners["image_encoder"].calls == 0
        assert policy.requests == []

    def test_a_policy_that_ends_without_a_result_is_an_error(self, build):
        class Silent(FakePolicy):
            def stream(self, request):
                yield Words("well")

        with pytest.raises(PolicyError, match="fake policy ended without a result"):
            build(Silent())[0].segment(picture(), "x")

    def test_a_policy_that_fails_leaves_the_next_question_alone(self, build):
        failures = [PolicyError("it broke")]

        def during():
            if failures:
                raise failures.pop()

        coprs, _ = build(FakePolicy(during=during))
        with pytest.raises(PolicyError, match="it broke"):
            coprs.segment(picture(), "x")
        assert coprs.segment(picture(), "x").found


class TestMany:
    @pytest.mark.parametrize("concurrency", [1, 3])
    def test_answers_come_in_the_order_of_the_questions(self, build, concurrency):
        coprs, _ = build(FakePolicy(concurrency=concurrency))
        questions = [(picture(i), f"question {i}") for i in range(7)]
        answers = list(coprs.segment_many(questions))
        assert [a.instruction for a in answers] == [text for _, text in questions]
        assert [int(a.image[0, 0, 0]) for a in answers] == list(range(7))

    @pytest.mark.parametrize("concurrency", [1, 3])
    def test_questions_are_read_one_ahead(self, build, concurrency):
        coprs, _ = build(FakePolicy(concurrency=concurrency))
        read = []

        def questions():
            for i in range(9):
                read.append(i)
                yield picture(i), "x"

        answers = coprs.segment_many(questions())
        assert read == []
        next(answers)
        assert len(read) == concurrency + 1
        next(answers)
        assert len(read) == concurrency + 2
        answers.close()
        assert len(read) == concurrency + 2

    def test_the_next_picture_is_encoded_while_this_answer_is_written(self, build):
        seen = []
        second = threading.Event()

        def encode():
            seen.append(None)
            if len(seen) == 2:
                second.set()

        coprs, _ = build(FakePolicy(words=("w",), during=lambda: second.wait(WAIT)), encode)
        answers = coprs.segment_many([(picture(1), "x"), (picture(2), "x")])
        assert next(answers).found
        assert second.is_set()
        answers.close()

    def test_a_policy_that_serves_several_at_once_is_given_several(self, build):
        together = threading.Barrier(3, timeout=WAIT)  # broken unless three are at work at once
        policy = FakePolicy(words=("w",), during=together.wait, concurrency=3)
        answers = build(policy)[0].segment_many([(picture(i), "x") for i in range(3)])
        assert len(list(answers)) == 3

    def test_targets_are_passed_on(self, build):
        (answer,) = build()[0].segment_many([(picture(), "x")], targets=2)
        assert len(answer.masks) == 2

    def test_no_questions_give_no_answers(self, build):
        assert list(build()[0].segment_many([])) == []

    def test_the_first_question_that_fails_raises(self, build):
        answers = build()[0].segment_many([(picture(), "x"), (picture(), ""), (picture(), "x")])
        with pytest.raises(InstructionError):
            list(answers)

    @pytest.mark.parametrize("bad", [(b"no image", "x"), (picture(), "")])
    def test_answers_before_a_question_that_fails_are_given(self, build, bad):
        answers = build()[0].segment_many([(picture(), "x"), bad])
        assert next(answers).found
        with pytest.raises(ValueError, match=r"not an image|instruction is empty"):
            next(answers)


class TestAsync:
    def test_the_asynchronous_answer_is_the_same(self, build):
        coprs, _ = build()
        expected = coprs.segment(picture(), "x", 2)
        found = asyncio.run(coprs.asegment(picture(), "x", 2))
        assert np.array_equal(found.priors, expected.priors)
        assert found.response == expected.response

    def test_the_asynchronous_stream_has_the_same_events(self, build):
        coprs, _ = build()

        async def collect():
            return [type(event) async for event in coprs.astream(picture(), "x")]

        assert asyncio.run(collect()) == [Words, Words, PriorReady, Answer]

    def test_errors_are_raised_to_the_one_who_awaits(self, build):
        coprs, _ = build()
        with pytest.raises(InstructionError):
            asyncio.run(coprs.asegment(picture(), ""))

    def test_the_event_loop_goes_on_while_the_policy_writes(self, build):
        ticked = threading.Event()
        coprs, _ = build(FakePolicy(during=lambda: ticked.wait(WAIT)))

        async def main():
            asyncio.get_running_loop().call_later(0.01, ticked.set)
            return await asyncio.wait_for(coprs.asegment(picture(), "x"), WAIT)

        assert asyncio.run(main()).found
        assert ticked.is_set()

    def test_questions_asked_together_are_all_answered(self, build):
        coprs, _ = build(FakePolicy(concurrency=4))

        async def main():
            return await asyncio.gather(
                *(coprs.asegment(picture(i), f"question {i}") for i in range(4))
            )

        assert [a.instruction for a in asyncio.run(main())] == [f"question {i}" for i in range(4)]

    def test_a_cancelled_question_is_abandoned_and_the_next_one_answered(self, build):
        started, release = threading.Event(), threading.Event()

        def during():
            started.set()
            release.wait(WAIT)

        policy = FakePolicy(words=("w",) * 50, during=during)
        coprs, runners = build(policy)

        async def main():
            task = asyncio.create_task(coprs.asegment(picture(), "x"))
            await asyncio.to_thread(started.wait, WAIT)
            task.cancel()
            asyncio.get_running_loop().call_soon(release.set)
            threading.Timer(0.2, release.set).start()
            with pytest.raises(asyncio.CancelledError):
                await task
            return await coprs.asegment(picture(), "again")

        answer = asyncio.run(main())
        assert answer.instruction == "again"
        assert policy.abandoned == 1
        assert runners["prior"].calls == 1

    def test_cancelling_does_not_hold_up_the_event_loop(self, build):
        started, release = threading.Event(), threading.Event()

        def during():
            started.set()
            release.wait(1)

        coprs, _ = build(FakePolicy(words=("w",), during=during))

        async def main():
            task = asyncio.create_task(coprs.asegment(picture(), "x"))
            await asyncio.to_thread(started.wait, WAIT)
            task.cancel()
            before = time.perf_counter()
            await asyncio.sleep(0.01)
            held_up = time.perf_counter() - before
            release.set()
            with pytest.raises(asyncio.CancelledError):
                await task
            return held_up

        assert asyncio.run(main()) < 0.5

    def test_leaving_an_asynchronous_stream_early_abandons_it(self, build):
        policy = FakePolicy(words=("w",) * 50, during=lambda: time.sleep(0.05))
        coprs, _ = build(policy)

        async def main():
            events = coprs.astream(picture(), "x")
            async for _ in events:
                break
            await events.aclose()

        asyncio.run(main())
        assert policy.abandoned == 1


class TestThreads:
    def test_questions_from_several_threads_do_not_mix(self, tiny_llava_bundle, scene):
        questions = [
            (image, text) for image in (scene, scene[:, ::-1]) for text in ("a disc", "a box")
        ]
        with CoPRS.load(tiny_llava_bundle) as coprs:
            expected = [coprs.segment(*question) for question in questions]
        barrier = threading.Barrier(len(questions), timeout=WAIT)
        found = [None] * len(questions)

        def ask(i):
            barrier.wait()
            found[i] = coprs.segment(*questions[i])

        with CoPRS.load(tiny_llava_bundle) as coprs:
            threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(questions))]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(WAIT)
        for one, other in zip(found, expected, strict=True):
            assert np.array_equal(one.priors, other.priors)
        assert len({answer.priors.tobytes() for answer in expected}) == len(questions)


class TestLimits:
    def test_a_question_beyond_the_queue_is_refused_at_once(self, build):
        coprs, runners = build(max_waiting=1)
        streams = [coprs.stream(picture(), "x") for _ in range(2)]
        for stream in streams:
            next(stream)
        with pytest.raises(QueueFullError, match="2 answers are under way"):
            coprs.segment(picture(1), "x")
        assert runners["image_encoder"].calls == 1  # the refused picture was not encoded
        streams[0].close()
        assert coprs.segment(picture(), "x").found
        streams[1].close()

    def test_places_are_left_by_answers_and_by_failures(self, build):
        coprs, _ = build(max_waiting=0)
        for _ in range(3):
            assert coprs.segment(picture(), "x").found
            with pytest.raises(InstructionError):
                coprs.segment(picture(), " ")

    def test_an_answer_that_takes_too_long_is_abandoned(self, build):
        policy = FakePolicy()
        policy.during = lambda: [policy.requests[-1].remaining_s(), time.sleep(0.06)]
        coprs, _ = build(policy, timeout_s=0.05)
        with pytest.raises(AnswerTimeoutError, match="the answer to 'the cup' was not ready"):
            coprs.segment(picture(), "the cup")
        assert policy.abandoned == 1

    def test_an_image_encoder_that_takes_too_long_is_not_waited_for(self, build):
        release = threading.Event()
        coprs, _ = build(encode=lambda: release.wait(WAIT), timeout_s=0.05)
        with pytest.raises(AnswerTimeoutError):
            coprs.segment(picture(), "x")
        release.set()

    def test_a_real_policy_stops_at_the_deadline(self, tiny_bundle, scene):
        with CoPRS.load(tiny_bundle, RuntimeOptions(timeout_s=1e-4)) as coprs:
            with pytest.raises(AnswerTimeoutError):
                coprs.segment(scene, "the red disc")
            assert coprs._admission.taken == 0

    @pytest.mark.parametrize("options", [{"max_waiting": -1}, {"timeout_s": 0}])
    def test_limits_out_of_range_are_refused(self, options):
        (name,) = options
        with pytest.raises(ValueError, match=f"{name} is"):
            RuntimeOptions(**options)

    def test_an_encoding_that_nobody_waits_for_is_called_off(self, build):
        begun, release = threading.Event(), threading.Event()

        def encode():
            begun.set()
            release.wait(WAIT)

        coprs, runners = build(encode=encode)
        streams = [coprs.stream(picture(value), "x") for value in (1, 2)]
        for stream in streams:
            next(stream)
        assert begun.wait(WAIT)
        streams[1].close()
        release.set()
        assert list(streams[0])[-1].found
        assert coprs.segment(picture(3), "x").found
        assert runners["image_encoder"].calls == 2  # of the pictures 1 and 3


class TestTimings:
    def test_the_time_from_the_last_state_to_the_mask_covers_what_happens_there(self, build):
        coprs, runners = build()
        runners["prior"].before = runners["mask_decoder"].before = lambda: time.sleep(0.02)
        timings = coprs.segment(picture(), "x").timings
        assert timings.reference_to_mask_ms >= timings.prior_ms + timings.mask_decoder_ms >= 40
        assert timings.total_ms >= timings.reference_to_mask_ms

    def test_the_policy_says_what_it_waited_wrote_and_kept(self, build):
        class Telling(FakePolicy):
            def stream(self, request):
                *words, result = super().stream(request)
                yield from words
                yield dataclasses.replace(result, queue_ms=5.0, num_cached_tokens=17)

        timings = build(Telling())[0].segment(picture(), "x").timings
        assert (timings.queue_ms, timings.cached_prompt_tokens) == (5.0, 17)
        assert timings.tokens_per_second == pytest.approx(7 / 0.002)

    def test_warming_up_runs_every_stage_and_keeps_nothing(self, build):
        coprs, runners = build()
        timings = coprs.warm_up()
        assert [runner.calls for runner in runners.values()] == [1, 1, 1]
        assert timings.decode_ms == 2.0
        assert len(coprs._cache) == 0

    def test_loading_tells_what_it_does(self, tiny_bundle):
        steps = []
        CoPRS.load(tiny_bundle, progress=steps.append).close()
        assert steps[:2] == [
            "checking the bundle's files",
            "loading graphs and policy (transformers)",
        ]
        assert steps[2].startswith("graphs ready after")
        assert steps[3].startswith("policy ready after")
        assert "transformers qwen2_5_vl on cpu" in steps[3]

    def test_the_policy_can_be_named_in_the_call(self, tiny_bundle):
        with pytest.raises(ValueError, match="policy is 'gpt'; accepted: transformers, vllm"):
            CoPRS.load(tiny_bundle, policy="gpt")


class TestClosing:
    def test_an_answer_that_waits_for_its_embedding_ends_with_an_error(self, build):
        begun, release = threading.Event(), threading.Event()

        def encode():
            begun.set()
            release.wait(WAIT)

        coprs, _ = build(encode=encode)
        first, second = (coprs.stream(picture(value), "x") for value in (1, 2))
        next(first), next(second)
        assert begun.wait(WAIT)
        closing = threading.Thread(target=coprs.close)
        closing.start()
        with pytest.raises(CoPRSError, match="was closed while it answered"):
            for _ in second:
                pass
        release.set()
        closing.join(WAIT)
        first.close()

    def test_leaving_the_block_closes_graphs_policy_and_threads(self, build):
        policy = FakePolicy()
        coprs, runners = build(policy)
        with coprs as same:
            assert same is coprs
            coprs.segment(picture(), "x")
        assert policy.is_closed
        assert all(runner.is_closed for runner in runners.values())
        names = [thread.name for thread in threading.enumerate()]
        assert not [name for name in names if name.startswith(("image-encoder", "segment"))]

    def test_leaving_the_block_with_an_error_closes_too(self, build):
        policy = FakePolicy()
        coprs, _ = build(policy)
        with pytest.raises(KeyError), coprs:
            raise KeyError
        assert policy.is_closed

    def test_closing_twice_is_harmless(self, build):
        coprs, _ = build()
        coprs.close()
        coprs.close()

    def test_requests_are_passed_on_as_they_were_asked(self, build):
        policy = FakePolicy()
        coprs, _ = build(policy)
        coprs.segment(picture(3), " the cup ", targets=2, max_new_tokens=40)
        (request,) = policy.requests
        assert dataclasses.replace(request, rgb=None) == PolicyRequest(None, " the cup ", 2, 40)
        assert np.array_equal(request.rgb, picture(3))
