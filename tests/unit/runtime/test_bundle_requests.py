"""A bundle at work: equal to PyTorch, refused when it is broken, honest when nothing is found."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

import coprs_deploy
from coprs_deploy.bundle import open_bundle
from coprs_deploy.checkpoint import load_segmentation_model, read_checkpoint, write_checkpoint
from coprs_deploy.conversion.random_policy import build_random_policy
from coprs_deploy.engines import RunnerOptions, SegmentationGraphs, open_graph
from coprs_deploy.engines.torch_runner import TorchRunner
from coprs_deploy.errors import (
    BundleError,
    BundleIntegrityError,
)
from coprs_deploy.policy.transformers_policy import TransformersPolicy
from coprs_deploy.runtime import CoPRS, PriorEvent, RuntimeOptions, SegmentationResult
from coprs_deploy.specs import graph_specs
from tests import ROOT
from tests.unit.runtime_fakes import FakePolicy, picture

PRIOR_RELATIVE = 1e-3
"""The tolerance of the whole chain in float32; measured below 1e-5."""


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
        specs = graph_specs(config.model.geometry, config.model.policy_hidden_size)
        stages = load_segmentation_model(checkpoint).graph_modules()
        policy = TransformersPolicy(
            checkpoint.policy_path,
            config.prompt,
            min_pixels=config.policy_image.min_pixels,
            max_pixels=config.policy_image.max_pixels,
        )
        runners = {name: TorchRunner(stage, specs[name]) for name, stage in stages.items()}
        with CoPRS(SegmentationGraphs(runners), policy, config.model.geometry) as opened:
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
        graphs = ("prior_ms", "mask_decoder_ms")
        for name in ("image_ms", "policy_image_ms", "prefill_ms", "decode_ms", *graphs):
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
            answer = coprs.segment(ROOT / "examples/scene.png", "the cat")
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
        options = RuntimeOptions(policy_dtype="bfloat16", num_threads=1, max_cached_images=0)
        with CoPRS.load(tiny_bundle, options) as coprs:
            assert coprs.description.endswith("torch.bfloat16")
            for runner in coprs._stages.runners.values():
                assert runner._session.get_session_options().intra_op_num_threads == 1
            assert coprs.segment(scene, "the red disc").found

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"policy": "gpt"}, "policy is 'gpt'; accepted: transformers"),
            ({"retune": True}, "retune is for the runtime auto, and the runtime is None"),
            ({"max_cached_images": -1}, "max_cached_images is -1; it must be at least 0"),
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
            build_random_policy("tiny", script=script).save,
        )
        bundle = open_bundle(tiny_bundle)
        stages = SegmentationGraphs(
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
        assert PriorEvent not in kinds
        assert kinds[-1] is SegmentationResult

    def test_the_graphs_behind_the_encoder_stay_idle(self, build):
        coprs, runners = build(FakePolicy(found=0))
        answer = coprs.segment(picture(), "x")
        assert not answer.found
        assert (runners["prior"].calls, runners["mask_decoder"].calls) == (0, 0)
        assert answer.timings.prior_ms == answer.timings.resize_ms == 0
