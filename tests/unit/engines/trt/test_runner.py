"""Results of engines: CUDA graphs, profiles, fused launches and threads, on a GPU that computes.

``engine_fakes`` stands for TensorRT and the GPU; tests/gpu runs the real ones.
"""

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from coprs_deploy.engines import SegmentationGraphs
from coprs_deploy.engines.graphs import join_chunks
from coprs_deploy.engines.runner import Runner
from coprs_deploy.errors import BundleError, CoPRSError, RuntimeUnavailableError
from coprs_deploy.images import PreparedImage
from tests.unit.engines.trt.engine_fakes import (
    GRAPHS,
    SPEC,
    SPECS,
    FakeDevice,
    random_inputs,
    record,
    reference,
)


def assert_outputs(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].shape, found[name].dtype) == (array.shape, "float32")
        np.testing.assert_array_equal(found[name].numpy(), array)


class TestResults:
    @pytest.mark.parametrize("cuda_graphs", [True, False])
    @pytest.mark.parametrize("name", GRAPHS)
    def test_calls_with_new_inputs_compute_their_graph(self, machine, name, cuda_graphs):
        with machine.open(name, cuda_graphs=cuda_graphs) as runner:
            for seed in range(3):
                inputs = random_inputs(runner.spec, 2, seed)
                assert_outputs(runner(**inputs), reference(name, **inputs))

    @pytest.mark.parametrize("cuda_graphs", [True, False])
    def test_alternating_target_counts_compute_their_graph(self, machine, cuda_graphs):
        with machine.open(cuda_graphs=cuda_graphs) as runner:
            for seed, count in enumerate((1, 2, 4, 1, 2, 4)):
                inputs = random_inputs(SPEC, count, seed)
                assert_outputs(runner(**inputs), reference("prior", **inputs))

    def test_an_output_survives_later_calls(self, machine):
        inputs = [random_inputs(SPEC, 1, seed) for seed in range(3)]
        with machine.open() as runner:
            outputs = [runner(**one) for one in inputs]  # nothing has run yet
            for one, found in zip(inputs, outputs, strict=True):
                assert_outputs(found, reference("prior", **one))

    def test_an_output_of_another_stream_is_awaited(self, machine):
        image = random_inputs(SPECS["image_encoder"], 1)
        inputs = random_inputs(SPEC, 2)
        with machine.open("image_encoder") as encoder, machine.open() as prior:
            inputs["image_embedding"] = encoder(**image)["image_embedding"]
            found = prior(**inputs)["prior_logits"].numpy()
        embedding = reference("image_encoder", **image)["image_embedding"]
        expected = reference("prior", **{**inputs, "image_embedding": embedding})
        np.testing.assert_array_equal(found, expected["prior_logits"])

    def test_calls_from_several_threads_do_not_mix(self, machine):
        inputs = [random_inputs(SPEC, 1 + seed % 2, seed) for seed in range(4)]
        machine.gpu.on_fill = lambda: time.sleep(0)  # lets another thread run
        with machine.open() as runner:
            # Launches are concurrent; the fake GPU runs them when the first result is read.
            with ThreadPoolExecutor(4) as pool:
                outputs = list(pool.map(lambda i: runner(**inputs[i % 4]), range(40)))
            for i, found in enumerate(outputs):
                assert_outputs(found, reference("prior", **inputs[i % 4]))

    def test_cuda_graphs_replay_every_call_after_the_first(self, machine):
        with machine.open() as runner:
            for _ in range(3):
                runner(**random_inputs(SPEC, 2))
        assert machine.gpu.launches == ["prior", "replay", "replay"]

    def test_without_cuda_graphs_nothing_is_replayed(self, machine):
        with machine.open(cuda_graphs=False) as runner:
            for _ in range(3):
                runner(**random_inputs(SPEC, 2))
        assert machine.gpu.launches == ["prior"] * 3

    def test_a_file_of_another_graph_is_not_run(self, machine):
        machine.path("prior").write_bytes(machine.path("mask_decoder").read_bytes())
        with pytest.raises(BundleError, match=r"the engine has image_embedding.*the manifest says"):
            machine.open(engine=record("mask_decoder"))


class TestErrors:
    @pytest.mark.parametrize("count", [0, 5])
    def test_a_target_count_outside_the_profile_is_refused(self, machine, count):
        with (
            machine.open() as runner,
            pytest.raises(ValueError, match=f"given {count} targets; .* 1 to 4: .* --targets"),
        ):
            runner(**random_inputs(SPEC, count))

    def test_an_image_count_outside_the_profile_is_refused(self, machine):
        with (
            machine.open("image_encoder") as runner,
            pytest.raises(ValueError, match=r"given 5 images; .* 1 to 4: .* --images"),
        ):
            runner(**random_inputs(SPECS["image_encoder"], 5))

    def test_a_launch_that_fails_raises(self, machine):
        machine.library.accepts_runs = False
        with (
            machine.open() as runner,
            pytest.raises(RuntimeUnavailableError, match="could not run prior"),
        ):
            runner(**random_inputs(SPEC, 1))

    def test_a_full_gpu_raises(self, machine):
        machine.library.has_memory = False
        with (
            machine.open() as runner,
            pytest.raises(RuntimeUnavailableError, match=r"context for prior.*free GPU memory"),
        ):
            runner(**random_inputs(SPEC, 1))

    def test_a_closed_runner_raises_and_closes_again(self, machine):
        runner = machine.open()
        output = runner(**random_inputs(SPEC, 1))
        runner.close()
        runner.close()
        assert_outputs(output, reference("prior", **random_inputs(SPEC, 1)))
        with pytest.raises(CoPRSError, match="prior was called after it was closed"):
            runner(**random_inputs(SPEC, 1))

    def test_closing_waits_for_running_work(self, machine):
        runner = machine.open()
        output = runner(**random_inputs(SPEC, 1))["prior_logits"]
        assert not output.is_ready
        runner.close()
        assert output.is_ready


class TestDescription:
    def test_description_names_library_gpu_and_verification(self, machine):
        with machine.open() as runner:
            assert runner.description == "tensorrt 10.9.0 on NVIDIA L4, never verified"
        with machine.open(engine=record(verified_on="NVIDIA L4")) as runner:
            assert runner.description.endswith("on NVIDIA L4, verified on NVIDIA L4")

    def test_layers_memory_and_gpu_are_read_from_the_engine(self, machine):
        with machine.open() as runner:
            assert runner.layers == ("layer 0",)
            assert runner.device_memory_bytes == 1234
            assert runner.gpu_name == "NVIDIA L4"


class TestKernelCache:
    """Kernels that TensorRT for RTX compiles on the GPU."""

    @staticmethod
    def run(machine, counts=(1, 2)):
        """Open, run and close; return the number of compiled kernels."""
        before = machine.library.num_compiled
        engine = record(variant="tensorrt-rtx")
        with machine.open(engine=engine) as runner:
            for count in counts:
                inputs = random_inputs(SPEC, count)
                assert_outputs(runner(**inputs), reference("prior", **inputs))
        return machine.library.num_compiled - before

    def test_the_second_opening_compiles_only_new_kernels(self, machine):
        assert self.run(machine) == 2
        assert self.run(machine) == 0
        assert self.run(machine, (1, 4)) == 1

    def test_a_kernel_cache_that_cannot_be_read_is_replaced(self, machine):
        self.run(machine)
        (saved,) = (machine.folder / "cache" / "runtime").iterdir()
        saved.write_bytes(b"damaged")
        with pytest.warns(UserWarning, match="kernel cache cannot be read"):
            assert self.run(machine) == 2
        assert self.run(machine) == 0

    def test_kernels_that_cannot_be_saved_are_a_warning(self, machine):
        runner = machine.open(engine=record(variant="tensorrt-rtx"))
        runner(**random_inputs(SPEC, 1))
        (machine.folder / "cache").write_text("a file, not a folder")
        with pytest.warns(UserWarning, match=r"cannot be written.*COPRS_DEPLOY_CACHE"):
            runner.close()
        with pytest.raises(CoPRSError, match="after it was closed"):
            runner(**random_inputs(SPEC, 1))


class TestFused:
    """Prior and mask decoder as one call."""

    @pytest.fixture
    def pair(self, machine):
        with machine.open("prior") as prior, machine.open("mask_decoder") as mask_decoder:
            yield prior, mask_decoder

    @staticmethod
    def expected(inputs):
        embedding = inputs["image_embedding"]
        priors = reference(
            "prior", image_embedding=embedding, concentration=inputs["concentration"]
        )
        size = inputs["unpadded_size"]
        return priors | reference(
            "mask_decoder", image_embedding=embedding, unpadded_size=size, **priors
        )

    def test_the_fused_spec_has_the_outer_inputs_and_all_outputs(self, pair):
        with pair[0].fused_with(pair[1]) as fused:
            names = [tensor.name for tensor in fused.spec.inputs]
            assert names == ["image_embedding", "concentration", "unpadded_size"]
            assert [t.name for t in fused.spec.outputs] == ["prior_logits", "mask_logits"]
            assert fused.spec.targets == SPEC.targets

    def test_fused_calls_compute_both_graphs_in_one_launch(self, machine, pair):
        with pair[0].fused_with(pair[1]) as fused:
            for seed, count in enumerate((2, 2, 4, 2, 4)):
                inputs = random_inputs(fused.spec, count, seed)
                assert_outputs(fused(**inputs), self.expected(inputs))
        both = ["prior", "mask_decoder"]
        assert machine.gpu.launches == [*both, "replay", *both, "replay", "replay"]

    def test_fused_calls_without_cuda_graphs_compute_both_graphs(self, machine):
        with (
            machine.open("prior", cuda_graphs=False) as prior,
            machine.open("mask_decoder", cuda_graphs=False) as mask_decoder,
            prior.fused_with(mask_decoder) as fused,
        ):
            for seed in range(2):
                inputs = random_inputs(fused.spec, 3, seed)
                assert_outputs(fused(**inputs), self.expected(inputs))
        assert machine.gpu.launches == ["prior", "mask_decoder"] * 2

    def test_fused_and_single_calls_at_once_do_not_mix(self, pair):
        with pair[0].fused_with(pair[1]) as fused:
            for seed in range(3):
                inputs, others = (random_inputs(fused.spec, 2, s) for s in (seed, seed + 10))
                alone = {t.name: others[t.name] for t in SPEC.inputs}
                together, single = fused(**inputs), pair[0](**alone)
                assert_outputs(together, self.expected(inputs))
                assert_outputs(single, reference("prior", **alone))

    def test_a_single_call_during_the_capture_is_not_captured(self, machine, pair):
        single = random_inputs(SPEC, 2, seed=1)
        outputs = []
        with pair[0].fused_with(pair[1]) as fused:
            pair[0](**single)  # its own capture is over
            machine.gpu.during_capture = lambda: outputs.append(pair[0](**single))
            inputs = random_inputs(fused.spec, 2)
            assert_outputs(fused(**inputs), self.expected(inputs))
            assert len(outputs) == 1
            assert_outputs(outputs[0], reference("prior", **single))
            assert_outputs(fused(**inputs), self.expected(inputs))

    def test_a_target_count_outside_the_profile_is_refused(self, pair):
        with (
            pair[0].fused_with(pair[1]) as fused,
            pytest.raises(ValueError, match="prior and mask_decoder was given 5 targets"),
        ):
            fused(**random_inputs(fused.spec, 5))

    def test_a_closed_fused_runner_raises(self, machine, pair):
        fused = pair[0].fused_with(pair[1])
        fused.close()
        with pytest.raises(CoPRSError, match="prior and mask_decoder was called after it was"):
            fused(**random_inputs(fused.spec, 1))
        assert machine.gpu.launches == []

    def test_runners_outlive_their_fused_runner(self, pair):
        with pair[0].fused_with(pair[1]) as fused:
            fused(**random_inputs(fused.spec, 1))
        inputs = random_inputs(SPEC, 1)
        assert_outputs(pair[0](**inputs), reference("prior", **inputs))

    def test_engines_on_two_gpus_are_not_fused(self, machine, pair):
        with machine.open("mask_decoder", device=FakeDevice(machine.gpu, index=1)) as elsewhere:
            assert pair[0].fused_with(elsewhere) is None

    def test_engines_and_other_runners_are_not_fused(self, pair):
        other = OtherRunner(SPECS["mask_decoder"], "another runtime")
        assert pair[0].fused_with(other) is None
        assert other.fused_with(pair[1]) is None


class OtherRunner(Runner):
    def _run(self, inputs):
        raise NotImplementedError

    def close(self):
        raise NotImplementedError


@pytest.mark.parametrize("count", [1, 4, 6])
def test_segmentation_graphs_on_engines_equal_the_reference(machine, count):
    generator = np.random.default_rng(0)
    images = [
        PreparedImage(
            np.array([12, 16]),
            (24, 32),
            generator.standard_normal((1, 3, 16, 16), dtype=np.float32),
        )
        for _ in range(3)
    ]
    concentrations = generator.standard_normal((count, 3), dtype=np.float32)
    with SegmentationGraphs({name: machine.open(name) for name in GRAPHS}) as graphs:
        assert graphs.is_fused
        for _ in range(2):  # the second time replays
            for image, embedding in zip(images, graphs.encode_batch(images), strict=True):
                found = graphs.priors_and_masks(embedding, concentrations, image.unpadded_size)
                encoded = reference("image_encoder", image=image.image)["image_embedding"]
                expected = TestFused.expected(
                    {
                        "image_embedding": encoded,
                        "concentration": concentrations,
                        "unpadded_size": image.unpadded_size,
                    }
                )
                for chunks, name in zip(found, ("prior_logits", "mask_logits"), strict=True):
                    np.testing.assert_array_equal(join_chunks(chunks, count), expected[name])
