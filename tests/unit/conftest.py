"""A runtime of fakes, a model hub, and a fresh accelerate state for every test."""

import sys

import pytest

from coprs_deploy.engines import SegmentationGraphs
from coprs_deploy.runtime import CoPRS, RuntimeOptions
from tests.unit.hub_server import running_hub
from tests.unit.runtime_fakes import GEOMETRY, SPECS, FakePolicy, FakeRunner


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Reset accelerate's process-wide state: it keeps the precision of an earlier test."""
    yield
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def build():
    """Build a CoPRS of fakes; it is closed after the test.

    ``encode`` runs in each call of the image encoder. Returns the CoPRS and its runners by name.
    """
    built = []

    def builder(
        policy=None,
        encode=lambda: None,
        specs=SPECS,
        runner_class=FakeRunner,
        **options,
    ):
        runners = {
            name: runner_class(name, encode if name == "image_encoder" else lambda: None)
            for name in specs
        }
        coprs = CoPRS(
            SegmentationGraphs(runners),
            policy or FakePolicy(),
            GEOMETRY,
            RuntimeOptions(**options),
        )
        built.append(coprs)
        return coprs, runners

    yield builder
    for coprs in built:
        coprs.close()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A running hub, an empty cache, and no token."""
    from huggingface_hub import constants

    with running_hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
        yield server
