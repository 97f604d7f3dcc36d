"""Trackers of ``report_to``, with stand-ins for packages that are not installed."""

import sys
import types

import pytest
from accelerate import Accelerator

from coprs_deploy.errors import MissingDependencyError
from coprs_deploy.training.recipe import Recipe
from coprs_deploy.training.runs.trackers import log_curves, open_trackers, require_trackers
from coprs_deploy.training.settings import CheckpointModel, SupervisedSettings, SyntheticData


class StandIn(types.ModuleType):
    """A package with ``init``, which records what it gets."""

    def __init__(self, name, error=None):
        super().__init__(name)
        self.started, self.logged, self.error = [], [], error

    def init(self, **settings):
        if self.error:
            raise self.error
        self.started.append(settings)
        return self

    def log(self, values, step):
        self.logged.append((step, values))


@pytest.fixture
def recipe():
    return Recipe(
        description="a test",
        model=CheckpointModel(),
        data=SyntheticData(),
        stages={"one": SupervisedSettings(max_steps=9)},
        report_to=("wandb", "trackio", "tensorboard"),
    )


@pytest.fixture
def packages(monkeypatch):
    found = {name: StandIn(name) for name in ("wandb", "trackio")}
    for name, package in found.items():
        monkeypatch.setitem(sys.modules, name, package)
    return found


def test_open_trackers_continues_the_run_under_its_id(tmp_path, recipe, packages):
    out = tmp_path / "run"
    out.mkdir()
    for _ in range(2):
        accelerator = Accelerator(cpu=True)
        open_trackers(accelerator, out, recipe, 1)
        accelerator.trackers[2].finish()
    first, second = packages["wandb"].started
    assert first == second
    assert (first["project"], first["name"], first["resume"]) == ("coprs-deploy", "run", "allow")
    assert first["config"]["stages"]["one"]["max_steps"] == 9
    names = {settings["name"] for settings in packages["trackio"].started}
    assert names == {f"run-{first['id']}"}


def test_log_curves_repeats_only_what_was_rewound(tmp_path, recipe, packages):
    accelerator = Accelerator(cpu=True)
    open_trackers(accelerator, tmp_path, recipe, 1)
    written = []
    accelerator.trackers[2].log = lambda values, step: written.append((step, values))
    log_curves(accelerator, {"loss": 1.0}, 4, is_repeated=True)
    log_curves(accelerator, {"loss": 0.5}, 5, is_repeated=False)
    accelerator.trackers[2].finish()
    assert written == [(4, {"loss": 1.0}), (5, {"loss": 0.5})]
    for package in packages.values():
        assert package.logged == [(5, {"loss": 0.5})]


def test_open_trackers_that_does_not_start_names_it(tmp_path, recipe, packages):
    packages["wandb"].error = RuntimeError("No API key configured")
    with pytest.raises(ValueError, match=r"'wandb', which does not start: No API .*WANDB_MODE"):
        open_trackers(Accelerator(cpu=True), tmp_path, recipe, 1)


def test_require_trackers_names_the_extra_of_a_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(
        MissingDependencyError, match=r"report_to = 'trackio' needs .*pip install trackio"
    ):
        require_trackers(["tensorboard", "trackio"])
