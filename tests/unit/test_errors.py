"""The tree of errors."""

import inspect
import pickle
import re
import tomllib

import pytest

from coprs_deploy import errors
from coprs_deploy.errors import CoPRSError, error_body, install_hint, shorten
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
