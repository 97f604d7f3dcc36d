"""Engines as they run, the library and the GPU played.

What a GPU computes is not tested here; which calls are made, in which order, on what, is.
"""

from types import SimpleNamespace

import numpy as np
import pytest

from coprs_deploy.engines import RunnerOptions
from coprs_deploy.engines.cache import BuildCache
from coprs_deploy.engines.runner import Runner
from coprs_deploy.engines.trt.runner import TrtRunner
from coprs_deploy.errors import (
    CoPRSError,
    RuntimeUnavailableError,
)
from tests.unit.engines.trt.engine_fakes import (
    CUDA,
    ENGINE,
    SPEC,
    SPECS,
    FakeDevice,
    inputs_of,
    names,
    open_runner,
)


class TestCalls:
    def test_the_first_call_runs_and_captures_and_later_ones_replay(self, library, plan):
        with open_runner(library, plan) as runner:
            library.calls.clear()
            runner(**inputs_of(2))
            first = names(library)
            library.calls.clear()
            runner(**inputs_of(2))
            again = names(library)
        fills = ["fill"] * len(SPEC.inputs)
        assert first == [
            "context",
            *["shape", "address"] * len(SPEC.inputs),
            "address",
            *fills,
            "execute",
            "capture",
            "execute",
            "copy out",
        ]
        assert again == [*fills, "replay", "copy out"]

    def test_without_capture_every_call_executes_on_the_own_stream(self, library, plan):
        options = RunnerOptions(device="cuda", cuda_graphs=False)
        with open_runner(library, plan, options) as runner:
            for _ in range(2):
                runner(**inputs_of(1))
        assert [call for call in library.calls if call[0] == "execute"] == [("execute", 7)] * 2
        assert "capture" not in names(library)

    def test_each_number_of_targets_has_its_own_context(self, library, plan):
        with open_runner(library, plan) as runner:
            for count in (1, 2, 1, 2):
                assert runner(**inputs_of(count))["prior_logits"].shape == (count, 1, 64, 64)
        assert names(library).count("context") == 2
        assert names(library).count("replay") == 2

    @pytest.mark.parametrize("count", [0, 5])
    def test_more_targets_than_the_engine_takes_are_refused(self, library, plan, count):
        with (
            open_runner(library, plan) as runner,
            pytest.raises(ValueError, match=f"given {count} targets; .* 1 to 4"),
        ):
            runner(**inputs_of(count))

    def test_a_failed_run_raises(self, library, plan):
        library.runs = False
        with (
            open_runner(library, plan) as runner,
            pytest.raises(RuntimeUnavailableError, match="could not run prior"),
        ):
            runner(**inputs_of(1))

    def test_closing_waits_for_the_gpu_once(self, library, plan):
        runner = open_runner(library, plan)
        runner.close()
        runner.close()
        assert names(library).count("synchronize") == 1

    def test_all_work_is_done_with_its_device_as_the_current_one(self, library, plan):
        with open_runner(library, plan) as runner:
            runner(**inputs_of(1))
        depth = 0
        for call in library.calls:
            depth += {"enter": 1, "leave": -1}.get(call[0], 0)
            assert depth == 1 or call[0] == "leave", call

    def test_kernels_that_cannot_be_kept_are_a_warning(self, library, plan):
        runner = open_runner(library, plan)
        runner._plan._compiled = SimpleNamespace(serialize=lambda: b"kernels")
        (plan.parent / "cache").write_text("a file stands in the way")
        with pytest.warns(UserWarning, match=r"will be compiled again.*COPRS_DEPLOY_CACHE"):
            runner.close()
        assert not runner._plan.is_open

    def test_it_says_what_it_is(self, library, plan):
        with open_runner(library, plan) as runner:
            assert runner.description == "tensorrt 10.9.0 on NVIDIA L4, never verified"
            assert runner.layers == ("layer 0",)
            assert runner.device_memory_bytes == 1234


class TestJoined:
    """Prior and mask decoder as one call."""

    @pytest.fixture
    def pair(self, library, plan):
        runners = []
        for name in ("prior", "mask_decoder"):
            library.spec = SPECS[name]
            device, cache = FakeDevice(library.calls), BuildCache(plan.parent / "cache")
            runners.append(
                TrtRunner(plan, SPECS[name], CUDA, engine=ENGINE, device=device, cache=cache)
            )
        library.calls.clear()
        yield runners
        for runner in runners:
            runner.close()

    @staticmethod
    def inputs(spec, count):
        return {t.name: np.zeros(t.shape_for(count), t.dtype) for t in spec.inputs}

    def test_it_takes_what_neither_gives_and_gives_what_both_give(self, pair):
        with pair[0].fused_with(pair[1]) as joined:
            assert [t.name for t in joined.spec.inputs] == [
                "image_embedding",
                "concentration",
                "unpadded_size",
            ]
            assert [t.name for t in joined.spec.outputs] == ["prior_logits", "mask_logits"]
            assert joined.spec.targets == SPEC.targets

    def test_both_run_on_one_stream_and_are_captured_as_one(self, library, pair):
        with pair[0].fused_with(pair[1]) as joined:
            for expected in (
                ["execute", "execute", "capture", "execute", "execute"],
                ["replay"],
            ):
                library.calls.clear()
                outputs = joined(**self.inputs(joined.spec, 2))
                made = [n for n in names(library) if n in ("execute", "capture", "replay")]
                assert made == expected
                assert names(library).count("fill") == 3
                assert names(library).count("copy out") == 2
        assert {name: array.shape for name, array in outputs.items()} == {
            "prior_logits": (2, 1, 64, 64),
            "mask_logits": (2, 1, 64, 64),
        }

    def test_the_prior_is_read_where_it_was_written(self, library, pair):
        with pair[0].fused_with(pair[1]) as joined:
            joined(**self.inputs(joined.spec, 1))
        addresses = [call[1:] for call in library.calls if call[0] == "address"]
        for name in ("prior_logits", "image_embedding"):
            found = [address for tensor, address in addresses if tensor == name]
            assert len(found) == 2 and len(set(found)) == 1

    def test_more_targets_than_the_engines_take_are_refused(self, pair):
        with (
            pair[0].fused_with(pair[1]) as joined,
            pytest.raises(ValueError, match="prior and mask_decoder was given 5 targets"),
        ):
            joined(**self.inputs(joined.spec, 5))

    def test_it_shares_no_stream_and_no_buffer_with_the_runners(self, library, pair):
        # The prior is asked alone by one thread while another asks for both.
        with pair[0].fused_with(pair[1]) as joined:
            assert joined._device not in (pair[0]._device, pair[1]._device)
            library.calls.clear()
            joined(**self.inputs(joined.spec, 1))
            pair[0](**self.inputs(pair[0].spec, 1))
        addresses = [call[2] for call in library.calls if call[:2] == ("address", "prior_logits")]
        assert len(addresses) == 3 and len(set(addresses)) == 2

    def test_nothing_runs_after_closing(self, library, pair):
        joined = pair[0].fused_with(pair[1])
        joined.close()
        library.calls.clear()
        with pytest.raises(CoPRSError, match="prior and mask_decoder was closed"):
            joined(**self.inputs(joined.spec, 1))
        assert names(library) == []

    def test_it_leaves_the_runners_usable(self, pair):
        with pair[0].fused_with(pair[1]):
            pass
        assert pair[0](**self.inputs(pair[0].spec, 1))

    def test_graphs_elsewhere_are_not_joined(self, pair):
        pair[1]._device.index = 1
        assert pair[0].fused_with(pair[1]) is None
        other = OnnxLike(SPECS["mask_decoder"], "another runtime")
        assert pair[0].fused_with(other) is None
        assert other.fused_with(pair[1]) is None


class OnnxLike(Runner):
    def _run(self, inputs):
        raise NotImplementedError

    def close(self):
        raise NotImplementedError
