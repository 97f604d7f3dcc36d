"""The check of the extras, with a resolver that reads a local folder of packages."""

import shutil
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests import ROOT
from tests.scripts import load_script

check_extras = load_script(".ci/check_extras.py")
Environment, Resolution = check_extras.Environment, check_extras.Resolution

BESIDE = Path(sys.executable).with_name("uv")
UV = str(BESIDE) if BESIDE.exists() else shutil.which("uv")

PROJECT = """
[project]
name = "project"
version = "1"
requires-python = ">=3.11"
dependencies = ["base>=1"]

[project.optional-dependencies]
one = ["runtime>=1"]
two = ["runtime-gpu>=1", "base<{below}"]
"""


def write_wheel(folder, name, version, requires=()):
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {requirement}" for requirement in requires]
    stem = f"{name.replace('-', '_')}-{version}"
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{stem}.dist-info/METADATA", "\n".join(lines) + "\n")
        wheel.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{stem}.dist-info/RECORD", "")


@pytest.fixture
def project(tmp_path):
    """Return a function that resolves the extras of a project from two wheels of each package."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for version in ("1", "2"):
        write_wheel(wheels, "base", version)
        write_wheel(wheels, "runtime", version, [f"base>={version}"])
        write_wheel(wheels, "runtime-gpu", version)
    write_wheel(wheels, "runtime", "3a1")

    def run(environment, below=3):
        (tmp_path / "pyproject.toml").write_text(PROJECT.format(below=below))
        (tmp_path / "constraints.txt").write_text("base==2\n")
        options = ("--offline", "--no-index", "--find-links", str(wheels), "--no-cache")
        return check_extras.resolve(environment, tmp_path, UV, options)

    return run


needs_uv = pytest.mark.skipif(UV is None, reason="uv is not installed")


@needs_uv
def test_resolve_returns_the_versions_of_a_possible_combination(project):
    both = ("one", "two")
    assert project(Environment("both", both)) == (
        {"base": "2", "runtime": "2", "runtime-gpu": "2"},
        "",
    )
    tested = Environment("tested", ("one",), constraints="constraints.txt")
    assert project(tested).packages == {"base": "2", "runtime": "2"}


@needs_uv
def test_resolve_of_an_impossible_combination_names_the_packages(project):
    two = Environment("two", ("two",), constraints="constraints.txt")
    resolution = project(two, below=2)
    assert resolution.packages == {}
    assert "base<2" in resolution.error
    assert check_extras.problem(two, resolution) == resolution.error


@needs_uv
def test_overrides_replace_the_requirements_of_other_packages(project):
    older = Environment("older", ("one",), ("runtime==2",), overrides=("base==1",))
    assert project(older).packages == {"base": "1", "runtime": "2"}


@needs_uv
def test_a_prerelease_is_not_taken_where_no_release_fits(project):
    resolution = project(Environment("x", ("one",), ("runtime>2",)))
    assert resolution.error.startswith("error: No solution found")


def test_two_packages_of_one_module_are_a_problem():
    resolution = Resolution({"onnxruntime": "1", "onnxruntime-gpu": "1"})
    found = check_extras.problem(Environment("x"), resolution)
    assert found == "onnxruntime and onnxruntime-gpu overwrite each other's files"
    apart = Environment("x", reason="onnxruntime and onnxruntime-gpu")
    assert check_extras.problem(apart, resolution) == ""


def test_a_package_that_must_be_absent_is_a_problem():
    small = Environment("small", absent=("torch",))
    assert check_extras.problem(small, Resolution({"numpy": "2"})) == ""
    assert "it brings torch" in check_extras.problem(small, Resolution({"torch": "2"}))


@pytest.mark.parametrize(
    ("resolution", "expected"),
    [
        (Resolution({"a": "1"}), "must be apart"),
        (Resolution({}, "No solution found: a < b"), "for another reason than 'transformers'"),
        (Resolution({}, "Failed to fetch: transformers"), "for another reason than 'transformers'"),
        (Resolution({}, "No solution found: vllm depends on transformers<5.20"), ""),
    ],
)
def test_environments_that_must_be_apart_fail_for_the_documented_reason(resolution, expected):
    found = check_extras.problem(Environment("x", reason="transformers"), resolution)
    assert expected in found
    assert bool(found) == bool(expected)


def test_check_prints_each_environment_and_returns_the_problems(capsys):
    listed = [Environment("good", constraints="constraints.txt"), Environment("bad", ("a",))]
    answers = {"good": Resolution({"tensorrt": "11"}), "bad": Resolution({}, "a needs b")}
    problems = check_extras.check(listed, lambda environment: answers[environment.name])
    assert problems == ["bad, newest versions: a needs b"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["resolves", "good", "constraints.txt", "1", "packages"]
    assert lines[1].split() == ["FAILED", "bad", "newest", "versions"]
    assert lines[2].startswith("tensorrt: its library comes from NVIDIA's index")


def test_combinations_of_the_docs_are_checked_with_tested_and_newest_versions():
    combinations = check_extras.combinations(ROOT)
    assert {("dev",), ("cpu", "edge", "policy-export")} <= set(combinations)  # of the Makefile
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = {extra for names in combinations for extra in names}
    assert named == set(project["optional-dependencies"])
    listed = check_extras.environments(combinations)
    versions = {e.constraints for e in listed if e.extras == ("dev",)}
    assert versions == {"", "constraints.txt"}


def test_environments_that_must_be_apart_are_named_in_the_docs():
    page = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    section = page.partition("## Separate environments")[2].partition("\n## ")[0]
    apart = [environment for environment in check_extras.SEPARATE if environment.reason]
    assert len(apart) == section.count("\n| ") - 1  # the heads of the table
    for environment in apart:
        assert any(environment.reason in line for line in section.splitlines()), environment.name


def test_torch_of_the_vllm_environment_is_that_of_its_constraints():
    constraints = (ROOT / "constraints-vllm.txt").read_text(encoding="utf-8").splitlines()
    assert check_extras.CPU_TORCH[0] in constraints
