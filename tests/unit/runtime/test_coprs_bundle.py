"""CoPRS with real bundles: equality with PyTorch, broken bundles, and no-match results."""

import shutil

import msgspec
import numpy as np
import pytest
from PIL import Image

from coprs_deploy.bundle import open_bundle, read_manifest, write_manifest
from coprs_deploy.checkpoint import load_segmentation_model, read_checkpoint, write_checkpoint
from coprs_deploy.conversion.random_policy import build_random_policy
from coprs_deploy.engines import RunnerOptions, SegmentationGraphs, open_graph
from coprs_deploy.engines.torch_runner import TorchRunner
from coprs_deploy.errors import BundleError, BundleIntegrityError
from coprs_deploy.logits import sigmoid
from coprs_deploy.policy.transformers_policy import TransformersPolicy
from coprs_deploy.runtime import CoPRS, PriorEvent, SegmentationResult
from coprs_deploy.specs import graph_specs
from tests import ROOT
from tests.unit.runtime_fakes import FakePolicy, image_of

PRIOR_RELATIVE_ERROR = 1e-3
"""End-to-end tolerance in float32; measured below 1e-5."""


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
        """The PyTorch modules in the same class."""
        checkpoint = read_checkpoint(paths[1])
        config = checkpoint.config
        specs = graph_specs(config.model.geometry, config.model.policy_hidden_size)
        modules = load_segmentation_model(checkpoint).graph_modules()
        policy = TransformersPolicy(
            checkpoint.policy_path,
            config.prompt,
            min_pixels=config.policy_image.min_pixels,
            max_pixels=config.policy_image.max_pixels,
        )
        runners = {name: TorchRunner(module, specs[name]) for name, module in modules.items()}
        with CoPRS(SegmentationGraphs(runners), policy, config.model.geometry) as opened:
            yield opened

    @pytest.mark.parametrize("max_targets", [1, 2])
    def test_segment_equals_pytorch(self, coprs, reference, scene, max_targets):
        result = coprs.segment(scene, "the red disc", max_targets)
        expected = reference.segment(scene, "the red disc", max_targets)
        assert result.response == expected.response
        assert result.masks.shape == (max_targets, 90, 140)
        assert 0 < result.masks.sum() < result.masks.size
        assert np.array_equal(result.masks, expected.masks)
        difference = np.abs(result.prior_logits - expected.prior_logits).max()
        assert difference <= PRIOR_RELATIVE_ERROR * np.abs(expected.prior_logits).max()
        assert expected.prior_logits.std() > 10 * difference

    def test_segment_fills_every_field(self, coprs, scene):
        result = coprs.segment(scene, "  the red disc ")
        assert result.found
        assert result.stop_reason == "targets_reached"
        assert result.reasoning == "this generated policy follows a script"
        assert result.response.endswith("</think><REF_POS>")
        assert result.format_violations == ()
        assert np.array_equal(result.image, scene)
        assert result.scores.shape == result.areas.shape == (1,)
        assert 0 <= result.scores[0] <= 1
        assert result.boxes.shape == (1, 4)
        assert "onnxruntime" in result.runtime
        assert "transformers" in result.runtime
        assert repr(coprs) == f"CoPRS({result.runtime})"
        timings = result.timings
        assert timings.response_tokens == 9
        assert timings.prompt_tokens > 50
        for name in (
            "image_decode_ms",
            "policy_preprocess_ms",
            "prefill_ms",
            "decode_ms",
            "prior_ms",
            "mask_decoder_ms",
        ):
            assert 0 < getattr(timings, name) < timings.total_ms, name

    def test_segment_gives_the_same_result_for_every_source(self, coprs, scene, tmp_path):
        path = tmp_path / "scene.png"
        Image.fromarray(scene).save(path)
        sources = (scene, path, str(path), path.read_bytes(), Image.fromarray(scene))
        results = [coprs.segment(source, "the red disc") for source in sources]
        for result in results[1:]:
            assert np.array_equal(result.prior_logits, results[0].prior_logits)

    def test_segment_several_targets_have_different_priors(self, coprs, scene):
        one, three = (coprs.segment(scene, "the discs", max_targets=n) for n in (1, 3))
        assert three.response.count("<REF_POS>") == 3
        # A pass of several tokens rounds differently than one of a single token.
        assert np.allclose(three.prior_logits[0], one.prior_logits[0], atol=1e-4)
        assert not np.allclose(three.prior_logits[0], three.prior_logits[1], atol=1e-3)
        assert np.array_equal(three.prior, sigmoid(three.prior_logits[2]))

    def test_segment_stops_at_the_token_budget(self, coprs, scene):
        result = coprs.segment(scene, "the red disc", max_new_tokens=3)
        assert not result.found
        assert result.timings.response_tokens == 3
        assert result.stop_reason == "token_budget"
        assert "no_reference" in result.format_violations


class TestLoading:
    def test_load_without_a_bundle_loads_the_demo_model(self):
        with CoPRS.load() as coprs:
            result = coprs.segment(ROOT / "examples/scene.png", "the cat")
        assert result.image.shape == (640, 640, 3)
        assert not result.found

    def test_load_directory_without_a_bundle_is_refused(self, tmp_path):
        with pytest.raises(BundleError, match=f"there is no bundle at {tmp_path}"):
            CoPRS.load(tmp_path)

    @pytest.mark.parametrize("file", ["prior.onnx", "policy/model.safetensors"])
    def test_load_changed_file_is_refused(self, tiny_bundle, tmp_path, file):
        copied = tmp_path / "bundle"
        shutil.copytree(tiny_bundle, copied)
        with (copied / file).open("ab") as stream:
            stream.write(b"!")
        with pytest.raises(BundleIntegrityError, match="was truncated or changed"):
            CoPRS.load(copied)

    def test_load_policy_of_another_hidden_size_is_refused(self, tiny_bundle, tmp_path):
        copied = tmp_path / "bundle"
        shutil.copytree(tiny_bundle, copied)
        manifest = read_manifest(copied)
        policy = msgspec.structs.replace(manifest.policy, hidden_size=32)
        write_manifest(copied, msgspec.structs.replace(manifest, policy=policy))
        message = "policy hidden size 64 does not match prior input size 32; use the policy"
        with pytest.raises(BundleError, match=message):
            CoPRS.load(copied)


class TestNoMatch:
    @pytest.fixture(scope="class")
    @staticmethod
    def coprs(tiny_bundle, tiny_checkpoint, tmp_path_factory):
        """The tiny graphs with a policy that ends its response without <REF_POS>."""
        root = tmp_path_factory.mktemp("no-match")
        source = read_checkpoint(tiny_checkpoint)
        script = ("<think>", " there", " is", " none", "</think>", "<|im_end|>")
        write_checkpoint(
            root / "checkpoint",
            source.config,
            load_segmentation_model(source).state_dict(),
            build_random_policy("tiny", script=script).save,
        )
        bundle = open_bundle(tiny_bundle)
        graphs = SegmentationGraphs(
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
        with CoPRS(graphs, policy, bundle.manifest.geometry) as opened:
            yield opened

    def test_no_match_gives_an_empty_mask_and_the_reasoning(self, coprs, scene):
        result = coprs.segment(scene, "the unicorn")
        assert not result.found
        assert result.masks.shape == result.prior_logits.shape == (0, 90, 140)
        assert result.mask.shape == (90, 140)
        assert not result.mask.any()
        assert result.reasoning == "there is none"
        assert result.response == "<think> there is none</think>"
        assert result.stop_reason == "end_of_text"
        assert result.format_violations == ("no_reference",)
        assert "nothing found" in repr(result)

    def test_no_match_streams_no_prior(self, coprs, scene):
        kinds = [type(event) for event in coprs.stream(scene, "the unicorn")]
        assert PriorEvent not in kinds
        assert kinds[-1] is SegmentationResult

    def test_no_match_runs_neither_prior_nor_mask_decoder(self, build):
        coprs, runners = build(FakePolicy(found=0))
        result = coprs.segment(image_of(), "x")
        assert not result.found
        assert (runners["prior"].calls, runners["mask_decoder"].calls) == (0, 0)
        assert result.timings.prior_ms == result.timings.resize_ms == 0
