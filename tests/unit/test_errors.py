"""The tree of errors."""

import importlib
import inspect
import pickle
import re
import sys
import tomllib

import pytest

from coprs_deploy import errors
from coprs_deploy.data import rows
from coprs_deploy.data.detections import detections
from coprs_deploy.engines import onnxruntime_runner, openvino_runner
from coprs_deploy.engines.trt.variants import TRT_VARIANTS
from coprs_deploy.errors import (
    CoPRSError,
    MissingDependencyError,
    error_body,
    import_failure,
    install_hint,
    shorten,
)
from coprs_deploy.evaluation.reports import plots
from tests import ROOT

CLASSES = [
    value
    for _, value in inspect.getmembers(errors, inspect.isclass)
    if value.__module__ == errors.__name__
]


def drawn_tree():
    parents, branch = {}, []
    for line in errors.__doc__.splitlines():
        found = re.match(r"^    ([│ ]*)(?:[├└]── )?([A-Z]\w+)\b", line)
        if not found:
            continue
        depth = (len(found[1]) // 4) + 1 if "──" in line else 0
        branch[depth:] = [found[2]]
        parents[found[2]] = branch[depth - 1] if depth else None
    return parents


def test_tree_in_the_docstring_equals_the_classes():
    assert drawn_tree() == {
        error.__name__: None if error is CoPRSError else error.__bases__[0].__name__
        for error in CLASSES
    }


@pytest.mark.parametrize("error", CLASSES)
def test_base_class_catches_every_error(error):
    with pytest.raises(CoPRSError, match="what happened"):
        raise error("what happened")


@pytest.mark.parametrize("error", CLASSES)
def test_every_error_has_a_docstring(error):
    assert inspect.getdoc(error).endswith(".")
    assert error.__dict__.get("__doc__")


def test_errors_caused_by_an_argument_are_value_errors():
    assert {error.__name__ for error in CLASSES if issubclass(error, ValueError)} == {
        "ImageError",
        "ImageDecodeError",
        "ImageSizeError",
        "InstructionError",
    }


@pytest.fixture
def import_error(tmp_path, monkeypatch):
    """Return a function that imports a package with some content, or none, and its error."""

    def fail(content):
        monkeypatch.syspath_prepend(tmp_path)
        if content is not None:
            (tmp_path / "abridged.py").write_text(content)
        with pytest.raises(ImportError) as caught:
            importlib.import_module("abridged")
        return caught.value

    return fail


@pytest.mark.parametrize(
    ("content", "state"),
    [
        (None, "is not installed; pip"),
        ("import absent", r"is installed and cannot be imported \(No module named 'absent'\)"),
        (
            "raise ImportError('libgomp.so.1: cannot open')",
            r"imported \(libgomp.so.1: cannot open\)",
        ),
        ("from json import nothing", r"imported \(cannot import name 'nothing' from 'json'"),
    ],
)
def test_import_failure_is_missing_or_has_the_error_of_the_library(import_error, content, state):
    error = import_error(content)
    found = str(import_failure(error, "abridged", "pip install abridged"))
    assert re.match(f"abridged .*{state}", found), found
    assert found.endswith("pip install abridged")


def test_import_failure_names_who_needs_what(import_error):
    found = import_failure(import_error(None), "", "pip install abridged", needed_by="training")
    assert str(found) == ("training needs abridged, which is not installed; pip install abridged")


@pytest.mark.parametrize(
    ("package", "call"),
    [
        ("supervision", lambda: detections(None, None, None, (), ())),
        ("pyarrow", rows.import_pyarrow),
        ("onnxruntime", lambda: onnxruntime_runner._import_onnxruntime("cpu")),
        ("openvino", openvino_runner._import_openvino),
        ("matplotlib", plots.pyplot),
        ("tensorrt_rtx", TRT_VARIANTS["tensorrt-rtx"].load),
    ],
)
def test_import_of_a_broken_package_shows_its_own_error(tmp_path, monkeypatch, package, call):
    (tmp_path / f"{package}.py").write_text("raise ImportError('libbroken.so: out of reach')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(MissingDependencyError, match=r"\(libbroken.so: out of reach\).*pip"):
        call()


def test_missing_dependency_is_an_import_error():
    assert {error.__name__ for error in CLASSES if issubclass(error, ImportError)} == {
        "MissingDependencyError"
    }


def test_exit_code_1_is_for_failed_checks_only():
    assert {error.__name__ for error in CLASSES if error.exit_code == 1} == {
        "BundleIntegrityError",
        "EquivalenceError",
        "NoValidRowError",
    }
    assert {error.exit_code for error in CLASSES} == {1, 2}


@pytest.mark.parametrize("error", CLASSES)
def test_every_error_can_be_pickled(error):
    copy = pickle.loads(pickle.dumps(error("what happened")))
    assert type(copy) is error
    assert str(copy) == "what happened"


def test_error_body_holds_message_and_class():
    error = errors.QueueFullError("2 requests are active")
    assert error_body(error) == {"error": "2 requests are active", "type": "QueueFullError"}


def test_shorten_leaves_out_the_middle_of_long_texts_only():
    assert shorten("x" * 200) == "x" * 200
    assert shorten("a" * 150 + "b" * 150) == "a" * 100 + "...(100 characters)..." + "b" * 100


def test_error_body_shortens_long_messages():
    text = error_body(ValueError("y" * 1_000_000))["error"]
    assert text.startswith("yyy")
    assert len(text) < 2_100


def test_install_hints_name_extras_of_the_package():
    with (ROOT / "pyproject.toml").open("rb") as file:
        extras = set(tomllib.load(file)["project"]["optional-dependencies"])
    named = set()
    for path in (ROOT / "coprs_deploy").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for hint in re.findall(r"""install_hint\(["'](.+?)["']\)""", text):
            named |= set(hint.split(","))
        assert "coprs-deploy[" not in text, f"{path}: not on PyPI, use install_hint"
    assert {"cpu", "edge", "export", "serve", "torch", "train"} <= named <= extras
    assert install_hint("serve") == 'pip install -e ".[serve]" (in the checkout)'
